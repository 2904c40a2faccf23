import math

import pytest

from kd_plugin.objective.schedules import constant, parse


def weight(text):
    return parse(text, "--kd-weight-schedule", lambda x: 0 <= x <= 1, "from 0 to 1")


def test_linear():
    schedule = weight("linear:0.2:1:10")
    assert [schedule(u) for u in (0, 5, 10, 11)] == pytest.approx([0.2, 0.6, 1.0, 1.0])


def test_cosine():
    schedule = weight("cosine:1:0:8")
    assert [schedule(u) for u in (0, 2, 4, 8, 100)] == pytest.approx(
        [1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, 0.0, 0.0]
    )


def test_outside_training_it_is_over():
    assert weight("linear:0:0.75:10")(None) == 0.75
    assert constant(0.3)(None) == constant(0.3)(0) == constant(0.3)(10**6) == 0.3


@pytest.mark.parametrize(
    "text",
    [
        *("linear", "linear:0:1", "linear:0:1:0", "linear:0:2:5", "linear:a:1:5", "linear:nan:1:5"),
        *("step:0:1:5", "cosine:0:1:2.5"),
    ],
)
def test_anything_else_is_refused_with_the_flag(text):
    with pytest.raises(ValueError, match="--kd-weight-schedule must be .*from 0 to 1.*" + text):
        weight(text)
