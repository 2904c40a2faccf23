"""The only place that touches tokens x vocabulary: value and gradient in bounded memory.

The objective works through the real target rows in chunks and writes the gradient with respect to
the student's logits as it goes, so that beside those logits and their gradient its memory does not
grow with tokens x vocabulary.
"""

from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .divergences import forward_kl
from .signal import TeacherSignal

# Rows per chunk times V. On a CPU a chunk's few buffers should stay in its caches; a GPU needs
# enough work per kernel.
_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}


class NotFiniteTeacherError(RuntimeError):
    """A teacher gave NaN, +inf or no probability at all. ``rows`` are the flat target rows."""

    def __init__(self, teachers: str, rows: Tensor) -> None:
        super().__init__(teachers)
        self.teachers = teachers
        self.rows = rows


class Terms(NamedTuple):
    """What the objective found, one value per real target row, in nats where it is a loss.

    ``loss`` is the differentiable sum that training minimises; the others carry no gradient.
    The teacher's are None without a teacher, the ones that cost passes over the vocabulary
    (``correct``, ``teacher_nll``, ``agree``) also unless asked for.
    """

    loss: Tensor  # scalar
    nll: Tensor  # (n,) student's negative log-probability of the reference at T = 1
    kd: Optional[Tensor]  # (n,) divergence, without c(T) and weight
    correct: Optional[Tensor]  # (n,) student's argmax is the reference
    teacher_nll: Optional[Tensor]  # (n,) at T = 1
    agree: Optional[Tensor]  # (n,) the two argmaxes are the same


def distillation_objective(
    logits: Tensor,
    target: Tensor,
    rows: Tensor,
    signal: Optional[TeacherSignal],
    ce_weight: float,
    kd_weight: float,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    with_metrics: bool = False,
) -> Terms:
    """Sum over rows of ``ce_weight * ce + kd_weight * T^2 * KL(p || q)``.

    ce is label-smoothed cross-entropy at T = 1 exactly as fairseq's
    ``label_smoothed_cross_entropy`` defines it (epsilon spread over the V - 1 other symbols);
    p and q are the teacher's and the student's softmax at temperature T (Hinton et al. 2015,
    section 2; T^2 keeps the gradient's size independent of T).

    Args:
        logits: student logits, (N, V), any floating dtype; computed on in float32 (or float64).
        target: reference symbols, (N,).
        rows: int64 indices of the real target rows among the N; others get gradient 0.
        signal: the teacher's say, or None for cross-entropy alone.
        with_metrics: also fill ``correct``, ``teacher_nll`` and ``agree``.

    Raises:
        NotFiniteTeacherError: a teacher row is NaN, +inf or has no mass.
    """
    work = _Work(
        target, rows, signal, ce_weight, kd_weight, temperature, label_smoothing, with_metrics
    )
    loss = _Objective.apply(logits, work)
    return Terms(loss, work.nll, work.kd, work.correct, work.teacher_nll, work.agree)


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, work: "_Work") -> Tensor:
        # A half-precision gradient computed now would underflow: the loss scale arrives with the
        # incoming gradient. Any other dtype has float32's range and needs one pass only.
        ctx.work, ctx.late = work, logits.dtype == torch.float16
        ctx.gradient = None
        if ctx.needs_input_grad[0]:
            if ctx.late:
                ctx.save_for_backward(logits)
            else:
                ctx.gradient = torch.empty_like(logits)
        return work.run(logits, ctx.gradient)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Tuple[Tensor, None]:
        if ctx.late:
            (logits,) = ctx.saved_tensors
            gradient = torch.empty_like(logits)
            ctx.work.run(logits, gradient, scale)
            return gradient, None
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the distillation objective can be differentiated only once")
        if gradient.is_cuda or scale != 1:
            gradient.mul_(scale)
        return gradient, None


class _Work:
    """One evaluation of the objective: its inputs, its chunk loop, and its per-row results."""

    def __init__(
        self,
        target: Tensor,
        rows: Tensor,
        signal: Optional[TeacherSignal],
        ce_weight: float,
        kd_weight: float,
        temperature: float,
        label_smoothing: float,
        with_metrics: bool,
    ) -> None:
        self.rows, self.target, self.signal = rows, target[rows], signal
        self.ce_weight, self.kd_weight, self.temperature = ce_weight, kd_weight, temperature
        self.label_smoothing, self.with_metrics = label_smoothing, with_metrics

    def run(
        self, logits: Tensor, gradient: Optional[Tensor], scale: Optional[Tensor] = None
    ) -> Tensor:
        """Fill the per-row results, and ``gradient`` (times ``scale``) if given; return the loss."""
        n, vocabulary = self.rows.numel(), logits.size(-1)
        dtype = logits.dtype if logits.dtype == torch.float64 else torch.float32
        new = lambda kind=dtype: torch.empty(n, dtype=kind, device=logits.device)  # noqa: E731
        teacher, metrics = self.signal is not None, self.with_metrics
        self.nll, self.ce = new(), new()
        self.kd = new() if teacher else None
        self.correct = new(torch.bool) if metrics else None
        self.teacher_nll = new() if metrics and teacher else None
        self.agree = new(torch.bool) if metrics and teacher else None
        self._bad_teacher = new(torch.bool) if teacher else None

        if gradient is not None:
            gradient[_others(self.rows, logits.size(0))] = 0
        size = max(1, _CHUNK_ELEMENTS.get(logits.device.type, 1 << 25) // vocabulary)
        contiguous = n == logits.size(0)
        for start in range(0, n, size):
            here = slice(start, min(start + size, n))
            rows = here if contiguous else self.rows[here]
            chunk_gradient = self._chunk(here, logits[rows].to(dtype), gradient is not None)
            if gradient is not None:
                if scale is not None:
                    chunk_gradient.mul_(scale)
                gradient[rows] = chunk_gradient.to(gradient.dtype)

        loss = self.ce_weight * self.ce.sum()
        if self.kd is not None:
            if self._bad_teacher.any():
                bad = self.rows[self._bad_teacher]
                raise NotFiniteTeacherError(" and ".join(self.signal.not_finite(bad)), bad)
            loss = loss + self.kd_weight * self.temperature**2 * self.kd.sum()
        return loss

    def _chunk(self, here: slice, z: Tensor, with_gradient: bool) -> Optional[Tensor]:
        """Results of one chunk of rows; returns its gradient with respect to the logits ``z``."""
        target = self.target[here].unsqueeze(-1)
        log_q = torch.log_softmax(z, dim=-1)
        nll = -log_q.gather(-1, target).squeeze(-1)
        eps = self.label_smoothing
        other_eps = eps / (z.size(-1) - 1)
        on_target = 1.0 - eps - other_eps
        ce = on_target * nll
        if eps > 0:
            ce -= other_eps * log_q.sum(dim=-1)
        self.nll[here], self.ce[here] = nll, ce

        kd_gradient = None
        if self.signal is not None:
            t = self.temperature
            z_t = self.signal.logits(self.rows[here]).to(z.device)
            log_p = torch.log_softmax(z_t if t == 1 else z_t / t, dim=-1)
            log_q_t = log_q if t == 1 else torch.log_softmax(z / t, dim=-1)
            self.kd[here], kd_gradient = forward_kl(log_p, log_q_t)
            # log_softmax spreads NaN, +inf and an empty row over all of its row
            self._bad_teacher[here] = log_p[:, 0].isnan()
            if self.with_metrics:
                nll_t = torch.logsumexp(z_t, dim=-1) - z_t.gather(-1, target).squeeze(-1)
                self.teacher_nll[here] = nll_t
                self.agree[here] = z_t.argmax(dim=-1) == z.argmax(dim=-1)
        if self.with_metrics:
            self.correct[here] = z.argmax(dim=-1) == self.target[here]
        if not with_gradient:
            return None

        # d ce / d z = q - other_eps - on_target * [the reference]
        gradient = log_q.exp_().sub_(other_eps).mul_(self.ce_weight)
        gradient.scatter_add_(
            -1, target, torch.full_like(target, -self.ce_weight * on_target, dtype=z.dtype)
        )
        if kd_gradient is not None:
            gradient.add_(kd_gradient, alpha=self.kd_weight * self.temperature)
        return gradient


def _others(rows: Tensor, total: int) -> Tensor:
    """Indices below ``total`` that are not in ``rows``."""
    rest = torch.ones(total, dtype=torch.bool, device=rows.device)
    rest[rows] = False
    return rest.nonzero().squeeze(-1)
