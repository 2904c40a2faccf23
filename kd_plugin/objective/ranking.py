"""Ranking: a student should order a teacher's likeliest symbols as the teacher does, and put its
own favourites no higher (TIE: Zhang et al., ACL 2023, "Towards Understanding and Improving
Knowledge Distillation for Neural Machine Translation").

With t_1, ..., t_k the teacher's and s_1, ..., s_k the student's likeliest symbols, p and q their
distributions at temperature 1::

    R = sum_i max(0, q[t_i] - q[t_1])
      + sum_i sum_j [p[t_i] > p[s_j]] max(0, q[s_j] - q[t_i])

R is in probabilities, 0 where the two agree, and is added to the divergence of its token.
"""

from typing import NamedTuple, Protocol, Tuple

import torch
from torch import Tensor

from .divergences import Distribution
from .parameters import Parameter

TOP_K = Parameter(
    flag="--kd-ranking-top-k",
    keyword="k",
    default=5,
    valid=lambda k: k >= 1,
    expected="at least 1",
    meaning="how many of the teacher's, and of the student's, likeliest symbols are ranked",
)
_BLOCK = 64  # symbols
_FEW = 16  # symbols, up to which looking for the likeliest by blocks is faster


class RankedRows(Protocol):
    """What is asked of a teacher."""

    def likeliest(self, k: int) -> Tuple[Tensor, Tensor]:
        """Its k likeliest symbols and their probabilities at temperature 1, (n, k) each."""

    def probabilities_of(self, symbols: Tensor) -> Tensor:
        """Of any symbols (n, m), at temperature 1, (n, m); of those that it does not know, 0."""


class RankingGradient(NamedTuple):
    """The gradient of ``ranking_loss``, which few symbols and the student's softmax make up."""

    student: Distribution
    symbols: Tensor  # (n, 2k), some more than once
    slopes: Tensor  # (n, 2k): q times the gradient for q

    def add_to(self, gradient: Tensor, weight: Tensor) -> None:
        """Add ``weight`` (n,) times it to the gradient for the student's logits (n, V), in place.

        d R / d z_v = q_v (g_v - sum_u q_u g_u), where g is the gradient for q.
        """
        slopes = self.slopes * weight.unsqueeze(-1)
        gradient.addcmul_(self.student.probabilities, slopes.sum(-1, keepdim=True), value=-1)
        gradient.scatter_add_(-1, self.symbols, slopes)


def ranking_loss(
    teacher: RankedRows, student: Distribution, k: int
) -> Tuple[Tensor, RankingGradient]:
    """R of each row, (n,), in probabilities, and its gradient.

    Args:
        teacher: exact if it knows its k likeliest symbols: those that it does not know are less
            likely than these.
        student: over the whole vocabulary, (n, V), at temperature 1.
    """
    theirs, p_theirs = teacher.likeliest(k)
    ours = likeliest(student.logits, k)
    q_theirs, q_ours = [student.probabilities.gather(-1, symbols) for symbols in (theirs, ours)]
    above = q_theirs - q_theirs[:, :1]
    apart = q_ours.unsqueeze(1) - q_theirs.unsqueeze(2)  # (n, i, j)
    wrong = p_theirs.unsqueeze(2) > teacher.probabilities_of(ours).unsqueeze(1)
    value = above.clamp(min=0).sum(-1) + (apart.clamp(min=0) * wrong).sum((1, 2))

    first = (above > 0).to(q_ours)
    second = ((apart > 0) & wrong).to(q_ours)
    slope_theirs = first - second.sum(2)
    slope_theirs[:, 0] -= first.sum(1)
    slopes = torch.cat([slope_theirs * q_theirs, second.sum(1) * q_ours], dim=-1)
    return value, RankingGradient(student, torch.cat([theirs, ours], dim=-1), slopes)


def likeliest(logits: Tensor, k: int) -> Tensor:
    """The symbols of the k largest of each row (n, V), the largest first, (n, k).

    On a CPU, ``topk`` passes over a row several times. The largest values of blocks of symbols say
    which k blocks hold all of them: one pass, and a few blocks.
    """
    n, v = logits.shape
    blocks = v // _BLOCK
    if logits.device.type != "cpu" or k > _FEW or blocks <= k:
        return logits.topk(k, dim=-1).indices
    whole = logits[:, : blocks * _BLOCK].reshape(n, blocks, _BLOCK)
    first = whole.amax(-1).topk(k, dim=-1).indices.unsqueeze(-1)
    values = whole.gather(1, first.expand(-1, -1, _BLOCK)).flatten(1)
    symbols = (first * _BLOCK + torch.arange(_BLOCK)).flatten(1)
    if blocks * _BLOCK < v:
        values = torch.cat([values, logits[:, blocks * _BLOCK :]], dim=-1)
        rest = torch.arange(blocks * _BLOCK, v).expand(n, -1)
        symbols = torch.cat([symbols, rest], dim=-1)
    return symbols.gather(-1, values.topk(k, dim=-1).indices)
