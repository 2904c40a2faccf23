"""Other text to text: BART and mBART as teachers and as students, of sources that are cut, as
summarisation asks of each route; and students that are not autoregressive."""

import importlib.util
import re

import pytest
from support import (
    LANGUAGES,
    STUDENT,
    TARGET,
    USER_DIR,
    distil,
    fairseq,
    hypotheses,
    train_plain,
    transformer,
    write_cache,
    write_sequences,
)
from toy import binarise, dictionary_lines, train_teacher

BART, MBART = (transformer(16, name) for name in ("bart_base", "mbart_base"))
# of two to eight words and an end; what is cut is padded again
LONG = ("--truncate-source", "--max-source-positions", 6, "--required-seq-len-multiple", 4)


@pytest.fixture(scope="module")
def data(corpus, tmp_path_factory):
    """With one dictionary, which fairseq's BART needs."""
    folder = tmp_path_factory.mktemp("joined") / "data"
    return binarise(
        *(corpus.text, folder, "--testpref", corpus.text / "test", "--joined-dictionary")
    )


@pytest.fixture(scope="module")
def bart(data, tmp_path_factory):
    return train_teacher(data, tmp_path_factory.mktemp("bart"), BART, 120, *LONG)


@pytest.fixture(scope="module")
def mbart(data, tmp_path_factory):
    return train_teacher(data, tmp_path_factory.mktemp("mbart"), MBART, 120, *LONG)


@pytest.fixture(scope="module")
def written(data, bart, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "data"
    write_sequences(data, bart, folder, "--beam", 2, "--no-filters", *LONG).ok()
    return folder


def generated(data, checkpoint):
    found = fairseq(
        *("fairseq-generate", data, *USER_DIR, *LANGUAGES, "--cpu", "--path", checkpoint),
        *("--beam", 2, "--required-batch-size-multiple", 1, "--batch-size", 16, *LONG),
    ).ok()
    return hypotheses(found.text)


@pytest.mark.parametrize(
    "teacher, students",
    [("bart", {"bart": BART, "transformer": STUDENT}), ("mbart", {"mbart": MBART})],
)
def test_online_and_from_a_cache(teacher, students, data, tmp_path, request):
    """The cache holds all symbols, so both trainings are the same, whatever the student is."""
    path = request.getfixturevalue(teacher)
    symbols = len(dictionary_lines(data, TARGET)) + 4
    write_cache(data, path, tmp_path / "cache", "--top-k", symbols, *LONG).ok()
    short = (*LONG, "--max-update", 10, "--kd-weight", 0.9)
    for name, arch in students.items():
        online = distil(data, path, tmp_path / name, *short, arch=arch).ok()
        read = ("--teacher-cache", tmp_path / "cache")
        cached = distil(data, None, tmp_path / f"{name}-cached", *short, *read, arch=arch).ok()
        losses = online.series("train_inner", "kd_loss")
        assert len(losses) == 10 and losses[-1] < losses[0]
        assert cached.series("train_inner", "kd_loss") == pytest.approx(losses, abs=0.011)
        assert len(generated(data, tmp_path / name / "checkpoint_last.pt")) == 16


def test_what_it_writes_trains_a_student_and_is_judged(data, bart, written, tmp_path):
    train_plain(written, tmp_path / "student", "--max-update", 4, *LONG).ok()
    student = tmp_path / "student" / "checkpoint_last.pt"
    run = fairseq(
        *("fairseq-kd-report", data, "--models", f"teacher={bart}", f"student={student}"),
        *("--output", tmp_path / "report", "--cpu", *LANGUAGES, "--repeats", 1, *LONG),
        *("--train-sample", 0, "--significance-samples", 10, "--metrics", "chrf", "ter"),
    ).ok()
    assert "| model | chrF2 | speed-up | MB | of the teacher's chrF2 | parameters |" in run.text
    table = (tmp_path / "report" / "report.md").read_text().split("## Quality")[1]
    assert "longer than the model" not in table  # they are cut instead
    assert re.findall(r"^\| (\w+) \| 5 \|", table, re.MULTILINE) == ["teacher", "student"]


@pytest.mark.parametrize(
    "arch",
    [
        *("cmlm_transformer", "nonautoregressive_transformer"),
        pytest.param(
            "levenshtein_transformer",
            marks=pytest.mark.skipif(
                not importlib.util.find_spec("fairseq.libnat"), reason="built without libnat"
            ),
        ),
    ],
)
def test_students_that_are_not_autoregressive(arch, data, written, tmp_path):
    """Stock fairseq trains them on what a teacher has written, and generates."""
    flags = ("--task", "translation_lev", "--criterion", "nat_loss")
    noise = {"levenshtein_transformer": "random_delete", "cmlm_transformer": "random_mask"}
    run = train_plain(
        *(written, tmp_path, *flags, "--noise", noise.get(arch, "full_mask")),
        *("--apply-bert-init", "--max-epoch", 2),
        arch=transformer(16, arch),
    ).ok()
    losses = run.series("train_inner", "loss")
    assert losses[-1] < 0.9 * losses[0]
    found = fairseq(
        *("fairseq-generate", data, *USER_DIR, *LANGUAGES, "--cpu", "--task", "translation_lev"),
        *("--path", tmp_path / "checkpoint_last.pt", "--iter-decode-max-iter", 3, "--beam", 1),
        *("--iter-decode-eos-penalty", 0, "--batch-size", 16, "--print-step"),
    ).ok()
    assert len(hypotheses(found.text)) == 16
