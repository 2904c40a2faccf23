"""A student that starts from its teacher's layers, in fairseq-train."""

import shlex

import pytest
from support import (
    STOCK,
    TRAINING,
    assert_same_weights,
    distil,
    fairseq,
    train_plain,
    validate,
)
from toy import binarise, permuted_dictionaries


@pytest.fixture(scope="module")
def shuffled(corpus, tmp_path_factory):
    """The corpus with dictionaries in another order."""
    folder = tmp_path_factory.mktemp("shuffled")
    return binarise(corpus.text, folder / "data", *permuted_dictionaries(corpus, folder))


def start(teacher, output, *flags):
    """The flags that the command prints."""
    run = fairseq("fairseq-kd-init", teacher, "--output", output, *flags).ok()
    return shlex.split(run.text.splitlines()[-1])


def test_training_starts_from_these_weights(data, shuffled, teacher, tmp_path):
    """With all layers it is as good as its teacher before it has learned anything."""
    first = tmp_path / "first.pt"
    flags = start(teacher, first, "--dictionary", shuffled)
    still = ("--optimizer", "sgd", "--lr", 0, "--max-update", 1)
    common = (shuffled, *STOCK, *TRAINING, *still, "--save-dir", tmp_path)
    run = fairseq("fairseq-train", *common, *flags).ok()
    assert "loading pretrained model from" in run.text
    assert_same_weights(tmp_path / "checkpoint_last.pt", first)
    (found,) = run.series("valid", "valid_nll_loss")
    expected = validate(data, teacher).ok().metrics()["nll_loss"]
    assert found == pytest.approx(expected, abs=0.002) and found < 2


def test_it_learns_at_word_level(data, teacher, tmp_path):
    """A deeper one, as a layer that is taken twice makes it, with the flags of its training
    checked by the command; from random numbers the same flags begin elsewhere."""
    more = ("--dropout", 0.1)
    flags = start(teacher, tmp_path / "first.pt", "--encoder-layers", "0,0", *more)
    assert flags[-2:] == ["--dropout", "0.1"] and "--encoder-layers 2" in " ".join(flags)
    options = ("--max-update", 20, "--kd-weight", 0.7)
    run = distil(data, teacher, tmp_path / "layers", *options, arch=flags).ok()
    random = train_plain(data, tmp_path / "random", "--max-update", 1, arch=flags[2:]).ok()
    losses = run.series("train_inner", "nll_loss")
    assert losses[0] < random.series("train_inner", "nll_loss")[0] - 0.5
    assert sum(losses[-5:]) < sum(losses[:5])
