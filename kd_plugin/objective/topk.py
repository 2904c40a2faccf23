"""Compare a student with the teacher's K likeliest symbols, and treat the others as a tail.

First temper, then cut (Tan et al. 2019): both distributions are at the distillation temperature.
The cut pair is over K outcomes (tail ``renormalise``: given that the symbol is one of the K) or
K + 1 (tail ``bucket``: all other symbols are one more outcome). K = V equals no cut.

Tail ``sample`` cuts nothing: symbols drawn from the tail stand for all of it, and value and
gradient of the forward KL over the whole vocabulary are right on average over the draws.
"""

import math
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .divergences import Distribution, distribution

TAILS = ("bucket", "renormalise", "sample")
# Below, the student's probabilities outside of the K come near to float32's underflow
_TINY_MASS = 1e-30


class Top(NamedTuple):
    """A teacher's K likeliest symbols at the distillation temperature."""

    symbols: Tensor  # (n, K)
    logits: Tensor  # (n, K)
    rest: Optional[Tensor]  # (n, 1): log of the sum of exp(logits) of all others; None: left out


class CutBackward:
    """The backward pass of ``cut``: from the gradient for the cut logits to that for all."""

    def __init__(self, top: Top, student: Distribution, mass: Optional[Tensor]) -> None:
        self.symbols, self.student, self.mass = top.symbols, student, mass

    def add_to(self, gradient: Tensor, cut: Tensor) -> None:
        """Add what ``cut``, the gradient for the cut logits (n, K or K + 1), gives all (n, V).

        In place.
        """
        # set at the end, not corrected: a share of a tiny rest's bucket would drown their gradient
        inside = gradient.gather(-1, self.symbols) + cut[:, : self.symbols.size(-1)]
        if self.mass is not None:
            # the bucket's logit is a logsumexp: its gradient is shared out as its members' softmax
            bucket = cut[:, -1:]
            tiny = (self.mass < _TINY_MASS).squeeze(-1)
            share = (bucket / self.mass).masked_fill_(tiny.unsqueeze(-1), 0)
            gradient.addcmul_(self.student.probabilities, share)
            if tiny.any():
                others = self.student.logits[tiny].scatter(-1, self.symbols[tiny], -math.inf)
                gradient[tiny] += torch.softmax(others, dim=-1) * bucket[tiny]
        gradient.scatter_(-1, self.symbols, inside)


def cut(top: Top, student: Distribution) -> Tuple[Distribution, Distribution, CutBackward]:
    """Both distributions over the same K outcomes or, with a rest, K + 1.

    Args:
        top: the teacher's likeliest symbols, logits at the distillation temperature.
        student: over all symbols, (n, V), at the same temperature.

    Returns:
        teacher, student, and what carries a gradient for the cut student back to all symbols.
    """
    kept = student.logits.gather(-1, top.symbols)
    if top.rest is None:
        return distribution(top.logits), distribution(kept), CutBackward(top, student, None)
    rest, mass = _rest_of_student(student, top.symbols)
    return (
        distribution(torch.cat([top.logits, top.rest], dim=-1)),
        distribution(torch.cat([kept, rest], dim=-1)),
        CutBackward(top, student, mass),
    )


def _rest_of_student(student: Distribution, symbols: Tensor) -> Tuple[Tensor, Tensor]:
    """Logit of all other symbols together, (n, 1), and their probability."""
    probabilities = student.probabilities
    # Sum the others themselves: one minus the K's sum would lose all digits of a small rest. In
    # place and back again, because a copy of (n, V) costs more than both.
    inside = probabilities.gather(-1, symbols)
    probabilities.scatter_(-1, symbols, 0)
    mass = probabilities.sum(-1, keepdim=True)
    probabilities.scatter_(-1, symbols, inside)
    rest = mass.log() + student.log_normaliser
    tiny = (mass < _TINY_MASS).squeeze(-1)
    if tiny.any():
        others = student.logits[tiny].scatter(-1, symbols[tiny], -math.inf)
        rest[tiny] = torch.logsumexp(others, dim=-1, keepdim=True)
    return rest, mass


class Sampled(NamedTuple):
    """An estimate of a teacher's distribution that is unbiased, and its exact entropy."""

    symbols: Tensor  # (n, m): the likeliest, and those drawn from the tail, more than once perhaps
    probabilities: Tensor  # (n, m): of the likeliest; of a drawn one, its share of the tail's mass
    entropy: Tensor  # (n,), nats


class SampledBackward:
    """The backward pass of ``sampled_forward_kl``, to the gradient for all logits."""

    def __init__(self, symbols: Tensor, student: Distribution) -> None:
        self.symbols, self.student = symbols, student

    def add_to(self, gradient: Tensor, sampled: Tensor) -> None:
        """Add to ``gradient`` (n, V) what ``sampled``, (n, m + 1), stands for. In place.

        Args:
            sampled: what each symbol adds, and the factor of the student's probabilities.
        """
        gradient.addcmul_(self.student.probabilities, sampled[:, -1:])
        gradient.scatter_add_(-1, self.symbols, sampled[:, :-1])


def sampled_forward_kl(
    teacher: Sampled, student: Distribution
) -> Tuple[Tensor, Tensor, SampledBackward]:
    """KL(p || q) over the whole vocabulary from an unbiased estimate p^ of p.

    ``-H(p) - sum p^ log q`` with gradient ``q - p^``: both are linear in p^, so both are right on
    average over the draws (Anshumann et al. 2025, "Sparse Logit Sampling", here with an exact
    head). One draw's value may be below 0.

    Args:
        student: over all symbols, (n, V), at the teacher's temperature.

    Returns:
        value (n,), nats; its gradient as ``SampledBackward.add_to`` takes it.
    """
    p = teacher.probabilities
    chosen = student.logits.gather(-1, teacher.symbols)
    value = student.log_normaliser.squeeze(-1) - (p * chosen).sum(-1) - teacher.entropy
    gradient = torch.cat([-p, torch.ones_like(p[:, :1])], dim=-1)
    return value, gradient, SampledBackward(teacher.symbols, student)
