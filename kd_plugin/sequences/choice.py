"""Which hypothesis a sentence gets, and which sentences are dropped."""

from collections import Counter
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from sacrebleu.metrics import BLEU, CHRF

from ..decoding.databin import words
from ..decoding.engines import Hypothesis

METRICS = ("bleu", "chrf")
# Why a sentence is dropped, in the order in which that is asked
REASONS = (
    "longer_than_the_teacher_reads",
    "empty",
    "unfinished",
    "too_long",
    "length_ratio",
    "copy_of_source",
    "repetition",
    "unknown_symbol",
    "far_from_reference",
    "low_score",
)
_NGRAM = 4


def closeness(metric: str) -> Callable[[str, str], float]:
    """sacreBLEU's sentence-level score of a hypothesis against its reference, 0 to 100.

    Args:
        metric: "bleu", with the effective order as sentences need it, or "chrf".
    """
    scorer: Any = BLEU(effective_order=True) if metric == "bleu" else CHRF()
    return lambda hypothesis, reference: scorer.sentence_score(hypothesis, [reference]).score


def closest(scores: Sequence[float]) -> int:
    """The hypothesis with the highest closeness (sequence interpolation, Kim & Rush 2016,
    section 3.3); of several, the one that the teacher finds likeliest."""
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


def per_token(hypothesis: Hypothesis, lenpen: float, unnormalized: bool) -> float:
    """The teacher's mean log-probability per symbol, end of sentence included, in nats."""
    length = len(words(hypothesis.subwords)) + 1
    return hypothesis.score * (1 / length if unnormalized else length ** (lenpen - 1))


class Filters(NamedTuple):
    """What drops a sentence; None or 0 switches a filter off.

    Lengths are in subwords. Attributes:
        max_length: most subwords of source or hypothesis.
        max_length_ratio: most that one side, end of sentence included, may be longer than the
            other.
        copies: drop hypotheses that repeat the source, unless the reference does.
        max_repeats: most that a hypothesis's commonest 4-gram may occur more often than the
            source's commonest does (oscillation: Raunak et al. 2021; Guerreiro et al. 2023, TNG).
        unfinished: drop hypotheses that were ended by the length limit.
    """

    max_length: Optional[int] = 250
    max_length_ratio: Optional[float] = 3.0
    copies: bool = True
    max_repeats: Optional[int] = 1
    unfinished: bool = True

    @classmethod
    def off(cls) -> "Filters":
        return cls(None, None, False, None, False)

    def fault(
        self, source: str, hypothesis: Hypothesis, texts: Tuple[str, str, Optional[str]]
    ) -> Optional[str]:
        """One of ``REASONS`` to drop a sentence, or None.

        Args:
            source: its subwords.
            texts: source, hypothesis and reference as running text.
        """
        said, read = words(hypothesis.subwords), words(source)
        n, m = len(said), len(read)
        if not said:
            return "empty"
        if self.unfinished and not hypothesis.finished:
            return "unfinished"
        if self.max_length is not None and max(n, m) > self.max_length:
            return "too_long"
        if self.max_length_ratio is not None:
            if max(n + 1, m + 1) > self.max_length_ratio * min(n + 1, m + 1):
                return "length_ratio"
        source_text, text, reference = texts
        if self.copies and text == source_text != reference:
            return "copy_of_source"
        if self.max_repeats is not None:
            if _commonest(said) - _commonest(read) > self.max_repeats:
                return "repetition"
        return None


def _commonest(symbols: List[str]) -> int:
    """How often the commonest 4-gram occurs."""
    ngrams = Counter(tuple(symbols[i : i + _NGRAM]) for i in range(len(symbols) - _NGRAM + 1))
    return max(ngrams.values(), default=0)


def new_counts() -> Dict[str, int]:
    return {reason: 0 for reason in REASONS}
