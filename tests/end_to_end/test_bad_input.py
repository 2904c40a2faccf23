"""Whatever cannot work is said at once, in one message, before the first update."""

import pickle
import re
import shutil

import pytest
import support
import torch
from support import ARCHITECTURES, TRAINING, USER_DIR, distil, fairseq, load, train_plain, validate
from toy import binarise, changed, train_teacher


def refused(run, folder, *words):
    message = run.error
    for word in words:
        assert word in message, f"{word!r} not in: {message}"
    assert not run.records("train_inner")
    assert not [*folder.glob("**/checkpoint*.pt"), *folder.glob("**/crash.pt")]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--kd-weight", -0.1], ["--kd-weight", "-0.1"]),
        (["--kd-weight", 1.5], ["--kd-weight", "1.5"]),
        (["--kd-weight", "nan"], ["--kd-weight", "nan"]),
        (["--ce-weight", -1], ["--ce-weight", "-1"]),
        (["--kd-temperature", 0], ["--kd-temperature", "0"]),
        (["--kd-temperature", -2], ["--kd-temperature", "-2"]),
        (["--kd-temperature", "inf"], ["--kd-temperature", "inf"]),
        (["--kd-weight", 2, "--kd-temperature", 0], ["--kd-weight", "--kd-temperature"]),
        (["--teacher-weights", "1,2"], ["--teacher-weights", "1"]),
        (["--teacher-weights", "-1"], ["--teacher-weights", "positive"]),
        (["--teacher-weights", "0"], ["--teacher-weights", "positive"]),
        (["--teacher-weights", "nan"], ["--teacher-weights", "positive"]),
        (["--teacher-weights", "much"], ["--teacher-weights", "much"]),
        (["--teacher-overrides", "dropout=0"], ["--teacher-overrides", "dropout=0"]),
        (["--teacher-overrides", "{'droput': 0}"], ["--teacher-overrides", "'droput'"]),
        (
            ["--teacher-data", "/nowhere/at/all"],
            ["--teacher-data", "/nowhere/at/all", "dict.aa"],
        ),
        (["--teacher-device", "cpu", "--teacher-dtype", "fp16"], ["--teacher-device", "fp16"]),
        (["--criterion", "label_smoothed_cross_entropy"], ["--criterion kd_label_smoothed_cross"]),
        (["--task", "translation"], ["--task kd_translation"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if "--" in str(value[0]) else "",
)
def test_flags(flags, words, data, teacher, tmp_path):
    given = None if "--task" in flags else teacher  # of which fairseq's own task knows nothing
    run = distil(data, given, tmp_path, *flags, tool=support.in_process)
    refused(run, tmp_path, *words)


def test_flags_as_a_user_sees_them_refused(data, teacher, tmp_path):
    flags = ("--kd-weight", 2, "--kd-temperature", 0)
    run = distil(data, teacher, tmp_path, *flags)
    refused(run, tmp_path, "--kd-weight", "--kd-temperature")


def test_no_teacher(data, tmp_path):
    refused(distil(data, None, tmp_path), tmp_path, "--teacher-checkpoint-path")


def test_missing_file(data, tmp_path):
    path = tmp_path / "missing.pt"
    refused(distil(data, path, tmp_path), tmp_path, str(path), "no such")


def test_one_of_two_files_missing(data, teacher, tmp_path):
    paths = f"{teacher}:{tmp_path / 'missing.pt'}"
    refused(distil(data, paths, tmp_path), tmp_path, str(tmp_path / "missing.pt"), "no such")


def text_file(path, teacher):
    path.write_text("not a checkpoint at all\n" * 40)


def empty_file(path, teacher):
    path.write_bytes(b"")


def truncated(path, teacher):
    whole = teacher.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def other_dictionary(path, teacher):
    torch.save({"weights": torch.zeros(3), "step": 7}, str(path))


def list_of_tensors(path, teacher):
    torch.save([torch.zeros(3)], str(path))


def bare_pickle(path, teacher):
    path.write_bytes(pickle.dumps({"model": {}}))


def torchscript(path, teacher):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


def weights_alone(path, teacher):
    torch.save({"model": load(teacher)["model"]}, str(path))


@pytest.mark.parametrize(
    "make",
    [
        *(text_file, empty_file, truncated, other_dictionary, list_of_tensors, bare_pickle),
        *(torchscript, weights_alone),
    ],
)
def test_not_a_fairseq_checkpoint(make, data, teacher, tmp_path):
    path = tmp_path / "odd.pt"
    make(path, teacher)
    refused(distil(data, path, tmp_path / "student"), tmp_path, str(path), "checkpoint")


def test_another_task(data, teacher, tmp_path):
    def change(state):
        state["cfg"]["task"]["_name"] = "translation_lev"

    path = changed(teacher, tmp_path / "teacher.pt", change)
    run = distil(data, path, tmp_path / "student")
    refused(run, tmp_path, str(path), "translation_lev", "Sequence-level")


def test_another_direction(corpus, tmp_path):
    """A real teacher of bb-aa: fairseq keeps both dictionaries in one folder."""
    reverse = tmp_path / "reverse"
    fairseq(
        "fairseq-preprocess",
        *("--source-lang", "bb", "--target-lang", "aa", "--destdir", reverse, "--workers", 1),
        *("--trainpref", corpus.text / "train", "--validpref", corpus.text / "valid"),
    ).ok()
    theirs = train_teacher(
        *(reverse, tmp_path / "teacher", ARCHITECTURES["transformer"], 2),
        *("--source-lang", "bb", "--target-lang", "aa"),
    )
    folder = tmp_path / "student"
    refused(distil(corpus.data, theirs, folder), folder, str(theirs), "bb-aa", "aa-bb")


def test_other_names_of_the_same_languages(data, teacher, tmp_path):
    def change(state):
        state["cfg"]["task"].update(source_lang="a_A", target_lang="b_B")

    path, student = changed(teacher, tmp_path / "teacher.pt", change), tmp_path / "student"
    run = distil(data, path, student)
    refused(run, student, "a_A-b_B", "aa-bb")
    advised = ["--teacher-overrides", re.search('--teacher-overrides "(.*)"', run.error).group(1)]
    # those in its data folder may be another's
    refused(distil(data, path, student, *advised), student, "dict.a_A.txt", "--teacher-data names")
    distil(data, path, student, *advised, "--teacher-data", data, "--max-update", 1).ok()


def test_decoder_only(corpus, tmp_path):
    lm_data = tmp_path / "lm"
    fairseq(
        "fairseq-preprocess",
        *("--only-source", "--destdir", lm_data, "--workers", 1),
        *("--trainpref", corpus.text / "train.bb", "--validpref", corpus.text / "valid.bb"),
    ).ok()
    fairseq(
        "fairseq-train",
        *(lm_data, "--task", "language_modeling", "--arch", "transformer_lm", "--cpu"),
        *("--decoder-embed-dim", 16, "--decoder-ffn-embed-dim", 16, "--decoder-layers", 1),
        *("--decoder-attention-heads", 1, "--optimizer", "adam", "--lr", 0.001),
        *("--max-tokens", 200, "--tokens-per-sample", 16, "--max-update", 1),
        *("--save-dir", tmp_path / "lm-model", "--no-epoch-checkpoints", "--num-workers", 0),
    ).ok()
    path = tmp_path / "lm-model" / "checkpoint_last.pt"
    student = tmp_path / "student"
    refused(distil(corpus.data, path, student), student, str(path), "decoder-only")


def test_teacher_too_short_for_the_data(data, distilled, tmp_path):
    """It names the lengths and the flags, and with these flags training runs."""
    theirs = train_teacher(
        *(data, tmp_path / "teacher", support.transformer(16), 60),
        *("--max-source-positions", 6, "--max-target-positions", 6),
        "--skip-invalid-size-inputs-valid-test",
    )
    student = tmp_path / "student"
    run = distil(data, theirs, student)
    # the corpus's first sentence has all 20 words and an end of sentence
    refused(run, student, "21", "6", "--max-source-positions 6", "--max-target-positions 6")
    distil(
        *(data, theirs, student, "--max-update", 1),
        *("--max-source-positions", 6, "--max-target-positions", 6),
        "--skip-invalid-size-inputs-valid-test",
    ).ok()
    run = validate(data, distilled.checkpoint, "--teacher-checkpoint-path", theirs)
    assert "--max-source-positions 6" in run.error and "--max-target-positions 6" in run.error


def test_adaptive_softmax_in_the_teacher(data, tmp_path):
    arch = [a for a in support.transformer(16) if a != "--share-decoder-input-output-embed"]
    fairseq(
        "fairseq-train",
        *(data, "--task", "translation", *TRAINING, *arch, "--save-dir", tmp_path / "teacher"),
        *("--criterion", "adaptive_loss", "--adaptive-softmax-cutoff", "8,16"),
        *("--ddp-backend", "legacy_ddp", "--max-update", 1, "--disable-validation"),
    ).ok()
    path = tmp_path / "teacher" / "checkpoint_last.pt"
    student = tmp_path / "student"
    refused(distil(data, path, student), student, str(path), "adaptive softmax")


def test_adaptive_softmax_in_the_student(data, teacher, tmp_path):
    arch = [a for a in support.transformer(16) if a != "--share-decoder-input-output-embed"]
    run = distil(data, teacher, tmp_path, "--adaptive-softmax-cutoff", "8,16", arch=arch)
    refused(run, tmp_path, "student", "adaptive softmax")


def test_teacher_that_overflows_in_one_sentence(corpus, tmp_path):
    """The run stops there, naming the sentence; checkpoints written before stay good."""
    text = tmp_path / "text"
    shutil.copytree(str(corpus.text), str(text))
    sentence = 5
    for lang in ("aa", "bb"):
        lines = (text / ("train." + lang)).read_text().splitlines()
        lines[sentence] += " rare"
        (text / ("train." + lang)).write_text("\n".join(lines) + "\n")
    data = binarise(text, tmp_path / "data")
    theirs = train_teacher(data, tmp_path / "teacher", support.transformer(16), 60)
    symbols = (data / "dict.aa.txt").read_text().split("\n")
    row = 4 + [line.split(" ")[0] for line in symbols].index("rare")

    def change(state):
        state["model"]["encoder.embed_tokens.weight"][row] = torch.finfo(torch.float32).max

    path = changed(theirs, tmp_path / "teacher.pt", change)
    run = distil(data, path, tmp_path / "student", "--max-epoch", 1)
    assert f"[{sentence}]" in run.error
    assert str(path) in run.error
    assert len(run.records("train_inner")) < 40
    assert not (tmp_path / "student" / "checkpoint_last.pt").exists()


def test_validation_says_when_a_given_teacher_is_no_checkpoint(data, distilled, tmp_path):
    """Without the file it validates the student alone; with a broken one it must not pretend."""
    broken = tmp_path / "broken.pt"
    broken.write_text("nothing")
    run = validate(data, distilled.checkpoint, "--teacher-checkpoint-path", broken)
    assert str(broken) in run.error


def test_stock_training_under_the_plugin(data, teacher, tmp_path):
    """Loading the plugin refuses nothing that worked without it."""
    train_plain(data, tmp_path, *USER_DIR, "--max-update", 1).ok()
