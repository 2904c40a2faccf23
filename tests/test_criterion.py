"""The criterion on its own: flags, sums and what the selection's queue is fed with."""

import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from fairseq.data import Dictionary
from fairseq.logging import metrics
from omegaconf import OmegaConf

from kd_plugin.criterion import (
    KDLabelSmoothedCrossEntropyCriterion,
    KDLabelSmoothedCrossEntropyCriterionConfig,
)
from kd_plugin.objective.answer import Member, RunningAnswer
from kd_plugin.tasks.translation import KDTranslationConfig
from kd_plugin.teachers import Step

PAD = 1


class Student(torch.nn.Module):
    """Logits that do not depend on the input."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, src_tokens):
        return (self.logits,)

    def get_targets(self, sample, net_output):
        return sample["target"]


def criterion(task=None, **flags):
    dictionary = Dictionary()
    for symbol in "abcdef":
        dictionary.add_symbol(symbol)
    if task is None:
        task = Namespace(cfg=KDTranslationConfig(), target_dictionary=dictionary)
    config = KDLabelSmoothedCrossEntropyCriterionConfig(sentence_avg=False)
    for name, value in flags.items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    return KDLabelSmoothedCrossEntropyCriterion.build_criterion(config, task)


def batch(logits=None, seed=0, update=None, is_dummy=False):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(2, 4, 10, generator=generator)
    teacher = torch.randn(8, 10, generator=generator) if logits is None else logits
    target = torch.randint(4, 10, (2, 4), generator=generator)
    target[1, 2:] = PAD
    sample = {
        "id": torch.tensor([30, 31]),
        "net_input": {"src_tokens": None},
        "target": target,
        "ntokens": 6,
        "teacher": RunningAnswer([Member("t.pt", lambda rows: teacher[rows])]),
        "step": Step(update, is_dummy),
    }
    return Student(student), sample


def test_only_real_training_tokens_enter_the_queue():
    c = criterion(kd_selection="global", kd_selection_rate=0.5)
    queue = c.queue
    model, sample = batch(update=0)
    nll = torch.nn.functional.cross_entropy(
        model.logits.flatten(0, 1), sample["target"].flatten(), ignore_index=PAD, reduction="none"
    ).detach()

    c.train()
    c(model, sample)
    queue.commit()
    torch.testing.assert_close(queue.scores, nll[nll > 0])  # no padding

    before = queue.scores.clone()
    c.train()
    c(*batch(update=1, is_dummy=True))
    queue.commit()
    c.eval()
    with torch.no_grad():
        c(*batch())
    queue.commit()
    assert torch.equal(queue.scores, before)

    c.train()
    c(*batch(update=1, seed=1))  # its step overflows, and the trainer begins the update again
    c.train()
    c(*batch(update=1, seed=2))
    queue.commit()
    assert queue.scores.numel() == 12


def logged(log):
    """What becomes of it in the end, by name."""
    with metrics.aggregate() as found:
        KDLabelSmoothedCrossEntropyCriterion.reduce_metrics([log])
    return found.get_smoothed_values()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ignored", [False, True], ids=["padding", "ignored prefix"])
def test_a_batch_of_nothing(ignored, training, count):
    """Neither loss nor gradient nor scores; logged with the keys that other ranks log."""
    flags = dict(kd_selection="global", kd_weight_schedule="linear:0:1:5", report_accuracy=True)
    c = criterion(ignore_prefix_size=4 if ignored else 0, **flags).train(training)
    model, sample = batch(update=1)
    _, _, full = criterion(**flags).train(training)(model, sample)
    if not ignored:
        sample["target"][:] = PAD
        sample["ntokens"] = 0
    loss, sample_size, log = c(model, sample)
    loss.backward()
    assert loss == 0 and sample_size == (6 if ignored else 0)
    assert (model.logits.grad == 0).all()
    assert log.keys() == full.keys()
    c.queue.commit()
    assert not c.queue.scores.numel()
    found = logged(log)
    assert "kd_loss" not in found and all(math.isfinite(value) for value in found.values())
    count("batches without a token")


@pytest.mark.parametrize(
    "flags",
    [dict(kd_selection="teacher-correct"), dict(kd_selection="batch", kd_selection_rate=0.05)],
    ids=lambda flags: flags["kd_selection"],
)
def test_a_batch_of_which_no_token_is_selected(flags, count):
    """Plain cross-entropy of full weight."""
    model, sample = batch(update=1)
    # sure of what is never the reference
    sample["teacher"].members[0] = Member("t.pt", lambda rows: torch.eye(10)[0].expand(8, 10)[rows])
    loss, _, log = criterion(label_smoothing=0.1, kd_weight=0.9, **flags).train()(model, sample)
    lprobs = torch.log_softmax(model.logits, -1).flatten(0, 1)
    expected, _ = label_smoothed_nll_loss(lprobs, sample["target"].flatten(), 0.1, PAD)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, model.logits)
    (expected_gradient,) = torch.autograd.grad(expected, model.logits)
    torch.testing.assert_close(gradient, expected_gradient)
    assert log["kd_tokens"] == 0 and logged(log)["kd_selected"] == 0
    assert "kd_loss" not in logged(log)
    count("batches of which no token is selected")


def test_schedules_follow_the_updates():
    c = criterion(
        kd_weight_schedule="linear:0:1:10", kd_temperature_schedule="cosine:1:3:4"
    ).train()
    for update, weight, temperature in ((0, 0.0, 1.0), (2, 0.2, 2.0), (10, 1.0, 3.0)):
        _, _, log = c(*batch(update=update))
        assert log["kd_weight"] / log["kd_tokens"] == pytest.approx(weight)
        assert log["kd_temperature"] / log["kd_temperature_tokens"] == pytest.approx(temperature)


def test_a_queue_that_selects_logs_its_share():
    c = criterion(kd_selection="teacher-correct").train()
    _, _, log = c(*batch(update=0))
    assert 0 <= log["kd_tokens"] <= log["kd_candidates"] == 6


@pytest.mark.parametrize("training", [True, False])
def test_ranking_is_logged_apart(training):
    """Per distilled token; the loss has it times its weight and the token's."""
    losses, logs = [], []
    for weight in (0.0, 2.0):
        c = criterion(kd_ranking_weight=weight, kd_weight=0.7).train(training)
        loss, _, log = c(*batch(update=0))
        losses.append(loss)
        logs.append(log)
    assert "kd_ranking" not in logs[0]
    assert (losses[1] - losses[0]).item() == pytest.approx(1.4 * logs[1]["kd_ranking"].item())
    assert logged(logs[1])["kd_ranking"] == pytest.approx(
        logs[1]["kd_ranking"].item() / 6, abs=1e-3
    )
    assert logged(logs[1])["kd_loss"] == logged(logs[0])["kd_loss"]


def test_the_prefix_is_ignored():
    model, sample = batch(update=0)
    c = criterion(ignore_prefix_size=2).train()
    loss, _, log = c(model, sample)
    loss.backward()
    assert log["kd_tokens"] == 2
    assert (model.logits.grad[:, :2] == 0).all() and (model.logits.grad[0, 2:] != 0).any()


def test_a_teacher_that_is_not_finite_is_named_with_the_samples():
    logits = torch.zeros(8, 10)
    logits[5, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"t\.pt.*\[31\]"):
        criterion().train()(*batch(logits, update=0))


def test_the_shipped_yaml_has_every_field():
    path = Path(__file__).parents[1] / "recipes" / "config" / "kd_translation.yaml"
    shipped = OmegaConf.load(str(path))
    flags = set(KDLabelSmoothedCrossEntropyCriterionConfig.__dataclass_fields__)
    assert set(shipped.criterion) | {"sentence_avg", "ddp_backend"} == flags
    teacher = {f for f in KDTranslationConfig.__dataclass_fields__ if f.startswith("teacher_")}
    assert teacher == {f for f in shipped.task if f.startswith("teacher_")}
