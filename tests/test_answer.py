import math

import torch

from kd_plugin.objective.answer import Member, RunningAnswer


def test_rows_are_computed_only_when_asked_for():
    asked = []

    def logits(rows):
        asked.append(rows.tolist())
        return torch.zeros(len(rows), 3)

    answer = RunningAnswer([Member("t", logits)])
    assert asked == []
    assert answer.logits(torch.tensor([4, 2])).shape == (2, 3)
    assert asked == [[4, 2]]


def test_logits_are_at_least_float32():
    half = RunningAnswer([Member("t", lambda rows: torch.zeros(len(rows), 3).half())])
    double = RunningAnswer([Member("t", lambda rows: torch.zeros(len(rows), 3).double())])
    rows = torch.tensor([0])
    assert half.logits(rows).dtype == torch.float32
    assert double.logits(rows).dtype == torch.float64


def test_an_ensemble_averages_probabilities():
    first, second = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[0.0, -math.inf, 1.0]])
    answer = RunningAnswer(
        [Member("a", lambda rows: first[rows]), Member("b", lambda rows: second[rows])],
        [math.log(0.2), math.log(0.8)],
    )
    p = torch.softmax(answer.logits(torch.tensor([0])), -1)
    expected = 0.2 * torch.softmax(first, -1) + 0.8 * torch.softmax(second, -1)
    torch.testing.assert_close(p, expected)


def test_names_the_members_that_are_not_finite():
    fine = torch.tensor([[1.0, -math.inf]])
    answer = RunningAnswer(
        [
            Member("fine", lambda rows: fine[rows]),
            Member("nan", lambda rows: fine[rows] * math.nan),
            Member("empty", lambda rows: torch.full((1, 2), -math.inf)[rows]),
        ],
        [math.log(1 / 3)] * 3,
    )
    assert answer.not_finite(torch.tensor([0])) == ["nan", "empty"]
