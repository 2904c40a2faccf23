"""A student whose vocabulary is cut out of its teacher's learns from it, by both routes."""

import json
import math
from pathlib import Path
from typing import Any, List, NamedTuple

import pytest
from subwords import encode, train
from support import SOURCE, TARGET, distil, fairseq, train_plain, transformer, write_sequences
from toy import binarise, train_teacher

SPLITS = ("train", "valid")


class Languages(NamedTuple):
    teacher: Path
    teachers_data: Path  # what the student is to learn, in the teacher's subwords
    students_data: Path
    cut: Path  # the vocabulary


def write_subwords(model: bytes, text: Path, folder: Path) -> Path:
    folder.mkdir()
    for split in SPLITS:
        for lang in (SOURCE, TARGET):
            lines = (text / f"{split}.{lang}").read_text().splitlines()
            encoded = [" ".join(symbols) for symbols in encode(model, lines)]
            (folder / f"{split}.{lang}").write_text("\n".join(encoded) + "\n")
    return folder


def with_dictionary(path: Path) -> List[Any]:
    return ["--srcdict", path, "--tgtdict", path]


@pytest.fixture(scope="module")
def languages(corpus, tmp_path_factory) -> Languages:
    """The student's text has half of the words that the teacher knows."""
    folder = tmp_path_factory.mktemp("languages")
    lines = [
        line
        for lang in (SOURCE, TARGET)
        for line in (corpus.text / f"train.{lang}").read_text().splitlines()
    ]
    spm = folder / "spm.model"
    whole_words = {"split_by_unicode_script": False, "split_by_number": False}
    spm.write_bytes(train(lines, "bpe", 90, **whole_words))
    theirs = write_subwords(spm.read_bytes(), corpus.text, folder / "text")
    data = binarise(theirs, folder / "data", "--joined-dictionary")
    teacher = train_teacher(data, folder / "teacher", transformer(32), 60)
    mine = folder / "mine"
    mine.mkdir()
    for split in SPLITS:
        sides = [(corpus.text / f"{split}.{s}").read_text().splitlines() for s in (SOURCE, TARGET)]
        few = [pair for pair in zip(*sides) if all(word < "a10" for word in pair[0].split())]
        for lang, side in zip((SOURCE, TARGET), zip(*few)):
            (mine / f"{split}.{lang}").write_text("\n".join(side) + "\n")
    cut = folder / "cut"
    run = fairseq(
        "fairseq-kd-vocabulary",
        *("--spm", spm, "--dict", data / f"dict.{SOURCE}.txt", "--output", cut),
        *("--text", mine / f"train.{SOURCE}", mine / f"train.{TARGET}"),
        *("--valid", mine / f"valid.{SOURCE}", mine / f"valid.{TARGET}"),
    ).ok()
    assert "0.00% of them cut differently" in run.text
    text = write_subwords((cut / "spm.model").read_bytes(), mine, folder / "students-text")
    students = binarise(text, folder / "students", *with_dictionary(cut / "dict.txt"))
    text = write_subwords(spm.read_bytes(), mine, folder / "teachers-text")
    teachers = binarise(text, folder / "teachers", *with_dictionary(data / f"dict.{SOURCE}.txt"))
    return Languages(teacher, teachers, students, cut)


def test_it_learns_at_word_level(languages, tmp_path):
    """Of the same sentences in the same pieces: with fewer symbols to give probability to, the
    teacher is never worse."""
    options = ("--max-update", 30, "--kd-weight", 0.7, "--report-accuracy")
    cut = distil(languages.students_data, languages.teacher, tmp_path / "cut", *options).ok()
    whole = distil(languages.teachers_data, languages.teacher, tmp_path / "all", *options).ok()
    record = json.loads((languages.cut / "record.json").read_text())
    symbols, theirs = record["symbols"], record["teacher_symbols"]
    assert symbols < theirs / 1.5
    assert f"mapped (student {symbols} symbols, teacher {theirs})" in cut.text
    ours, all_symbols = (run.series("train_inner", "teacher_nll_loss") for run in (cut, whole))
    assert len(ours) == 30
    assert all(x <= y + 0.002 for x, y in zip(ours, all_symbols))
    assert sum(ours) > 0.8 * sum(all_symbols)
    losses = cut.series("train_inner", "kd_loss")
    assert all(map(math.isfinite, losses)) and sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert 0 < cut.series("train_inner", "agreement")[-1] <= 1


def test_it_learns_the_teachers_translations(languages, tmp_path):
    given = ("--student-data", languages.students_data, "--no-filters")
    given += ("--student-spm", languages.cut / "spm.model", "--remove-bpe", "sentencepiece")
    write_sequences(languages.teachers_data, languages.teacher, tmp_path / "data", *given).ok()
    record = json.loads((tmp_path / "data" / "record.json").read_text())
    assert record["counts"]["distilled"] > 20
    assert record["counts"]["unknown_tokens"] <= 0.02 * record["counts"]["target_tokens"]
    run = train_plain(tmp_path / "data", tmp_path / "student", "--max-update", 20).ok()
    losses = run.series("train_inner", "nll_loss")
    assert sum(losses[-5:]) < sum(losses[:5])
