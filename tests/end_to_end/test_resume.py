"""A training that was interrupted ends where an uninterrupted one does."""

import shutil

import pytest
from support import assert_same_weights, distil, load

# dropout: what a resumed run draws must be what the other one drew
OPTIONS = ("--max-update", 60, "--dropout", 0.1, "--save-interval-updates", 25)
BLEU = (
    *("--eval-bleu", "--eval-bleu-args", '{"beam": 2, "max_len_b": 10}'),
    *("--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric"),
)


SELECTION = (
    *("--kd-selection", "global", "--kd-queue-size", 300, "--kd-divergence", "js"),
    *("--kd-weight-schedule", "linear:0.2:1:50", "--kd-temperature-schedule", "cosine:1:2:40"),
)


@pytest.fixture(scope="module", params=[(), BLEU, SELECTION], ids=["loss", "bleu", "selection"])
def uninterrupted(request, data, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    distil(data, teacher, folder, *OPTIONS, *request.param).ok()
    return folder, request.param


@pytest.mark.parametrize("updates", [25, 50])
def test_resumed_after_a_kill(uninterrupted, data, teacher, tmp_path, updates):
    """From a checkpoint written inside the first and inside the second epoch."""
    folder, more = uninterrupted
    (saved,) = folder.glob(f"checkpoint_*_{updates}.pt")
    shutil.copy(str(saved), str(tmp_path / "checkpoint_last.pt"))
    run = distil(data, teacher, tmp_path, *OPTIONS, *more).ok()

    assert run.series("train_inner", "num_updates") == list(range(updates + 1, 61))
    assert_same_weights(tmp_path / "checkpoint_last.pt", folder / "checkpoint_last.pt")


def test_resumed_after_max_update(uninterrupted, data, teacher, tmp_path):
    folder, more = uninterrupted
    distil(data, teacher, tmp_path, *OPTIONS, *more, "--max-update", 33).ok()
    run = distil(data, teacher, tmp_path, *OPTIONS, *more).ok()

    assert run.series("train_inner", "num_updates") == list(range(34, 61))
    assert_same_weights(tmp_path / "checkpoint_last.pt", folder / "checkpoint_last.pt")
    if more == BLEU:
        best = [load(f / "checkpoint_last.pt")["extra_state"]["best"] for f in (tmp_path, folder)]
        assert best[0] == best[1] > 0
    if more == SELECTION:
        queues = [
            load(f / "checkpoint_last.pt")["extra_state"]["train_iterator"]["kd_queue"]["scores"]
            for f in (tmp_path, folder)
        ]
        assert queues[0].tolist() == queues[1].tolist() and len(queues[0]) == 300


def test_a_selection_without_its_memory_says_so(uninterrupted, data, teacher, tmp_path):
    folder, more = uninterrupted
    forget = ["--reset-dataloader"] if more == SELECTION else []
    shutil.copy(str(folder / "checkpoint_last.pt"), str(tmp_path / "checkpoint_last.pt"))
    run = distil(
        *(data, teacher, tmp_path, *OPTIONS, *SELECTION, *forget, "--max-update", 62),
        *("--update-freq", 2),
    ).ok()
    assert run.text.count("without the scores of earlier tokens") == 1


def test_resumed_with_another_teacher(uninterrupted, data, teacher, tmp_path):
    """The checkpoint does not tie its training to the teacher's old place."""
    folder, more = uninterrupted
    shutil.copy(str(teacher), str(tmp_path / "moved.pt"))
    (saved,) = folder.glob("checkpoint_*_50.pt")
    shutil.copy(str(saved), str(tmp_path / "checkpoint_last.pt"))
    distil(data, tmp_path / "moved.pt", tmp_path, *OPTIONS, *more).ok()

    assert_same_weights(tmp_path / "checkpoint_last.pt", folder / "checkpoint_last.pt")
