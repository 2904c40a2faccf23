"""What quality is measured by: one table, whose entries become columns of the report.

A metric is one of sacreBLEU's, or has its interface: statistics of each sentence, and a score of
their sum. So intervals and tests of significance are sacreBLEU's for all of them.
"""

import functools
import importlib
import re
from importlib.metadata import version
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from sacrebleu.metrics import CHRF, TER
from sacrebleu.metrics.base import Metric, Score, Signature

from ..decoding import Tokenizer
from ..errors import Faults

_ASCII = re.compile("[a-z0-9]", re.ASCII | re.IGNORECASE)
_MUCH = 0.005  # of the letters: more is no English with a few foreign names


class Measure(NamedTuple):
    """What ``--metrics`` names.

    Attributes:
        columns: the names of its metrics.
        make: these, given what tells words apart.
        source: what computes it.
        module: what has to be importable.
        lower_is_better: of all its metrics.
        at_a_glance: whether it stands in the first table, too.
        doubts: what a user should know before believing it on these references.
    """

    columns: Sequence[str]
    make: Callable[[Tokenizer], Sequence[Metric]]
    source: str = "sacreBLEU"
    module: Optional[str] = None
    lower_is_better: bool = False
    at_a_glance: bool = True
    doubts: Callable[[Tokenizer, Sequence[str]], List[str]] = lambda tokenizer, references: []


class _CHRF(CHRF):
    """With scores of one type: sacreBLEU's bootstrap stops where some samples score 0.0."""

    def _compute_f_score(self, statistics: Any) -> float:
        return float(super()._compute_f_score(statistics))


class _Signature(Signature):
    def __init__(self, args: Dict[str, Any]) -> None:
        super().__init__(args)
        self.info.update(args["about"])


class _Ratio(Metric):
    """The sum over sentences of one number, divided by the sum of another.

    Args:
        pair: both numbers of a reference and a translation.
        about: what the signature says.
        scale: times that.
    """

    _SIGNATURE_TYPE = _Signature

    def __init__(
        self,
        name: str,
        pair: Callable[[str, str], Tuple[float, float]],
        about: Dict[str, str],
        scale: int = 100,
    ) -> None:
        super().__init__()
        self.name, self.pair, self.about, self.scale = name, pair, about, scale

    def _preprocess_segment(self, sent: str) -> str:
        return sent

    def _extract_reference_info(self, refs: Sequence[str]) -> Dict[str, Any]:
        return {"reference": refs[0]}

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: Dict) -> List[float]:
        return list(self.pair(ref_kwargs["reference"], hypothesis))

    def _aggregate_and_compute(self, stats: Any) -> Score:
        return self._compute_score_from_stats(np.sum(stats, axis=0, dtype=np.float64))

    def _compute_score_from_stats(self, stats: Any) -> Score:
        return Score(self.name, float(self.scale * stats[0] / max(stats[1], 1)))


def mean_of(name: str) -> Metric:
    """Of sentences that are each a number; what they are compared with is of no interest."""
    return _Ratio(name, lambda nothing, number: (float(number), 1), {}, scale=1)


class _Words:
    """BLEU's words in lower case, without punctuation, as a tokenizer of rouge-score."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.split = tokenizer.metric().tokenizer

    def tokenize(self, text: str) -> List[str]:
        return [word for word in self.split(text.lower()).split() if any(map(str.isalnum, word))]


_ROUGE = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}  # as the package has them


def _rouge(tokenizer: Tokenizer) -> List[Metric]:
    """ROUGE-1, ROUGE-2, ROUGE-L (Lin 2004): the mean of the sentences' F1.

    Words are as in the original script for English, ASCII letters and digits with Porter's stemmer,
    unless BLEU's tokenizer was asked for or the language has one of its own.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    ascii_only = tokenizer.is_usual
    words = DefaultTokenizer(use_stemmer=True) if ascii_only else _Words(tokenizer)
    scorer = RougeScorer(list(_ROUGE.values()), tokenizer=words)
    scores = functools.lru_cache(None)(scorer.score)  # of each pair once for all three and the test
    about = {
        "tok": "ascii" if ascii_only else tokenizer.name,
        "stem": "porter" if ascii_only else "no",
        "version": version("rouge-score"),
    }

    def pair(key: str, reference: str, translation: str) -> Tuple[float, float]:
        return scores(reference, translation)[key].fmeasure, 1

    return [_Ratio(name, functools.partial(pair, key), about) for name, key in _ROUGE.items()]


def _rouge_doubts(tokenizer: Tokenizer, references: Sequence[str]) -> List[str]:
    letters = [letter for text in references for letter in text if letter.isalnum()]
    lost = sum(not _ASCII.match(letter) for letter in letters)
    if not tokenizer.is_usual or lost <= _MUCH * len(letters):
        return []
    return [
        f"ROUGE LEAVES OUT {lost / len(letters):.1%} OF THE LETTERS: its words, as those of the "
        "original script for English, are of ASCII letters and digits. --bleu-tokenize 13a (or "
        "another) gives it the words of BLEU, without stemming."
    ]


def _wer(tokenizer: Tokenizer) -> List[Metric]:
    """Word error rate: substitutions, deletions and insertions by words of the references."""
    import jiwer

    @functools.lru_cache(None)
    def pair(reference: str, translation: str) -> Tuple[float, float]:
        expected, got = reference.split(), translation.split()
        if not expected or not got:  # which some versions refuse
            return len(expected) + len(got), len(expected)
        found = jiwer.process_words(" ".join(expected), " ".join(got))
        return found.substitutions + found.deletions + found.insertions, len(expected)

    about = {"case": "mixed", "punct": "yes", "tok": "none", "version": version("jiwer")}
    return [_Ratio("WER", pair, about)]


def _ter(tokenizer: Tokenizer) -> List[Metric]:
    asian = tokenizer.asian  # split only where the text is normalised, too
    return [TER(normalized=asian, asian_support=asian)]


METRICS = {
    "bleu": Measure(
        ("BLEU",),
        lambda tokenizer: [tokenizer.metric()],
        doubts=lambda tokenizer, references: tokenizer.notes(references),
    ),
    "chrf": Measure(("chrF2",), lambda tokenizer: [_CHRF()]),
    "ter": Measure(("TER",), _ter, lower_is_better=True, at_a_glance=False),
    "rouge": Measure(
        *(tuple(_ROUGE), _rouge, "rouge-score", "rouge_score.rouge_scorer"), doubts=_rouge_doubts
    ),
    "wer": Measure(("WER",), _wer, "jiwer", "jiwer", lower_is_better=True),
}
USUAL = ("bleu", "chrf", "ter")


def check(metrics: Sequence[str]) -> None:
    """That what computes them is there.

    Raises:
        UserError: a package is missing; all of them in one message.
    """
    faults = Faults()
    for name in metrics:
        measure = METRICS[name]
        try:
            importlib.import_module(measure.module or __name__)
        except ImportError as error:
            faults.add(
                f"--metrics {name} needs the package {measure.source}: pip install "
                f"'kd_plugin[{name}]' ({error})"
            )
    faults.raise_if_any()


def make(metrics: Sequence[str], tokenizer: Tokenizer) -> Dict[str, Metric]:
    """The metrics by the names of their columns."""
    return {
        column: metric
        for name in metrics
        for column, metric in zip(METRICS[name].columns, METRICS[name].make(tokenizer))
    }


def of_sentences(
    metrics: Sequence[str], tokenizer: Tokenizer
) -> Tuple[str, bool, Callable[[str, str], float]]:
    """What tells good translations of single sentences from bad ones.

    chrF if it is among the metrics, for BLEU's n-grams are few in a sentence; else the first one.

    Returns:
        its name, whether a lower value is better, and the value of a translation and a reference.
    """
    name = "chrf" if "chrf" in metrics else metrics[0]
    column = METRICS[name].columns[0]
    metric = make([name], tokenizer)[column]
    if name == "bleu":
        column, metric = "sentence BLEU", tokenizer.metric(effective_order=True)

    def value(translation: str, reference: str) -> float:
        return float(metric.sentence_score(translation, [reference]).score)

    return column, METRICS[name].lower_is_better, value


def describe(metrics: Sequence[str]) -> List[Dict[str, Any]]:
    """What a reader of the scores should know of each column, in their order."""
    return [
        {
            "name": column,
            "source": METRICS[name].source,
            "lower_is_better": METRICS[name].lower_is_better,
            "at_a_glance": METRICS[name].at_a_glance,
            "decimals": 2,
        }
        for name in metrics
        for column in METRICS[name].columns
    ]


def doubts(metrics: Sequence[str], tokenizer: Tokenizer, references: Sequence[str]) -> List[str]:
    """What a user should know before believing the scores on these references."""
    return [note for name in metrics for note in METRICS[name].doubts(tokenizer, references)]
