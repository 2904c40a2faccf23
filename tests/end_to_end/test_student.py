"""What becomes of a student: it generates, validates, is tuned further, and teaches, alone."""

import math
import shutil

import pytest
import support
import torch
from support import (
    LANGUAGES,
    USER_DIR,
    distil,
    fairseq,
    hypotheses,
    load,
    script,
    train_plain,
    validate,
)

DECODING = ("--cpu", "--beam", 2, "--max-len-b", 10, "--required-batch-size-multiple", 1)
# torch >= 2.6 opens no fairseq checkpoint until the plugin has allowed what they hold
TORCH_NEEDS_PLUGIN = not torch.__version__.startswith("1.")
with_and_without_plugin = pytest.mark.parametrize(
    "user_dir",
    [
        USER_DIR,
        pytest.param(
            (),
            marks=pytest.mark.skipif(
                TORCH_NEEDS_PLUGIN, reason="stock fairseq opens no checkpoint with this torch"
            ),
        ),
    ],
    ids=["user-dir", "stock"],
)


@with_and_without_plugin
def test_generates_without_the_teacher(user_dir, corpus, distilled):
    run = script(
        *("fairseq-generate", corpus.data, *user_dir, "--path", distilled.checkpoint, *DECODING),
    ).ok()
    references = (corpus.text / "test.bb").read_text().splitlines()
    assert len(hypotheses(run.text)) == len(references) == 16
    assert "Generate test with beam=2: BLEU4" in run.text


@with_and_without_plugin
def test_interactive_without_the_teacher(user_dir, corpus, distilled):
    lines = (corpus.text / "test.aa").read_text()
    run = script(
        *("fairseq-interactive", corpus.data, *user_dir, "--path", distilled.checkpoint),
        *(*DECODING, *LANGUAGES),
        stdin=lines,
    ).ok()
    by_generate = fairseq(
        *("fairseq-generate", corpus.data, *user_dir, "--path", distilled.checkpoint, *DECODING),
    ).ok()
    assert hypotheses(run.text) == hypotheses(by_generate.text)


@pytest.mark.parametrize(
    "task", [("--task", "translation"), ("--task", "kd_translation")], ids=lambda t: t[1]
)
def test_generates_as_a_model_of_either_task(task, data, distilled):
    run = fairseq(
        "fairseq-generate",
        *(data, *USER_DIR, *task, "--path", distilled.checkpoint, *DECODING),
    ).ok()
    assert len(hypotheses(run.text)) == 16


def test_validates_without_the_teacher(data, distilled):
    run = validate(data, distilled.checkpoint, tool=script).ok()
    found = run.metrics()
    during_training = distilled.run.records("valid")[-1]
    assert found["nll_loss"] == pytest.approx(during_training["valid_nll_loss"], abs=0.0011)
    assert found["accuracy"] == pytest.approx(during_training["valid_accuracy"], abs=0.011)
    assert not {"kd_loss", "teacher_nll_loss", "agreement"} & set(found)
    assert run.text.count("no teacher at") == 1


def test_validates_with_the_teacher(data, distilled, teacher):
    run = validate(data, distilled.checkpoint, "--teacher-checkpoint-path", teacher).ok()
    found = run.metrics()
    during_training = distilled.run.records("valid")[-1]
    for key in ("loss", "nll_loss", "kd_loss", "teacher_nll_loss", "agreement", "accuracy"):
        assert found[key] == pytest.approx(during_training["valid_" + key], abs=0.0011), key
    assert "no teacher at" not in run.text


def test_checkpoint_holds_nothing_of_the_teacher(data, distilled, teacher, tmp_path):
    stock = train_plain(data, tmp_path, "--max-update", 1).ok()
    assert stock.records("train_inner")
    plain = load(tmp_path / "checkpoint_last.pt")
    ours = load(distilled.checkpoint)

    assert {k: v.shape for k, v in ours["model"].items()} == {
        k: v.shape for k, v in plain["model"].items()
    }
    assert set(ours) - set(plain) <= {"task_state", "criterion"}
    # but for constants, such as a layer norm's 1s before its first update
    theirs = [w for w in load(teacher)["model"].values() if w.numel() > 1 and w.std() > 0]
    held = list(tensors(ours))
    assert len(held) > len(ours["model"])  # the optimizer's too
    for tensor in held:
        assert not any(tensor.shape == w.shape and torch.equal(tensor, w) for w in theirs)


def tensors(state):
    if torch.is_tensor(state):
        yield state
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors(value)
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors(value)


def test_finetunes_from_a_distilled_and_from_a_plain_checkpoint(data, distilled, teacher, tmp_path):
    """The new run begins where the old one was, whether or not it knew the plugin."""
    scratch = distilled.run.records("train_inner")[0]
    plain = tmp_path / "stock"
    stock = train_plain(data, plain, "--max-update", 60).ok()
    for name, checkpoint, before in (
        ("distilled", distilled.checkpoint, distilled.run.records("valid")[-1]),
        ("plain", plain / "checkpoint_last.pt", stock.records("valid")[-1]),
    ):
        run = distil(
            *(data, teacher, tmp_path / name, "--finetune-from-model", checkpoint),
            *("--max-update", 1, "--lr", 1e-9),
        ).ok()
        assert run.records("train_inner")[0]["num_updates"] == 1
        after = run.records("valid")[-1]
        assert after["valid_nll_loss"] == pytest.approx(before["valid_nll_loss"], abs=0.0021), name
        assert after["valid_nll_loss"] < scratch["nll_loss"] - 0.3


def test_finetunes_without_a_teacher(data, distilled, tmp_path):
    """By stock fairseq: it cares for the weights only."""
    run = train_plain(
        *(data, tmp_path, *USER_DIR, "--finetune-from-model", distilled.checkpoint),
        *("--max-update", 1, "--lr", 1e-9),
    ).ok()
    before = distilled.run.records("valid")[-1]["valid_nll_loss"]
    assert run.records("valid")[-1]["valid_nll_loss"] == pytest.approx(before, abs=0.0021)


def test_teaches_with_the_dictionaries_in_its_checkpoint(corpus, distilled, tmp_path):
    """Far from every dict file, and in another order than the next student's vocabulary."""
    from toy import binarise, permuted_dictionaries

    (tmp_path / "away").mkdir()
    teacher = tmp_path / "away" / "teacher.pt"
    state = load(distilled.checkpoint)
    state["cfg"]["task"]["data"] = str(tmp_path / "gone")
    torch.save(state, str(teacher))
    for name, folder in (
        ("same", corpus.data),
        (
            "permuted",
            binarise(corpus.text, tmp_path / "data", *permuted_dictionaries(corpus, tmp_path)),
        ),
    ):
        run = distil(folder, teacher, tmp_path / name, "--max-update", 2).ok()
        assert "TAKEN TO BE" not in run.text
        found = run.records("valid")[-1]["valid_teacher_nll_loss"]
        expected = distilled.run.records("valid")[-1]["valid_nll_loss"]
        assert found == pytest.approx(expected, abs=0.0021), name


def test_validation_bleu_is_the_students(corpus, data, teacher, tmp_path):
    import sacrebleu

    run = distil(
        *(data, teacher, tmp_path, "--max-update", 300, "--log-interval", 100, "--eval-bleu"),
        *("--eval-bleu-args", '{"beam": 2, "max_len_b": 10}', "--max-epoch", 2, "--kd-weight", 1),
    ).ok()
    references = (corpus.text / "valid.bb").read_text().splitlines()

    def bleu(checkpoint):
        decoded = fairseq(
            "fairseq-generate",
            *(data, *USER_DIR, "--path", checkpoint, *DECODING, "--gen-subset", "valid"),
        ).ok()
        return sacrebleu.corpus_bleu(
            hypotheses(decoded.text), [references], tokenize="none", force=True
        ).score

    logged = run.records("valid")[-1]["valid_bleu"]
    assert logged == pytest.approx(bleu(tmp_path / "checkpoint_last.pt"), abs=0.011)
    assert bleu(teacher) > logged + 10
    assert math.isfinite(logged)


def test_training_leaves_the_teacher_as_it_was(data, teacher, tmp_path, monkeypatch):
    """Bitwise, in memory and on disk, and the optimizer knows nothing of it."""
    from fairseq import options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.trainer import Trainer
    from fairseq_cli import train

    import kd_plugin  # noqa: F401

    seen = {}

    class Watched(Trainer):
        def __init__(self, cfg, task, model, criterion, *more):
            super().__init__(cfg, task, model, criterion, *more)
            seen.update(trainer=self, task=task)

    monkeypatch.setattr(train, "Trainer", Watched)
    file_before = teacher.read_bytes()
    arguments = [str(a) for a in support.kd_arguments(data, teacher, tmp_path)]
    where = arguments.index("--user-dir")
    del arguments[where : where + 2]  # imported above; under pytest it may be already
    args = options.parse_args_and_arch(
        options.get_training_parser(), [*arguments, "--max-update", "45", "--weight-decay", "0.1"]
    )
    train.main(convert_namespace_to_omegaconf(args))
    assert tasks.TASK_REGISTRY["kd_translation"] is type(seen["task"])

    model = seen["task"].source.teacher.members[0].model
    before = support.used_weights(teacher)
    after = model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert teacher.read_bytes() == file_before
    assert not model.training
    theirs = {id(p) for p in model.parameters()}
    trained = {
        id(p) for group in seen["trainer"].optimizer.optimizer.param_groups for p in group["params"]
    }
    modules = {
        id(p)
        for module in (seen["trainer"].model, seen["trainer"].criterion)
        for p in module.parameters()
    }
    assert theirs and trained and not theirs & (trained | modules)


def test_resuming_without_the_teacher_is_refused(data, distilled, tmp_path):
    """Training goes on with a teacher or not at all."""
    shutil.copy(str(distilled.checkpoint), str(tmp_path / "checkpoint_last.pt"))
    before = (tmp_path / "checkpoint_last.pt").read_bytes()
    run = distil(data, tmp_path / "gone.pt", tmp_path, "--max-update", 70)
    assert "gone.pt: no such checkpoint file" in run.error
    assert not run.records("train_inner")
    assert (tmp_path / "checkpoint_last.pt").read_bytes() == before
