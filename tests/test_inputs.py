"""Inputs that the student writes: what they are, what is learnt, and what is left alone."""

import copy
import logging
import math

import pytest
import torch
from trainer import Training, criterion_config, new_task, write_data, write_teacher

from kd_plugin.errors import UserError
from kd_plugin.objective import schedules
from kd_plugin.teachers import Step

PAD, EOS = 1, 2
ALWAYS = {"kd_inputs_rate": 1.0}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"), knowing=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "data")


def training(data, teacher, task=None, **criterion):
    return Training(data, {"teacher_checkpoint_path": teacher, **(task or {})}, **criterion).begin()


def written(begun, batch, update=0, number=0):
    """The batch as it would be trained on."""
    return begun.task.inputs(batch, Step(update=update), number)[0]


def likely_to_end(begun, bias):
    """Let the student end its sentences always or never."""
    decoder = begun.model.decoder
    own = decoder.output_projection
    decoder.output_projection = torch.nn.Linear(own.in_features, own.out_features)
    decoder.output_projection.weight.data = own.weight.data
    decoder.output_projection.bias.data.zero_()[EOS] = bias
    return begun


def next_symbols(model, sample, i, inputs):
    """What the student says after ``inputs`` of sentence i, one row for each, without padding."""
    source = sample["net_input"]["src_tokens"][i]
    source = source[source.ne(PAD)][None]
    model.eval()
    with torch.no_grad():
        return model(source, torch.tensor([source.size(1)]), torch.tensor([inputs]))[0][0]


def by_hand(model, sample):
    """Each sentence's inputs and targets under argmax, as lists."""
    found = []
    for i, target in enumerate(sample["target"]):
        reference = target[target.ne(PAD)].tolist()
        logits = next_symbols(model, sample, i, [EOS, *reference[:-1]])
        allowed = [v for v in range(logits.size(1)) if v not in (PAD, EOS)]
        own = [max(allowed, key=lambda v: float(row[v])) for row in logits[:-1]]
        found.append(([EOS, *own], [*own, EOS]))
    return found


# argmax


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_argmax_is_a_batch_made_by_hand(data, teacher, left):
    """In loss and gradient; the student writes without dropout."""
    begun = training(
        *(data, teacher, {"left_pad_target": left}),
        **dict(kd_inputs="argmax", kd_weight=0.3, label_smoothing=0.1, **ALWAYS),
    )
    batch = begun.batches()[0]
    for module in begun.model.modules():
        if hasattr(module, "p"):
            module.p = 0.5
    expected, made = by_hand(begun.model, batch), written(begun, batch)
    for module in begun.model.modules():
        if hasattr(module, "p"):
            module.p = 0.0
    for inputs, target, pair in zip(
        made["net_input"]["prev_output_tokens"], made["target"], expected
    ):
        assert (inputs[inputs.ne(PAD)].tolist(), target[target.ne(PAD)].tolist()) == pair
    assert torch.equal(made["target"].eq(PAD), batch["target"].eq(PAD))
    assert made["ntokens"] == batch["ntokens"]
    assert not torch.equal(made["target"], batch["target"])

    (log,) = begun.update([batch])
    # fairseq 0.12.2's layers hold parameters that have no part in anything
    used = [one for one in begun.model.parameters() if one.grad is not None]
    found = [parameter.grad.clone() for parameter in used]

    # KL of full weight, and nothing else, sentence by sentence
    begun.model.zero_grad()
    loss = 0.0
    for i, (inputs, _) in enumerate(expected):
        source = batch["net_input"]["src_tokens"][i]
        source = source[source.ne(PAD)][None]
        read = source, torch.tensor([source.size(1)]), torch.tensor([inputs])
        with torch.no_grad():
            p = begun.task.source.teacher.members[0].model(*read)[0][0].double().log_softmax(-1)
        q = begun.model(*read)[0][0].double().log_softmax(-1)
        loss = loss + (p.exp() * (p - q)).sum()
    loss.backward()
    assert float(log["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    assert len(found) > 10
    for ours, parameter in zip(found, used):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)


def test_an_ensemble_and_a_divergence_at_a_temperature(data, teacher):
    flags = dict(kd_inputs="argmax", kd_divergence="js", kd_temperature=2.0, **ALWAYS)
    one = training(data, teacher, **flags)
    two = training(data, f"{teacher}:{teacher}", **flags)
    losses = [[float(log["loss"]) for log in x.update(x.batches())] for x in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and all(losses[0])


# sample


def test_a_cold_student_writes_its_likeliest_translation(data, teacher):
    begun = training(
        data,
        teacher,
        kd_inputs="sample",
        kd_inputs_temperature=1e-4,
        kd_inputs_extra_length=3,
        **ALWAYS,
    )
    for batch in begun.batches():
        made, longest = written(begun, batch), batch["target"].size(1) + 3
        for i, target in enumerate(made["target"]):
            own = [EOS]
            for _ in range(longest - 1):
                row = next_symbols(begun.model, batch, i, own)[-1]
                row[PAD] = -math.inf
                own.append(int(row.argmax()))
                if own[-1] == EOS:
                    break
            else:
                own.append(EOS)
            assert target[target.ne(PAD)].tolist() == own[1:]
            inputs = made["net_input"]["prev_output_tokens"][i]
            assert inputs[inputs.ne(PAD)].tolist() == own[:-1]
        assert made["ntokens"] == int(made["target"].ne(PAD).sum())
        begun.update([batch])


def test_samples_follow_the_students_distribution(data, teacher):
    """At their first symbol, at a temperature, of 4,000 drawn together."""
    begun = training(data, teacher, kd_inputs="sample", kd_inputs_temperature=2.0, **ALWAYS)
    one, n = begun.task.dataset("train")[0], 4000
    batch = begun.task.dataset("train").collater([one] * n)
    p = next_symbols(begun.model, batch, 0, [EOS])[0].double() / 2
    p[PAD] = -math.inf
    p = p.softmax(-1)
    found = torch.bincount(written(begun, batch)["target"][:, 0], minlength=len(p)) / n
    deviation = (p * (1 - p) / n).sqrt()
    assert ((found - p).abs() <= 4 * deviation).all()
    assert p[p > 0].min() > 0.01  # it would show


@pytest.mark.parametrize("bias, length", [(-1e5, 5 + 2), (1e5, 1)], ids=["never", "at once"])
def test_a_student_that_never_ends_costs_no_more_than_the_limit(data, teacher, bias, length):
    """And one that says nothing is handled. Neither end has a probability that a float holds."""
    begun = training(data, teacher, kd_inputs="sample", kd_inputs_extra_length=2, **ALWAYS)
    likely_to_end(begun, bias)
    batch = begun.batches()[0]
    assert batch["target"].size(1) == 5
    made = written(begun, batch)
    assert made["target"].shape == (2, length) and made["ntokens"] == 2 * length
    assert (made["target"][:, -1] == EOS).all() and (made["target"] != PAD).all()
    (log,) = begun.update([batch])
    assert log["ntokens"] == log["sample_size"] == 2 * length and math.isfinite(log["loss"])


def test_a_sample_is_no_longer_than_the_teacher_reads(data, teacher):
    begun = likely_to_end(training(data, teacher, kd_inputs="sample", **ALWAYS), -1e5)
    begun.task.source.teacher.max_positions = lambda: (1024, 6)
    begun.task.begin_epoch(2, begun.model)
    assert written(begun, begun.batches()[0])["target"].size(1) == 6


# what is left alone


@pytest.mark.parametrize("kind", ["argmax", "sample"])
def test_nothing_else_is_changed(data, teacher, kind):
    """Neither the trainer's batch, nor random numbers, nor the student's mode, nor validation."""
    begun = training(data, teacher, kd_inputs=kind, **ALWAYS)
    begun.model.train()
    batch = begun.batches()[0]
    before, random = copy.deepcopy(batch), torch.get_rng_state()
    made = written(begun, batch)
    assert made is not batch and begun.model.training and begun.model.encoder.layers[0].training
    assert torch.equal(random, torch.get_rng_state())
    begun.update([batch])
    assert batch.keys() == before.keys() and batch["ntokens"] == before["ntokens"]
    assert torch.equal(batch["target"], before["target"])
    for key, value in before["net_input"].items():
        assert torch.equal(batch["net_input"][key], value)

    plain = training(data, teacher)
    logs = [x.validate(x.batches("valid")[0]) for x in (begun, plain)]
    assert logs[0].keys() == logs[1].keys() and logs[0]["loss"] == logs[1]["loss"]
    skipped, step = begun.task.inputs(batch, Step(update=0, is_dummy=True), 0)
    assert skipped is batch and step.inputs == "reference"


def test_what_is_logged(data, teacher):
    """The same on every rank: also a dummy batch, which is a reference."""
    flags = dict(kd_weight_schedule="linear:0.1:0.2:5", report_accuracy=True)
    begun = training(data, teacher, kd_inputs="argmax", **ALWAYS, **flags)
    own = begun.update(begun.batches()[:1])[0]
    dummy = begun.update(begun.batches()[:1], dummy=True)[0]
    assert own.keys() == dummy.keys()
    assert {k: torch.is_tensor(v) for k, v in own.items()} == {
        k: torch.is_tensor(v) for k, v in dummy.items()
    }
    assert own["kd_inputs"] == own["kd_tokens"] == own["ntokens"] and dummy["kd_inputs"] == 0
    for key in ("nll_loss", "total", "n_correct", "teacher_nll_loss", "n_agree", "n_compared"):
        assert own[key] == 0, key
    for key in ("nll_loss", "total", "teacher_nll_loss", "n_compared"):
        assert dummy[key] > 0, key
    assert own["kd_weight"] == own["kd_tokens"]

    from test_criterion import logged

    assert logged(own)["kd_inputs"] == 1 and not {"nll_loss", "ppl"} & set(logged(own))
    both = {key: own[key] + dummy[key] for key in own}
    alone = logged(dummy)
    for key in ("nll_loss", "accuracy", "teacher_nll_loss", "agreement", "ppl"):
        assert logged(both)[key] == alone[key], key
    assert logged(both)["kd_inputs"] == 0.5


def test_the_queue_holds_scores_of_references_alone(data, teacher, caplog):
    """And its selection is not asked about what the student wrote."""
    flags = dict(kd_selection="global", kd_queue_size=50)
    begun = training(
        data, teacher, kd_inputs="argmax", kd_inputs_rate_schedule="linear:1:0:1", **flags
    )
    first, second = begun.batches()[:2]
    logs = begun.update([first])
    assert logs[0]["kd_inputs"] > 0 and not begun.task.queue.scores.numel()
    with caplog.at_level(logging.WARNING):
        begun.update([second])
    assert begun.task.queue.scores.numel() == int(second["ntokens"])
    assert "without the scores of earlier tokens" not in caplog.text


# the coin


def coins(begun, updates=40):
    batch = begun.batches()[0]
    return [
        [begun.task.inputs(batch, Step(update=u), n)[1].by_student for n in range(3)]
        for u in range(updates)
    ]


def test_the_coin(data, teacher):
    """Of the seed, the update and the batch's number; a share of them as the rate has it."""
    found = coins(training(data, teacher, kd_inputs="argmax"))
    assert found == coins(training(data, teacher, kd_inputs="argmax"))
    assert found != coins(training(data, teacher, {"seed": 2}, kd_inputs="argmax"))
    assert 40 < sum(map(sum, found)) < 80 and any(0 < sum(three) < 3 for three in found)
    moving = coins(
        training(data, teacher, kd_inputs="argmax", kd_inputs_rate_schedule="linear:0:1:20")
    )
    assert (
        not any(moving[0]) and all(map(all, moving[20:])) and 10 < sum(map(sum, moving[:20])) < 50
    )


def test_batches_are_numbered_within_an_update(data, teacher):
    """Dummy ones, too; an update that overflowed is repeated with the same numbers."""
    begun = training(data, teacher, kd_inputs="argmax")
    numbers, real = [], begun.task.inputs

    def noting(sample, step, number):
        numbers.append((step.update, number))
        return real(sample, step, number)

    begun.task.inputs = noting
    two = begun.batches()[:2]
    begun.update(two)
    begun.update(two, overflows=True)
    begun.validate(begun.batches("valid")[0])
    begun.update(two)
    begun.update(two[:1], dummy=True)
    assert numbers == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 0), (1, 1), (2, 0)]


# flags


def refusal(task=None, **criterion):
    with pytest.raises(UserError) as error:
        new_task(**(task or {})).build_criterion(criterion_config(**criterion))
    return str(error.value)


def test_what_cannot_be_is_refused_all_at_once():
    for flags, words in (
        (
            dict(
                kd_inputs_rate=0.5,
                kd_inputs_rate_schedule="linear:0:1:9",
                kd_inputs_temperature=2.0,
                kd_inputs_extra_length=5,
            ),
            [
                "--kd-inputs-rate has no effect with --kd-inputs reference",
                "--kd-inputs-rate-schedule has no effect with --kd-inputs reference",
                "--kd-inputs-rate 0.5 and --kd-inputs-rate-schedule linear:0:1:9 exclude",
                "--kd-inputs-temperature has no effect with --kd-inputs reference",
                "--kd-inputs-extra-length has no effect with --kd-inputs reference",
            ],
        ),
        (
            dict(kd_inputs="argmax", kd_inputs_rate=1.5, kd_inputs_temperature=2.0),
            ["--kd-inputs-rate must be a number from 0 to 1, got 1.5", "--kd-inputs argmax"],
        ),
        (
            dict(kd_inputs="sample", kd_inputs_temperature=0.0, kd_inputs_extra_length=-1),
            [
                "--kd-inputs-temperature must be above 0",
                "--kd-inputs-extra-length must be at least 0",
            ],
        ),
        (
            dict(kd_inputs="sample", kd_inputs_rate_schedule="linear:0:2:9", ignore_prefix_size=1),
            ["--kd-inputs-rate-schedule must be constant", "leave out --ignore-prefix-size"],
        ),
        (
            dict(kd_inputs="sample", kd_inputs_rate=1.0, kd_selection="batch"),
            ["--kd-inputs-rate 1 leaves no reference", "leave out --kd-selection"],
        ),
    ):
        found = refusal(**flags)
        for word in words:
            assert word in found
    assert "--ddp-backend fully_sharded" in refusal(ddp_backend="fully_sharded", kd_inputs="sample")


def test_a_cache_is_refused_in_training_and_not_in_validation(data):
    begun = Training(data, {"teacher_cache": "nowhere"}, kd_inputs="sample")
    with pytest.raises(UserError, match="--kd-inputs sample asks the teacher about what the"):
        begun.begin()


def test_weight_0_is_that_of_references_alone():
    """Their cross-entropy, and the teacher on what the student writes."""
    flags = dict(kd_inputs="sample", kd_weight=0.0, kd_top_k=3, kd_tail="bucket")
    plan = new_task().build_criterion(criterion_config(**flags)).plan
    assert plan.inputs.rate == schedules.constant(0.5)
    own, reference = plan.settings(3, by_student=True), plan.settings(3)
    assert (own.kd_weight, own.ce_weight, reference.kd_weight) == (1, 0, 0)
