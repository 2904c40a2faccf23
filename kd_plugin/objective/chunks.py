"""The distillation objective: value and gradient in bounded memory.

The only place that touches tokens x vocabulary. ``_chunk`` computes the terms of a few rows and
their gradient with respect to the student's logits; it is a pure function. ``_evaluate`` applies it
chunk by chunk and writes each gradient where it belongs, so that beside the logits and their
gradient memory does not grow with tokens x vocabulary. ``distillation_objective`` makes the result
known to autograd.
"""

from functools import partial
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

from .answer import (
    Answer,
    Comparison,
    NotFiniteTeacherError,
    TeacherRows,
    rows_ahead,
    rows_at_once,
)
from .divergences import Distribution, Divergence, distribution, divergence
from .ranking import TOP_K, RankingGradient, ranking_loss
from .selection import Selection, TokenStatistics
from .topk import CutBackward, SampledBackward

_FORWARD_KL = divergence("forward-kl")


class Settings(NamedTuple):
    """What is minimised; the criterion's flags at one update."""

    kd_weight: float = 0.5
    ce_weight: Optional[float] = None  # None: what a token's distillation term leaves of 1
    temperature: float = 1.0
    label_smoothing: float = 0.0
    divergence: Divergence = _FORWARD_KL
    top_k: int = 0  # 0: all that the teacher's answer knows
    tail: str = "bucket"
    selection: Selection = Selection("all")
    ranking_weight: float = 0.0  # beside the divergence; at temperature 1 alone
    ranking_k: int = TOP_K.default
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
    ranking: Optional[Tensor]  # (n,) in probabilities, without weights; 0 where not selected
    correct: Optional[Tensor]  # (n,) student's argmax is the reference
    agree: Optional[Tensor]  # (n,) the two argmaxes are the same


def distillation_objective(
    logits: Tensor,
    target: Tensor,
    rows: Tensor,
    answer: Optional[Answer],
    settings: Settings,
    groups: Optional[Tensor] = None,
) -> Terms:
    """Sum over rows of ``ce_weight * ce + kd_weight * selected * (c(T) * D(p, q) + ranking * R)``.

    ce is label-smoothed cross-entropy at T = 1 exactly as fairseq's
    ``label_smoothed_cross_entropy`` defines it (epsilon spread over the V - 1 other symbols);
    p and q are the teacher's and the student's softmax at temperature T; c(T) keeps the gradient's
    size independent of T (Hinton et al. 2015, section 2); R is ``ranking_loss``, at T = 1.

    Args:
        logits: student logits, (N, V), any floating dtype; computed on in float32 (or float64).
        target: reference symbols, (N,).
        rows: int64 indices of the real target rows among the N; others get gradient 0.
        answer: the teacher's, or None for cross-entropy alone (with weight 1).
        groups: number of the group of each of the N, int64 (N,), for a selection within groups.

    Raises:
        NotFiniteTeacherError: a teacher row is NaN, +inf or has no mass.
    """
    group = None if groups is None else groups[rows]
    evaluate = partial(_evaluate, target=target[rows], rows=rows, answer=answer, group=group)
    learns = torch.is_grad_enabled() and logits.requires_grad
    # A half-precision gradient computed now would underflow: the loss scale arrives with the
    # incoming gradient. Any other dtype has float32's range and needs one pass only.
    late = logits.dtype == torch.float16
    gradient = torch.empty_like(logits) if learns and not late else None
    with torch.no_grad():
        loss, found = evaluate(logits, settings=settings, gradient=gradient)
    if learns and late:
        again = partial(evaluate, settings=settings._replace(with_metrics=False))
        loss = _GradientInBackward.apply(logits, loss, again)
    elif learns:
        loss = _GradientReady.apply(logits, loss, gradient)
    tokens = TokenStatistics(
        found.student_nll,
        found.teacher_nll,
        found.teacher_entropy,
        found.teacher_correct,
        group,
    )
    return Terms(
        *(loss, tokens, found.selected, found.kd, found.kd_weight),
        *(found.ranking, found.correct, found.agree),
    )


class _GradientReady(torch.autograd.Function):
    """A loss whose gradient with respect to the logits is known already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Tuple[Tensor, None, None]:  # type: ignore[override]
        gradient, ctx.gradient = ctx.gradient, None  # given away, not copied
        if gradient is None:
            raise RuntimeError("the distillation objective can be differentiated only once")
        if gradient.is_cuda or scale != 1:
            gradient.mul_(scale)
        return gradient, None, None


class _GradientInBackward(torch.autograd.Function):
    """A loss whose gradient is computed by a second pass, which knows the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor, evaluate: Callable[..., Any]) -> Tensor:
        ctx.evaluate = evaluate
        ctx.save_for_backward(logits)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Tuple[Tensor, None, None]:  # type: ignore[override]
        (logits,) = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        ctx.evaluate(logits, gradient=gradient, scale=scale)
        return gradient, None, None


class _RowTerms(NamedTuple):
    """What is found at each of some rows, (n,) each; None where it does not apply."""

    student_nll: Tensor
    ce: Tensor  # label-smoothed cross-entropy
    ce_weight: Optional[Tensor] = None
    correct: Optional[Tensor] = None
    # of the teacher; 0 where it was not asked
    teacher_bad: Optional[Tensor] = None
    teacher_nll: Optional[Tensor] = None
    teacher_entropy: Optional[Tensor] = None
    teacher_correct: Optional[Tensor] = None
    agree: Optional[Tensor] = None
    # of distillation; 0 where not selected
    selected: Optional[Tensor] = None  # None is all
    kd: Optional[Tensor] = None
    kd_weight: Optional[Tensor] = None
    ranking: Optional[Tensor] = None


# Gives the teacher's distributions at those rows of a chunk that an index names; None is all
_Ask = Callable[[Optional[Tensor]], TeacherRows]


def _evaluate(
    logits: Tensor,
    *,
    target: Tensor,
    rows: Tensor,
    answer: Optional[Answer],
    settings: Settings,
    group: Optional[Tensor] = None,
    gradient: Optional[Tensor] = None,
    scale: Optional[Tensor] = None,
) -> Tuple[Tensor, _RowTerms]:
    """Loss and terms of all rows, chunk by chunk.

    Args:
        target: the references of the rows, (n,); ``group``: the numbers of their groups.
        gradient: (N, V), filled with that of ``scale`` (1 if None) times the loss.
    """
    n, device = rows.numel(), logits.device
    like = logits.new_empty(0, dtype=torch.promote_types(logits.dtype, torch.float32))
    size, ahead = rows_at_once(device, logits.size(-1)), rows_ahead(device)

    def place(here: slice) -> Union[slice, Tensor]:
        return here if n == logits.size(0) else rows[here]  # a slice gives a view

    if gradient is not None and n < logits.size(0):
        others = torch.ones(logits.size(0), dtype=torch.bool, device=device)
        others[rows] = False
        gradient[others] = 0
    selected = None
    if answer is not None and settings.selection.looks_at_batch:
        chunks = ((logits[place(here)].to(like), target[here]) for here in _slices(0, n, size))
        nll = torch.cat([_nll(z, t, distribution(z).log_normaliser) for z, t in chunks])
        selected = settings.selection(TokenStatistics(nll, group=group))

    parts: List[_RowTerms] = []
    for block in _slices(0, n, size * ahead):
        ask: Optional[_Ask] = None  # also frees the last block's answer before the next one's
        several = None
        if answer is not None and _asks_about_every_row(settings):
            # a lazy teacher's projection is a small product: several chunks' at a time is faster
            several = answer.rows(rows[block], like)
        for here in _slices(block.start, block.stop, size):
            if several is not None:
                part = slice(here.start - block.start, here.stop - block.start)
                ask = partial(_rows_of_block, several.rows(part))
            elif answer is not None:
                ask = partial(_rows_of_answer, answer, rows[here], like)
            terms, slope = _chunk(
                logits[place(here)].to(like),
                target[here],
                ask,
                settings,
                group=None if group is None else group[here],
                selected=None if selected is None else selected[here],
                with_gradient=gradient is not None,
            )
            parts.append(terms)
            if gradient is not None and slope is not None:
                if scale is not None:
                    slope.mul_(scale)
                gradient[place(here)] = slope.to(gradient.dtype)

    found = _joined(parts)
    return _loss(found, rows, answer, settings), found


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size``; of nothing, an empty one."""
    for first in range(start, max(stop, start + 1), size):
        yield slice(first, min(first + size, stop))


def _joined(parts: List[_RowTerms]) -> _RowTerms:
    columns: List[Any] = [None if x[0] is None else torch.cat(x) for x in zip(*parts)]
    return _RowTerms(*columns)


def _rows_of_block(teacher: TeacherRows, index: Optional[Tensor]) -> TeacherRows:
    return teacher if index is None else teacher.rows(index)


def _rows_of_answer(
    answer: Answer, rows: Tensor, like: Tensor, index: Optional[Tensor]
) -> TeacherRows:
    return answer.rows(rows if index is None else rows[index], like)


def _asks_about_every_row(settings: Settings) -> bool:
    """Otherwise the student's statistics decide at which rows the teacher is asked."""
    selection = settings.selection
    return settings.with_metrics or bool(selection.needs) or selection.takes_all()


def _loss(found: _RowTerms, rows: Tensor, answer: Optional[Answer], settings: Settings) -> Tensor:
    """The sum over all rows."""
    if answer is None:
        return found.ce.sum()
    assert found.teacher_bad is not None and found.ce_weight is not None
    assert found.kd is not None and found.kd_weight is not None
    if found.teacher_bad.any():
        bad = rows[found.teacher_bad]
        raise NotFiniteTeacherError(answer.not_finite(bad), bad)
    c = settings.temperature**settings.divergence.temperature_power
    loss = (found.ce_weight * found.ce).sum() + c * (found.kd_weight * found.kd).sum()
    if found.ranking is not None:
        loss += settings.ranking_weight * (found.kd_weight * found.ranking).sum()
    return loss


def _chunk(
    z: Tensor,
    target: Tensor,
    ask: Optional[_Ask],
    settings: Settings,
    *,
    group: Optional[Tensor] = None,
    selected: Optional[Tensor] = None,
    with_gradient: bool = False,
) -> Tuple[_RowTerms, Optional[Tensor]]:
    """The terms of some rows and, if wanted, the gradient of their loss.

    Args:
        z: the student's logits, (n, V), float32 or float64.
        target: the references, (n,).
        ask: the teacher; None for cross-entropy alone.
        group: number of each one's group, where there are any.
        selected: which rows are distilled, bool (n,), where that is decided for the whole batch.

    Returns:
        the terms, and the gradient with respect to z, (n, V).
    """
    student, eps = distribution(z), settings.label_smoothing
    nll = _nll(z, target, student.log_normaliser)
    v = z.size(-1)
    other_eps = eps / (v - 1)
    on_target = 1.0 - eps - other_eps
    ce = on_target * nll
    if eps > 0:
        ce += other_eps * (v * student.log_normaliser.squeeze(-1) - z.sum(dim=-1))
    best = z.argmax(dim=-1) if settings.with_metrics else None
    terms = _RowTerms(nll, ce, correct=None if best is None else best == target)
    kd_gradient = None
    if ask is not None:
        terms, kd_gradient = _distil(
            *(terms, student, best, target, ask, settings, group, selected)
        )
    if not with_gradient:
        return terms, None

    # d ce / d z = q - other_eps - on_target * [the reference]
    gradient = student.probabilities - other_eps
    reference = target.unsqueeze(-1)
    gradient.scatter_add_(-1, reference, torch.full_like(reference, -on_target, dtype=z.dtype))
    if terms.ce_weight is not None:
        gradient.mul_(terms.ce_weight.unsqueeze(-1))
    if kd_gradient is not None:
        kd_gradient.add_to(gradient)
    return terms, gradient


def _nll(z: Tensor, target: Tensor, log_normaliser: Tensor) -> Tensor:
    return (log_normaliser - z.gather(-1, target.unsqueeze(-1))).squeeze(-1)


class _KDGradient(NamedTuple):
    """The weighted gradient of the divergence, (m, outcomes), and where it belongs."""

    gradient: Tensor
    where: Optional[Tensor]  # the m rows of the chunk that are distilled; None is all
    # to the whole vocabulary; None if these are all outcomes
    back: Union[CutBackward, SampledBackward, None]
    ranking: Optional[Tuple[RankingGradient, Tensor]]  # and its weights, (m,)

    def add_to(self, whole: Tensor) -> None:
        """Add it to that of the chunk, (n, V), in place."""
        here = _pick(whole, self.where)
        if self.back is None:
            here.add_(self.gradient)
        else:
            self.back.add_to(here, self.gradient)
        if self.ranking is not None:
            ranked, weight = self.ranking
            ranked.add_to(here, weight)
        if self.where is not None:
            whole[self.where] = here


def _distil(
    terms: _RowTerms,
    student: Distribution,
    best: Optional[Tensor],
    target: Tensor,
    ask: _Ask,
    settings: Settings,
    group: Optional[Tensor],
    selected: Optional[Tensor],
) -> Tuple[_RowTerms, Optional[_KDGradient]]:
    """The terms of some rows completed by the teacher's, and the divergence's gradient.

    Args:
        terms: what the student alone gives.
        student: at temperature 1.
        best: the student's argmax, if metrics are wanted.
    """
    n, t = target.numel(), settings.temperature
    facts: Dict[str, Tensor] = {}
    asked_already = _asks_about_every_row(settings)
    if asked_already:
        teacher = ask(None)
        facts = _teacher_facts(teacher, target, best, settings)
    if selected is None:
        tokens = TokenStatistics(terms.student_nll, group=group)
        known = {name: fact for name, fact in facts.items() if name in tokens._fields}
        selected = settings.selection(tokens._replace(**known))
    where = None if selected is None else selected.nonzero().squeeze(-1)
    if not asked_already:
        teacher = ask(where)
        some = _teacher_facts(teacher, _pick(target, where), None, settings)
        facts = {name: _put(value, where, n) for name, value in some.items()}
    elif where is not None:
        teacher = teacher.rows(where)

    if where is not None:
        student = student.rows(where)
    value, gradient, back = terms.student_nll.new_empty(0), None, None
    ranked, order = value, None
    if student.logits.numel():
        if t != 1:
            student = distribution(student.logits / t)
        how = Comparison(settings.divergence.function, t, settings.top_k, settings.tail)
        value, gradient, back = teacher.compare(student, how)
        if settings.ranking_weight:
            ranked, order = ranking_loss(teacher, student, settings.ranking_k)
    weight = torch.full_like(value, settings.kd_weight)
    if settings.adaptive:
        gap = terms.student_nll - facts["teacher_nll"]
        weight *= torch.sigmoid(_pick(gap, where))
    kd_weight = _put(weight, where, n)
    constant = settings.ce_weight
    terms = terms._replace(
        ce_weight=1 - kd_weight if constant is None else torch.full_like(kd_weight, constant),
        selected=selected,
        kd=_put(value, where, n),
        kd_weight=kd_weight,
        ranking=_put(ranked, where, n) if settings.ranking_weight else None,
        **facts,
    )
    if gradient is None:
        return terms, None
    # c(T), and 1 / T because the divergence's gradient is for the tempered logits
    gradient.mul_((weight * t ** (settings.divergence.temperature_power - 1)).unsqueeze(-1))
    ranks = None if order is None else (order, weight * settings.ranking_weight)
    return terms, _KDGradient(gradient, where, back, ranks)


def _teacher_facts(
    teacher: TeacherRows, target: Tensor, best: Optional[Tensor], settings: Settings
) -> Dict[str, Tensor]:
    """Those fields of ``_RowTerms`` that the settings need of the teacher alone."""
    needs, metrics = settings.selection.needs, settings.with_metrics
    facts = {"teacher_bad": teacher.bad()}
    if metrics or settings.adaptive or "teacher_nll" in needs:
        facts["teacher_nll"] = teacher.nll(target)
    if metrics or "teacher_correct" in needs:
        teacher_best = teacher.best()
        if best is not None:
            facts["agree"] = teacher_best == best
        if "teacher_correct" in needs:
            facts["teacher_correct"] = teacher_best == target
    if "teacher_entropy" in needs:
        facts["teacher_entropy"] = teacher.entropy()
    return facts


def _pick(values: Tensor, where: Optional[Tensor]) -> Tensor:
    return values if where is None else values[where]


def _put(values: Tensor, where: Optional[Tensor], n: int) -> Tensor:
    """The values at their places among n rows, 0 elsewhere."""
    if where is None:
        return values
    whole = values.new_zeros(n)
    whole[where] = values
    return whole
