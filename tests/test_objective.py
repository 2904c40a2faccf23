"""Value and gradient of the objective against independent float64 references."""

import math

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_plugin.errors import UserError
from kd_plugin.objective import answer as answers
from kd_plugin.objective import chunks as objective
from kd_plugin.objective import divergences
from kd_plugin.objective.answer import CachedAnswer, Member, NotFiniteTeacherError, RunningAnswer
from kd_plugin.objective.chunks import Settings
from kd_plugin.objective.divergences import divergence
from kd_plugin.objective.selection import Selection


def distillation_objective(
    student, target, rows, answer, ce_weight=None, kd_weight=0.5, temperature=1.0, eps=0.0, **more
):
    settings = Settings(kd_weight, ce_weight, temperature, eps, **more)
    return objective.distillation_objective(student, target, rows, answer, settings)


def answer_of(*logits, weights=None):
    weights = weights or [1.0] * len(logits)
    total = sum(weights)
    return RunningAnswer(
        [Member(f"t{i}", lambda rows, z=z: z[rows]) for i, z in enumerate(logits)],
        [math.log(w / total) for w in weights],
    )


def random_case(n=7, v=11, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(n, v, generator=generator, dtype=torch.float64).mul(2).to(dtype)
    teacher = torch.randn(n, v, generator=generator, dtype=torch.float64).mul(2).to(dtype)
    target = torch.randint(0, v, (n,), generator=generator)
    return student.requires_grad_(), teacher, target


def reference_loss(student, teacher, target, rows, ce_weight, kd_weight, temperature, eps):
    """The definition, written out term by term in float64."""
    total = torch.zeros((), dtype=torch.float64)
    v = student.size(-1)
    for i in rows.tolist():
        q = torch.softmax(student[i].double(), -1)
        smoothed = torch.full((v,), eps / (v - 1), dtype=torch.float64)
        smoothed[target[i]] = 1 - eps
        total = total - ce_weight * (smoothed * q.log()).sum()
        p_t = torch.softmax(teacher[i].double() / temperature, -1)
        q_t = torch.softmax(student[i].double() / temperature, -1)
        kl = sum(p * (p / q).log() for p, q in zip(p_t, q_t) if p > 0)
        total = total + kd_weight * temperature**2 * kl
    return total


def test_by_hand():
    # V = 2, one token, the reference is symbol 0, T = 2, no smoothing
    student = torch.tensor([[0.0, 2 * math.log(3.0)]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[2 * math.log(1.0), 0.0]], dtype=torch.float64)
    terms = distillation_objective(
        student, torch.tensor([0]), torch.tensor([0]), answer_of(teacher), 0.25, 0.75, 2.0
    )
    # at T = 1: q = (1/10, 9/10); at T = 2: q = (1/4, 3/4), p = (1/2, 1/2)
    kl = 0.5 * math.log(2.0) + 0.5 * math.log(2.0 / 3.0)
    assert terms.tokens.student_nll.item() == pytest.approx(math.log(10.0), abs=1e-12)
    assert terms.kd.item() == pytest.approx(kl, abs=1e-12)
    assert terms.loss.item() == pytest.approx(0.25 * math.log(10.0) + 0.75 * 4 * kl, abs=1e-12)
    terms.loss.backward()
    # ce: q - [reference]; kd: T * (q_T - p)
    expected = [0.25 * (0.1 - 1) + 0.75 * 2 * (0.25 - 0.5), 0.25 * 0.9 + 0.75 * 2 * 0.25]
    assert student.grad[0].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 1.7, 5.0])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_value_and_gradient_in_float64(temperature, eps):
    student, teacher, target = random_case()
    rows = torch.tensor([0, 2, 3, 6])
    args = (0.3, 0.7, temperature, eps)
    expected = reference_loss(student, teacher, target, rows, *args)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    terms = distillation_objective(student, target, rows, answer_of(teacher), *args)
    (gradient,) = torch.autograd.grad(terms.loss, student)
    torch.testing.assert_close(terms.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)
    assert (gradient[[1, 4, 5]] == 0).all()


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_without_kd_it_is_fairseqs_label_smoothed_cross_entropy(eps):
    student, teacher, target = random_case(n=9, v=23, dtype=torch.float32)
    target[4] = target[7] = 1  # padding
    stock, stock_nll = label_smoothed_nll_loss(
        torch.log_softmax(student, -1), target, eps, ignore_index=1
    )
    (expected,) = torch.autograd.grad(stock, student)
    rows = target.ne(1).nonzero().squeeze(-1)
    terms = distillation_objective(student, target, rows, answer_of(teacher), 1.0, 0.0, eps=eps)
    (gradient,) = torch.autograd.grad(terms.loss, student)
    torch.testing.assert_close(terms.loss, stock)
    torch.testing.assert_close(terms.tokens.student_nll.sum(), stock_nll)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_student_equal_to_teacher_learns_nothing_from_it():
    student, _, target = random_case(dtype=torch.float32)
    rows = torch.arange(7)
    for temperature in (1.0, 3.0):
        terms = distillation_objective(
            student, target, rows, answer_of(student.detach()), 0.0, 1.0, temperature
        )
        (gradient,) = torch.autograd.grad(terms.loss, student)
        assert (terms.kd == 0).all()
        assert (gradient == 0).all()


@pytest.mark.parametrize("selected", ["batch", "teacher-correct", "teacher-better"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("metrics", [False, True])
def test_tokens_that_are_not_selected_learn_from_the_text_alone(selected, temperature, metrics):
    student, teacher, target = random_case(n=30)
    # what is not selected must not even matter: an infinite divergence there
    rows = torch.arange(2, 30)
    terms = distillation_objective(
        student,
        target,
        rows,
        answer_of(teacher),
        None,
        0.7,
        temperature,
        0.1,
        selection=Selection(selected, 0.3),
        with_metrics=metrics,
    )
    (gradient,) = torch.autograd.grad(terms.loss, student)
    chosen = rows[terms.selected]
    others = rows[~terms.selected]
    assert 0 < len(chosen) < len(rows)
    parts = [
        reference_loss(student, teacher, target, chosen, 1 - 0.7, 0.7, temperature, 0.1),
        reference_loss(student, teacher, target, others, 1.0, 0.0, temperature, 0.1),
    ]
    (expected,) = torch.autograd.grad(sum(parts), student)
    torch.testing.assert_close(terms.loss, sum(parts), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    assert (terms.kd[~terms.selected] == 0).all()


def test_which_tokens_are_selected():
    student, teacher, target = random_case(n=40)
    rows = torch.arange(40)

    def selected(name, rate=0.25):
        return distillation_objective(
            student, target, rows, answer_of(teacher), selection=Selection(name, rate)
        ).selected

    student_nll = torch.nn.functional.cross_entropy(student, target, reduction="none")
    teacher_nll = torch.nn.functional.cross_entropy(teacher, target, reduction="none")
    hardest = student_nll.argsort(descending=True)[:10]
    assert set(selected("batch").nonzero().squeeze(-1).tolist()) == set(hardest.tolist())
    assert selected("teacher-correct").tolist() == (teacher.argmax(-1) == target).tolist()
    assert selected("teacher-better").tolist() == (teacher_nll < student_nll).tolist()


@pytest.mark.parametrize("name", ["global", "teacher-entropy"])
def test_selection_against_the_queue(name):
    student, teacher, target = random_case(n=40)
    rows = torch.arange(40)
    selection = Selection(name, 0.25, queue_size=100)
    args = (student, target, rows, answer_of(teacher), 0.5, 0.5, 2.0)
    first = distillation_objective(*args, selection=selection)
    assert first.selected is None  # nothing to compare with yet
    selection.queue.observe(selection.score(first.tokens))
    selection.queue.commit()
    second = distillation_objective(*args, selection=selection)
    p = torch.softmax(teacher, -1)
    score = {
        "global": torch.nn.functional.cross_entropy(student, target, reduction="none").detach(),
        "teacher-entropy": (p * p.log()).sum(-1),
    }[name]
    # the queue holds these very tokens: the share 1/4 with the highest score
    assert set(second.selected.nonzero().squeeze(-1).tolist()) == set(
        score.argsort(descending=True)[:10].tolist()
    )


def test_padding_does_not_change_what_is_selected():
    student, teacher, target = random_case(n=60)
    rows = torch.arange(0, 60, 2)  # half of the rows are padding
    for name in ("batch", "teacher-correct", "teacher-better"):
        padded = distillation_objective(
            student, target, rows, answer_of(teacher), selection=Selection(name, 0.5)
        )
        alone = distillation_objective(
            student[rows],
            target[rows],
            torch.arange(30),
            answer_of(teacher[rows]),
            selection=Selection(name, 0.5),
        )
        assert padded.selected.tolist() == alone.selected.tolist()
        if name == "batch":
            assert padded.selected.sum() == 15


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("ce_weight", [None, 0.5])
def test_the_adaptive_weight_is_a_constant_to_the_gradient(temperature, ce_weight):
    student, teacher, target = random_case(n=9)
    rows = torch.arange(9)
    terms = distillation_objective(
        student, target, rows, answer_of(teacher), ce_weight, 0.8, temperature, adaptive=True
    )
    (gradient,) = torch.autograd.grad(terms.loss, student)
    with torch.no_grad():
        gap = torch.nn.functional.cross_entropy(
            student, target, reduction="none"
        ) - torch.nn.functional.cross_entropy(teacher, target, reduction="none")
        weight = 0.8 / (1 + torch.exp(-gap))
    torch.testing.assert_close(terms.kd_weight, weight)
    expected = sum(
        reference_loss(
            student,
            teacher,
            target,
            torch.tensor([i]),
            1 - weight[i] if ce_weight is None else ce_weight,
            weight[i],
            temperature,
            0.0,
        )
        for i in range(9)
    )
    torch.testing.assert_close(terms.loss, expected, rtol=1e-12, atol=1e-12)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def test_the_gradient_keeps_its_size_at_high_temperature():
    """T^2 KL tends to the squared difference of centred logits / 2V (Hinton et al., sec. 2.1)."""
    student, teacher, target = random_case()
    rows = torch.arange(7)
    centred = lambda z: z - z.mean(-1, keepdim=True)  # noqa: E731
    limit = (centred(student) - centred(teacher)).pow(2).sum() / (2 * student.size(-1))
    (expected,) = torch.autograd.grad(limit, student)
    terms = distillation_objective(student, target, rows, answer_of(teacher), 0.0, 1.0, 1e4)
    (gradient,) = torch.autograd.grad(terms.loss, student)
    torch.testing.assert_close(terms.loss, limit, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-4)


def test_a_cold_teacher_is_its_argmax():
    student, teacher, target = random_case()
    rows = torch.arange(7)
    cold = 1e-4
    terms = distillation_objective(student, target, rows, answer_of(teacher), 0.0, 1.0, cold)
    log_q = torch.log_softmax(student / cold, -1)
    torch.testing.assert_close(
        terms.kd, -log_q.gather(-1, teacher.argmax(-1, keepdim=True)).squeeze(-1).detach()
    )


def test_an_ensemble_is_the_log_of_its_average():
    student, first, target = random_case()
    second = random_case(seed=5)[1]
    rows = torch.arange(7)
    average = (0.75 * torch.softmax(first, -1) + 0.25 * torch.softmax(second, -1)).log()
    for temperature in (1.0, 2.0):
        args = (0.5, 0.5, temperature)
        both = answer_of(first, second, weights=[3, 1])
        terms = distillation_objective(student, target, rows, both, *args)
        expected = distillation_objective(student, target, rows, answer_of(average), *args)
        torch.testing.assert_close(terms.loss, expected.loss, rtol=1e-12, atol=1e-12)


def test_symbols_without_teacher_mass_add_nothing():
    student, teacher, target = random_case()
    teacher[:, 4] = -math.inf
    rows = torch.arange(7)
    terms = distillation_objective(student, target, rows, answer_of(teacher), 0.5, 0.5, 2.0)
    expected = reference_loss(student, teacher, target, rows, 0.5, 0.5, 2.0, 0.0)
    torch.testing.assert_close(terms.loss, expected, rtol=1e-12, atol=1e-12)
    terms.loss.backward()
    assert torch.isfinite(student.grad).all()


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 20),
    v=st.integers(2, 40),
    chunk=st.integers(1, 200),
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([1.0, 0.5, 2.0]),
    name=st.sampled_from(sorted(set(divergences.NAMES) - {"logit-mse"})),
    tail=st.sampled_from([None, "bucket", "renormalise"]),
    selected=st.sampled_from(["all", "batch", "teacher-correct", "teacher-better"]),
    data=st.data(),
)
def test_chunked_equals_unchunked(n, v, chunk, seed, temperature, name, tail, selected, data):
    student, teacher, target = random_case(n, v, seed)
    keep = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    rows = torch.tensor(keep).nonzero().squeeze(-1)
    args = (target, rows, answer_of(teacher), 0.4, 0.6, temperature, 0.1)
    more = dict(divergence=divergence(name), selection=Selection(selected, 0.4), with_metrics=True)
    if tail is not None:
        more.update(top_k=max(1, v // 3), tail=tail)
    saved = answers._CHUNK_ELEMENTS
    results = []
    for size in (10**9, chunk):
        answers._CHUNK_ELEMENTS = {"cpu": size}
        try:
            terms = distillation_objective(student, *args, **more)
        finally:
            answers._CHUNK_ELEMENTS = saved
        (gradient,) = torch.autograd.grad(terms.loss, student)
        results.append([terms.loss, terms.kd, terms.agree, terms.correct, gradient])
    for whole, parts in zip(*results):
        torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("selected", ["all", "batch", "global", "teacher-better"])
@pytest.mark.parametrize("top_k", [0, 3])
def test_a_chunk_is_a_pure_function(selected, top_k):
    """The same inputs give the same terms and gradient, bit for bit, and are left as they were."""
    student, teacher, target = random_case(n=12, dtype=torch.float32)
    selection = Selection(selected, 0.5)
    if selection.queue is not None:
        selection.queue.observe(torch.tensor([2.0]))
        selection.queue.commit()
    chosen = Settings(top_k=top_k, temperature=2.0, selection=selection, label_smoothing=0.1)
    z = student.detach().clone()
    answer = answer_of(teacher.clone())
    rows = torch.arange(12)

    def ask(index):
        return answer.rows(rows if index is None else rows[index], z)

    whole = selection(objective.TokenStatistics(torch.rand(12))) if selected == "batch" else None
    results = [
        objective._chunk(z, target, ask, chosen, selected=whole, with_gradient=True)
        for _ in range(2)
    ]
    (first, first_gradient), (second, second_gradient) = results
    assert torch.equal(first_gradient, second_gradient)
    for one, other in zip(first, second):
        assert (one is None and other is None) or torch.equal(one, other)
    assert torch.equal(z, student.detach()) and torch.equal(ask(None).logits, teacher)
    # without a gradient: the same terms
    terms, none = objective._chunk(z, target, ask, chosen, selected=whole)
    assert none is None
    assert torch.equal(terms.kd, first.kd) and torch.equal(terms.ce, first.ce)


@pytest.mark.parametrize("name", ["all", "batch", "global", "teacher-entropy", "teacher-correct"])
@pytest.mark.parametrize("metrics", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("size", [1, 40, 10**9])
def test_terms_do_not_depend_on_the_size_of_chunks(name, metrics, dtype, size, monkeypatch):
    """Nor on how many of them the teacher answers in one go."""
    student, teacher, target = random_case(n=30)
    student = student.detach().to(dtype).requires_grad_()
    rows = torch.arange(1, 30)
    selection = Selection(name, 0.3)
    if selection.queue is not None:
        selection.queue.observe(torch.linspace(-3, 6, 20))
        selection.queue.commit()
    results = []
    for elements in (11 * 29, size):
        monkeypatch.setattr(answers, "_CHUNK_ELEMENTS", {"cpu": elements})
        terms = distillation_objective(
            student, target, rows, answer_of(teacher), None, selection=selection, adaptive=True,
            with_metrics=metrics,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(terms.loss, student)
        results.append([terms.loss, *terms.tokens, *terms[2:], gradient])
    for whole, parts in zip(*results):
        assert (whole is None) == (parts is None)
        if whole is not None:
            torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("name", divergences.NAMES)
@pytest.mark.parametrize("selected", ["all", "batch", "global", "teacher-better"])
@pytest.mark.parametrize("top_k", [0, 3])
def test_no_rows_for_any_divergence_and_selection(name, selected, top_k):
    student, teacher, target = random_case()
    terms = distillation_objective(
        student,
        target,
        torch.empty(0, dtype=torch.long),
        answer_of(teacher),
        divergence=divergence(name),
        selection=Selection(selected),
        top_k=top_k,
        tail="renormalise",
        adaptive=True,
        with_metrics=True,
    )
    terms.loss.backward()
    assert terms.loss == 0 and (student.grad == 0).all()
    assert terms.kd.shape == terms.tokens.teacher_nll.shape == (0,)


def test_a_batch_is_the_sum_of_its_rows_in_any_order():
    student, teacher, target = random_case(n=12)

    def loss_and_gradient(rows):
        terms = distillation_objective(
            student, target, rows, answer_of(teacher), 0.5, 0.5, 2.0, 0.1
        )
        return terms.loss, torch.autograd.grad(terms.loss, student)[0]

    loss, gradient = loss_and_gradient(torch.arange(12))
    parts = [loss_and_gradient(torch.tensor([i])) for i in reversed(range(12))]
    torch.testing.assert_close(sum(part[0] for part in parts), loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(part[1] for part in parts), gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_are_computed_on_in_float32(dtype):
    student, teacher, target = random_case(n=16, v=50, dtype=torch.float32)
    low = student.detach().to(dtype).requires_grad_()
    rows = torch.arange(16)
    wide = low.detach().float().requires_grad_()
    for z in (low, wide):
        distillation_objective(z, target, rows, answer_of(teacher), 0.5, 0.5, 2.0).loss.backward()
    assert low.grad.dtype == dtype
    torch.testing.assert_close(low.grad, wide.grad.to(dtype), rtol=0, atol=0)


def test_a_half_precision_gradient_survives_until_the_loss_scale_is_applied():
    """Probabilities of 1e-9 vanish in half precision, but not times fairseq's loss scale."""
    v, scale = 2**15, 2.0**15
    student = torch.zeros(2, v).half().requires_grad_()
    teacher = torch.zeros(2, v)
    teacher[:, 0] = 30.0
    rows = torch.arange(2)
    # weight 1e-4 stands for the tiny gradients of a nearly converged student
    args = (torch.tensor([5, 5]), rows, answer_of(teacher), 0.0, 1e-4)
    (distillation_objective(student, *args).loss * scale).backward()
    wide = torch.zeros(2, v, dtype=torch.float64, requires_grad=True)
    (distillation_objective(wide, *args).loss * scale).backward()
    assert (student.grad[:, 1:] > 0).all()
    torch.testing.assert_close(student.grad.double(), wide.grad, rtol=2e-3, atol=0)
    # the same numbers without the scale are below half's smallest
    assert (wide.grad / scale).half()[0, 1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_incoming_gradient_multiplies(dtype):
    student, teacher, target = random_case(dtype=torch.float32)
    rows = torch.arange(7)
    gradients = []
    for factor in (1.0, 4.0, 0.0):
        z = student.detach().to(dtype).requires_grad_()
        terms = distillation_objective(z, target, rows, answer_of(teacher), 0.5, 0.5)
        (terms.loss * factor).backward()
        gradients.append(z.grad)
    torch.testing.assert_close(gradients[1], gradients[0] * 4)
    assert (gradients[2] == 0).all()


def test_metrics_against_a_direct_computation():
    student, teacher, target = random_case(n=20)
    rows = torch.arange(3, 20)
    terms = distillation_objective(
        student, target, rows, answer_of(teacher), 0.5, 0.5, 2.0, with_metrics=True
    )
    log_p = torch.log_softmax(teacher, -1)
    nll = -log_p.gather(-1, target[:, None]).squeeze(-1)
    torch.testing.assert_close(terms.tokens.teacher_nll, nll[rows])
    assert terms.agree.tolist() == (student.argmax(-1) == teacher.argmax(-1))[rows].tolist()
    assert terms.correct.tolist() == (student.argmax(-1) == target)[rows].tolist()


def test_without_a_teacher_there_is_only_cross_entropy():
    student, _, target = random_case()
    terms = distillation_objective(
        student, target, torch.arange(7), None, 1.0, 0.5, with_metrics=True
    )
    expected = torch.nn.functional.cross_entropy(student, target, reduction="sum")
    torch.testing.assert_close(terms.loss, expected)
    assert terms.kd is None and terms.tokens.teacher_nll is None and terms.agree is None
    assert terms.selected is None and terms.kd_weight is None


def test_no_rows_at_all():
    student, teacher, target = random_case()
    rows = torch.empty(0, dtype=torch.long)
    terms = distillation_objective(student, target, rows, answer_of(teacher), 0.5, 0.5)
    terms.loss.backward()
    assert terms.loss == 0 and (student.grad == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_teacher_that_is_not_finite_is_named_with_its_rows(value):
    student, teacher, target = random_case()
    broken = teacher.clone()
    broken[5, 3] = value
    with pytest.raises(NotFiniteTeacherError) as error:
        distillation_objective(
            student, target, torch.arange(7), answer_of(teacher, broken), 0.5, 0.5
        )
    assert isinstance(error.value, UserError)
    assert "teacher t1 gave NaN" in str(error.value)
    assert error.value.teachers == "t1"
    assert error.value.rows.tolist() == [5]


def test_a_student_that_is_not_finite_is_left_to_the_loss_scaler():
    student, teacher, target = random_case(dtype=torch.float32)
    with torch.no_grad():
        student[2, 2] = math.inf
    terms = distillation_objective(student, target, torch.arange(7), answer_of(teacher), 0.5, 0.5)
    assert not torch.isfinite(terms.loss)


def test_it_is_not_differentiated_twice():
    student, teacher, target = random_case()
    loss = distillation_objective(
        student, target, torch.arange(7), answer_of(teacher), 0.5, 0.5
    ).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


@pytest.mark.parametrize("name", divergences.NAMES)
@pytest.mark.parametrize("temperature, temperatures", [(1.0, []), (2.0, [2.0])])
def test_a_blank_answer_is_harmless(name, temperature, temperatures):
    """Of a dummy batch: fairseq multiplies its loss by 0, which needs a finite one."""
    student, _, target = random_case(4, 9, 0)
    real = torch.tensor([[True, True], [True, False]])
    blank = CachedAnswer.blank(real, 3, temperatures, False)
    mse = name == "logit-mse"
    settings = Settings(
        temperature=1.0 if mse else temperature,
        divergence=divergence(name),
        tail="renormalise" if mse else "bucket",
        with_metrics=True,
    )
    terms = objective.distillation_objective(student, target, torch.arange(3), blank, settings)
    terms.loss.backward()
    for found in (terms.loss, terms.kd, student.grad, terms.tokens.teacher_nll):
        assert found.isfinite().all()
