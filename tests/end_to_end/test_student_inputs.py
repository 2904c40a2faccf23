"""Trainings in which the student writes a share of what the decoder reads."""

import shutil

import support
from support import SGD, assert_same_weights, distil, train_on_two_ranks

# 40 batches, with dropout: what is drawn for the student must not move what training draws
OPTIONS = ("--max-update", 24, "--dropout", 0.1, "--report-accuracy")
SAMPLE = ("--kd-inputs", "sample", "--kd-inputs-temperature", 0.8)


def test_rate_0_is_the_training_without(data, teacher, tmp_path):
    plain = distil(data, teacher, tmp_path / "plain", *OPTIONS).ok()
    never = distil(data, teacher, tmp_path / "never", *OPTIONS, *SAMPLE, "--kd-inputs-rate", 0).ok()
    assert_same_weights(
        *(tmp_path / folder / "checkpoint_last.pt" for folder in ("plain", "never"))
    )
    for key in ("loss", "nll_loss", "ppl", "accuracy", "kd_loss", "gnorm"):
        assert never.series("train_inner", key) == plain.series("train_inner", key)
    assert never.series("train_inner", "kd_inputs") == [0.0] * 24
    assert not any("kd_inputs" in key for key in never.metrics())


def test_it_goes_on_after_a_checkpoint_as_if_never_stopped(data, teacher, tmp_path):
    options = (*OPTIONS, *SAMPLE, "--update-freq", 2, "--save-interval-updates", 10)
    whole = distil(data, teacher, tmp_path / "whole", *options).ok()
    shares = whole.series("train_inner", "kd_inputs")
    assert {0, 1} < set(shares) and len(shares) == 24  # of two batches one, both or none
    (tmp_path / "resumed").mkdir()
    (saved,) = (tmp_path / "whole").glob("checkpoint_*_10.pt")
    shutil.copy(str(saved), str(tmp_path / "resumed" / "checkpoint_last.pt"))
    resumed = distil(data, teacher, tmp_path / "resumed", *options).ok()
    assert resumed.series("train_inner", "kd_inputs") == shares[10:]
    assert_same_weights(
        *(tmp_path / folder / "checkpoint_last.pt" for folder in ("whole", "resumed"))
    )


def test_two_ranks_decide_alike_with_unequal_numbers_of_batches(data, teacher, tmp_path):
    """31 batches: in the last update of the epoch, the 16th, a rank has only a dummy batch."""
    options = (*SGD, "--max-sentences", 21, "--max-update", 18, "--ddp-backend", "legacy_ddp")
    runs = train_on_two_ranks(
        *support.kd_arguments(data, teacher, tmp_path, *options, *SAMPLE), "--disable-validation"
    )
    shares = runs[0].ok().series("train_inner", "kd_inputs")
    assert set(shares) == {0, 1} and len(shares) == 18  # never one rank alone
