"""The queue of scores is one queue for all ranks, and goes on after a checkpoint."""

import shutil
from pathlib import Path
from typing import List, NamedTuple

import pytest
import support
import torch
from support import SGD, assert_same_weights, distil, load, train_on_two_ranks

SIZE = 700
OPTIONS = (
    *(*SGD, "--ddp-backend", "legacy_ddp"),
    # 31 batches of about 120 tokens: in the last update of the epoch, the 16th, a rank has only a
    # dummy batch. Two updates later some of that update's scores are still in the queue.
    *("--max-sentences", 21, "--max-update", 18, "--save-interval-updates", 10),
    *("--kd-selection", "global", "--kd-selection-rate", 0.5, "--kd-queue-size", SIZE),
    "--disable-validation",
)
# fairseq saves what the first rank holds; here every rank saves, into a folder of its own
EVERY_RANK_SAVES = """
import sys
sys.path.insert(0, {checkout!r})
import kd_plugin
from fairseq.trainer import Trainer
Trainer.should_save_checkpoint_on_current_rank = True
"""


class Trained(NamedTuple):
    runs: List[support.Run]
    folders: List[Path]


def queue(folder, name="checkpoint_last.pt"):
    return load(folder / name)["extra_state"]["train_iterator"]["kd_queue"]["scores"]


@pytest.fixture(scope="module")
def two_ranks(data, teacher, tmp_path_factory):
    """Trains into ``folder``/0 and ``folder``/1, from the checkpoints there."""
    plugin = tmp_path_factory.mktemp("plugin") / "every_rank_saves"
    plugin.mkdir()
    code = EVERY_RANK_SAVES.format(checkout=str(support.CHECKOUT))
    (plugin / "__init__.py").write_text(code)

    def train(folder):
        folders = [folder / "0", folder / "1"]
        for one in folders:
            one.mkdir(exist_ok=True)  # fairseq makes the first rank's only
        runs = train_on_two_ranks(
            *support.kd_arguments(data, teacher, folder / "{rank}", *OPTIONS),
            *("--user-dir", plugin),
        )
        return Trained(runs, folders)

    return train


@pytest.fixture(scope="module")
def uninterrupted(two_ranks, tmp_path_factory):
    return two_ranks(tmp_path_factory.mktemp("uninterrupted"))


def test_two_ranks_hold_the_queue_of_one_with_two_batches_per_update(
    uninterrupted, data, teacher, tmp_path
):
    """Both the same, full to the token, in the order of ranks; so both distil the same share."""
    run = distil(data, teacher, tmp_path, *OPTIONS, "--update-freq", 2).ok()

    for name in ("checkpoint_1_10.pt", "checkpoint_last.pt"):
        first, second = (queue(folder, name) for folder in uninterrupted.folders)
        assert first.shape == (SIZE,)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, queue(tmp_path, name), rtol=1e-3, atol=1e-4)
        assert first.unique().numel() > SIZE / 2  # an order of equal scores would prove nothing

    share = run.series("train_inner", "kd_selected")
    assert share[0] == 1 and all(0 < x < 1 for x in share[1:])  # against nothing, then the queue
    assert len(share) == 18
    for key in ("kd_selected", "kd_loss", "loss"):
        expected = run.series("train_inner", key)
        for rank in uninterrupted.runs[:1]:  # only the first one logs
            assert rank.series("train_inner", key) == pytest.approx(expected, abs=0.0021), key


def test_two_ranks_resume_with_their_queue(uninterrupted, two_ranks, tmp_path):
    """Both, though fairseq reads the first one's checkpoint alone and sends it to the other."""
    for folder in uninterrupted.folders:
        (tmp_path / folder.name).mkdir()
        last = tmp_path / folder.name / "checkpoint_last.pt"
        shutil.copy(str(folder / "checkpoint_1_10.pt"), str(last))
    # a queue of the second rank's own would show
    spoilt = load(last)
    spoilt["extra_state"]["train_iterator"]["kd_queue"]["scores"].zero_()
    torch.save(spoilt, str(last))
    resumed = two_ranks(tmp_path)

    assert resumed.runs[0].series("train_inner", "num_updates") == list(range(11, 19))
    for key in ("kd_selected", "kd_loss", "loss"):
        expected = uninterrupted.runs[0].series("train_inner", key)[10:]
        assert resumed.runs[0].series("train_inner", key) == expected, key
    for before, after in zip(uninterrupted.folders, resumed.folders):
        assert torch.equal(queue(after), queue(before))
        assert_same_weights(after / "checkpoint_last.pt", before / "checkpoint_last.pt")
