"""Divergences between a teacher's and a student's distribution, as pure functions.

Every function takes log-probabilities (natural log) of both at the same temperature,
``teacher`` and ``student`` of shape (rows, V), and returns

- the divergence of each row in nats, shape (rows,), and
- its gradient with respect to the student's logits divided by the temperature, (rows, V).

Each is 0, with gradient 0, when the two are equal.
"""

from typing import Tuple

import torch
from torch import Tensor


def forward_kl(teacher: Tensor, student: Tensor) -> Tuple[Tensor, Tensor]:
    """KL(p || q), the loss of word-level distillation (Hinton et al. 2015; Kim & Rush 2016, eq. 3).

    The gradient is q - p. A symbol to which the teacher gives probability 0 adds nothing.
    """
    p = teacher.exp()
    # 0 * log 0 = 0: a finite stand-in for -inf keeps the product from being NaN
    difference = teacher.clamp(min=torch.finfo(teacher.dtype).min).sub_(student)
    value = difference.mul_(p).sum(dim=-1)
    return value, torch.exp(student, out=difference).sub_(p)
