"""The only place that touches tokens x vocabulary: value and gradient in bounded memory.

The objective works through the real target rows in chunks and writes the gradient with respect to
the student's logits as it goes, so that beside those logits and their gradient its memory does not
grow with tokens x vocabulary.
"""

from typing import Any, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

from .answer import CachedAnswer, RunningAnswer, Sparse, rows_ahead, rows_at_once
from .divergences import Distribution, Divergence, distribution, divergence
from .selection import Selection, TokenStatistics
from .topk import Spread, cut


class NotFiniteTeacherError(RuntimeError):
    """A teacher gave NaN, +inf or no probability at all. ``rows`` are the flat target rows."""

    def __init__(self, teachers: str, rows: Tensor) -> None:
        super().__init__(teachers)
        self.teachers = teachers
        self.rows = rows


Signal = Union[RunningAnswer, CachedAnswer]
_FORWARD_KL = divergence("forward-kl")


class Settings(NamedTuple):
    """What is minimised; the criterion's flags at one update."""

    kd_weight: float = 0.5
    ce_weight: Optional[float] = None  # None: what a token's distillation term leaves of 1
    temperature: float = 1.0
    label_smoothing: float = 0.0
    divergence: Divergence = _FORWARD_KL
    top_k: int = 0  # 0: all that the signal knows
    tail: str = "bucket"
    selection: Selection = Selection("all")
    adaptive: bool = False  # kd_weight * sigmoid(student's nll - teacher's nll), token by token
    with_metrics: bool = False  # fill the fields of Terms that cost passes over the vocabulary


class Terms(NamedTuple):
    """What the objective found, one value per real target row, natural logarithms.

    ``loss`` is the differentiable sum that training minimises; the others carry no gradient. The
    teacher's are None without a teacher, and what nobody asked for is None.
    """

    loss: Tensor  # scalar
    tokens: TokenStatistics  # what the selection decided on
    selected: Optional[Tensor]  # (n,) bool; None is all
    kd: Optional[Tensor]  # (n,) divergence, without c(T) and weight; 0 where not selected
    kd_weight: Optional[Tensor]  # (n,) weight of the divergence; 0 where not selected
    correct: Optional[Tensor]  # (n,) student's argmax is the reference
    agree: Optional[Tensor]  # (n,) the two argmaxes are the same


def distillation_objective(
    logits: Tensor,
    target: Tensor,
    rows: Tensor,
    signal: Optional[Signal],
    settings: Settings,
) -> Terms:
    """Sum over rows of ``ce_weight * ce + kd_weight * selected * c(T) * D(p, q)``.

    ce is label-smoothed cross-entropy at T = 1 exactly as fairseq's
    ``label_smoothed_cross_entropy`` defines it (epsilon spread over the V - 1 other symbols);
    p and q are the teacher's and the student's softmax at temperature T; c(T) keeps the gradient's
    size independent of T (Hinton et al. 2015, section 2).

    Args:
        logits: student logits, (N, V), any floating dtype; computed on in float32 (or float64).
        target: reference symbols, (N,).
        rows: int64 indices of the real target rows among the N; others get gradient 0.
        signal: the teacher's say, or None for cross-entropy alone (with weight 1).

    Raises:
        NotFiniteTeacherError: a teacher row is NaN, +inf or has no mass.
    """
    work = _Work(target, rows, signal, settings)
    loss = _Objective.apply(logits, work)
    return work.terms(loss)


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
    def backward(ctx: Any, scale: Tensor) -> Tuple[Tensor, None]:  # type: ignore[override]
        if ctx.late:
            (logits,) = ctx.saved_tensors
            gradient = torch.empty_like(logits)
            ctx.work.settings = ctx.work.settings._replace(with_metrics=False)
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

    # One value per row each; what nobody asks for is None, see _allocate
    nll: Tensor
    ce: Tensor
    ce_weight: Any
    kd: Any
    kd_weight: Any
    bad_teacher: Any
    selected: Any
    correct: Any
    agree: Optional[Tensor]
    teacher_nll: Any
    teacher_entropy: Optional[Tensor]
    teacher_correct: Optional[Tensor]
    _ahead: Any  # rows about which the teacher was asked already, and its word on them

    def __init__(
        self, target: Tensor, rows: Tensor, signal: Optional[Signal], settings: Settings
    ) -> None:
        self.rows, self.target = rows, target[rows]
        self.signal, self.settings = signal, settings

    def run(
        self, logits: Tensor, gradient: Optional[Tensor], scale: Optional[Tensor] = None
    ) -> Tensor:
        """Fill the per-row results and ``gradient`` (times ``scale``) if given; return the loss."""
        settings = self.settings
        self._allocate(logits)
        if gradient is not None and self.rows.numel() < logits.size(0):
            rest = torch.ones(logits.size(0), dtype=torch.bool, device=logits.device)
            rest[self.rows] = False
            gradient[rest] = 0
        if self.signal is not None and settings.selection.looks_at_batch:
            for here, z in self._chunks(logits):
                self._student_nll(here, z, torch.logsumexp(z, dim=-1, keepdim=True))
            self.selected = settings.selection(TokenStatistics(self.nll))

        for here, z in self._chunks(logits):
            chunk_gradient = self._chunk(here, z, gradient is not None)
            if gradient is not None and chunk_gradient is not None:
                if scale is not None:
                    chunk_gradient.mul_(scale)
                gradient[self._place(here, logits)] = chunk_gradient.to(gradient.dtype)

        self._ahead = None  # the graph holds this work until its backward pass
        if self.signal is None:
            return self.ce.sum()
        if self.bad_teacher.any():
            bad = self.rows[self.bad_teacher]
            raise NotFiniteTeacherError(" and ".join(self.signal.not_finite(bad)), bad)
        c = settings.temperature**settings.divergence.temperature_power
        return (self.ce_weight * self.ce).sum() + c * (self.kd_weight * self.kd).sum()

    def terms(self, loss: Tensor) -> Terms:
        tokens = TokenStatistics(
            self.nll, self.teacher_nll, self.teacher_entropy, self.teacher_correct
        )
        return Terms(loss, tokens, self.selected, self.kd, self.kd_weight, self.correct, self.agree)

    def _allocate(self, logits: Tensor) -> None:
        """A value per row for all that is asked for; None for the rest."""
        wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
        n, device, selection = self.rows.numel(), logits.device, self.settings.selection

        def new(wanted: bool, kind: torch.dtype = wide, fill: float = 0) -> Any:
            return torch.full((n,), fill, dtype=kind, device=device) if wanted else None

        self._ahead = None
        taught, metrics = self.signal is not None, self.settings.with_metrics
        self.dtype = wide
        self.nll, self.ce = new(True), new(True)
        self.correct = new(metrics, torch.bool)
        self.selected = None
        self.kd, self.kd_weight = new(taught), new(taught)
        self.bad_teacher = new(taught, torch.bool)
        self.agree = new(taught and metrics, torch.bool)
        self.teacher_nll = new(
            taught and (metrics or self.settings.adaptive or selection.name == "teacher-better")
        )
        self.teacher_entropy = new(taught and selection.name == "teacher-entropy")
        self.teacher_correct = new(taught and selection.name == "teacher-correct", torch.bool)
        constant = self.settings.ce_weight
        self.ce_weight = new(taught, fill=1.0 if constant is None else constant)

    def _chunks(self, logits: Tensor) -> Any:
        n = self.rows.numel()
        size = rows_at_once(logits.device, logits.size(-1))
        for start in range(0, n, size):
            here = slice(start, min(start + size, n))
            yield here, logits[self._place(here, logits)].to(self.dtype)

    def _place(self, here: slice, logits: Tensor) -> Any:
        """Where a chunk stands in the logits: a view where no row is left out."""
        return here if self.rows.numel() == logits.size(0) else self.rows[here]

    def _student_nll(self, here: slice, z: Tensor, log_normaliser: Tensor) -> Tensor:
        at_target = z.gather(-1, self.target[here].unsqueeze(-1))
        self.nll[here] = (log_normaliser - at_target).squeeze(-1)
        return self.nll[here]

    def _chunk(self, here: slice, z: Tensor, with_gradient: bool) -> Optional[Tensor]:
        """Results of one chunk of rows; returns its gradient with respect to the logits ``z``."""
        student = distribution(z)
        nll = self._student_nll(here, z, student.log_normaliser)
        v, eps = z.size(-1), self.settings.label_smoothing
        other_eps = eps / (v - 1)
        on_target = 1.0 - eps - other_eps
        self.ce[here] = on_target * nll
        if eps > 0:
            self.ce[here] += other_eps * (v * student.log_normaliser.squeeze(-1) - z.sum(dim=-1))

        if self.settings.with_metrics:
            best = z.argmax(dim=-1)
            self.correct[here] = best == self.target[here]
        else:
            best = None
        distilled = None
        if self.signal is not None:
            distilled = self._distil(here, student, best, with_gradient)
        if not with_gradient:
            return None

        # d ce / d z = q - other_eps - on_target * [the reference]
        gradient = student.probabilities - other_eps
        target = self.target[here].unsqueeze(-1)
        gradient.scatter_add_(-1, target, torch.full_like(target, -on_target, dtype=z.dtype))
        if self.ce_weight is not None:
            gradient.mul_(self.ce_weight[here].unsqueeze(-1))
        if distilled is not None:
            index, kd_gradient, spread = distilled
            here_too = gradient if index is None else gradient[index]
            if spread is None:
                here_too.add_(kd_gradient)
            else:
                spread.add_to(here_too, kd_gradient)
            if index is not None:
                gradient[index] = here_too
        return gradient

    def _distil(
        self, here: slice, student: Distribution, best: Optional[Tensor], with_gradient: bool
    ) -> Optional[Tuple[Optional[Tensor], Tensor, Optional[Spread]]]:
        """The distillation term of a chunk.

        Returns:
            which of its rows are distilled (None is all), their weighted gradient, and how a cut
            one spreads over the vocabulary; None when no row is, or without a gradient.
        """
        assert self.signal is not None
        settings = self.settings
        t, selection = settings.temperature, settings.selection
        target = self.target[here]
        # The teacher is asked about every row only where something depends on it
        ask_all = settings.with_metrics or selection.asks_teacher
        index = None if ask_all else self._decide(here)
        if index is not None:
            if not index.numel():
                return None
            target = target[index]
        word = self._word(here, index, student.logits)
        everywhere = here if index is None else index + here.start
        self.bad_teacher[everywhere] = word.bad()
        if self.teacher_nll is not None:
            self.teacher_nll[everywhere] = word.nll(target)
        if self.agree is not None or self.teacher_correct is not None:
            teacher_best = word.best()
            if self.agree is not None:
                self.agree[everywhere] = teacher_best == best
            if self.teacher_correct is not None:
                self.teacher_correct[everywhere] = teacher_best == target
        if self.teacher_entropy is not None:
            self.teacher_entropy[everywhere] = word.entropy()

        if ask_all:
            index = self._decide(here)
            if index is not None:
                if not index.numel():
                    return None
                word = word.rows(index)
        if index is not None:
            student = student.rows(index)
            everywhere = index + here.start
        if t != 1:
            student = distribution(student.logits / t)
        spread = None
        if settings.top_k or isinstance(word, Sparse):
            top = word.top(settings.top_k, t, settings.tail == "bucket")
            teacher, student, spread = cut(top, student)
        else:
            teacher = word.at(t)
        value, gradient = settings.divergence.function(teacher, student)

        weight = torch.full_like(value, settings.kd_weight)
        if settings.adaptive:
            weight *= torch.sigmoid(self.nll[everywhere] - self.teacher_nll[everywhere])
        self.kd[everywhere], self.kd_weight[everywhere] = value, weight
        if settings.ce_weight is None:
            self.ce_weight[everywhere] = 1 - weight
        if not with_gradient:
            return None
        # c(T), and 1 / T because the divergence's gradient is for the tempered logits
        factor = weight * t ** (settings.divergence.temperature_power - 1)
        return index, gradient.mul_(factor.unsqueeze(-1)), spread

    def _word(self, here: slice, index: Optional[Tensor], like: Tensor) -> Any:
        """The teacher's word on a chunk's rows, or on those of them that ``index`` says."""
        assert self.signal is not None
        if index is not None:
            return self.signal.rows(self.rows[here][index], like)
        if self._ahead is None or here.start >= self._ahead[0].stop:
            # a lazy teacher's projection is a small product: several chunks' at a time is faster
            n = here.start + rows_ahead(like.device) * (here.stop - here.start)
            block = slice(here.start, min(n, self.rows.numel()))
            self._ahead = block, self.signal.rows(self.rows[block], like)
        block, word = self._ahead
        return word.rows(slice(here.start - block.start, here.stop - block.start))

    def _decide(self, here: slice) -> Optional[Tensor]:
        """Indices of the chunk's rows that are distilled; None is all of them."""
        selection = self.settings.selection
        if selection.looks_at_batch and self.selected is not None:
            return self.selected[here].nonzero().squeeze(-1)
        others = (self.teacher_nll, self.teacher_entropy, self.teacher_correct)
        chosen = selection(
            TokenStatistics(self.nll[here], *(None if x is None else x[here] for x in others))
        )
        if chosen is None:
            return None
        if self.selected is None:
            self.selected = torch.zeros_like(self.rows, dtype=torch.bool)
        self.selected[here] = chosen
        return chosen.nonzero().squeeze(-1)
