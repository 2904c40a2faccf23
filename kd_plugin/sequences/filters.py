"""Which sentences are dropped."""

from collections import Counter
from typing import Dict, NamedTuple, Optional, Sequence, Tuple

# Why a sentence is dropped, in the order in which that is asked
REASONS = (
    "longer_than_the_teacher_reads",
    "without_translation",
    "empty",
    "unfinished",
    "too_long",
    "length_ratio",
    "copy_of_source",
    "repetition",
    "unknown_symbol",
    "wrong_language",
    "far_from_reference",
    "duplicate",
    "low_score",
    "low_backward_score",
)
_NGRAM = 4


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
        empty: drop hypotheses without any symbol; CTranslate2 translates an empty line so.
    """

    max_length: Optional[int] = 250
    max_length_ratio: Optional[float] = 3.0
    copies: bool = True
    max_repeats: Optional[int] = 1
    unfinished: bool = True
    empty: bool = True

    @classmethod
    def off(cls) -> "Filters":
        return cls(None, None, False, None, False, False)

    def reason(
        self,
        source: Sequence[str],
        target: Sequence[str],
        finished: bool,
        texts: Tuple[str, str, Optional[str]],
    ) -> Optional[str]:
        """One of ``REASONS`` to drop a sentence, or None.

        Args:
            source, target: subwords of the source and of the hypothesis.
            finished: whether that has ended by itself.
            texts: source, hypothesis and reference as running text.
        """
        n, m = len(target), len(source)
        if self.empty and not target:
            return "empty"
        if self.unfinished and not finished:
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
            repeats = _commonest(target)
            if repeats > self.max_repeats and repeats - _commonest(source) > self.max_repeats:
                return "repetition"
        return None


def _commonest(symbols: Sequence[str]) -> int:
    """How often the commonest 4-gram occurs."""
    ngrams = list(zip(*(symbols[i:] for i in range(_NGRAM))))
    if len(set(ngrams)) == len(ngrams):  # as of most sentences, and faster to see
        return min(len(ngrams), 1)
    return max(Counter(ngrams).values())


def in_words(dropped: Dict[str, int]) -> str:
    """``12 too long, 3 empty``; an empty text if nothing was dropped."""
    return ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in dropped.items() if n)
