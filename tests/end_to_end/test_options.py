"""fairseq's own options go on to work, and the log says what it claims to say."""

import math

import pytest
import support
from support import SGD, assert_same_weights, distil, load, train_plain

SHORT = ("--max-update", 8)


@pytest.mark.parametrize(
    "options",
    [
        ("--sentence-avg", "--lr", 0.05),
        ("--ignore-prefix-size", 1),
        ("--update-freq", 3),
        ("--label-smoothing", 0),
        ("--max-tokens", 120),
        ("--truncate-source", "--max-source-positions", 6),
    ],
    ids=lambda options: options[0],
)
def test_stock_options_at_kd_weight_0(options, data, teacher, tmp_path):
    """Each means what it means in stock fairseq."""
    more = (*SGD, *SHORT, "--report-accuracy", *options)
    stock = train_plain(data, tmp_path / "stock", *more).ok()
    ours = distil(data, teacher, tmp_path / "ours", *more, "--kd-weight", 0).ok()
    for key in ("loss", "nll_loss", "accuracy", "gnorm", "wpb"):
        expected = stock.series("train_inner", key)
        assert len(expected) == 8
        assert ours.series("train_inner", key) == pytest.approx(expected, abs=0.0021), key
    for key in ("valid_loss", "valid_nll_loss", "valid_accuracy"):
        expected = stock.series("valid", key)
        assert len(expected) == 1
        assert ours.series("valid", key) == pytest.approx(expected, abs=0.0021), key
    assert_same_weights(
        *(tmp_path / "ours/checkpoint_last.pt", tmp_path / "stock/checkpoint_last.pt"),
        rtol=1e-3,
        atol=1e-5,
    )


def test_a_moving_average_of_the_student_is_kept_and_resumed(data, teacher, tmp_path):
    options = ("--store-ema", "--ema-decay", 0.9, "--ema-fp32")
    distil(data, teacher, tmp_path / "whole", *options, "--max-update", 20).ok()
    distil(data, teacher, tmp_path / "halves", *options, "--max-update", 10).ok()
    distil(data, teacher, tmp_path / "halves", *options, "--max-update", 20).ok()

    whole, halves = (load(tmp_path / name / "checkpoint_last.pt") for name in ("whole", "halves"))
    averages = whole["extra_state"]["ema"]
    key = "decoder.embed_tokens.weight"
    assert averages[key].shape == whole["model"][key].shape
    assert not averages[key].equal(whole["model"][key])
    assert averages[key].equal(halves["extra_state"]["ema"][key])


def test_every_valid_subset_has_its_metrics(distilled):
    for subset in ("valid", "valid1"):
        (record,) = distilled.run.records(subset)[-1:]
        for key in ("loss", "nll_loss", "ppl", "kd_loss", "teacher_nll_loss", "agreement"):
            assert subset + "_" + key in record
    one, other = (distilled.run.records(s)[-1] for s in ("valid", "valid1"))
    assert one["valid_teacher_nll_loss"] != other["valid1_teacher_nll_loss"]


def test_log_fields(distilled):
    records = distilled.run.records("train_inner")
    assert len(records) == 60
    for record in records:
        assert record["kd_loss"] > 0
        assert 0 <= record["agreement"] <= 1
        assert 0 <= record["accuracy"] <= 100
        assert 0 < record["teacher_nll_loss"] < math.log2(24)
        # ppl is rounded to two places
        assert record["ppl"] == pytest.approx(2 ** record["nll_loss"], rel=0.01)
    # it learns, from both
    for key in ("loss", "nll_loss", "kd_loss"):
        values = [record[key] for record in records]
        assert sum(values[-10:]) < 0.95 * sum(values[:10]), key
    validation = distilled.run.records("valid")
    assert validation[-1]["valid_agreement"] > validation[0]["valid_agreement"] - 0.1
    # the epoch's record is the average of its updates, each weighted by its tokens
    epoch = distilled.run.records("train")[0]
    first = records[:40]
    tokens = sum(r["wpb"] for r in first)
    for key in ("nll_loss", "kd_loss", "teacher_nll_loss", "agreement"):
        average = sum(r[key] * r["wpb"] for r in first) / tokens
        assert epoch["train_" + key] == pytest.approx(average, abs=0.0021), key


def test_costly_metrics_in_training_only_on_request(data, teacher, tmp_path):
    run = distil(data, teacher, tmp_path, *SHORT).ok()
    (record, *_) = run.records("train_inner")
    assert "kd_loss" in record
    assert not {"teacher_nll_loss", "agreement", "accuracy"} & set(record)
    assert {"valid_teacher_nll_loss", "valid_agreement"} <= set(run.records("valid")[-1])


def test_loss_is_the_weighted_sum_of_its_terms(data, teacher, tmp_path):
    """At kd_weight 1 it is T^2 times kd_loss; --ce-weight adds so much cross-entropy."""

    def first(name, *more):
        run = distil(
            *(data, teacher, tmp_path / name, "--max-update", 1, "--label-smoothing", 0, *more)
        ).ok()
        (record,) = run.records("train_inner")
        return record

    record = first("kd", "--kd-weight", 1)
    assert record["loss"] == pytest.approx(record["kd_loss"], abs=0.0011)
    warm = first("warm", "--kd-weight", 1, "--kd-temperature", 2)
    assert warm["loss"] == pytest.approx(4 * warm["kd_loss"], abs=0.0051)
    assert warm["kd_loss"] < record["kd_loss"]
    for weight, ce in ((0.25, None), (1, 1), (0.5, 2)):
        more = ("--kd-weight", weight) if ce is None else ("--kd-weight", weight, "--ce-weight", ce)
        mixed = first(f"mixed-{weight}", *more)
        ce = 1 - weight if ce is None else ce
        assert mixed["nll_loss"] == record["nll_loss"]
        expected = ce * mixed["nll_loss"] + weight * mixed["kd_loss"]
        assert mixed["loss"] == pytest.approx(expected, abs=0.0031)


def test_a_student_equal_to_its_teacher(data, teacher, tmp_path):
    """It has nothing to learn from it: no divergence, no gradient, full agreement."""
    run = distil(
        *(data, teacher, tmp_path, "--finetune-from-model", teacher, "--max-update", 1),
        *("--kd-weight", 1, "--report-accuracy", "--lr", 1e-9),
        arch=support.transformer(32),
    ).ok()
    (record,) = run.records("train_inner")
    assert record["kd_loss"] == 0
    assert record["gnorm"] < 1e-3
    assert record["agreement"] == 1
    assert record["teacher_nll_loss"] == record["nll_loss"]
    after = run.records("valid")[-1]
    assert after["valid_agreement"] == 1
    assert after["valid_teacher_nll_loss"] == after["valid_nll_loss"]


def test_without_validation(data, teacher, distilled, tmp_path):
    run = distil(data, teacher, tmp_path, *SHORT, "--disable-validation").ok()
    assert not run.records("valid")
    expected = distilled.run.series("train_inner", "loss")[:8]
    assert run.series("train_inner", "loss") == expected


def test_best_checkpoint_by_nll_loss(data, teacher, tmp_path):
    run = distil(
        *(data, teacher, tmp_path, "--max-epoch", 3, "--best-checkpoint-metric", "nll_loss")
    ).ok()
    best = min(run.series("valid", "valid_nll_loss"))
    assert run.records("valid")[-1]["valid_best_nll_loss"] == best
    kept = load(tmp_path / "checkpoint_best.pt")["extra_state"]
    assert kept["val_loss"] == pytest.approx(best, abs=0.001)


def test_tensorboard(data, teacher, tmp_path):
    pytest.importorskip("tensorboardX")
    distil(data, teacher, tmp_path, *SHORT, "--tensorboard-logdir", tmp_path / "board").ok()
    events = {
        folder: b"".join(f.read_bytes() for f in (tmp_path / "board" / folder).glob("events*"))
        for folder in ("train_inner", "valid")
    }
    assert b"kd_loss" in events["train_inner"]
    for key in (b"kd_loss", b"teacher_nll_loss", b"agreement"):
        assert key in events["valid"], key


def test_teacher_on_the_cpu_is_the_teacher(data, teacher, distilled, tmp_path):
    """There is nothing else here to run it on: the option must change nothing."""
    run = distil(data, teacher, tmp_path, *SHORT, "--teacher-device", "cpu").ok()
    expected = distilled.run.series("train_inner", "kd_loss")[:8]
    assert run.series("train_inner", "kd_loss") == expected


def test_teacher_in_another_precision(data, teacher, distilled, tmp_path):
    """bfloat16 is near enough to teach, and not the same."""
    run = distil(data, teacher, tmp_path, *SHORT, "--teacher-dtype", "bf16").ok()
    expected = distilled.run.series("train_inner", "kd_loss")[:8]
    found = run.series("train_inner", "kd_loss")
    assert found == pytest.approx(expected, rel=0.05)
    assert found != expected


def test_teacher_overrides_reach_its_model(data, teacher, tmp_path):
    """Relu for gelu: another teacher, as its metrics show."""
    plain = distil(data, teacher, tmp_path / "plain", "--max-update", 1).ok()
    other = distil(
        *(data, teacher, tmp_path / "other", "--max-update", 1),
        *("--teacher-overrides", "{'activation_fn': 'gelu'}"),
    ).ok()
    found = [r.records("valid")[-1]["valid_teacher_nll_loss"] for r in (plain, other)]
    assert found[0] != found[1]
