"""Whether an exported model says what the checkpoint says: in another process, in CTranslate2."""

import logging
import math
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import torch
from fairseq.dataclass.configs import GenerationConfig
from omegaconf import OmegaConf
from sacrebleu.metrics import BLEU

from .. import decoding
from ..checkpoints import Checkpoint, translation_task
from ..decoding import databin
from ..files import FileError, passing_folder
from .ctranslate2 import convert
from .fairseq import ExportError

logger = logging.getLogger(__name__)

# of log-probabilities per token: rounding, and no more
STOCK_TOLERANCE = 1e-5
CTRANSLATE2_TOLERANCE = 1e-3
_MAX_TOKENS = 2048

# fairseq-generate; that the plugin is not there is part of the proof
_STOCK = """
import sys
from fairseq_cli.generate import cli_main
cli_main()
sys.exit("the plugin was imported" if "kd_plugin" in sys.modules else 0)
"""


class Text(NamedTuple):
    """Sentences to compare translations of.

    Attributes:
        folder: a data-bin of these alone.
        task: a translation task that has read them.
        batches: numbers of sentences; as fairseq-generate makes them.
    """

    folder: Path
    subset: str
    task: Any
    corpus: decoding.Corpus
    batches: Sequence[Any]

    @classmethod
    def cut(
        cls,
        data: decoding.DataBin,
        subset: str,
        sentences: int,
        max_positions: Tuple[int, int],
        folder: Path,
    ) -> "Text":
        """The first sentences of a subset, as a data-bin in a new folder.

        Args:
            sentences: how many; 0 for all.
            max_positions: of the model, on both sides; longer sentences are left out.

        Raises:
            FileError: no such subset, or nothing in it.
        """
        databin.copy(data.dictionary_files(), folder)
        for lang, dictionary in zip(data.langs, (data.source, data.target)):
            side = data.side(subset, lang)
            if side is None:
                continue  # which of them, the reader says
            prefix = "{}.{}-{}.{}".format(subset, *data.langs, lang)
            writer = databin.Writer(folder / prefix, len(dictionary))
            for i in range(min(len(side), sentences or len(side))):
                writer.add(side[i])
            writer.close()
        task = translation_task(
            *(data.source, data.target, max_positions),
            data=str(folder),
            source_lang=data.langs[0],
            target_lang=data.langs[1],
            left_pad_source=True,
            left_pad_target=False,
            train_subset="train",
            dataset_impl=None,
            required_seq_len_multiple=1,
        )
        if data.side(subset, data.langs[0]) is None:
            decoding.Corpus.of_subset(task, data, subset)  # names what there is
        corpus = decoding.Corpus.of_subset(task, decoding.DataBin(str(folder), *data.langs), subset)
        batches = decoding.plan(task, corpus, [max_positions], max_tokens=_MAX_TOKENS)
        if not batches:
            raise FileError(f"{data.folder}, {subset}: no sentence to verify with")
        return cls(folder, subset, task, corpus, batches)

    def samples(self) -> Iterator[Dict[str, Any]]:
        """The batches, collated."""
        dataset = self.corpus.dataset
        for batch in self.batches:
            yield dataset.collater([dataset[int(i)] for i in batch])

    @property
    def sentences(self) -> int:
        return sum(map(len, self.batches))


def build(checkpoint: Checkpoint, text: Text, beam: int) -> Any:
    """The checkpoint's model, in float32 on the CPU, as fairseq-generate prepares it."""
    cfg = Namespace(generation=_generation(beam))
    device = torch.device("cpu")
    return decoding.build_models([checkpoint], text.task, {}, cfg, device, torch.float32)[0]


def _generation(beam: int) -> Any:
    return OmegaConf.structured(GenerationConfig(beam=beam))


def translations(engine: Any, text: Text) -> Dict[int, decoding.Hypothesis]:
    """The best hypothesis of each sentence."""
    return {i: nbest[0] for found in engine.decode(text.samples()) for i, nbest in found.items()}


def by_fairseq(model: Any, text: Text, beam: int) -> Dict[int, decoding.Hypothesis]:
    return translations(decoding.FairseqEngine(text.task, [model], _generation(beam), 1), text)


def compare_with_stock(checkpoint: Checkpoint, text: Text, exported: Path, beam: int) -> float:
    """Translations of the export by stock fairseq, in a process that has never seen the plugin.

    Args:
        checkpoint: translates here, in this process.

    Returns:
        the largest difference of two scores, in nats per token.

    Raises:
        ExportError: they are not the checkpoint's.
    """
    logger.info(f"translating {text.sentences} sentences with {checkpoint}")
    expected = by_fairseq(build(checkpoint, text, beam), text, beam)
    logger.info("translating them with the export, in stock fairseq without the plugin")
    source, target = text.corpus.data.langs
    command = [
        *(sys.executable, "-W", "ignore", "-c", _STOCK, str(text.folder.resolve())),
        *("--path", str(exported.resolve()), "--gen-subset", text.subset, "--beam", str(beam)),
        *("--source-lang", source, "--target-lang", target, "--cpu", "--num-workers", "0"),
        *("--max-tokens", str(_MAX_TOKENS), "--required-batch-size-multiple", "1"),
        *("--max-source-positions", str(text.task.cfg.max_source_positions)),
        *("--max-target-positions", str(text.task.cfg.max_target_positions)),
        "--skip-invalid-size-inputs-valid-test",
    ]
    done = subprocess.run(
        command,
        cwd=str(text.folder),
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        raise ExportError(f"stock fairseq cannot use the export: {lines[-1][:500]}")
    found = {}
    for line in re.findall(r"^H-(.*)$", done.stdout.decode("utf-8"), re.MULTILINE):
        i, score, words = line.split("\t", 2)
        found[int(i)] = (float(score) * math.log(2), words)  # it prints them to base 2
    if found.keys() != expected.keys():
        raise ExportError(
            f"stock fairseq translates {len(found)} sentences with the export, the checkpoint "
            f"{len(expected)}"
        )
    for i, hypothesis in sorted(expected.items()):
        if found[i][1] != hypothesis.subwords:
            raise ExportError(
                f"the export translates otherwise than the checkpoint: sentence {i} is "
                f"{found[i][1]!r} with stock fairseq, {hypothesis.subwords!r} before"
            )
    difference = max(abs(found[i][0] - expected[i].score) for i in expected)
    if not difference <= STOCK_TOLERANCE:
        raise ExportError(
            f"the export scores otherwise than the checkpoint: by up to {difference:.2g} per token"
        )
    return difference


@torch.no_grad()
def reference_scores(model: Any, text: Text) -> Dict[int, List[float]]:
    """Log-probabilities, in nats, of each reference's tokens; the end of sentence included."""
    found = {}
    for sample in text.samples():
        lprobs = model.get_normalized_probs(model(**sample["net_input"]), log_probs=True)
        target = sample["target"]
        scores = lprobs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        real = target.ne(text.task.target_dictionary.pad())
        for i, row, mask in zip(sample["id"].tolist(), scores, real):
            found[i] = row[mask].tolist()
    return found


def compare_token_scores(
    expected: Dict[int, List[float]], translator: Any, text: Text
) -> Tuple[float, float]:
    """References scored by CTranslate2.

    Args:
        expected: fairseq's ``reference_scores``.

    Returns:
        the largest and the mean difference, in nats per token.
    """
    ids = sorted(expected)
    source, target = [
        [databin.words(databin.decode(dictionary, side[i].tolist())) for i in ids]
        for dictionary, side in (
            (text.task.source_dictionary, text.corpus.source),
            (text.task.target_dictionary, text.corpus.references or []),
        )
    ]
    found = translator.score_batch(
        source, target, max_batch_size=_MAX_TOKENS, batch_type="tokens", max_input_length=0
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


def bleu(
    systems: Sequence[Dict[int, decoding.Hypothesis]], text: Text, detokenise: Callable[[str], str]
) -> Tuple[List[float], str]:
    """sacreBLEU's BLEU of several systems on the references, and its signature.

    Args:
        detokenise: from symbols with spaces between to what is scored.
    """
    dictionary, ids = text.task.target_dictionary, sorted(systems[0])
    references = [
        # an unknown word is nobody's hit
        detokenise(dictionary.string(text.corpus.references[i], escape_unk=True))
        for i in ids
        if text.corpus.references is not None
    ]
    metric = BLEU()
    scores = [
        metric.corpus_score([detokenise(found[i].subwords) for i in ids], [references]).score
        for found in systems
    ]
    return scores, str(metric.get_signature())


def compare_with_ctranslate2(
    checkpoint: Checkpoint,
    stock: Dict[str, Any],
    text: Text,
    folder: Path,
    quantization: str,
    beam: int,
    detokenise: Callable[[str], str],
) -> Dict[str, Any]:
    """A conversion has to be right to rounding in float32; what quantization costs is measured.

    Args:
        stock: what was converted.
        folder: the conversion.

    Returns:
        differences of the references' token scores, in nats, and BLEU of both.

    Raises:
        ExportError: CTranslate2 says something else in float32.
    """

    def engine(model: Path) -> Any:
        longest = stock["cfg"]["model"]["max_target_positions"]
        generation = _generation(beam)
        return decoding.CTranslate2Engine(
            text.task,
            model,
            generation,
            device="cpu",
            compute_type="default",
            max_positions=longest,
        )

    logger.info(f"scoring {text.sentences} references with {checkpoint} and CTranslate2")
    model = build(checkpoint, text, beam)
    expected = reference_scores(model, text)
    with passing_folder(folder) as passing:
        exact = folder
        if quantization != "float32":
            exact = Path(passing) / "float32"
            convert(checkpoint, stock, exact)
        largest, _ = compare_token_scores(expected, engine(exact).translator, text)
    if not largest <= CTRANSLATE2_TOLERANCE:
        raise ExportError(
            f"CTranslate2 scores otherwise than fairseq, by up to {largest:.2g} per token in "
            f"float32 ({CTRANSLATE2_TOLERANCE:.0e} at most was expected): it does not convert "
            "this model as it is. --format fairseq takes any"
        )
    converted = engine(folder)
    compute_type = converted.translator.compute_type
    if not compute_type.startswith(quantization):
        logger.warning(
            "this CPU does not compute in {0}: the files are {0}, and are verified as {1}".format(
                quantization, compute_type
            )
        )
    logger.info(f"translating {text.sentences} sentences with {checkpoint} and CTranslate2")
    differences = compare_token_scores(expected, converted.translator, text)
    systems = [by_fairseq(model, text, beam), translations(converted, text)]
    (before, after), signature = bleu(systems, text, detokenise)
    return {
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
