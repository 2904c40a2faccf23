"""Teachers as users have them: of any architecture, file format, number and vocabulary."""

import random
from argparse import Namespace

import pytest
import support
import torch
from support import ARCHITECTURES, SOURCE, TARGET, assert_same_weights, distil, load, write_cache
from toy import (
    binarise,
    changed,
    dictionary_lines,
    permuted_dictionaries,
    train_teacher,
    write_dictionaries,
    write_text,
)

OTHERS = ["lstm", "fconv", "lightconv", "transformer_align"]
UPDATES = ("--max-update", 12)


@pytest.fixture(scope="module")
def permuted(corpus, tmp_path_factory):
    """The corpus, binarised with its dictionaries in another order."""
    folder = tmp_path_factory.mktemp("permuted")
    return binarise(corpus.text, folder / "data", *permuted_dictionaries(corpus, folder))


@pytest.mark.parametrize("arch", OTHERS)
def test_student_of_another_architecture(arch, data, teacher, tmp_path):
    run = distil(data, teacher, tmp_path, *UPDATES, "--kd-weight", 1, arch=ARCHITECTURES[arch]).ok()
    losses = run.series("train_inner", "kd_loss")
    assert losses[-1] < losses[0]
    assert "mapped" not in run.text


@pytest.mark.parametrize("arch", OTHERS)
def test_teacher_of_another_architecture(arch, data, permuted, tmp_path):
    """With dictionaries in another order, it must be as good as its own training found it."""
    theirs = train_teacher(
        *(permuted, tmp_path / "teacher", ARCHITECTURES[arch], 60, "--lr", 0.01),
        *("--best-checkpoint-metric", "nll_loss"),
    )
    expected = load(theirs)["extra_state"]["val_loss"]
    run = distil(data, theirs, tmp_path / "student", *UPDATES).ok()
    assert "mapped" in run.text
    found = run.records("valid")[-1]["valid_teacher_nll_loss"]
    assert found == pytest.approx(expected, abs=0.0021)


def as_args(state):
    """The format of fairseq before 0.10.2: everything in one Namespace."""
    flat = Namespace()
    for name in ("common", "dataset", "optimization", "checkpoint", "task", "model"):
        section = state["cfg"][name]
        for key, value in (vars(section) if isinstance(section, Namespace) else section).items():
            if key != "_name":
                setattr(flat, key, value)
    flat.task, flat.arch, flat.criterion = "translation", "transformer", "cross_entropy"
    state["args"], state["cfg"] = flat, None


def stripped(state):
    for key in ("last_optimizer_state", "optimizer_history", "extra_state", "task_state"):
        state.pop(key, None)


def stripped_args(state):
    as_args(state)
    stripped(state)


@pytest.mark.parametrize("change", [as_args, stripped, stripped_args])
def test_checkpoint_formats(change, data, teacher, distilled, tmp_path):
    theirs = changed(teacher, tmp_path / "teacher" / "teacher.pt", change)
    run = distil(data, theirs, tmp_path / "student", *UPDATES, "--report-accuracy").ok()
    for key in ("loss", "kd_loss", "teacher_nll_loss"):
        expected = distilled.run.series("train_inner", key)[:12]
        assert run.series("train_inner", key) == expected, key


def test_legacy_zipless_checkpoint(data, teacher, distilled, tmp_path):
    """What torch wrote before 1.6."""
    path = tmp_path / "teacher.pt"
    torch.save(load(teacher), str(path), _use_new_zipfile_serialization=False)
    run = distil(data, path, tmp_path / "student", *UPDATES).ok()
    assert (
        run.series("train_inner", "kd_loss") == distilled.run.series("train_inner", "kd_loss")[:12]
    )


def test_averaged_checkpoint(data, teacher, tmp_path):
    """As fairseq's scripts/average_checkpoints.py writes it: one state with averaged weights."""
    second = train_teacher(data, tmp_path / "second", support.transformer(32), 350, "--seed", 3)
    other = load(second)["model"]

    def average(state):
        for name, weight in state["model"].items():
            state["model"][name] = (weight + other[name]) / 2

    theirs = changed(teacher, tmp_path / "teacher" / "teacher.pt", average)
    run = distil(data, theirs, tmp_path / "student", *UPDATES).ok()
    assert 0 < run.records("valid")[-1]["valid_teacher_nll_loss"] < 4


@pytest.fixture(scope="module")
def second_teacher(data, tmp_path_factory):
    """A worse teacher with a name of its own."""
    return train_teacher(data, tmp_path_factory.mktemp("second"), ARCHITECTURES["transformer"], 60)


def test_ensemble_weights(data, teacher, second_teacher, tmp_path):
    """From one member alone to the other alone, and nowhere worse than the worse one."""

    def teacher_nll(name, *more):
        paths = f"{teacher}:{second_teacher}"
        run = distil(data, paths, tmp_path / name, "--max-update", 1, *more).ok()
        return run.records("valid")[-1]["valid_teacher_nll_loss"]

    alone = [
        distil(data, path, tmp_path / str(i), "--max-update", 1)
        .ok()
        .records("valid")[-1]["valid_teacher_nll_loss"]
        for i, path in enumerate((teacher, second_teacher))
    ]
    uniform = teacher_nll("uniform")
    assert teacher_nll("equal", "--teacher-weights", "3,3") == uniform
    assert teacher_nll("first", "--teacher-weights", "1e9,1") == pytest.approx(alone[0], abs=0.0011)
    assert teacher_nll("last", "--teacher-weights", "1,1e9") == pytest.approx(alone[1], abs=0.0011)
    assert alone[1] > alone[0] + 0.3
    # the average of probabilities is concave in log: better than the average of the two losses
    assert uniform < (alone[0] + alone[1]) / 2


# vocabularies


def reordered(corpus, teacher, folder):
    """The teacher as it would be with its dictionaries in another order: rows move along."""
    folder.mkdir()
    state = load(teacher)
    for lang, keys in (
        (SOURCE, ["encoder.embed_tokens.weight"]),
        (TARGET, ["decoder.embed_tokens.weight", "decoder.output_projection.weight"]),
    ):
        lines = dictionary_lines(corpus.data, lang)
        order = list(range(len(lines)))
        random.Random(lang).shuffle(order)
        (folder / f"dict.{lang}.txt").write_text("\n".join(lines[i] for i in order) + "\n")
        rows = torch.tensor([0, 1, 2, 3] + [4 + i for i in order])
        for key in keys:
            state["model"][key] = state["model"][key][rows]
    torch.save(state, str(folder / "teacher.pt"))
    return folder / "teacher.pt"


@pytest.mark.parametrize("where", ["beside", "teacher-data"])
def test_permuted_dictionaries_change_nothing(where, corpus, teacher, distilled, tmp_path):
    theirs = reordered(corpus, teacher, tmp_path / "teacher")
    more = []
    if where == "teacher-data":
        moved = tmp_path / "dictionaries"
        moved.mkdir()
        for file in theirs.parent.glob("dict.*.txt"):
            file.rename(moved / file.name)
        more = ["--teacher-data", moved]
    run = distil(
        corpus.data, theirs, tmp_path / "student", "--max-update", 60, "--report-accuracy", *more
    ).ok()

    assert "mapped" in run.text
    assert "TAKEN TO BE" not in run.text
    for key in ("loss", "kd_loss", "teacher_nll_loss", "agreement"):
        expected = distilled.run.series("train_inner", key)
        assert run.series("train_inner", key) == pytest.approx(expected, abs=0.0011), key
    assert_same_weights(
        tmp_path / "student/checkpoint_last.pt", distilled.checkpoint, rtol=1e-3, atol=1e-3
    )


def test_student_with_a_permuted_vocabulary(corpus, permuted, teacher, tmp_path):
    """The other way round: the teacher's is plain, and it is the data that is in another order."""
    run = distil(permuted, teacher, tmp_path / "student", "--max-update", 1).ok()
    own = distil(corpus.data, teacher, tmp_path / "own", "--max-update", 1).ok()
    found, expected = (r.records("valid")[-1]["valid_teacher_nll_loss"] for r in (run, own))
    assert found == pytest.approx(expected, abs=0.0011)


@pytest.fixture(scope="module")
def larger(corpus, tmp_path_factory):
    """A corpus, and a teacher for it, with dictionaries that hold some symbols more."""
    folder = tmp_path_factory.mktemp("larger")
    lines = [dictionary_lines(corpus.data, lang) for lang in (SOURCE, TARGET)]
    options = write_dictionaries(
        folder / "dictionaries",
        *(["extra0 9", *lines[0], "extra1 1"], ["extra2 9", "extra3 9", *lines[1]]),
    )
    data = binarise(corpus.text, folder / "data", *options)
    return data, train_teacher(
        *(data, folder / "teacher", support.transformer(32), 150),
        *("--best-checkpoint-metric", "nll_loss"),
    )


def test_teacher_with_more_symbols(larger, corpus, tmp_path):
    _, theirs = larger
    run = distil(corpus.data, theirs, tmp_path, *UPDATES).ok()
    assert "mapped" in run.text
    own = load(theirs)["extra_state"]["val_loss"]
    # its mass on the extra symbols goes to the others, so it gets no worse
    assert 0 < run.records("valid")[-1]["valid_teacher_nll_loss"] <= own


def test_teacher_that_lacks_symbols(larger, corpus, teacher, tmp_path):
    data, _ = larger
    run = distil(data, teacher, tmp_path, *UPDATES)
    assert "lacks" in run.error
    for word in ("source", "extra0", "extra1", "Sequence-level"):
        assert word in run.error, word
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("side", ["source", "target"])
def test_teacher_that_lacks_symbols_of_one_side(side, corpus, teacher, tmp_path):
    lines = [dictionary_lines(corpus.data, lang) for lang in (SOURCE, TARGET)]
    lines[side == "target"].append("strange 1")
    data = binarise(corpus.text, tmp_path / "data", *write_dictionaries(tmp_path / "d", *lines))
    run = distil(data, teacher, tmp_path / "student", *UPDATES)
    for word in (side, "lacks 1", "'strange'", "Sequence-level"):
        assert word in run.error, word
    assert not list((tmp_path / "student").glob("*.pt"))


def test_padding_symbols_are_nobodys_words(corpus, teacher, tmp_path):
    """fairseq-preprocess --padding-factor 32 adds madeupwords that no teacher need know."""
    data = binarise(corpus.text, tmp_path / "data", "--padding-factor", 32)
    assert "madeupword" in (data / "dict.bb.txt").read_text()
    run = distil(data, teacher, tmp_path / "student", *UPDATES).ok()
    assert "mapped" in run.text
    assert run.records("valid")[-1]["valid_teacher_nll_loss"] < 2


def test_wrong_order_with_no_dictionary_is_caught(corpus, teacher, tmp_path):
    """The last net: such a teacher knows less than a uniform guess."""
    theirs = reordered(corpus, teacher, tmp_path / "teacher")
    for file in theirs.parent.glob("dict.*.txt"):
        file.unlink()
    state = load(theirs)
    state["cfg"]["task"]["data"] = str(tmp_path / "gone")
    torch.save(state, str(theirs))
    run = distil(corpus.data, theirs, tmp_path / "student", *UPDATES)
    assert "TAKEN TO BE THE STUDENT'S" in run.text
    for word in ("uniform guess", "--teacher-data", "direction"):
        assert word in run.error, word
    assert not list((tmp_path / "student").glob("*.pt"))
    run = write_cache(corpus.data, theirs, tmp_path / "cache", "--gen-subset", "valid")
    assert run.code == 1 and "sentences of valid" in run.text and "uniform guess" in run.text
    assert not list(tmp_path.rglob("manifest.json"))


def test_the_right_order_with_no_dictionary_is_warned_about(data, teacher, distilled, tmp_path):
    def homeless(state):
        state["cfg"]["task"]["data"] = str(tmp_path / "gone")

    theirs = changed(teacher, tmp_path / "teacher" / "teacher.pt", homeless)
    run = distil(data, theirs, tmp_path / "student", *UPDATES).ok()
    assert run.text.count("TAKEN TO BE THE STUDENT'S") == 1
    assert (
        run.series("train_inner", "kd_loss") == distilled.run.series("train_inner", "kd_loss")[:12]
    )


def test_teacher_of_other_sentences(data, tmp_path):
    """A dictionary with the same words in another order, from another sample of the language."""
    text = write_text(tmp_path / "text", seed=7)
    theirs = binarise(text, tmp_path / "data")
    assert (theirs / "dict.bb.txt").read_text() != (data / "dict.bb.txt").read_text()
    teacher = train_teacher(theirs, tmp_path / "teacher", support.transformer(32), 150)
    run = distil(data, teacher, tmp_path / "student", *UPDATES).ok()
    assert "mapped" in run.text
    assert run.records("valid")[-1]["valid_teacher_nll_loss"] < 3
