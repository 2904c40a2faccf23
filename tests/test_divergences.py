"""Every divergence against an independent float64 computation, its limits, and its edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_plugin.objective import divergences
from kd_plugin.objective.answer import Dense
from kd_plugin.objective.divergences import NAMES, distribution, divergence
from kd_plugin.objective.topk import cut


def kl(p, q):
    """Sum over p > 0, written without the tricks of the implementation."""
    log_p, log_q = p.clamp(min=1e-300).log(), q.clamp(min=1e-300).log()
    return torch.where(p > 0, p * (log_p - log_q), 0 * p).sum(-1)


REFERENCE = {
    "forward-kl": lambda p, q, x: kl(p, q),
    "reverse-kl": lambda p, q, x: kl(q, p),
    "js": lambda p, q, b: b * kl(p, b * p + (1 - b) * q) + (1 - b) * kl(q, b * p + (1 - b) * q),
    "tvd": lambda p, q, x: (p - q).abs().sum(-1) / 2,
    "skew-kl": lambda p, q, s: kl(p, s * p + (1 - s) * q),
    "skew-reverse-kl": lambda p, q, s: kl(q, s * q + (1 - s) * p),
}
DEFAULT = {"js": 0.5, "skew-kl": 0.1, "skew-reverse-kl": 0.1}


def case(n=6, v=9, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, n, v, generator=generator, dtype=torch.float64) * scale
    return teacher.to(dtype), student.to(dtype)


def evaluate(name, teacher, student, parameter=None):
    return divergence(name, parameter).function(distribution(teacher), distribution(student))


def by_autograd(name, teacher, student, parameter=None):
    student = student.clone().requires_grad_()
    if name == "logit-mse":
        d = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
        value = d.pow(2).sum(-1) / (2 * student.size(-1))
    else:
        value = REFERENCE[name](torch.softmax(teacher, -1), torch.softmax(student, -1), parameter)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(NAMES),
    n=st.integers(1, 5),
    v=st.integers(2, 30),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    parameter=st.sampled_from([0.1, 0.5, 0.9]),
)
def test_value_and_gradient(name, n, v, seed, scale, parameter):
    teacher, student = case(n, v, seed, scale)
    given_parameter = parameter if divergence(name).parameter else None
    value, gradient = evaluate(name, teacher, student, given_parameter)
    expected, expected_gradient = by_autograd(name, teacher, student, parameter)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-12)


def test_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4)
    teacher = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)
    mixed = (0.375, 0.625)  # half and half
    expected = {
        "forward-kl": 0.5 * math.log(2) + 0.5 * math.log(2 / 3),
        "reverse-kl": 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2),
        "js": 0.5 * (0.5 * math.log(0.5 / mixed[0]) + 0.5 * math.log(0.5 / mixed[1]))
        + 0.5 * (0.25 * math.log(0.25 / mixed[0]) + 0.75 * math.log(0.75 / mixed[1])),
        "tvd": 0.25,
        "skew-kl": 0.5 * math.log(0.5 / 0.275) + 0.5 * math.log(0.5 / 0.725),
        "skew-reverse-kl": 0.25 * math.log(0.25 / 0.475) + 0.75 * math.log(0.75 / 0.525),
        # centred student logits are -/+ log(3)/2
        "logit-mse": 2 * (math.log(3) / 2) ** 2 / 4,
    }
    assert set(expected) == set(NAMES)
    for name, value in expected.items():
        assert evaluate(name, teacher, student)[0].item() == pytest.approx(value, abs=1e-14), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype, small", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_nothing_to_learn_from_an_equal_teacher(name, dtype, small):
    teacher, _ = case(dtype=dtype)
    value, gradient = evaluate(name, teacher, teacher.clone())
    assert value.abs().max() <= small
    assert gradient.abs().max() <= small


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_added_to_the_logits_changes_nothing(name):
    teacher, student = case()
    value, gradient = evaluate(name, teacher, student)
    shifted = evaluate(name, teacher + 3.0, student - 5.0)
    torch.testing.assert_close(shifted[0], value)
    torch.testing.assert_close(shifted[1], gradient)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(6, dtype=torch.float64))


def test_skew_0_is_kl():
    teacher, student = case()
    for skewed, plain in (("skew-kl", "forward-kl"), ("skew-reverse-kl", "reverse-kl")):
        for found, expected in zip(
            evaluate(skewed, teacher, student, 0.0), evaluate(plain, teacher, student)
        ):
            torch.testing.assert_close(found, expected)


def test_js_tends_to_the_two_kls():
    teacher, student = case(scale=1.0)
    for beta, over, name in ((1e-7, 1e-7, "forward-kl"), (1 - 1e-7, 1e-7, "reverse-kl")):
        value, gradient = evaluate("js", teacher, student, beta)
        expected, expected_gradient = evaluate(name, teacher, student)
        torch.testing.assert_close(value / over, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradient / over, expected_gradient, rtol=1e-4, atol=1e-6)


def test_t_squared_kl_tends_to_logit_mse():
    teacher, student = case()
    t = 1e4
    value, gradient = evaluate("forward-kl", teacher / t, student / t)
    expected, expected_gradient = evaluate("logit-mse", teacher, student)
    torch.testing.assert_close(t**2 * value, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(t * gradient, expected_gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(name, dtype):
    teacher = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], dtype=dtype)
    student = torch.tensor([[-1e4, 0.0, 1e4], [1e4, -1e4, 0.0]], dtype=dtype)
    for a, b in ((teacher, student), (student, teacher)):
        value, gradient = evaluate(name, a, b)
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
        assert (value > 0).all()
    if name in ("js", "tvd", "skew-kl", "skew-reverse-kl"):
        # disjoint distributions: the largest value there is
        largest = {"js": math.log(2), "tvd": 1.0}.get(name, -math.log(0.1))
        assert evaluate(name, teacher, student)[0][0].item() == pytest.approx(largest, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_symbols_without_teacher_probability(name):
    teacher, student = case(n=4, v=7)
    teacher[0, 2] = teacher[1, :3] = -math.inf
    value, gradient = evaluate(name, teacher, student)
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
    for row in range(4):
        alive = teacher[row] > -math.inf
        if name in ("reverse-kl", "logit-mse"):
            # over the teacher's support, the student renormalised there
            expected, slope = by_autograd(name, teacher[row, alive], student[row, alive])
            expected_gradient = torch.zeros(7, dtype=torch.float64).masked_scatter(alive, slope)
        else:
            expected, expected_gradient = by_autograd(
                name, teacher[row], student[row], DEFAULT.get(name)
            )
        torch.testing.assert_close(value[row], expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradient[row], expected_gradient, rtol=1e-8, atol=1e-12)


def test_rows_that_are_no_distribution_are_nan():
    inf = math.inf
    rows = torch.tensor([[math.nan, 0.0], [inf, 0.0], [-inf, -inf], [0.0, -inf]])
    assert distribution(rows).log_normaliser.isnan().squeeze(-1).tolist() == [True] * 3 + [False]


def test_only_two_families_take_a_parameter():
    parameters = {name: divergence(name).parameter for name in NAMES}
    assert {name: taken.keyword for name, taken in parameters.items() if taken} == {
        "js": "beta",
        "skew-kl": "skew",
        "skew-reverse-kl": "skew",
    }
    with pytest.raises(ValueError, match="no parameter"):
        divergence("tvd", 0.5)


def test_a_parameter_describes_itself():
    for parameter, fine, wrong in (
        (divergences.BETA, [0.01, 0.99], [0.0, 1.0, math.nan]),
        (divergences.SKEW, [0.0, 0.99], [-0.1, 1.0, math.nan]),
    ):
        assert parameter.valid(parameter.default)
        assert all(parameter.valid(x) for x in fine)
        assert not any(parameter.valid(x) for x in wrong)
        assert parameter.help.endswith(f"{parameter.expected} (default: {parameter.default})")
    assert [(p.flag, p.field) for p in divergences.PARAMETERS] == [
        ("--kd-js-beta", "kd_js_beta"),
        ("--kd-skew", "kd_skew"),
    ]


def test_a_value_replaces_the_default():
    teacher, student = case()
    for name, parameter in (("js", divergences.BETA), ("skew-kl", divergences.SKEW)):
        default = evaluate(name, teacher, student)
        same = evaluate(name, teacher, student, parameter.default)
        assert torch.equal(default[0], same[0]) and torch.equal(default[1], same[1])
        assert not torch.equal(default[0], evaluate(name, teacher, student, 0.7)[0])


def test_the_help_names_each_with_its_source():
    for one in divergences.DIVERGENCES:
        assert f"{one.name}, {one.summary}" in divergences.HELP
        assert one.summary.endswith(")") and "20" in one.summary


# top-k


def cut_value_and_gradient(name, teacher, student, k, tail):
    p, q, back = cut(Dense(teacher).top(k, 1.0, tail == "bucket"), distribution(student))
    value, gradient = divergence(name).function(p, q)
    whole = torch.zeros_like(student)
    back.add_to(whole, gradient)
    return value, whole


def cut_by_autograd(name, teacher, student, k, tail):
    student = student.clone().requires_grad_()
    values = []
    for z_t, z_s in zip(teacher, student):
        top = z_t.topk(k).indices
        p, q = torch.softmax(z_t, -1), torch.softmax(z_s, -1)
        kept_p, kept_q = p[top], q[top]
        if tail == "renormalise":
            kept_p, kept_q = kept_p / kept_p.sum(), kept_q / kept_q.sum()
        else:
            rest = torch.ones_like(z_t, dtype=torch.bool).scatter(0, top, False)
            kept_p = torch.cat([kept_p, p[rest].sum()[None]])
            kept_q = torch.cat([kept_q, q[rest].sum()[None]])
        values.append(REFERENCE[name](kept_p, kept_q, DEFAULT.get(name)))
    value = torch.stack(values)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


@pytest.mark.parametrize("name", sorted(REFERENCE))
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_top_k(name, tail, k):
    teacher, student = case()
    value, gradient = cut_value_and_gradient(name, teacher, student, k, tail)
    expected, expected_gradient = cut_by_autograd(name, teacher, student, k, tail)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_top_v_is_the_whole_vocabulary(name, tail):
    teacher, student = case()
    for found, expected in zip(
        cut_value_and_gradient(name, teacher, student, 9, tail), evaluate(name, teacher, student)
    ):
        torch.testing.assert_close(found, expected)


def test_logit_mse_of_the_top_k_divides_by_2k():
    teacher, student = case(n=1)
    top = teacher[0].topk(3).indices
    d = student[0, top] - teacher[0, top]
    d = d - d.mean()
    value, gradient = cut_value_and_gradient("logit-mse", teacher, student, 3, "renormalise")
    assert value.item() == pytest.approx((d**2).sum().item() / 6)
    assert gradient[0, top].tolist() == pytest.approx((d / 3).tolist())


def test_the_bucket_of_a_certain_teacher_is_empty_and_harmless():
    teacher = torch.tensor([[0.0, 1.0, -math.inf, -math.inf]], dtype=torch.float64)
    _, student = case(n=1, v=4)
    value, gradient = cut_value_and_gradient("forward-kl", teacher, student, 2, "bucket")
    expected, expected_gradient = evaluate("forward-kl", teacher, student)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def bucket_by_autograd(name, teacher, student, k):
    """In log space and float64: the rest is a logsumexp, whatever is left of it."""
    student = student.clone().requires_grad_()
    top = teacher.topk(k).indices
    log_p, log_q = [
        torch.log_softmax(
            torch.cat([z.gather(-1, top), z.scatter(-1, top, -math.inf).logsumexp(-1, True)], -1),
            dim=-1,
        )
        for z in (teacher, student)
    ]
    if name == "forward-kl":
        value = (log_p.exp() * (log_p - log_q)).sum(-1)
    else:
        value = REFERENCE[name](log_p.exp(), log_q.exp(), DEFAULT.get(name))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


@pytest.mark.parametrize("name", ["forward-kl", "reverse-kl", "js", "tvd"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("gap", [0.0, 15.0, 20.0, 40.0, 60.0, 80.0, 200.0])
def test_a_bucket_of_which_the_student_leaves_little(name, temperature, gap):
    """In float32, a student that gives the bucket e^-gap of its mass: nothing else suffers."""
    teacher, student = case(n=4, scale=1.0, dtype=torch.float32)
    student.scatter_add_(-1, teacher.topk(2).indices, torch.full((4, 2), gap))
    teacher, student = teacher / temperature, student / temperature
    value, gradient = cut_value_and_gradient(name, teacher, student, 2, "bucket")
    expected = bucket_by_autograd(name, teacher.double(), student.double(), 2)
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=1e-3, atol=1e-5)


def test_the_example_of_the_module():
    import doctest

    from kd_plugin.objective import divergences

    found = doctest.testmod(divergences, extraglobs={"torch": torch})
    assert found.attempted >= 4 and not found.failed
