"""Numbers that go bad: training stays right, or stops with a sentence."""

import math
from typing import Any, Dict

import pytest
import torch

from kd_plugin import divergences, objective
from kd_plugin.cache.writer import teacher_rows
from kd_plugin.divergences import divergence
from kd_plugin.objective import Settings
from kd_plugin.signal import CachedSignal, Dense, Member, TeacherSignal

# a teacher that rules symbols out

V = 9


def kl(p, q):
    return sum(a * (a / b).log() for a, b in zip(p, q) if a > 0)


def by_definition(name, teacher, student, k, tail, temperature):
    """The divergence of one row, outcome by outcome; differentiable in float64."""
    p, q = (torch.softmax(z / temperature, -1) for z in (teacher, student))
    top = p.topk(k).indices
    rest = torch.ones(V, dtype=torch.bool).scatter(0, top, False)
    p, q = ([part[top], part[rest].sum()[None]] for part in (p, q))
    p, q = (torch.cat(part if tail == "bucket" and k < V else part[:1]) for part in (p, q))
    p, q = p / p.sum(), q / q.sum()
    if name in ("reverse-kl", "logit-mse"):  # over the teacher's support
        alive = p > 0
        if name == "logit-mse":
            d = (student - teacher)[top[alive]]
            return (d - d.mean()).pow(2).mean() / 2
        p, q = p[alive], q[alive] / q[alive].sum()

    def mixed(share):
        return share * p + (1 - share) * q

    return {
        "forward-kl": lambda: kl(p, q),
        "reverse-kl": lambda: kl(q, p),
        "js": lambda: (kl(p, mixed(0.5)) + kl(q, mixed(0.5))) / 2,
        "tvd": lambda: (p - q).abs().sum() / 2,
        "skew-kl": lambda: kl(p, mixed(0.1)),
        "skew-reverse-kl": lambda: kl(q, mixed(0.9)),
    }[name]()


def cached(teacher, target, k, temperatures):
    """What the teacher says after a way over the disk, in half precision."""
    rows: Dict[str, Any] = teacher_rows(Dense(teacher), target, k, temperatures)
    rows["symbols"] = rows["symbols"].astype("i4")
    real = torch.ones(1, len(target), dtype=torch.bool)
    tensors = {name: torch.from_numpy(array) for name, array in rows.items()}
    return CachedSignal(tensors, real, temperatures, k == V)


@pytest.mark.parametrize("name", divergences.NAMES)
def test_symbols_that_the_teacher_rules_out(name, count):
    """-inf logits, of none to all but one symbol: value and gradient as defined, no NaN."""
    generator = torch.Generator().manual_seed(0)
    rows = 4 * V
    student, teacher = torch.randn(2, rows, V, generator=generator, dtype=torch.float64) * 2
    for row in range(rows):
        teacher[row, torch.randperm(V, generator=generator)[: row % V]] = -math.inf
    # the reference, too, may be one of them
    target = torch.randint(0, V, (rows,), generator=generator)
    assert teacher.gather(-1, target[:, None]).isinf().any()
    online = TeacherSignal([Member("t", lambda rows: teacher[rows])])

    for tail, k, temperature in (
        (tail, k, temperature)
        for tail in ("bucket", "renormalise")
        for k in (1, 3, V)
        for temperature in (1.0, 2.0)
    ):
        if name == "logit-mse" and (tail == "bucket" or temperature != 1):
            continue
        z = student.clone().requires_grad_()
        expected = torch.stack(
            [by_definition(name, p, q, k, tail, temperature) for p, q in zip(teacher, z)]
        )
        scale = temperature ** divergence(name).temperature_power
        (expected_gradient,) = torch.autograd.grad(scale * expected.sum(), z)
        signals = {
            "online": (online, dict(rtol=1e-4, atol=1e-5)),
            "cached": (cached(teacher, target, k, (1.0, 2.0)), dict(rtol=4e-3, atol=4e-3)),
        }
        if k == V:
            signals["online, not cut"] = signals["online"]
        for way, (signal, tolerance) in signals.items():
            settings = Settings(
                *(1.0, 0.0, temperature, 0.0, divergence(name)),
                top_k=0 if way == "online, not cut" else k,
                tail=tail,
                with_metrics=True,
            )
            where = "{}, {}, top {}, temperature {}".format(way, tail, k, temperature)
            z = student.float().requires_grad_()
            terms = objective.distillation_objective(z, target, torch.arange(rows), signal, settings)
            (gradient,) = torch.autograd.grad(terms.loss, z)
            torch.testing.assert_close(terms.kd.double(), expected, msg=where, **tolerance)
            torch.testing.assert_close(gradient.double(), expected_gradient, msg=where, **tolerance)
            count("divergences of a teacher that rules symbols out, in value and gradient")


def test_of_a_teacher_with_few_possible_symbols_the_cache_keeps_no_rest():
    """Though nothing notes it: at temperature 1 the rest is one minus the K's sum, but never 0."""
    teacher = torch.tensor([[0.5, 0.1, -0.3, *[-math.inf] * (V - 3)]], dtype=torch.float64)
    student = torch.randn(1, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first = torch.tensor([0])
    settings = Settings(1.0, 0.0, divergence=divergence("reverse-kl"))
    signal = cached(teacher, first, 4, ())
    terms = objective.distillation_objective(student, first, first, signal, settings)
    expected = by_definition("reverse-kl", teacher[0], student[0], 4, "bucket", 1.0)
    torch.testing.assert_close(terms.kd[0], expected, rtol=4e-3, atol=4e-3)
