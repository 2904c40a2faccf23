"""Which hypotheses a sentence gets.

Each hypothesis of a sentence has a value, as ``--select`` says; the highest is chosen, or the
highest few. To add a way, put it into ``SELECTORS``, from which the flag, its help and its refusals
follow, and the function of its values into ``values.plain_measures``.
"""

import hashlib
from typing import (
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
)

import numpy as np

from ..decoding import databin
from ..decoding.corpus import Corpus
from ..files import FileError
from ..timing import progress_bar
from .filters import REASONS, Filters
from .language import Languages
from .student import AnyHypothesis, Student
from .values import Candidates, Measures, Pairwise, plain_measures

_KEPT = -1
_BLOCK = 64  # sentences whose hypotheses are valued at a time


class Selector(NamedTuple):
    """A way to order the hypotheses of a sentence; the first is chosen, or the first few.

    Attributes:
        name: of the flag ``--select``.
        description: what it takes, for the flag's help.
        needs_references: whether hypotheses are compared with references.
        needs_several: whether one hypothesis leaves nothing to choose.
        uses_metric: whether the values depend on ``--metric``, which compares running text.
    """

    name: str
    description: str
    needs_references: bool = False
    needs_several: bool = False
    uses_metric: bool = False


SELECTORS = {
    selector.name: selector
    for selector in (
        Selector("best", "the likeliest"),
        Selector(
            "closest",
            "the closest to the reference (sequence interpolation, Kim & Rush 2016, section 3.3)",
            needs_references=True,
            needs_several=True,
            uses_metric=True,
        ),
        Selector(
            "mbr",
            "the closest on average to all hypotheses of the sentence (minimum Bayes risk, "
            "Eikema & Aziz 2020), without references; take samples, or a long n-best list",
            needs_several=True,
            uses_metric=True,
        ),
        Selector("scores", "the highest value in --scores FILE", needs_several=True),
        Selector(
            "backward",
            "the one that --backward-path finds the source likeliest of, per token",
            needs_several=True,
        ),
    )
}


def in_order(values: Sequence[float]) -> List[int]:
    """The highest first; of equal ones, the first: the teacher finds it likeliest."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def per_token(score: float, symbols: int, lenpen: float, unnormalized: bool) -> float:
    """The teacher's mean log-probability per symbol, end of sentence included, in nats.

    Args:
        score: of a hypothesis with so many symbols.
    """
    length = symbols + 1
    return score * (1 / length if unnormalized else length ** (lenpen - 1))


class Choice(NamedTuple):
    """How hypotheses are chosen, and dropped.

    Attributes:
        select: one of ``SELECTORS``.
        metric: what texts are compared by: "bleu" or "chrf".
        filters: what drops a hypothesis.
        min_closeness: least closeness of what is chosen, 0 to 100.
        min_score_quantile: share to drop, those with the teacher's lowest score per token.
        tokenize: BLEU's tokenizer, as sacrebleu's ``--tokenize``; None for the target language's.
        keep: how many hypotheses of a sentence are kept at most, equal ones once.
        scores: file with the values of "scores".
        backward_path: model of the other direction.
        backward_weight: of its score per token beside the teacher's, which "best" goes by.
        min_backward_quantile: share to drop, those with its lowest score.
        languages: of source and target, to drop what is in others (``OWN_LANGUAGES`` are the
            data's); None to look at none.
        deduplicate: "pairs", "source" or "target": of sentences equal in these, the first one
            stays; None to look for none.
    """

    select: str = "best"
    metric: str = "bleu"
    filters: Filters = Filters()
    min_closeness: Optional[float] = None
    min_score_quantile: float = 0.0
    tokenize: Optional[str] = None
    keep: int = 1
    scores: Optional[str] = None
    backward_path: Optional[str] = None
    backward_weight: float = 0.0
    min_backward_quantile: float = 0.0
    languages: Optional[Tuple[str, str]] = None
    deduplicate: Optional[str] = None

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
    """What became of the hypotheses that were good enough to be looked at, ``keep`` of a sentence.

    Attributes:
        tried: int32 (sentences, keep), their numbers, the best first; -1 for none.
        why: int8 (sentences, keep), the number of the reason in ``REASONS`` to drop it; -1 for what
            is kept, and where there is none.
        which: int32 (sentences, keep), the numbers of what is kept, or -1.
        dropped: how many, by reason; of sentences without a list, one each.
        duplicates: how many were passed over as equal to a better one of their sentence.
        means: over what is kept: ``score_per_token`` and ``backward`` in nats, ``closeness`` from 0
            to 100; None where nothing has one.
    """

    tried: np.ndarray
    why: np.ndarray
    which: np.ndarray
    dropped: Dict[str, int]
    duplicates: int
    means: Dict[str, Optional[float]]


def choose(
    corpus: Corpus,
    nbest: Iterable[Tuple[int, Sequence[AnyHypothesis]]],
    student: Student,
    choice: Choice,
    *,
    measures: Optional[Measures] = None,
    lenpen: float = 1.0,
    unnormalized: bool = False,
    missing: str = "longer_than_the_teacher_reads",
    spelled: bool = False,
) -> Chosen:
    """Choose hypotheses of each sentence, and drop what the filters drop.

    Args:
        nbest: sentences with their lists, in the order of the corpus.
        measures: what they are worth; ``plain_measures`` without.
        lenpen, unnormalized: how the scores were normalised; fairseq's flags.
        spelled: whether a teacher of text read what the source's symbols spell.
        missing: the reason, one of ``REASONS``, why a sentence has no list.

    Raises:
        FileError: the lists are of other sentences, or lack scores that are needed.
    """
    measures = measures or plain_measures(choice.select, choice.metric)
    sentences = len(corpus.source)
    tried = np.full((sentences, choice.keep), -1, dtype=np.int32)
    why = np.full(tried.shape, _KEPT, dtype=np.int8)
    why[:, 0] = REASONS.index(missing)  # until there is a list
    known = {
        "score_per_token": True,
        "closeness": choice.needs_references,
        "backward": measures.backward is not None,
    }
    unknown = np.broadcast_to(np.nan, tried.shape)  # which takes no memory
    values = {
        name: np.full(tried.shape, np.nan) if there else unknown for name, there in known.items()
    }
    duplicates = 0
    judge = _Judge(choice, student, corpus.data.source.unk_string(), spelled)

    def score(candidates: Candidates, j: int) -> float:
        length = len(candidates.symbols(j))
        return per_token(candidates.hypotheses[j].score, length, lenpen, unnormalized)

    with progress_bar(sentences, "choosing", "sentences") as progress:
        for ids, block in _blocks(corpus, nbest, student, measures.pairwise):
            progress.update(len(ids))
            why[ids, 0] = _KEPT
            backward = measures.backward(block) if measures.backward else None
            if choice.select == "backward":
                assert backward is not None
                order = backward
            else:
                order = measures.order(block)
            for n, (i, candidates) in enumerate(zip(ids, block)):
                worth = order[n]
                if choice.backward_weight and backward is not None:
                    scores = [score(candidates, j) for j in range(len(candidates))]
                    if np.isnan(scores).any():
                        raise FileError("--backward-weight: some hypotheses have no score")
                    pairs = zip(scores, backward[n])
                    worth = [own + choice.backward_weight * back for own, back in pairs]
                taken, seen = 0, set()
                for j in in_order(worth):
                    if taken == choice.keep:
                        break
                    text = candidates.text(j)
                    if text in seen:
                        duplicates += 1
                        continue
                    seen.add(text)
                    tried[i, taken] = j
                    reason = judge.reason(candidates, j)
                    if reason is not None:
                        why[i, taken] = REASONS.index(reason)
                    else:
                        values["score_per_token"][i, taken] = score(candidates, j)
                        if choice.needs_references:
                            values["closeness"][i, taken] = candidates.closeness(j)
                        if backward is not None:
                            values["backward"][i, taken] = backward[n][j]
                    taken += 1
    for reason, name, share in (
        ("low_score", "score_per_token", choice.min_score_quantile),
        ("low_backward_score", "backward", choice.min_backward_quantile),
    ):
        kept = (tried >= 0) & (why == _KEPT)
        if share > 0 and np.isnan(values[name][kept]).any():
            raise FileError("--min-score-quantile: some hypotheses have no score")
        if share > 0 and kept.any():
            kept &= values[name] < np.quantile(values[name][kept], share)
            why[kept] = REASONS.index(reason)
    counts = np.bincount(why[why >= 0], minlength=len(REASONS)).tolist()
    which = np.where(why == _KEPT, tried, -1)
    dropped = dict(zip(REASONS, counts))
    return Chosen(tried, why, which, dropped, duplicates, _means(values, which >= 0))


def _blocks(
    corpus: Corpus,
    nbest: Iterable[Tuple[int, Sequence[AnyHypothesis]]],
    student: Student,
    compare: Pairwise,
) -> Iterator[Tuple[List[int], List[Candidates]]]:
    """Sentences with what is to be chosen from, ``_BLOCK`` at a time."""
    ids: List[int] = []
    block: List[Candidates] = []
    last = -1
    for i, hypotheses in nbest:
        if not last < i < len(corpus.source):
            folder = getattr(nbest, "folder", "the n-best lists")
            raise FileError(
                f"{folder} has sentence {i} where another was expected: it is damaged. "
                "Delete it and decode again."
            )
        last, reference = i, None
        source = databin.decode(corpus.data.source, corpus.source[i].tolist())
        if corpus.references is not None:
            target = databin.decode(corpus.data.target, corpus.references[i].tolist())
            reference = student.to_text(target)
        ids.append(i)
        block.append(Candidates(hypotheses, databin.words(source), student, reference, compare))
        if len(ids) == _BLOCK:
            yield ids, block
            ids, block = [], []
    if ids:
        yield ids, block


class _Judge:
    """Says why a hypothesis is dropped."""

    def __init__(self, choice: Choice, student: Student, unknown: str, spelled: bool) -> None:
        self._choice, self._student, self._unknown = choice, student, unknown
        self._spelled = spelled
        self._languages = Languages(choice.languages) if choice.languages else None
        self._seen: Set[int] = set()

    def reason(self, candidates: Candidates, j: int) -> Optional[str]:
        """One of ``REASONS``, or None: it is kept."""
        choice, student = self._choice, self._student
        taken, seen = candidates.hypotheses[j], candidates.source
        texts = candidates.source_text, candidates.text(j)
        reason = choice.filters.reason(
            seen, candidates.symbols(j), taken.finished, (*texts, candidates.reference)
        )
        if reason is not None:
            return reason
        if self._spelled and self._unknown in seen:
            return "unknown_symbol"
        if student.cannot_read(self._unknown, seen, taken):
            return "unknown_symbol"
        if self._languages is not None and self._languages.wrong(texts):
            return "wrong_language"
        if choice.min_closeness is not None and candidates.closeness(j) < choice.min_closeness:
            return "far_from_reference"
        if choice.deduplicate is not None and self._is_duplicate(texts):
            return "duplicate"
        return None

    def _is_duplicate(self, texts: Tuple[str, str]) -> bool:
        content = {"pairs": "\n".join(texts), "source": texts[0], "target": texts[1]}
        text = content[str(self._choice.deduplicate)].encode("utf-8", "surrogatepass")
        # 8 bytes of each: of 10 million sentences one in 370,000 corpora has a false one
        key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        found = key in self._seen
        self._seen.add(key)
        return found


def _means(values: Dict[str, np.ndarray], kept: np.ndarray) -> Dict[str, Optional[float]]:
    found: Dict[str, Optional[float]] = {}
    for name, own in values.items():
        own = own[kept]
        own = own[~np.isnan(own)]
        found[name] = float(own.mean()) if len(own) else None
    return found
