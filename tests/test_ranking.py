"""TIE's ranking term against the definition, written out in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objective import answer_of, distillation_objective, random_case

from kd_plugin.errors import UserError
from kd_plugin.objective.answer import CachedAnswer
from kd_plugin.objective.divergences import distribution
from kd_plugin.objective.ranking import likeliest
from kd_plugin.objective.selection import Selection

ROWS = torch.arange(7)


def reference(student, teacher, k):
    """R of one row, as the paper has it."""
    p, q = torch.softmax(teacher.double(), -1), torch.softmax(student.double(), -1)
    t = sorted(range(len(p)), key=lambda v: -p[v].item())[:k]
    s = sorted(range(len(q)), key=lambda v: -q[v].item())[:k]
    total = torch.zeros((), dtype=torch.float64)
    for i in t:
        total = total + torch.relu(q[i] - q[t[0]])
        for j in s:
            if p[i] > p[j]:
                total = total + torch.relu(q[j] - q[i])
    return total


def test_by_hand():
    """The teacher has a before b before c; the student c before b before a."""
    teacher = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
    student = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64).log().requires_grad_()
    terms = distillation_objective(
        *(student, torch.tensor([0]), torch.tensor([0]), answer_of(teacher)),
        *(0.0, 1.0),
        ranking_weight=2.0,
        ranking_k=2,
    )
    # t = a, b; s = c, b. (b - a) + a: (c - a) + (b - a), b: (c - b)
    expected = 0.1 + (0.3 + 0.1) + 0.2
    assert terms.ranking.item() == pytest.approx(expected, abs=1e-12)
    assert terms.loss.item() == pytest.approx(terms.kd.item() + 2 * expected, abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 11])
def test_value_and_gradient_in_float64(k):
    """Beside a divergence, times the token's weight."""
    student, teacher, target = random_case()
    how = {"ce_weight": 0.3, "kd_weight": 0.6, "eps": 0.1}
    rows = torch.tensor([0, 2, 3, 6])
    answer = answer_of(teacher)
    plain = distillation_objective(student, target, rows, answer, **how)
    terms = distillation_objective(
        student, target, rows, answer, **how, ranking_weight=1.5, ranking_k=k
    )
    each = torch.stack([reference(student[i], teacher[i], k) for i in rows])
    torch.testing.assert_close(terms.ranking, each.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.kd, plain.kd, rtol=0, atol=0)
    expected = plain.loss + 0.6 * 1.5 * each.sum()
    torch.testing.assert_close(terms.loss, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(terms.loss, student, retain_graph=True)
    more = torch.autograd.grad(0.6 * 1.5 * each.sum(), student)[0]
    (without,) = torch.autograd.grad(plain.loss, student)
    torch.testing.assert_close(gradient, without + more, rtol=1e-10, atol=1e-12)
    assert (gradient[[1, 4, 5]] == 0).all()


def test_a_student_that_is_its_teacher_has_nothing_to_rank():
    _, teacher, target = random_case()
    student = teacher.clone().requires_grad_()
    terms = distillation_objective(
        student, target, ROWS, answer_of(teacher), 0.0, 1.0, ranking_weight=1.0
    )
    assert (terms.ranking == 0).all()
    terms.loss.backward()
    assert student.grad.abs().max() < 1e-12


def test_tokens_that_are_not_selected_are_not_ranked():
    student, teacher, target = random_case()
    how = {"selection": Selection("batch", 0.5), "ranking_weight": 1.0, "ranking_k": 3}
    terms = distillation_objective(student, target, ROWS, answer_of(teacher), **how)
    chosen = terms.selected
    assert 0 < chosen.sum() < 7
    assert (terms.ranking[~chosen] == 0).all() and (terms.ranking[chosen] > 0).any()
    some = chosen.nonzero().squeeze(-1)
    alone = distillation_objective(
        student, target, some, answer_of(teacher), ranking_weight=1.0, ranking_k=3
    )
    torch.testing.assert_close(terms.ranking[chosen], alone.ranking)


def test_a_batch_is_the_sum_of_its_rows():
    student, teacher, target = random_case()

    def of(rows):
        terms = distillation_objective(
            student, target, rows, answer_of(teacher), ranking_weight=1.0, ranking_k=4
        )
        return terms.loss, torch.autograd.grad(terms.loss, student)[0]

    whole = of(ROWS)
    parts = [of(torch.tensor([i])) for i in reversed(range(7))]
    for one, found in zip(whole, zip(*parts)):
        torch.testing.assert_close(sum(found), one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "sample"])
def test_a_cache_with_as_many_symbols_is_enough(tail):
    """Of a symbol that it does not hold, the order is known: it is below."""
    student, teacher, target = random_case(v=40)
    log_p, k = torch.log_softmax(teacher, -1), 6
    top, symbols = log_p.topk(k, -1)
    arrays = {
        "symbols": symbols.int(),
        "log_probs": top,
        "reference": log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "drawn": symbols[:, -2:].int(),
        "tempered_entropy": -(log_p.exp() * log_p).sum(-1),
    }
    cached = CachedAnswer(arrays, torch.ones(1, 7, dtype=torch.bool), [], whole=False)
    found, gradients = [], []
    for answer, kind in ((answer_of(teacher), "bucket"), (cached, tail)):
        terms = [
            distillation_objective(
                student, target, ROWS, answer, tail=kind, ranking_weight=w, ranking_k=k
            )
            for w in (0.0, 1.0)
        ]
        without, more = [torch.autograd.grad(one.loss, student)[0] for one in terms]
        found.append(terms[1].ranking)
        gradients.append(more - without)
    assert (found[0] > 0).any()
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)


def test_half_precision_logits_are_ranked_in_float32():
    student, teacher, target = random_case(v=50, dtype=torch.float32)
    low = student.detach().half().requires_grad_()
    wide = low.detach().float().requires_grad_()
    for z in (low, wide):
        distillation_objective(
            z, target, ROWS, answer_of(teacher), ranking_weight=1.0
        ).loss.backward()
    torch.testing.assert_close(low.grad, wide.grad.half(), rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 900), st.integers(0, 2**31))
def test_the_likeliest_are_those_of_topk(k, v, seed):
    k = min(k, v)
    logits = torch.randn(3, v, generator=torch.Generator().manual_seed(seed))
    logits[0, : v // 2] = -math.inf
    expected = logits.topk(k, -1)
    assert torch.equal(logits.gather(-1, likeliest(logits, k)), expected.values)
    assert torch.equal(likeliest(logits, k)[1:], expected.indices[1:])


def test_a_symbol_without_probability_is_below_all_others():
    teacher = torch.tensor([[0.0, 1.0, -math.inf, -math.inf]])
    student = torch.tensor([[0.0, 0.0, 3.0, 0.0]], requires_grad=True)
    terms = distillation_objective(
        *(student, torch.tensor([0]), torch.tensor([0]), answer_of(teacher)),
        ranking_weight=1.0,
        ranking_k=4,
    )
    q = torch.softmax(student.detach(), -1)[0]
    # the first sum: the third is above the first by 1 - 2; the second sum: above both others
    assert terms.ranking.item() == pytest.approx(3 * (q[2] - q[1]).item(), abs=1e-6)
    terms.loss.backward()
    assert student.grad.isfinite().all()
    assert distribution(student).probabilities.shape == (1, 4)


def test_flags_at_fault_are_told_together():
    from test_plan import plan as criterion_of

    with pytest.raises(UserError) as refused:
        criterion_of(kd_ranking_weight=-1.0, kd_ranking_top_k=0, kd_temperature=2.0, kd_weight=2.0)
    for message in (
        "--kd-ranking-weight must be a number >= 0, got -1.0",
        "--kd-ranking-top-k must be at least 1, got 0",
        "--kd-ranking-weight compares probabilities at temperature 1",
        "--kd-weight must be a number from 0 to 1",
    ):
        assert message in str(refused.value)
    with pytest.raises(UserError, match="--kd-ranking-top-k has no effect with --kd-ranking-weigh"):
        criterion_of(kd_ranking_top_k=3)
