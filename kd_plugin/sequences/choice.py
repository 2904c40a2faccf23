"""Which hypothesis a sentence gets.

A selector gives each hypothesis of a sentence a value; the highest one is chosen. To add one, write
its function and put it into ``SELECTORS``: the flag, its help and its refusals follow from there.
"""

from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from sacrebleu.metrics import CHRF

from ..decoding import Tokenizer, databin
from ..decoding.corpus import Corpus
from ..files import FileError
from ..timing import progress_bar
from .filters import Filters, new_counts
from .student import AnyHypothesis, Student

METRICS = ("bleu", "chrf")
_WESTERN = Tokenizer()


class Candidates:
    """The hypotheses of one sentence, and what selectors want to know of them.

    Args:
        hypotheses: the likeliest first.
        to_text: from a hypothesis to running text.
        reference: running text; None where there is none.
        similarity: of a hypothesis to a reference, both running text, 0 to 100.
    """

    def __init__(
        self,
        hypotheses: Sequence[AnyHypothesis],
        to_text: Callable[[AnyHypothesis], str],
        reference: Optional[str],
        similarity: Callable[[str, str], float],
    ) -> None:
        self.hypotheses, self.reference = hypotheses, reference
        self._to_text, self.similarity = to_text, similarity
        self._texts: Dict[int, str] = {}
        self._closeness: Dict[int, float] = {}

    def __len__(self) -> int:
        return len(self.hypotheses)

    def text(self, i: int) -> str:
        if i not in self._texts:
            self._texts[i] = self._to_text(self.hypotheses[i])
        return self._texts[i]

    def closeness(self, i: int) -> float:
        """Similarity of hypothesis ``i`` to the reference, 0 to 100."""
        assert self.reference is not None
        if i not in self._closeness:
            self._closeness[i] = self.similarity(self.text(i), self.reference)
        return self._closeness[i]


class Selector(NamedTuple):
    """A way to choose one of several hypotheses.

    Attributes:
        name: of the flag ``--select``.
        description: what it takes, for the flag's help.
        values: of each hypothesis; the highest is chosen.
        needs_references: whether they are compared with references.
        needs_several: whether one hypothesis leaves nothing to choose.
        uses_metric: whether the values depend on ``--metric``, which compares running text.
    """

    name: str
    description: str
    values: Callable[[Candidates], Sequence[float]]
    needs_references: bool = False
    needs_several: bool = False
    uses_metric: bool = False


def _rank(candidates: Candidates) -> List[float]:
    return [-float(i) for i in range(len(candidates))]


def _closeness(candidates: Candidates) -> List[float]:
    return [candidates.closeness(i) for i in range(len(candidates))]


SELECTORS = {
    selector.name: selector
    for selector in (
        Selector("best", "the likeliest", _rank),
        Selector(
            "closest",
            "the closest to the reference (sequence interpolation, Kim & Rush 2016, section 3.3)",
            _closeness,
            needs_references=True,
            needs_several=True,
            uses_metric=True,
        ),
    )
}


def highest(values: Sequence[float]) -> int:
    """Which value is the highest; of several, the first: the teacher finds it likeliest."""
    return max(range(len(values)), key=lambda i: (values[i], -i))


def similarity(metric: str, tokenizer: Tokenizer = _WESTERN) -> Callable[[str, str], float]:
    """sacreBLEU's sentence-level score of a hypothesis against its reference, 0 to 100.

    Args:
        metric: "bleu", with the effective order as sentences need it, or "chrf".
        tokenizer: BLEU's.
    """
    scorer: Any = tokenizer.metric(effective_order=True) if metric == "bleu" else CHRF()
    return lambda hypothesis, reference: scorer.sentence_score(hypothesis, [reference]).score


def per_token(score: float, symbols: int, lenpen: float, unnormalized: bool) -> float:
    """The teacher's mean log-probability per symbol, end of sentence included, in nats.

    Args:
        score: of a hypothesis with so many symbols.
    """
    length = symbols + 1
    return score * (1 / length if unnormalized else length ** (lenpen - 1))


class Choice(NamedTuple):
    """How hypotheses are chosen, and sentences dropped.

    Attributes:
        select: one of ``SELECTORS``.
        metric: of closeness: "bleu" or "chrf".
        filters: what drops a sentence.
        min_closeness: least closeness of what is chosen, 0 to 100.
        min_score_quantile: share of sentences to drop, those with the teacher's lowest score per
            token.
        tokenize: BLEU's tokenizer, as sacrebleu's ``--tokenize``; None for the target language's.
    """

    select: str = "best"
    metric: str = "bleu"
    filters: Filters = Filters()
    min_closeness: Optional[float] = None
    min_score_quantile: float = 0.0
    tokenize: Optional[str] = None

    @property
    def selector(self) -> Selector:
        return SELECTORS[self.select]

    @property
    def uses_metric(self) -> bool:
        return self.selector.uses_metric or self.min_closeness is not None

    @property
    def uses_bleu(self) -> bool:
        return self.uses_metric and self.metric == "bleu"

    @property
    def needs_references(self) -> bool:
        return self.selector.needs_references or self.min_closeness is not None


class Chosen(NamedTuple):
    """For each sentence the number of its hypothesis, or -1; and what became of all.

    Attributes:
        which: int32 (sentences,).
        dropped: how many sentences, by reason.
        means: over what is kept: ``score_per_token`` in nats, ``closeness`` from 0 to 100; None
            where nothing has one.
    """

    which: np.ndarray
    dropped: Dict[str, int]
    means: Dict[str, Optional[float]]


def choose(
    corpus: Corpus,
    nbest: Iterable[Tuple[int, Sequence[AnyHypothesis]]],
    student: Student,
    choice: Choice,
    *,
    tokenizer: Tokenizer = _WESTERN,
    lenpen: float = 1.0,
    unnormalized: bool = False,
    missing: str = "longer_than_the_teacher_reads",
) -> Chosen:
    """Choose a hypothesis of each sentence, and drop what the filters drop.

    Args:
        nbest: sentences with their lists, in the order of the corpus.
        tokenizer: of BLEU.
        lenpen, unnormalized: how the scores were normalised; fairseq's flags.
        missing: the reason, one of ``REASONS``, why a sentence has no list.

    Raises:
        FileError: the lists are of other sentences, or lack scores that are needed.
    """
    sentences = len(corpus.source)
    which = np.full(sentences, -1, dtype=np.int32)
    scores = np.full(sentences, -np.inf, dtype=np.float64)
    closeness = np.full(sentences, np.nan, dtype=np.float64)
    dropped = new_counts()
    measure = similarity(choice.metric, tokenizer)
    unknown = corpus.data.source.unk_string()
    decoded, last = 0, -1
    with progress_bar(sentences, "choosing", "sentences") as progress:
        for i, hypotheses in nbest:
            if not last < i < sentences:
                folder = getattr(nbest, "folder", "the n-best lists")
                raise FileError(
                    f"{folder} has sentence {i} where another was expected: it is damaged. "
                    "Delete it and decode again."
                )
            progress.update(1)
            decoded, last = decoded + 1, i
            source = databin.decode(corpus.data.source, corpus.source[i].tolist())
            reference = None
            if corpus.references is not None:
                target = databin.decode(corpus.data.target, corpus.references[i].tolist())
                reference = student.to_text(target)
            candidates = Candidates(hypotheses, student.text, reference, measure)
            best = highest(choice.selector.values(candidates))
            if choice.needs_references:
                closeness[i] = candidates.closeness(best)
            texts = student.to_text(source), candidates.text(best), reference
            taken, seen = hypotheses[best], databin.words(source)
            symbols = student.symbols(taken)
            reason = choice.filters.reason(seen, symbols, taken.finished, texts)
            if reason is None and student.cannot_read(unknown, seen, taken):
                reason = "unknown_symbol"
            if reason is None and choice.min_closeness is not None:
                if closeness[i] < choice.min_closeness:
                    reason = "far_from_reference"
            if reason is not None:
                dropped[reason] += 1
                continue
            which[i] = best
            scores[i] = per_token(taken.score, len(symbols), lenpen, unnormalized)
    dropped[missing] = sentences - decoded
    if choice.min_score_quantile > 0 and (which >= 0).any():
        if np.isnan(scores[which >= 0]).any():
            raise FileError("--min-score-quantile: some hypotheses have no score")
        least = np.quantile(scores[which >= 0], choice.min_score_quantile)
        low = (which >= 0) & (scores < least)
        which[low] = -1
        dropped["low_score"] = int(low.sum())
    kept = which >= 0
    means: Dict[str, Optional[float]] = {"score_per_token": None, "closeness": None}
    if kept.any():
        scored = scores[kept & ~np.isnan(scores)]
        means["score_per_token"] = float(scored.mean()) if len(scored) else None
        if choice.needs_references:
            means["closeness"] = float(closeness[kept].mean())
    return Chosen(which, dropped, means)
