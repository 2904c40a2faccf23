"""Folders for Hugging Face's transformers: a model, its tokenizer, a card, and their proof.

fairseq's transformers are four classes there. They differ in where the layer norms stand and in
their positions; parameters have the same names, so that what is left over, or missing, shows what
does not fit.
"""

import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.models.nat import FairseqNATModel
from fairseq.models.transformer import TransformerModel
from fairseq.modules import SinusoidalPositionalEmbedding
from torch import Tensor

from ..checkpoints import Checkpoint
from ..decoding import Hypothesis, databin, open_sentencepiece
from ..decoding.huggingface import open_library
from ..errors import Faults
from ..files import FileError, naming, read_json, write_json
from ..pages import markdown_text
from . import verify
from .fairseq import largest, model_arguments, unusual_options
from .formats import (
    RECORD,
    SPM,
    ExportError,
    Format,
    Model,
    Proof,
    Verdict,
    spm_faults,
)

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of log-probabilities per token, in float32: rounding, and no more
SAME = 0.99  # of translations: rounding decides between two that are equally likely
BEAM = 5  # of generate, unless told otherwise: fairseq-generate's
MAX_LEN_B = 200  # symbols of the longest translation, fairseq-generate's

_SIDES = ("encoder", "decoder")
_SYMBOLS = Dictionary()  # the special ones, which have the same numbers in all of fairseq's
_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "tanh": "tanh",
    "linear": "linear",
    "swish": "silu",
}


class Family(NamedTuple):
    """A class of transformers' that some of fairseq's transformers are.

    Attributes:
        name: of its configuration, without ``Config``.
        model: the rest of the class's name.
        one_table: whether it has a single table of embeddings, for both sides and the output.
    """

    name: str
    model: str = "ForConditionalGeneration"
    one_table: bool = True


# By whether there is a layer norm of the embeddings, and whether the others come first.
# FSMT, fairseq's transformer by name, writes something else in transformers 4.46 to 4.57: with a
# cache its decoder takes every position for the first one, and without it sees what comes later.
FAMILIES = {
    (False, False): Family("Marian", "MTModel", one_table=False),
    (False, True): Family("M2M100"),
    (True, False): Family("Bart"),
    (True, True): Family("MBart"),
}


class TransformersFormat(Format):
    """A folder for transformers, verified there by scores of references and translations."""

    name = "transformers"
    is_folder = True
    needs_references = True
    flags = SPM
    required = tuple(SPM)  # a tokenizer is made of it

    def faults(self, options: Mapping[str, Any]) -> List[str]:
        return spm_faults(options)

    def refuse(self, checkpoint: Checkpoint) -> None:
        check(checkpoint)

    def adapt(self, model: Model, options: Mapping[str, Any]) -> Model:
        symbols(model)
        return model

    def write(self, model: Model, output: Path, options: Mapping[str, Any]) -> None:
        logger.info(f"converting {model.checkpoint}")
        with naming(output):
            output.mkdir()
            write_tokenizer(model, options["spm"], output)
            write_model(model, output)

    def verify(
        self, model: Model, output: Path, options: Mapping[str, Any], proof: Proof
    ) -> Verdict:
        found = compare(model, output, options["spm"], proof)
        left_out = ""
        if found["ended_beam"] < found["sentences"]:
            cut = found["sentences"] - found["ended_beam"]
            left_out = f" ({cut} cut off at the longest length were not compared)"
        lines = [
            f"verified in transformers {found['transformers']}, {found['class']}: tokens of "
            f"{found['sentences']} references of {found['subset']} scored within "
            f"{found['max_token_difference']:.1g}, sources tokenised the same",
            f"the same translations of {found['same_greedy']} by greedy search, of "
            f"{found['same_beam']} by beam {found['beam']}{left_out}",
            f"BLEU {found['bleu_fairseq']:.2f} in fairseq, {found['bleu']:.2f} in transformers "
            f"({found['bleu_signature']}, beam {found['beam']})",
        ]
        return Verdict(lines, found)

    def record(
        self,
        model: Model,
        output: Path,
        options: Mapping[str, Any],
        paths: Sequence[str],
        *,
        figures: Optional[Dict[str, Any]],
    ) -> None:
        content = {"format": self.name, **model.origin(paths), "verification": figures}
        write_json(output / RECORD, content)
        card = model_card(model, content)
        (output / "README.md").write_bytes(card.encode("utf-8", "backslashreplace"))


# what fits


def family(args: Namespace) -> Family:
    """The class that a fairseq transformer with these options is."""
    pre_norm = bool(args.encoder_normalize_before)
    return FAMILIES[bool(getattr(args, "layernorm_embedding", False)), pre_norm]


def check(checkpoint: Checkpoint) -> None:
    """Refuse what none of the classes is, before any work.

    Raises:
        ExportError: every reason, by name; or transformers is not installed.
    """
    try:
        version = open_library("--format transformers").__version__
    except FileError as error:
        raise ExportError(str(error)) from None
    args = model_arguments(checkpoint)
    faults = Faults()
    kind = ARCH_MODEL_REGISTRY.get(checkpoint.architecture or "", object)
    if not issubclass(kind, TransformerModel) or issubclass(kind, FairseqNATModel):
        faults.add(f"{checkpoint.architecture!r} is none of fairseq's transformers that translate")
    else:
        faults.messages += _misfits(args)
    faults.raise_if_any(ExportError, f"transformers {version} has no class for {checkpoint}: ")


def _misfits(args: Namespace) -> Iterator[str]:
    """Why a fairseq transformer with these options is none of the classes."""
    yield from unusual_options(args)
    fit = family(args)
    if bool(args.encoder_normalize_before) != bool(args.decoder_normalize_before):
        yield "--encoder-normalize-before and --decoder-normalize-before must be given together"
    if args.encoder_embed_dim != args.decoder_embed_dim:
        yield "--encoder-embed-dim and --decoder-embed-dim must be the same"
    if args.activation_fn not in _ACTIVATIONS:
        yield f"--activation-fn {args.activation_fn} is not among {', '.join(_ACTIVATIONS)}"
    for name in ("no_token_positional_embeddings", "no_decoder_final_norm"):
        if getattr(args, name, False):
            yield f"Option --{name.replace('_', '-')} is not supported"
    if fit.name == "M2M100" and (args.encoder_learned_pos or args.decoder_learned_pos):
        yield (
            "--encoder-normalize-before with learned positions needs --layernorm-embedding, as "
            "MBart has it"
        )
    if fit.one_table and not args.share_all_embeddings:
        yield f"{fit.name} needs --share-all-embeddings"


def symbols(model: Model) -> Tuple[List[str], List[str]]:
    """Its source and target symbols.

    Raises:
        ExportError: some symbol is there twice, which the tokenizers cannot tell apart.
    """
    state = model.stock["task_state"]
    source, target = state["source_symbols"], state["target_symbols"]
    for side, listed in (("source", source), ("target", target)):
        twice = [symbol for symbol, n in Counter(listed).items() if n > 1]
        if twice:
            raise ExportError(
                f"{model.checkpoint}: its {side} dictionary holds {len(twice)} symbols more than "
                f"once ({', '.join(map(repr, twice[:4]))}), which no tokenizer of transformers "
                "can tell apart"
            )
    return source, target


# the model


def write_model(model: Model, folder: Path) -> None:
    """Its configuration, weights and settings of ``generate``, into a folder.

    Raises:
        ExportError: weights are left over, or missing, or of other shapes.
    """
    import transformers

    args = Namespace(**model.stock["cfg"]["model"])
    fit = family(args)
    weights = _weights(model, args, fit)
    settings = _settings(model, args, fit, weights)
    config = getattr(transformers, fit.name + "Config")(**settings)
    built = getattr(transformers, fit.name + fit.model)(config)
    try:
        missing, over = built.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # of shapes
        reason = " ".join(str(error).split())[:500]
        raise ExportError(f"{model.checkpoint} does not fit into {fit.name}: {reason}") from None
    if missing or over:
        raise ExportError(
            f"{model.checkpoint} does not fit into {fit.name}: its weights "
            f"{', '.join(over[:4]) or 'lack ' + ', '.join(missing[:4])}"
            + (" have no place there" if over else "")
        )
    built.generation_config = transformers.GenerationConfig(**_generation(model))
    built._keys_to_ignore_on_save = None  # Marian's positions, which are not fairseq's
    built.to(model.checkpoint.dtype).save_pretrained(str(folder))
    # safetensors lets nobody else read what it writes
    shutil.copymode(str(folder / "config.json"), str(folder / "model.safetensors"))


def _weights(model: Model, args: Namespace, fit: Family) -> Dict[str, Tensor]:
    """Its weights by their names there."""
    ignored = re.compile(r"(_float_tensor|\.version)$")
    stock = model.stock["model"]
    weights = {"model." + name: w for name, w in stock.items() if not ignored.search(name)}
    weights["lm_head.weight"] = weights.pop("model.decoder.output_projection.weight")
    _make_vocabularies_one_size(weights)
    source, target = [weights[f"model.{side}.embed_tokens.weight"] for side in _SIDES]
    if same(source, target):
        weights["model.shared.weight"] = source
    if fit.name == "M2M100":  # which computes its positions
        del weights["final_logits_bias"]
        return weights
    # the first one comes after the padding's; Marian's table begins with it
    first = _SYMBOLS.pad() + 1
    longest = max(model.max_positions)
    for side in _SIDES:
        name = f"model.{side}.embed_positions.weight"
        table = weights.get(name)
        if table is None:
            table = SinusoidalPositionalEmbedding.get_embedding(
                longest + first, args.encoder_embed_dim, _SYMBOLS.pad()
            ).to(source.dtype)
        # one length for both sides; tokenizer and generation know the limit of each
        more = table.new_zeros(longest + first - table.size(0), table.size(1))
        table = torch.cat([table, more])
        weights[name] = table[first:] if fit.name == "Marian" else table
    return weights


def _make_vocabularies_one_size(weights: Dict[str, Tensor]) -> None:
    """Fill up the smaller side's tables: Marian's decoder has as many embeddings as its encoder.

    What is added to the target side has no probability.
    """
    tables = [f"model.{side}.embed_tokens.weight" for side in _SIDES]
    rows, target = max(weights[name].size(0) for name in tables), weights[tables[1]].size(0)
    for name in (*tables, "lm_head.weight"):
        table = weights[name]
        weights[name] = torch.cat([table, table.new_zeros(rows - table.size(0), table.size(1))])
    bias = weights[tables[1]].new_zeros(1, rows)
    bias[:, target:] = -math.inf
    weights["final_logits_bias"] = bias


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(one.equal(other))


def _settings(
    model: Model, args: Namespace, fit: Family, weights: Mapping[str, Tensor]
) -> Dict[str, Any]:
    """Of its configuration."""
    sides: Dict[str, Any] = {}
    for side in _SIDES:
        numbers = [re.match(rf"model\.{side}\.layers\.(\d+)\.", name) for name in weights]
        sides[side + "_layers"] = 1 + max(int(found.group(1)) for found in numbers if found)
        sides[side + "_attention_heads"] = getattr(args, side + "_attention_heads")
        sides[side + "_ffn_dim"] = getattr(args, side + "_ffn_embed_dim")
        sides[side + "_layerdrop"] = 0.0
    tables = [weights[f"model.{side}.embed_tokens.weight"] for side in _SIDES]
    size, shared = tables[0].size(0), same(*tables)
    sizes: Dict[str, Any] = {"vocab_size": size}
    if not fit.one_table:
        sizes.update(decoder_vocab_size=size, share_encoder_decoder_embeddings=shared)
    return {
        **sides,
        **sizes,
        "d_model": args.encoder_embed_dim,
        "activation_function": _ACTIVATIONS[args.activation_fn],
        "scale_embedding": not getattr(args, "no_scale_embedding", False),
        "max_position_embeddings": max(model.max_positions),
        # of a further training
        "dropout": getattr(args, "dropout", 0.0),
        "attention_dropout": getattr(args, "attention_dropout", 0.0),
        "activation_dropout": getattr(args, "activation_dropout", 0.0),
        "tie_word_embeddings": same(tables[1], weights["lm_head.weight"]),
        **_specials(),
    }


def _specials() -> Dict[str, int]:
    eos = _SYMBOLS.eos()
    return {
        "bos_token_id": _SYMBOLS.bos(),
        "pad_token_id": _SYMBOLS.pad(),
        "eos_token_id": eos,
        "decoder_start_token_id": eos,  # what fairseq begins with
        "forced_eos_token_id": eos,
    }


def _generation(model: Model) -> Dict[str, Any]:
    """Of ``generate``: fairseq-generate's own search."""
    return {
        **_specials(),
        # the begin and the end are counted; so is the begin in min_length, of one symbol at least
        "max_length": min(MAX_LEN_B, model.max_positions[1] - 1) + 2,
        "min_length": 2,
        "num_beams": BEAM,
        "early_stopping": True,
        "length_penalty": 1.0,
        "suppress_tokens": [_SYMBOLS.pad()],
    }


# the tokenizer


def write_tokenizer(model: Model, spm: str, folder: Path) -> None:
    """What ``AutoTokenizer`` opens: SentencePiece itself, with the numbers of the dictionaries.

    Not the tokenizers library's own: its models number the pieces themselves, and dictionaries
    lack some of them (``▁wom``, on the way to ``▁woman``). The classes are those that look up
    SentencePiece's pieces in a list: one of one list, and one of two.
    """
    source, target = symbols(model)
    special = {
        "bos_token": _SYMBOLS.symbols[_SYMBOLS.bos()],
        "eos_token": _SYMBOLS.symbols[_SYMBOLS.eos()],
        "pad_token": _SYMBOLS.symbols[_SYMBOLS.pad()],
        "unk_token": _SYMBOLS.symbols[_SYMBOLS.unk()],
    }
    settings: Dict[str, Any] = {
        **special,
        "model_max_length": model.max_positions[0],
        "padding_side": "right",
        # "</s>" in a text is text
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    numbers = [{symbol: i for i, symbol in enumerate(listed)} for listed in (source, target)]
    write_json(folder / "vocab.json", numbers[0])
    if source == target:
        settings["tokenizer_class"] = "Speech2TextTokenizer"
        names = ["sentencepiece.bpe.model"]
    else:
        write_json(folder / "target_vocab.json", numbers[1])
        del special["bos_token"], settings["bos_token"]
        languages = dict(zip(("source_lang", "target_lang"), model.languages))
        settings.update(languages, tokenizer_class="MarianTokenizer", separate_vocabs=True)
        names = ["source.spm", "target.spm"]
    for name in names:
        shutil.copyfile(spm, str(folder / name))
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", special)


# the proof

# A process that has neither fairseq nor the plugin, with transformers alone
_THERE = """
import json, sys
import torch, transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

folder, asked, answers = sys.argv[1:]
with open(asked, encoding="utf-8") as file:
    asked = json.load(file)
how = {"local_files_only": True, "trust_remote_code": False}
tokenizer = AutoTokenizer.from_pretrained(folder, **how)
model = AutoModelForSeq2SeqLM.from_pretrained(folder, torch_dtype=torch.float32, **how).eval()
pad, end = model.config.pad_token_id, model.config.eos_token_id
beams = {"greedy": {"num_beams": 1, "early_stopping": False}, "beam": {"num_beams": asked["beam"]}}
if asked["beam"] == 1:
    del beams["beam"]

def padded(rows):
    width = max(map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])

found = {"ids": [], "scores": [], "greedy": [], "beam": [], "text": []}
with torch.no_grad():
    for batch in asked["batches"]:
        found["ids"] += tokenizer(batch["texts"])["input_ids"]
        sources, targets = padded(batch["sources"]), padded(batch["targets"])
        inputs = {"input_ids": sources, "attention_mask": sources.ne(pad).long()}
        start = torch.full_like(targets[:, :1], model.config.decoder_start_token_id)
        before = torch.cat([start, targets[:, :-1]], 1)
        logits = model(**inputs, decoder_input_ids=before, use_cache=False).logits
        scores = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        for row, target in zip(scores.tolist(), batch["targets"]):
            found["scores"].append(row[: len(target)])
        for name, search in beams.items():
            written = model.generate(**inputs, do_sample=False, **search).tolist()
            for row in written:
                row = row[1:]
                found[name].append(row[: row.index(end)] if end in row else row)
        last = found[name][-len(batch["sources"]) :]
        found["text"] += tokenizer.batch_decode(last, skip_special_tokens=True)
if asked["beam"] == 1:
    found["beam"] = found["greedy"]
found.update(transformers=transformers.__version__, model=type(model).__name__)
found["imported"] = [name for name in ("fairseq", "kd_plugin") if name in sys.modules]
with open(answers, "w", encoding="utf-8") as file:
    json.dump(found, file)
"""


class _Sentence(NamedTuple):
    """What is asked about one sentence: numbers, its end included, and the source as text."""

    i: int
    source: List[int]
    target: List[int]
    text: str


def compare(model: Model, folder: Path, spm: str, proof: Proof) -> Dict[str, Any]:
    """A folder's scores, translations and tokens, in a process of transformers alone.

    Returns:
        figures for the record.

    Raises:
        ExportError: they are not fairseq's, or the SentencePiece model is not that of the data.
    """
    text = proof.text
    assert isinstance(text, verify.Text)  # all others are refused
    logger.info(f"translating {text.sentences} sentences with {model.checkpoint}")
    torch_model = verify.build(model.checkpoint, text, proof.beam)
    scores = verify.reference_scores(torch_model, text)
    expected = {"greedy": verify.by_fairseq(torch_model, text, 1)}
    expected["beam"] = expected["greedy"]
    if proof.beam > 1:
        expected["beam"] = verify.by_fairseq(torch_model, text, proof.beam)
    pieces = open_sentencepiece(spm, "--spm")
    batches = [
        [_sentence(int(i), text, pieces) for i in batch if int(i) in scores]
        for batch in text.batches
    ]
    asked = [sentence for batch in batches for sentence in batch]
    logger.info("scoring and translating them in transformers")
    found = _there(folder, [batch for batch in batches if batch], proof)
    difference = largest(
        abs(ours - theirs)
        for sentence, row in zip(asked, found["scores"])
        for ours, theirs in zip(scores[sentence.i], row)
    )
    faults = Faults()
    faults.check(
        difference <= TOLERANCE,
        f"tokens' scores differ by up to {difference:.2g} ({TOLERANCE:.0e} at most was expected)",
    )
    same, written = {}, {}
    dictionary = text.task.target_dictionary
    for name in ("greedy", "beam"):
        written[name] = {
            sentence.i: _subwords(dictionary, row) for sentence, row in zip(asked, found[name])
        }
        # where all are cut off, transformers forces an end that costs nothing, and ranks otherwise
        both = {
            i: (one, expected[name][i].subwords)
            for i, one in written[name].items()
            if name == "greedy" or expected[name][i].finished
        }
        ended = len(both)
        same[name] = sum(ours == theirs for ours, theirs in both.values())
        differing = [f"{a!r}, not {b!r}" for a, b in both.values() if a != b]
        faults.check(
            same[name] >= SAME * ended,
            f"only {same[name]} of {ended} translations by "
            f"{'greedy search' if name == 'greedy' else f'beam {proof.beam}'} are fairseq's "
            f"({differing[:1]})",
        )
    _check_tokens(asked, found, written["beam"], pieces, text, faults)
    faults.raise_if_any(ExportError, "what transformers says is not what fairseq says: ")
    systems = [
        {i: expected["beam"][i] for i in written["beam"]},
        {i: Hypothesis(one, 0.0, True) for i, one in written["beam"].items()},
    ]
    (before, after), signature = verify.bleu(
        systems, text, post_process="sentencepiece", tokenizer=proof.tokenizer
    )
    return {
        "transformers": found["transformers"],
        "class": found["model"],
        "subset": text.subset,
        "sentences": len(asked),
        "max_token_difference": difference,
        "same_greedy": same["greedy"],
        "same_beam": same["beam"],
        "ended_beam": ended,
        "beam": proof.beam,
        "bleu_fairseq": before,
        "bleu": after,
        "bleu_signature": signature,
    }


def _sentence(i: int, text: verify.Text, pieces: Any) -> _Sentence:
    corpus = text.corpus
    assert corpus.references is not None
    source, target = corpus.source[i].tolist(), corpus.references[i].tolist()
    subwords = databin.words(databin.decode(text.task.source_dictionary, source))
    return _Sentence(i, source, target, pieces.decode(subwords))


def _there(folder: Path, batches: List[List[_Sentence]], proof: Proof) -> Dict[str, Any]:
    """What the process answers.

    Raises:
        ExportError: it fails.
    """
    asked, answers = [proof.text.folder / name for name in ("asked.json", "answers.json")]
    columns = (("sources", "source"), ("targets", "target"), ("texts", "text"))
    content = [
        {name: [getattr(one, part) for one in batch] for name, part in columns} for batch in batches
    ]
    asked.write_text(json.dumps({"beam": proof.beam, "batches": content}), encoding="utf-8")
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-c", _THERE, str(folder.resolve())),
            *(str(asked.resolve()), str(answers.resolve())),
        ],
        cwd=str(proof.text.folder),
        env={
            **os.environ,
            **{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
            "TOKENIZERS_PARALLELISM": "false",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        raise ExportError(f"transformers cannot use the export: {lines[-1][:500]}")
    found: Dict[str, Any] = read_json(answers)
    if found["imported"]:  # by something that this Python starts with
        raise ExportError(f"the process of transformers alone imported {found['imported']}")
    return found


def _subwords(dictionary: Dictionary, row: Sequence[int]) -> str:
    ends = {dictionary.bos(), dictionary.eos(), dictionary.pad()}
    return " ".join(dictionary.symbols[i] for i in row if i not in ends)


def _check_tokens(
    asked: Sequence[_Sentence],
    found: Mapping[str, Any],
    written: Mapping[int, str],
    pieces: Any,
    text: verify.Text,
    faults: Faults,
) -> None:
    """The tokenizer must be SentencePiece with the dictionaries, and the model that of the data."""
    dictionary = text.task.source_dictionary
    data = others = 0
    for sentence, ids in zip(asked, found["ids"]):
        own = databin.indices(dictionary, " ".join(pieces.encode(sentence.text, out_type=str)))
        others += ids != own
        data += own == sentence.source
    faults.check(
        not others, f"its tokenizer gives other tokens of {others} sources than SentencePiece"
    )
    faults.check(
        data > len(asked) / 2,
        f"--spm gives the data's subwords of {data} of {len(asked)} sources alone, so it is not "
        "the model that they were made with",
    )
    unknown = text.task.target_dictionary.unk_word
    known = [
        (string, one)
        for string, one in zip(found["text"], written.values())
        if unknown not in one.split(" ")  # which is left out there
    ]
    wrong = [a for a, b in known if a != _joined(b)]
    faults.check(not wrong, f"its tokenizer writes {wrong[:1]} where fairseq writes other text")


def _joined(subwords: str) -> str:
    """Text, as fairseq's ``--remove-bpe sentencepiece`` makes it."""
    return subwords.replace(" ", "").replace("\u2581", " ").strip()


# the card

_CARD = """---
language:
{tags}
library_name: transformers
pipeline_tag: translation
tags:
- translation
- fairseq
---

# From {source} to {target}

A translation model of {parameters:,} parameters ({kind}), trained with fairseq and written by
`fairseq-kd-export`.

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")  # this folder; it needs the package sentencepiece
model = AutoModelForSeq2SeqLM.from_pretrained(".")
inputs = tokenizer([input()], return_tensors="pt", padding=True, truncation=True)
print(*tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True), sep="\\n")
```

`generate` searches as `fairseq-generate` does: beam {beam}, at most {longest} tokens;
`num_beams=1, early_stopping=False` is greedy search.{further}

## Scores

{scores}

## Where it comes from

{origin}

No license is stated: it is for those who trained the model to say, after the license of their data.
"""


def _name(path: str) -> str:
    """A file's name, for the card: nothing in it ends a line or the quotes around it."""
    return " ".join(os.path.basename(path).replace("`", "'").split())


def model_card(model: Model, record: Mapping[str, Any]) -> str:
    """The README.md of a folder.

    Args:
        record: what ``RECORD`` holds.
    """
    args = Namespace(**model.stock["cfg"]["model"])
    fit = family(args)
    figures = record["verification"]
    scores = "It was not compared with its checkpoint, and nothing was measured."
    if figures:
        scores = (
            f"BLEU {figures['bleu']:.2f} on {figures['sentences']} sentences of the data's "
            f"`{figures['subset']}` ({figures['bleu_signature']}, beam {figures['beam']}), where "
            f"fairseq has {figures['bleu_fairseq']:.2f}.\n\nCompared there with its checkpoint: "
            f"tokens of references score within {figures['max_token_difference']:.1g} (natural "
            f"logarithms); {figures['same_greedy']} of {figures['sentences']} translations by "
            f"greedy search are fairseq's own, and {figures['same_beam']} of "
            f"{figures['ended_beam']} by beam {figures['beam']} that end by themselves."
        )
    checkpoint = model.checkpoint
    origin = [
        f"- checkpoint `{_name(one['path'])}`, SHA-256 `{one['sha256']}`"
        for one in record["checkpoints"]
    ]
    if len(origin) > 1:
        origin.append("- weights: the average of these checkpoints")
    origin.append(
        f"- architecture `{_name(str(checkpoint.architecture))}`, {checkpoint.updates:,} updates"
    )
    teacher = checkpoint.task_options.get("teacher_checkpoint_path")
    if isinstance(teacher, str) and teacher:
        names = ", ".join(f"`{_name(path)}`" for path in teacher.split(":"))
        origin.append(f"- knowledge distillation from {names}")
    source, target = map(markdown_text, model.languages)
    further = ""
    if fit.name == "Marian":
        further = (
            "\n\nIts positions are fairseq's, not Marian's. After a further training, save them, "
            "too:\n`model._keys_to_ignore_on_save = None` before `model.save_pretrained`."
        )
    return _CARD.format(
        tags="\n".join(f"- {json.dumps(language)}" for language in dict.fromkeys(model.languages)),
        source=source,
        target=target,
        parameters=record["parameters"],
        kind=fit.name,
        beam=BEAM,
        longest=_generation(model)["max_length"] - 2,
        further=further,
        scores=scores,
        origin="\n".join(origin),
    )
