"""A toy language pair, and the runs that many tests look at.

Each word of the source language has one translation, and sentences keep their order: a model of a
few thousand weights learns some of it within seconds.
"""

import random
import shutil
from pathlib import Path
from typing import Any, List, NamedTuple

import pytest
import support
from support import SOURCE, TARGET, TRAINING, fairseq, kd_arguments, script, transformer

WORDS = 20
# all divisible by 8: fairseq drops a remainder unless told otherwise
SIZES = {"train": 640, "valid": 48, "valid1": 24, "test": 16}


class Corpus(NamedTuple):
    text: Path  # train.aa, train.bb, ...
    data: Path  # binarised


def sentence(rng: random.Random) -> List[int]:
    return [min(rng.randrange(WORDS), rng.randrange(WORDS)) for _ in range(rng.randint(2, 8))]


def write_text(folder: Path, sizes=SIZES, seed: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for split, size in sizes.items():
        sentences = [sentence(rng) for _ in range(size)]
        if split == "train":
            sentences[0] = list(range(WORDS))  # every word is in the dictionary
        for lang, letter in ((SOURCE, "a"), (TARGET, "b")):
            lines = [" ".join("{}{:02d}".format(letter, w) for w in words) for words in sentences]
            (folder / "{}.{}".format(split, lang)).write_text("\n".join(lines) + "\n")
    return folder


def binarise(text: Path, data: Path, *more: Any) -> Path:
    fairseq(
        "fairseq-preprocess",
        *("--source-lang", SOURCE, "--target-lang", TARGET, "--destdir", data, "--workers", 1),
        *("--trainpref", text / "train", "--validpref", text / "valid"),
        *more,
    ).ok()
    return data


def dictionary_lines(folder: Path, lang: str) -> List[str]:
    return (folder / "dict.{}.txt".format(lang)).read_text().splitlines()


def write_dictionaries(folder: Path, source: List[str], target: List[str]) -> List[Any]:
    """Write both dictionaries; returns the options that make fairseq-preprocess use them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for lang, lines in ((SOURCE, source), (TARGET, target)):
        files.append(folder / "dict.{}.txt".format(lang))
        files[-1].write_text("\n".join(lines) + "\n")
    return ["--srcdict", files[0], "--tgtdict", files[1]]


def permuted_dictionaries(corpus: Corpus, folder: Path) -> List[Any]:
    """The corpus's dictionaries, each in an order of its own."""
    both = [dictionary_lines(corpus.data, lang) for lang in (SOURCE, TARGET)]
    for seed, lines in enumerate(both):
        random.Random(seed).shuffle(lines)
    return write_dictionaries(folder / "dictionaries", *both)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    text = write_text(folder / "text")
    valid = "{},{}".format(text / "valid", text / "valid1")
    data = binarise(text, folder / "data", "--validpref", valid, "--testpref", text / "test")
    return Corpus(text, data)


@pytest.fixture(scope="session")
def data(corpus) -> Path:
    return corpus.data


@pytest.fixture(scope="session")
def teacher(data, tmp_path_factory) -> Path:
    """A teacher from stock fairseq that knows the language pair rather well.

    With dropout, so that one that is not in eval mode would show.
    """
    folder = tmp_path_factory.mktemp("teacher")
    return train_teacher(data, folder, transformer(32), 300, "--dropout", 0.1)


def train_teacher(data: Path, folder: Path, arch: List[Any], updates: int, *more: Any) -> Path:
    fairseq(
        "fairseq-train",
        *(data, *support.STOCK, *TRAINING, *arch, "--save-dir", folder),
        *("--max-update", updates, "--log-interval", 50, *more),
    ).ok()
    return folder / "checkpoint_last.pt"


class Distilled(NamedTuple):
    run: support.Run
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint_last.pt"


@pytest.fixture(scope="session")
def distilled(data, teacher, tmp_path_factory) -> Distilled:
    """The ordinary distillation: the installed command, an epoch and a half, metrics reported.

    The teacher's file is gone afterwards.
    """
    folder = tmp_path_factory.mktemp("distilled")
    passing = folder / "passing" / "teacher.pt"
    passing.parent.mkdir()
    shutil.copy(str(teacher), str(passing))
    arguments = kd_arguments(
        *(data, passing, folder, "--max-update", 60, "--report-accuracy"),
        *("--valid-subset", "valid,valid1"),
    )
    run = script("fairseq-train", *arguments).ok()
    passing.unlink()
    return Distilled(run, folder)
