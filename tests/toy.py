"""A toy language pair, and teachers that know it.

Each word of the source language has one translation, and sentences keep their order: a model of a
few thousand weights learns some of it within seconds.
"""

import random
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple

import torch
from support import SOURCE, TARGET, Run, fairseq, load, train_plain

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
            lines = [" ".join(f"{letter}{w:02d}" for w in words) for words in sentences]
            (folder / f"{split}.{lang}").write_text("\n".join(lines) + "\n")
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
    return (folder / f"dict.{lang}.txt").read_text().splitlines()


def write_dictionaries(folder: Path, source: List[str], target: List[str]) -> List[Any]:
    """Write both dictionaries; returns the options that make fairseq-preprocess use them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for lang, lines in ((SOURCE, source), (TARGET, target)):
        files.append(folder / f"dict.{lang}.txt")
        files[-1].write_text("\n".join(lines) + "\n")
    return ["--srcdict", files[0], "--tgtdict", files[1]]


def permuted_dictionaries(corpus: Corpus, folder: Path) -> List[Any]:
    """The corpus's dictionaries, each in an order of its own."""
    both = [dictionary_lines(corpus.data, lang) for lang in (SOURCE, TARGET)]
    for seed, lines in enumerate(both):
        random.Random(seed).shuffle(lines)
    return write_dictionaries(folder / "dictionaries", *both)


def train_teacher(data: Path, folder: Path, arch: List[Any], updates: int, *more: Any) -> Path:
    options = ("--max-update", updates, "--log-interval", 50, *more)
    train_plain(data, folder, *options, arch=arch).ok()
    return folder / "checkpoint_last.pt"


def changed(checkpoint: Path, path: Path, change: Callable[[Dict[str, Any]], Any]) -> Path:
    """A copy of a checkpoint after ``change(state)``."""
    state = load(checkpoint)
    change(state)
    path.parent.mkdir(exist_ok=True)
    torch.save(state, str(path))
    return path


class Distilled(NamedTuple):
    run: Run
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint_last.pt"
