"""Where a student still differs from its teacher, token by token on the references.

Both read the reference up to each token and predict the next. Their distributions, at temperature
1 and in the data's vocabulary, are compared at every token of the reference, the end of sentence
included.
"""

import math
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from fairseq.data import Dictionary

from .. import calibration
from ..objective.answer import rows_ahead, rows_at_once
from ..objective.divergences import forward_kl
from ..teachers import Teacher


class Tokens(NamedTuple):
    """Arrays with one value for each target token, all of shape (n,); losses are in bits.

    Attributes:
        sentence: index of its sentence in the data.
        position: in its sentence, from 1.
        symbol: the reference's, as an index of the dictionary.
        student_nll, teacher_nll: negative log-likelihood of the reference.
        kl: KL(teacher || student).
        entropy: of the teacher's distribution.
        student_best, teacher_best: the likeliest symbols.
        student, teacher: of shape (3, n): the probability of the likeliest symbol; the expected
            one of the reference if the distribution were true, which is the sum of the squares;
            the one of the end of sentence.
    """

    sentence: np.ndarray
    position: np.ndarray
    symbol: np.ndarray
    student_nll: np.ndarray
    teacher_nll: np.ndarray
    kl: np.ndarray
    entropy: np.ndarray
    student_best: np.ndarray
    teacher_best: np.ndarray
    student: np.ndarray
    teacher: np.ndarray

    def only(self, which: np.ndarray) -> "Tokens":
        return Tokens(*(part[..., which] for part in self))


@torch.no_grad()
def compare(
    teacher: Teacher,
    student: Teacher,
    batches: Iterable[Dict[str, Any]],
    dictionary: Dictionary,
) -> Tokens:
    """Run a teacher and a student on the same batches.

    Args:
        teacher, student: on one device, with vocabularies mapped to the data's.
        batches: collated, in the data's indices, with references.
        dictionary: the data's, of the target.

    Returns:
        all tokens of the references, in the order of the batches.
    """
    parts: List[Tuple[torch.Tensor, ...]] = []
    like = torch.zeros((), device=teacher.device)
    for batch in batches:
        teacher_answer, student_answer = [model(batch) for model in (teacher, student)]
        for some in references(batch, dictionary, teacher.device):
            p = teacher_answer.rows(some.rows, like)
            q = student_answer.rows(some.rows, like)
            parts.append(
                (
                    some.sentence,
                    some.position,
                    some.symbol,
                    q.nll(some.symbol) / math.log(2),
                    p.nll(some.symbol) / math.log(2),
                    forward_kl(p.plain, q.plain)[0] / math.log(2),
                    p.entropy() / math.log(2),
                    q.best(),
                    p.best(),
                    _probabilities(q, dictionary.eos()),
                    _probabilities(p, dictionary.eos()),
                )
            )
    return Tokens(*(torch.cat(columns, -1).cpu().numpy() for columns in zip(*parts)))


class References(NamedTuple):
    """Some tokens of a batch's references, (n,) each: the sentence's number, the position in it
    from 1, the symbol, and which row of an answer predicts it."""

    sentence: torch.Tensor
    position: torch.Tensor
    symbol: torch.Tensor
    rows: torch.Tensor


def references(
    batch: Dict[str, Any], dictionary: Dictionary, device: torch.device
) -> Iterator[References]:
    """All of a batch, as many at a time as a model should be asked for in one go."""
    target = batch["target"].to(device)
    real = target.ne(dictionary.pad())
    sentence, column = real.nonzero(as_tuple=True)
    found = References(
        batch["id"].to(device)[sentence],
        real.cumsum(1)[real],
        target[real],
        sentence * target.size(1) + column,
    )
    step = rows_ahead(device) * rows_at_once(device, len(dictionary))
    for start in range(0, len(sentence), step):
        yield References(*(part[start : start + step] for part in found))


def _probabilities(rows: Any, end: int) -> torch.Tensor:
    p = rows.plain.probabilities
    return torch.stack([p.amax(-1), p.square().sum(-1), p[:, end]])


class Calibration(NamedTuple):
    """Whether a model's probabilities come true, on the references.

    Attributes:
        likeliest: expected calibration error of the likeliest symbol (Guo et al. 2017, eq. 3, 10
            bins): how far its probability is from how often it is the reference.
        reference: the same of the reference's probability, which is compared with what a model
            that is right about its own distribution would give it.
        ends: probability of the end of sentence, summed over all tokens, by the number of
            sentences: below 1, the model would go on where references end.
    """

    likeliest: Optional[float]
    reference: Optional[float]
    ends: Optional[float]

    @classmethod
    def of(
        cls, tokens: Tokens, best: np.ndarray, nll: np.ndarray, values: np.ndarray, end: int
    ) -> "Calibration":
        """Of one model: its likeliest symbols, its loss in bits, its values of ``Tokens``."""
        surest, expected, ends = values.astype(np.float64)
        sentences = int((tokens.symbol == end).sum())
        if not sentences:
            return cls(None, None, None)
        return cls(
            _error(surest, best == tokens.symbol),
            _error(expected, np.exp2(-nll.astype(np.float64))),
            float(ends.sum() / sentences),
        )


def _error(expected: np.ndarray, found: np.ndarray) -> float:
    return calibration.error(calibration.gaps(expected, found), len(expected))


def calibrations(tokens: Tokens, end: int) -> Dict[str, Calibration]:
    """Of the teacher and the student, by these names."""
    return {
        "teacher": Calibration.of(
            tokens, tokens.teacher_best, tokens.teacher_nll, tokens.teacher, end
        ),
        "student": Calibration.of(
            tokens, tokens.student_best, tokens.student_nll, tokens.student, end
        ),
    }


class Bucket(NamedTuple):
    """Tokens of one kind, and their averages; None where there are no tokens.

    Attributes:
        label: what they have in common.
        tokens: how many.
        agreement: the share for which the likeliest symbols of both models are the same.
        kl, nll, teacher_nll: in bits per token; nll is the student's.
    """

    label: str
    tokens: int
    agreement: Optional[float]
    kl: Optional[float]
    nll: Optional[float]
    teacher_nll: Optional[float]

    @classmethod
    def of(cls, label: str, tokens: Tokens) -> "Bucket":
        n = len(tokens.symbol)
        if n == 0:
            return cls(label, 0, None, None, None, None)
        return cls(
            label,
            n,
            float((tokens.student_best == tokens.teacher_best).mean()),
            float(tokens.kl.mean(dtype=np.float64)),
            float(tokens.student_nll.mean(dtype=np.float64)),
            float(tokens.teacher_nll.mean(dtype=np.float64)),
        )


# Upper ends of the buckets, inclusive; one more holds the rest
_COUNTS = (0, 9, 99, 999, 9999)
_POSITIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_LENGTHS = (5, 10, 20, 40, 80)
_ENTROPIES = (0.1, 0.5, 1.0, 2.0, 4.0)


def buckets(tokens: Tokens, counts: np.ndarray, end: int) -> Dict[str, List[Bucket]]:
    """Tokens by frequency and position of the token, length of the sentence, teacher's entropy.

    Args:
        counts: how often each symbol occurs in training, (V,).
        end: index of the end of sentence, which gets a bucket of its own among the frequencies.

    Returns:
        by these four kinds, the buckets that hold any token.
    """
    lengths = np.zeros(int(tokens.sentence.max(initial=0)) + 1, dtype=np.int64)
    np.add.at(lengths, tokens.sentence, 1)
    is_end = tokens.symbol == end
    words = tokens.only(~is_end)
    frequency = _split(words, counts[words.symbol], _COUNTS, least=0, write="{:,}")
    return {
        "frequency": frequency + _unless_empty(Bucket.of("end of sentence", tokens.only(is_end))),
        "position": _split(tokens, tokens.position, _POSITIONS, least=1, write="{}"),
        "length": _split(tokens, lengths[tokens.sentence], _LENGTHS, least=1, write="{}"),
        "entropy": _split(
            *(tokens, tokens.entropy, _ENTROPIES), least=0, write="{:g}", whole=False
        ),
    }


def _split(
    tokens: Tokens,
    values: np.ndarray,
    ends: Sequence[float],
    *,
    least: float,
    write: str,
    whole: bool = True,
) -> List[Bucket]:
    """Buckets of tokens by one value each, at least ``least``; bucket i goes up to ``ends[i]``.

    Args:
        write: format of the ends in labels.
        whole: whether values are integers.
    """
    found: List[Bucket] = []
    number = np.searchsorted(np.asarray(ends), values, side="left")
    for i in range(len(ends) + 1):
        low = ends[i - 1] + whole if i else least
        if i == len(ends):
            label = ("{} and more" if whole else "above {}").format(write.format(low))
        elif low == ends[i]:
            label = write.format(low)
        else:
            label = f"{write.format(low)} to {write.format(ends[i])}"
        found += _unless_empty(Bucket.of(label, tokens.only(number == i)))
    return found


def _unless_empty(bucket: Bucket) -> List[Bucket]:
    return [bucket] if bucket.tokens else []


def divergences(tokens: Tokens) -> Dict[int, float]:
    """KL per token of each sentence, by its index."""
    sentences, index = np.unique(tokens.sentence, return_inverse=True)
    mean = np.bincount(index, tokens.kl) / np.maximum(np.bincount(index), 1)
    return dict(zip(sentences.tolist(), mean.tolist()))


def farthest(found: Dict[int, float], count: int) -> List[int]:
    """The sentences with the largest divergence, the largest first."""
    return sorted(found, key=lambda i: -found[i])[:count]
