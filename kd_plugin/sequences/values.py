"""What hypotheses are worth: numbers that order those of each sentence, computed block by block.

A block is a few sentences with their n-best lists. Values that take long are kept beside the lists
as they are computed, so that an interrupted command goes on where it was.
"""

import contextlib
import logging
import math
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

import numpy as np
from sacrebleu.metrics import CHRF

from ..decoding import Tokenizer
from ..files import Busy, FileError, locked
from .student import AnyHypothesis, Student

METRICS = ("bleu", "chrf")
WESTERN = Tokenizer()
logger = logging.getLogger(__name__)

# Of each block's lists with each other's: (sentence, hypothesis, other), 0 to 100
Similarities = List[List[List[float]]]
Pairwise = Callable[[Sequence[Sequence[str]], Sequence[Sequence[str]]], Similarities]


class Candidates:
    """The hypotheses of one sentence, and what their values are made of.

    Args:
        hypotheses: the likeliest first.
        source: symbols of the source, as the data that is read has them.
        student: knows their text and symbols, which are made once.
        reference: running text; None where there is none.
        pairwise: how texts are compared.
    """

    def __init__(
        self,
        hypotheses: Sequence[AnyHypothesis],
        source: Sequence[str],
        student: Student,
        reference: Optional[str],
        pairwise: Pairwise,
    ) -> None:
        self.hypotheses, self.source, self.reference = hypotheses, source, reference
        self._student, self._pairwise = student, pairwise
        self._texts: Dict[int, str] = {}
        self._symbols: Dict[int, List[str]] = {}
        self._source_text: Optional[str] = None
        self._closeness: Dict[int, float] = {}

    def __len__(self) -> int:
        return len(self.hypotheses)

    def text(self, i: int) -> str:
        if i not in self._texts:
            self._texts[i] = self._student.text(self.hypotheses[i])
        return self._texts[i]

    def symbols(self, i: int) -> List[str]:
        if i not in self._symbols:
            self._symbols[i] = self._student.symbols(self.hypotheses[i])
        return self._symbols[i]

    @property
    def source_text(self) -> str:
        if self._source_text is None:
            self._source_text = self._student.to_text(" ".join(self.source))
        return self._source_text

    def texts(self) -> List[str]:
        return [self.text(i) for i in range(len(self))]

    def closeness(self, i: int) -> float:
        """Similarity of hypothesis ``i`` to the reference, 0 to 100."""
        assert self.reference is not None
        if i not in self._closeness:
            self._closeness[i] = self._pairwise([[self.text(i)]], [[self.reference]])[0][0][0]
        return self._closeness[i]


Block = Sequence[Candidates]
BlockValues = Callable[[Block], Sequence[Sequence[float]]]


def pairwise(metric: str, tokenizer: Tokenizer = WESTERN) -> Pairwise:
    """sacreBLEU's sentence-level score of each hypothesis against each other text, 0 to 100.

    Args:
        metric: "bleu", with the effective order as sentences need it, or "chrf", which the package
            fastchrf computes, where there is one: equal to the last digit (version 0.1, the last
            for Python 3.8: to seven digits), and 25 times as fast.
        tokenizer: BLEU's.
    """
    scorer: Any = CHRF() if metric == "chrf" else tokenizer.metric(effective_order=True)
    if metric == "chrf":
        with contextlib.suppress(ImportError):
            import fastchrf

            return lambda texts, others: fastchrf.pairwise_chrf(
                [[*own] for own in texts], [[*own] for own in others]
            )
    return lambda texts, others: [
        [[scorer.sentence_score(text, [other]).score for other in theirs] for text in own]
        for own, theirs in zip(texts, others)
    ]


def by_rank(block: Block) -> List[List[float]]:
    """As the teacher has them."""
    return [[-float(i) for i in range(len(candidates))] for candidates in block]


def closeness(block: Block) -> List[List[float]]:
    """Similarity to the reference (Kim & Rush 2016, section 3.3)."""
    return [[candidates.closeness(i) for i in range(len(candidates))] for candidates in block]


def expected_similarity(compare: Pairwise) -> BlockValues:
    """Mean similarity to all hypotheses of the sentence, each as likely as the others.

    The choice of minimum Bayes risk (Kumar & Byrne 2004; Eikema & Aziz 2020) under that
    distribution, which is the teacher's own where hypotheses are sampled from it.
    """

    def values(block: Block) -> List[List[float]]:
        texts = [candidates.texts() for candidates in block]
        return [[float(np.mean(row)) for row in rows] for rows in compare(texts, texts)]

    return values


class Measures(NamedTuple):
    """What hypotheses are worth.

    Attributes:
        pairwise: compares texts.
        order: values that order a sentence's hypotheses.
        backward: log-probability of the source per token, in nats; None without a model.
    """

    pairwise: Pairwise
    order: BlockValues
    backward: Optional[BlockValues] = None


def plain_measures(select: str, metric: str, tokenizer: Tokenizer = WESTERN) -> Measures:
    """Those of choices that need nothing but lists and references.

    Args:
        select, metric: as ``Choice`` has them.
    """
    compare = pairwise(metric, tokenizer)
    orders = {"closest": closeness, "mbr": expected_similarity(compare)}
    return Measures(compare, orders.get(select, by_rank))


class Given:
    """Values that somebody else computed: a file with one number for each hypothesis.

    Args:
        path: its lines are those of ``--write-nbest FILE.tsv``.
    """

    def __init__(self, path: str) -> None:
        self.path, self._read = path, 0
        self._lines = self._numbers()

    def _numbers(self) -> Iterator[float]:
        try:
            with open(self.path, encoding="utf-8", newline="\n") as file:
                for number, line in enumerate(file, 1):
                    try:
                        value = float(line)
                    except ValueError:
                        value = math.nan
                    if math.isnan(value):
                        raise FileError(
                            f"--scores {self.path}: line {number}: expected a number, got "
                            f"{line.strip()[:40]!r}"
                        )
                    yield value
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"--scores {self.path} cannot be read ({error})") from None

    def __call__(self, block: Block) -> List[List[float]]:
        found = []
        for candidates in block:
            values = [value for _, value in zip(range(len(candidates)), self._lines)]
            self._read += len(values)
            if len(values) < len(candidates):
                self._refuse(f"it has {self._read} lines, and there are more hypotheses")
            found.append(values)
        return found

    def end(self) -> None:
        """All hypotheses have had their number.

        Raises:
            FileError: there are more.
        """
        more = sum(1 for _ in self._lines)
        if more:
            self._refuse(f"it has {self._read + more} lines, and there are {self._read} hypotheses")

    def _refuse(self, what: str) -> None:
        raise FileError(
            f"--scores {self.path}: expected one number for each hypothesis, in the order of "
            f"--write-nbest; {what}"
        )


class Kept:
    """Values kept in a file, 8 bytes each, in the order in which they are asked for.

    Args:
        compute: what computes those that the file does not have.
        path: the file, whose name must say all that they depend on.
    """

    def __init__(self, compute: BlockValues, path: Path) -> None:
        self._compute, self._at = compute, 0
        self._lock: Any = None
        self._file: Any = None
        try:
            self._lock = locked(path.with_name(path.name + ".lock"))
        except Busy:
            logger.warning(f"{path} is being written by another process: this one keeps nothing")
            return
        path.touch()
        self._file = open(path, "r+b")
        self._known = np.fromfile(self._file, dtype="<f8")

    def __call__(self, block: Block) -> Sequence[Sequence[float]]:
        if self._file is None:
            return self._compute(block)
        ends = np.cumsum([len(candidates) for candidates in block])
        known = self._known[self._at : self._at + int(ends[-1])]
        if len(known) == ends[-1] and not np.isnan(known).any():
            self._at += len(known)
            return [part.tolist() for part in np.split(known, ends[:-1])]
        values = self._compute(block)
        # what a kill has left of a block, or of a number, is written over
        self._file.seek(8 * self._at)
        self._file.write(np.concatenate([np.asarray(own, "<f8") for own in values]).tobytes())
        self._file.flush()
        self._at += int(ends[-1])
        self._known = self._known[:0]
        return values

    def close(self) -> None:
        for file in (self._file, self._lock):
            if file is not None:
                file.close()
