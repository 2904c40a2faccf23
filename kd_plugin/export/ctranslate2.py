"""Models for CTranslate2: a folder with the model, its README and a record of what it is."""

import logging
import os
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from fairseq.data import Dictionary

from .. import decoding
from ..checkpoints import LANGUAGE_MODEL, Checkpoint
from ..decoding import databin
from ..errors import Faults
from ..files import FileError, naming, passing_folder, read_json, write_json
from . import verify
from .fairseq import model_arguments, shortened, stock_state, unusual_options, write
from .formats import (
    RECORD,
    SPM,
    ExportError,
    Format,
    Model,
    Proof,
    Verdict,
    data_bin,
    refuse_other_dictionaries,
    spm_faults,
)
from .vocabulary_map import ALWAYS, vocabulary_map

logger = logging.getLogger(__name__)

QUANTIZATIONS = (
    "float32",
    "float16",
    "bfloat16",
    "int16",
    "int8",
    "int8_float32",
    "int8_float16",
    "int8_bfloat16",
)
CANDIDATES = 50  # of a source symbol in a vocabulary map
TOLERANCE = 1e-3  # of log-probabilities per token, in float32: rounding, and no more


class CTranslate2Format(Format):
    """A folder for CTranslate2, verified by its scores of references and its BLEU."""

    name = "ctranslate2"
    is_folder = True
    sentences = 0
    needs_references = True
    scores_symbols = True
    flags = {
        "--quantization": dict(
            choices=QUANTIZATIONS, help="precision of CTranslate2's weights (default: float32)"
        ),
        **SPM,
        "--vocabulary-map": dict(
            nargs="+",
            metavar="DATA",
            help="data-bins of the model's training: their train says which target symbols each "
            "source symbol needs, and translations that choose among these (use_vmap=True) are "
            "faster",
        ),
        "--map-candidates": dict(
            type=int,
            metavar="N",
            help="target symbols of each source symbol in --vocabulary-map, beside the "
            f"{ALWAYS} most frequent ones (default: {CANDIDATES})",
        ),
        "--max-positions": dict(
            type=int,
            metavar="N",
            help="longest sentence, in subwords, that CTranslate2's model takes; a lower "
            "limit makes a small model smaller (default: the checkpoint's)",
        ),
    }

    def faults(self, options: Mapping[str, Any]) -> List[str]:
        found = spm_faults(options)
        longest = options.get("max_positions")
        if longest is not None and longest < 2:
            found.append("--max-positions must be 2 or more")
        for folder in options.get("vocabulary_map") or ():
            if not os.path.isdir(folder):
                found.append(f"--vocabulary-map {folder}: there is no such folder")
        if options.get("map_candidates") is not None:
            if not options.get("vocabulary_map"):
                found.append("--map-candidates needs --vocabulary-map")
            if options["map_candidates"] < 1:
                found.append("--map-candidates must be 1 or more")
        return found

    def refuse(self, checkpoint: Checkpoint) -> None:
        check(checkpoint)

    def adapt(self, model: Model, options: Mapping[str, Any]) -> Model:
        longest = options.get("max_positions")
        return model._replace(stock=shortened(model.stock, longest)) if longest else model

    def write(self, model: Model, output: Path, options: Mapping[str, Any]) -> None:
        quantization, spm = _quantization(options), options.get("spm")
        data = [_mapped_data(model, folder) for folder in options.get("vocabulary_map") or ()]
        logger.info(f"converting {model.checkpoint} to {quantization}")
        convert(model, output, quantization)
        if data:
            found = vocabulary_map(data, _candidates(options))
            found.write(output / decoding.VOCABULARY_MAP)
        if spm:
            shutil.copyfile(spm, str(output / "spm.model"))
        text = readme(model.languages, quantization, bool(spm), RECORD, mapped=bool(data))
        (output / "README.md").write_text(text, encoding="utf-8")

    def verify(
        self, model: Model, output: Path, options: Mapping[str, Any], proof: Proof
    ) -> Verdict:
        post_process = proof.post_process or ("sentencepiece" if options.get("spm") else None)
        found = compare(model, output, _quantization(options), proof, post_process=post_process)
        found.update(subset=proof.text.subset, beam=proof.beam, remove_bpe=post_process)
        lines = [
            f"verified in CTranslate2 {_ctranslate2().__version__}: tokens of "
            f"{found['sentences']} references scored within "
            f"{found['max_token_difference_float32']:.1g} before quantization, "
            f"{found['max_token_difference']:.2g} ({found['mean_token_difference']:.2g} on "
            f"average) as {found['compute_type']}",
            f"BLEU {found['bleu_fairseq']:.2f} in fairseq, {found['bleu']:.2f} in CTranslate2: "
            f"drop {found['bleu_drop']:.2f} ({found['bleu_signature']}, {found['sentences']} "
            f"sentences of {found['subset']}, beam {found['beam']})",
        ]
        if "bleu_without_map" in found:
            lines.append(
                f"BLEU {found['bleu']:.2f} is with the vocabulary map; without it "
                f"{found['bleu_without_map']:.2f}, and {found['same_without_map']} of "
                f"{found['sentences']} translations are the same"
            )
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
        content = {
            "format": self.name,
            **model.origin(paths),
            "quantization": _quantization(options),
            "sentencepiece": "spm.model" if options.get("spm") else None,
            "vocabulary_map": _map_record(options),
            "ctranslate2": _ctranslate2().__version__,
            "verification": figures,
        }
        write_json(output / RECORD, content)


def _quantization(options: Mapping[str, Any]) -> str:
    return options.get("quantization") or "float32"


def _candidates(options: Mapping[str, Any]) -> int:
    return options.get("map_candidates") or CANDIDATES


def _map_record(options: Mapping[str, Any]) -> Optional[Dict[str, Any]]:
    """What the vocabulary map was made of, if there is one."""
    folders = options.get("vocabulary_map")
    if not folders:
        return None
    return {
        "file": decoding.VOCABULARY_MAP,
        "data": [os.path.abspath(folder) for folder in folders],
        "candidates": _candidates(options),
        "always": ALWAYS,
    }


def _mapped_data(model: Model, folder: str) -> decoding.DataBin:
    """Data to make the vocabulary map of."""
    data, state = data_bin(folder, model.checkpoint, model.languages), model.stock["task_state"]
    symbols = [state["source_symbols"], state["target_symbols"]]
    refuse_other_dictionaries(model.checkpoint, data, symbols, "--vocabulary-map")
    return data


def export_ctranslate2(
    checkpoint: Checkpoint,
    source: Dictionary,
    target: Dictionary,
    langs: Tuple[str, str],
    *,
    folder: Path,
    quantization: str = "float32",
) -> None:
    """Write a checkpoint as a new folder that CTranslate2 opens; unverified.

    Raises:
        ExportError: CTranslate2 is not installed, or takes no such model.
    """
    check(checkpoint)
    stock = stock_state(checkpoint, source, target, langs)
    convert(Model(checkpoint, stock), folder, quantization)


def check(checkpoint: Checkpoint) -> None:
    """Refuse what CTranslate2 does not take, before any work.

    Raises:
        ExportError: the architecture or an option, by name; or CTranslate2 is not installed.
    """
    if checkpoint.kind is LANGUAGE_MODEL:
        raise ExportError(
            f"{_cannot_take(checkpoint)}it is {LANGUAGE_MODEL.model}, which --format fairseq writes"
        )
    converter = _ctranslate2().converters.fairseq
    args = model_arguments(checkpoint)
    faults = Faults()
    try:
        converter._get_model_spec(args)
    except AttributeError:
        pass  # another version of CTranslate2, which refuses while it converts
    except Exception as error:
        for reason in re.findall(r"^- (.*)$", str(error), re.MULTILINE) or [str(error)]:
            faults.add(" ".join(reason.split()))
    if not faults:  # options that it does not look at
        faults.messages += unusual_options(args)
    faults.raise_if_any(ExportError, _cannot_take(checkpoint))


def convert(model: Model, folder: Path, quantization: str = "float32") -> None:
    """Write a model in CTranslate2's format into a new folder.

    CTranslate2's converter opens files with a full unpickler; the one that it gets here was
    written for it a moment before, from plain types.

    Raises:
        ExportError: CTranslate2 is not installed, or takes no such model.
    """
    converters = _ctranslate2().converters
    stock, langs = model.stock, model.languages
    args = Namespace(**{**stock["cfg"]["model"], "task": "translation"})
    with naming(folder), passing_folder(folder) as passing:
        file = os.path.join(passing, "model.pt")
        write({**stock, "cfg": None, "args": args}, file)
        for side, lang in zip(("source", "target"), langs):
            _write_symbols(
                stock["task_state"][side + "_symbols"],
                os.path.join(passing, f"dict.{lang}.txt"),
            )
        try:
            converter = converters.FairseqConverter(
                file, passing, source_lang=langs[0], target_lang=langs[1]
            )
            converter.convert(str(folder), quantization=quantization)
        except OSError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ExportError(_cannot_take(model.checkpoint) + reason) from error


def compare_token_scores(
    expected: Dict[int, List[float]], translator: Any, text: verify.Text
) -> Tuple[float, float]:
    """References scored by CTranslate2.

    Args:
        expected: ``verify.reference_scores`` of fairseq.

    Returns:
        the largest and the mean difference, in nats per token.
    """
    source_dictionary, dictionary = text.task.source_dictionary, text.task.target_dictionary
    references = text.corpus.references or []
    ids = sorted(expected)
    source = [databin.symbols_seen(source_dictionary, text.corpus.source[i].tolist()) for i in ids]
    target = [databin.words(databin.decode(dictionary, references[i].tolist())) for i in ids]
    found = translator.score_batch(
        source, target, max_batch_size=verify.MAX_TOKENS, batch_type="tokens", max_input_length=0
    )
    differences = []
    for i, result in zip(ids, found):
        if len(result.log_probs) != len(expected[i]):
            raise ExportError(
                f"CTranslate2 scores {len(result.log_probs)} tokens in reference {i}, fairseq "
                f"{len(expected[i])}"
            )
        differences += [abs(a - b) for a, b in zip(expected[i], result.log_probs)]
    return max(differences), sum(differences) / len(differences)


def compare(
    model: Model, folder: Path, quantization: str, proof: Proof, *, post_process: Optional[str]
) -> Dict[str, Any]:
    """A conversion has to be right to rounding in float32; what quantization costs is measured.

    Args:
        folder: the conversion.
        post_process: what BLEU is scored without.

    Returns:
        differences of the references' token scores, in nats, and BLEU of both.

    Raises:
        ExportError: CTranslate2 says something else in float32.
    """
    text = proof.text
    assert isinstance(text, verify.Text)

    def engine(folder: Path, mapped: bool = True) -> Any:
        settings, longest = verify.generation(proof.beam), model.max_positions[1]
        return decoding.CTranslate2Engine(
            *(decoding.SymbolReading(text.task), folder, settings),
            device="cpu",
            compute_type="default",
            max_positions=longest,
            mapped=mapped,
        )

    logger.info(f"scoring {text.sentences} references with {model.checkpoint} and CTranslate2")
    torch_model = verify.build(model.checkpoint, text, proof.beam)
    expected = verify.reference_scores(torch_model, text)
    with passing_folder(folder) as passing:
        exact = folder
        if quantization != "float32":
            exact = Path(passing) / "float32"
            convert(model, exact)
        largest, _ = compare_token_scores(expected, engine(exact).translator, text)
    if not largest <= TOLERANCE:
        raise ExportError(
            f"CTranslate2's scores are not fairseq's: they differ by up to {largest:.2g} per token "
            f"in float32 ({TOLERANCE:.0e} at most was expected), so it does not convert this model "
            "as it is. --format fairseq takes any of them"
        )
    converted = engine(folder)
    compute_type = converted.translator.compute_type
    if not compute_type.startswith(quantization):
        logger.warning(
            f"this CPU does not compute in {quantization}: the files are {quantization}, and are "
            f"verified as {compute_type}"
        )
    logger.info(f"translating {text.sentences} sentences with {model.checkpoint} and CTranslate2")
    differences = compare_token_scores(expected, converted.translator, text)
    systems = [
        verify.by_fairseq(torch_model, text, proof.beam),
        verify.translations(converted, text),
    ]
    if converted.mapped:
        systems.append(verify.translations(engine(folder, mapped=False), text))
    (before, after, *unmapped), signature = verify.bleu(
        systems, text, post_process=post_process, tokenizer=proof.tokenizer
    )
    figures = {
        "sentences": text.sentences,
        "compute_type": compute_type,
        "max_token_difference_float32": largest,
        "max_token_difference": differences[0],
        "mean_token_difference": differences[1],
        "bleu_fairseq": before,
        "bleu": after,
        "bleu_drop": before - after,
        "bleu_signature": signature,
    }
    if unmapped:
        _, mapped, others = systems
        same = sum(mapped[i].subwords == others[i].subwords for i in mapped)
        figures.update(bleu_without_map=unmapped[0], same_without_map=same)
    return figures


def read_record(folder: Path) -> Dict[str, Any]:
    """What a CTranslate2 folder was made of; empty for one that another tool has made.

    Raises:
        FileError: it is damaged.
    """
    if not (folder / RECORD).is_file():
        return {}
    found = read_json(folder / RECORD)
    kinds = {
        "parameters": int,
        "parameters_without_embeddings": int,
        "max_source_positions": int,
        "max_target_positions": int,
        "quantization": str,
    }
    for name, kind in kinds.items():
        if not isinstance(found.get(name), (kind, type(None))):
            raise FileError(f"{folder / RECORD}: {name} is not of the type {kind.__name__}")
    return found


def _ctranslate2() -> Any:
    try:
        import ctranslate2
        import ctranslate2.converters
    except ImportError:
        raise ExportError("this needs CTranslate2: pip install ctranslate2") from None
    return ctranslate2


def _cannot_take(checkpoint: Checkpoint) -> str:
    return f"CTranslate2 {_ctranslate2().__version__} cannot take {checkpoint}: "


def _write_symbols(symbols: List[str], path: str) -> None:
    """A dictionary as fairseq reads it, repeated symbols included."""
    seen: Set[str] = set()
    special = Dictionary().nspecial
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        seen.update(symbols[:special])
        for symbol in symbols[special:]:
            again = " #fairseq:overwrite" if symbol in seen else ""
            file.write(f"{symbol} 1{again}\n")
            seen.add(symbol)


_README = """# From {source} to {target}, for CTranslate2 ({quantization})

    pip install {packages}
    echo 'a sentence in {source}' | python translate.py

in this folder, with `translate.py`:

```python
import {imports}

translator = ctranslate2.Translator(".")  # device="cuda" for a GPU
{subwords}result = translator.translate_batch([{encode}], beam_size=5{mapped})
print({decode})
```
{note}
What it was made of and how it compares with fairseq: `{record}`.
"""


_MAPPED = """
`use_vmap=True` is faster: the translator considers only the target symbols that the vocabulary
map, `{file}`, lists for the symbols of the batch. Scores are then probabilities among those.
Without it, all symbols are considered.
"""


def readme(
    langs: Tuple[str, str], quantization: str, spm: bool, record: str, *, mapped: bool = False
) -> str:
    """How to translate a sentence with a converted model: raw with ``spm``, else in subwords.

    Args:
        mapped: whether there is a vocabulary map.
    """
    words = "result[0].hypotheses[0]"
    processor = 'subwords = sentencepiece.SentencePieceProcessor(model_file="spm.model")\n'
    return _README.format(
        source=langs[0],
        target=langs[1],
        quantization=quantization,
        record=record,
        packages="ctranslate2 sentencepiece" if spm else "ctranslate2",
        imports="ctranslate2, sentencepiece" if spm else "ctranslate2",
        subwords=processor if spm else "# in and out: subwords, with spaces between\n",
        encode="subwords.encode(input(), out_type=str)" if spm else "input().split()",
        decode=f"subwords.decode({words})" if spm else f'" ".join({words})',
        mapped=", use_vmap=True" if mapped else "",
        note=_MAPPED.format(file=decoding.VOCABULARY_MAP) if mapped else "",
    )
