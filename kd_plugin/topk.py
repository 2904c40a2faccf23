"""Cut two distributions to the teacher's K likeliest symbols.

First temper, then cut: both distributions are at the distillation temperature. The cut pair is over
K outcomes (tail ``renormalise``: given that the symbol is one of the K) or K + 1 (tail ``bucket``:
all other symbols are one more outcome). K = V equals no cut.
"""

import math
from typing import Callable, Tuple

import torch
from torch import Tensor

from .divergences import Distribution, distribution

TAILS = ("bucket", "renormalise")

# From the gradient with respect to the cut student's logits to that for the whole vocabulary.
Spread = Callable[[Tensor], Tensor]


def cut(
    teacher: Distribution, student: Distribution, k: int, tail: str
) -> Tuple[Distribution, Distribution, Spread]:
    """Both cut to the teacher's ``k`` likeliest symbols, and the way back for the gradient."""
    top, symbols = teacher.logits.topk(k, dim=-1)
    kept = student.logits.gather(-1, symbols)
    whole = student.probabilities

    if tail == "renormalise" or k == whole.size(-1):
        return (
            distribution(top),
            distribution(kept),
            lambda gradient: torch.zeros_like(whole).scatter_(-1, symbols, gradient),
        )

    outside = torch.ones_like(whole, dtype=torch.bool).scatter_(-1, symbols, False)
    rest = _logsumexp_where(outside, student.logits)

    def spread(gradient: Tensor) -> Tensor:
        # the bucket's logit is a logsumexp: its gradient is shared out as its members' softmax
        inside, bucket = gradient[:, :k], gradient[:, k:]
        shares = torch.exp(student.logits - rest).mul_(bucket)
        return shares.scatter_(-1, symbols, inside)

    return (
        distribution(torch.cat([top, _logsumexp_where(outside, teacher.logits)], dim=-1)),
        distribution(torch.cat([kept, rest], dim=-1)),
        spread,
    )


def _logsumexp_where(mask: Tensor, logits: Tensor) -> Tensor:
    return torch.logsumexp(logits.masked_fill(~mask, -math.inf), dim=-1, keepdim=True)
