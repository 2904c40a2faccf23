"""Divergences between a teacher's and a student's distribution, as pure functions.

Every function takes the two as ``Distribution``s over the same outcomes, already at the
distillation temperature, and returns

- the divergence of each row, shape (rows,), in nats unless said otherwise, and
- its gradient with respect to the student's logits, (rows, V).

Gradients are written by hand because autograd would keep several tensors of rows x V for each
divergence; here one buffer becomes the gradient. They are with respect to logits, so that the
softmax between is part of them, and each is a fresh tensor that the caller may overwrite.

    >>> p, q = (torch.tensor([row]).log() for row in ([0.75, 0.25], [0.5, 0.5]))
    >>> value, gradient = forward_kl(distribution(p), distribution(q))
    >>> round(value.item(), 4)  # 0.75 log(0.75 / 0.5) + 0.25 log(0.25 / 0.5)
    0.1308
    >>> gradient  # q - p
    tensor([[-0.2500,  0.2500]])

Value and gradient are 0 when the two are equal. p is the teacher, q the student. A symbol to which
the teacher gives probability 0 (logit -inf) adds 0 to the sums over p; divergences that would be
infinite there (``reverse_kl``, ``logit_mse``) run over the teacher's support, q renormalised on it.

A new divergence is a function here and a line in ``DIVERGENCES``, with a ``Parameter`` if it takes
one; the flags and their help follow from these.
"""

import functools
import math
from typing import Callable, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

from .parameters import Parameter

ValueAndGradient = Tuple[Tensor, Tensor]

BETA = Parameter(
    flag="--kd-js-beta",
    keyword="beta",
    default=0.5,
    valid=lambda x: 0 < x < 1,
    expected="between 0 and 1",
    meaning="teacher's share of the mixture in js",
)
SKEW = Parameter(
    flag="--kd-skew",
    keyword="skew",
    default=0.1,
    valid=lambda x: 0 <= x < 1,
    expected="at least 0, below 1",
    meaning="first distribution's share of the mixture in skew-kl and skew-reverse-kl",
)


class Distribution(NamedTuple):
    """Rows of logits with their softmax, computed once and shared."""

    logits: Tensor  # (rows, V)
    probabilities: Tensor  # (rows, V)
    log_normaliser: Tensor  # (rows, 1): log of the sum of exp(logits)

    def log_probabilities(self) -> Tensor:
        return self.logits - self.log_normaliser

    def rows(self, index: Union[Tensor, slice]) -> "Distribution":
        return Distribution(*(part[index] for part in self))


def distribution(logits: Tensor) -> Distribution:
    """The softmax of each row of logits (rows, V); NaN where a row has NaN, +inf or no mass."""
    probabilities = torch.softmax(logits, dim=-1)
    # at the largest logit p = exp(0) / sum: the normaliser for two cheap passes, no second exp
    log_normaliser = logits.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log_()
    return Distribution(logits, probabilities, log_normaliser)


def forward_kl(teacher: Distribution, student: Distribution) -> ValueAndGradient:
    """KL(p || q) (Hinton et al. 2015; word-level distillation of Kim & Rush 2016, eq. 3).

    Gradient: q - p.
    """
    p, q = teacher.probabilities, student.probabilities
    value = (_finite(teacher.logits - student.logits).mul_(p)).sum(-1)
    value -= (teacher.log_normaliser - student.log_normaliser).squeeze(-1)
    return value, q - p


def reverse_kl(teacher: Distribution, student: Distribution) -> ValueAndGradient:
    """KL(q || p), mode-seeking (Gu et al. 2024, MiniLLM, eq. 1, per token).

    Gradient: q * (log(q/p) - KL).
    """
    teacher, student = _on_support(teacher, student)
    ratio = _finite(student.logits - teacher.logits)
    mean = ratio.mul(student.probabilities).sum(-1, keepdim=True)
    value = mean - student.log_normaliser + teacher.log_normaliser
    return value.squeeze(-1), ratio.sub_(mean).mul_(student.probabilities)


def js(
    teacher: Distribution, student: Distribution, beta: float = BETA.default
) -> ValueAndGradient:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, 0 < beta < 1.

    The generalised Jensen-Shannon divergence of Agarwal et al. 2024 (GKD), eq. 1. Gradient through
    d/dq = (1 - beta) log(q/m).
    """
    p, q = teacher.probabilities, student.probabilities
    log_m = _log(torch.lerp(q, p, beta))
    to_p = _finite(teacher.log_probabilities()).sub_(log_m).mul_(p).sum(-1)
    slope = _finite(student.log_probabilities()).sub_(log_m)
    mean = slope.mul(q).sum(-1, keepdim=True)
    value = beta * to_p + (1 - beta) * mean.squeeze(-1)
    return value, slope.sub_(mean).mul_(q).mul_(1 - beta)


def tvd(teacher: Distribution, student: Distribution) -> ValueAndGradient:
    """Total variation distance, half the sum of |p - q|, from 0 to 1 (Wen et al. 2023, f-DISTILL).

    Gradient through d/dq = sign(q - p) / 2.
    """
    difference = student.probabilities - teacher.probabilities
    value = difference.abs().sum(-1).mul_(0.5)
    return value, _through_softmax(difference.sign_().mul_(0.5), student.probabilities)


def skew_kl(
    teacher: Distribution, student: Distribution, skew: float = SKEW.default
) -> ValueAndGradient:
    """KL(p || m) with m = skew p + (1 - skew) q, 0 <= skew < 1 (Ko et al. 2024, DistiLLM, eq. 4).

    Gradient through d/dq = -(1 - skew) p/m. skew = 0 is KL(p || q).
    """
    if skew == 0:
        return forward_kl(teacher, student)
    p, q = teacher.probabilities, student.probabilities
    m = torch.lerp(q, p, skew)
    value = _finite(teacher.log_probabilities()).sub_(_log(m)).mul_(p).sum(-1)
    # q * p/m rather than p/m, which has no limit where both are 0
    weighted = (p * q).div_(m.clamp_(min=_tiny(m))).mul_(skew - 1)
    return value, weighted - q * weighted.sum(-1, keepdim=True)


def skew_reverse_kl(
    teacher: Distribution, student: Distribution, skew: float = SKEW.default
) -> ValueAndGradient:
    """KL(q || m) with m = skew q + (1 - skew) p, 0 <= skew < 1 (Ko et al. 2024, DistiLLM, eq. 5).

    Gradient through d/dq = log(q/m) + 1 - skew q/m. skew = 0 is KL(q || p).
    """
    if skew == 0:
        return reverse_kl(teacher, student)
    p, q = teacher.probabilities, student.probabilities
    m = torch.lerp(p, q, skew)
    slope = _finite(student.log_probabilities()).sub_(_log(m))
    value = slope.mul(q).sum(-1)
    slope.sub_(q.div(m.clamp_(min=_tiny(m))).mul_(skew))
    return value, _through_softmax(slope, q)


def logit_mse(teacher: Distribution, student: Distribution) -> ValueAndGradient:
    """Sum of squared differences of centred logits over 2V (Ba & Caruana 2014, eq. 1).

    In squared logits, not nats: the limit of T^2 KL(p || q) for large T (Hinton et al. 2015,
    section 2.1). Gradient: the centred difference over V.
    """
    alive = teacher.logits.gt(-math.inf)
    n = alive.sum(-1, keepdim=True)
    difference = (student.logits - teacher.logits).masked_fill_(~alive, 0.0)
    difference.sub_(difference.sum(-1, keepdim=True).div(n)).mul_(alive)
    value = difference.pow(2).sum(-1).div_(2 * n.squeeze(-1))
    return value, difference.div_(n)


class Divergence(NamedTuple):
    """A divergence as training uses it."""

    name: str
    function: Callable[..., ValueAndGradient]
    summary: str  # what it is and who proposed it, for the help
    temperature_power: int = 2  # c(T) = T ** power keeps the gradient's size independent of T
    in_nats: bool = True
    parameter: Optional[Parameter] = None
    # compares logits and not probabilities: no temperature applies, and a bucket of symbols has no
    # logit to compare
    of_logits: bool = False


DIVERGENCES = (
    Divergence("forward-kl", forward_kl, "KL(p||q) (Kim & Rush 2016)"),
    Divergence("reverse-kl", reverse_kl, "KL(q||p) (Gu et al. 2024)"),
    Divergence("js", js, "beta KL(p||m) + (1-beta) KL(q||m) (Agarwal et al. 2024)", parameter=BETA),
    Divergence("tvd", tvd, "sum |p-q| / 2 (Wen et al. 2023)", temperature_power=1, in_nats=False),
    Divergence("skew-kl", skew_kl, "KL(p||m) (Ko et al. 2024)", parameter=SKEW),
    Divergence("skew-reverse-kl", skew_reverse_kl, "KL(q||m) (Ko et al. 2024)", parameter=SKEW),
    Divergence(
        "logit-mse",
        logit_mse,
        "squared difference of centred logits (Ba & Caruana 2014)",
        temperature_power=0,
        in_nats=False,
        of_logits=True,
    ),
)
NAMES = tuple(one.name for one in DIVERGENCES)
PARAMETERS = tuple(dict.fromkeys(one.parameter for one in DIVERGENCES if one.parameter))
# the help of --kd-divergence
HELP = "divergence between teacher p and student q, m a mixture of both: " + "; ".join(
    f"{one.name}, {one.summary}" for one in DIVERGENCES
)


def divergence(name: str, value: Optional[float] = None) -> Divergence:
    """The named divergence, one of ``NAMES``; ``value`` replaces its parameter's default.

    Raises:
        ValueError: a value for a divergence without a parameter.
    """
    (found,) = [one for one in DIVERGENCES if one.name == name]
    if value is None:
        return found
    if found.parameter is None:
        raise ValueError(f"{name} takes no parameter")
    bound = functools.partial(found.function, **{found.parameter.keyword: value})
    return found._replace(function=bound)


def _through_softmax(slope: Tensor, q: Tensor) -> Tensor:
    """From d/dq to d/dlogits: q * (slope - sum of q * slope)."""
    return slope.sub_(slope.mul(q).sum(-1, keepdim=True)).mul_(q)


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


def _log(m: Tensor) -> Tensor:
    """log m, finite where m = 0: what it stands beside is 0 there."""
    return m.clamp(min=_tiny(m)).log_()


def _finite(x: Tensor) -> Tensor:
    """x with -inf and +inf made huge, in place: 0 * huge is 0 where 0 * inf would be NaN."""
    limit = torch.finfo(x.dtype).max
    return x.clamp_(-limit, limit)


def _on_support(teacher: Distribution, student: Distribution) -> Tuple[Distribution, Distribution]:
    """Both on the symbols to which the teacher gives probability; q renormalised there."""
    if teacher.logits.amin() > -math.inf:
        return teacher, student
    dead = teacher.logits.eq(-math.inf)
    # a finite stand-in on both sides, so that their difference there is 0
    floor = torch.finfo(student.logits.dtype).min
    kept = distribution(student.logits.masked_fill(dead, -math.inf))
    return (
        teacher._replace(logits=teacher.logits.masked_fill(dead, floor)),
        kept._replace(logits=kept.logits.masked_fill(dead, floor)),
    )
