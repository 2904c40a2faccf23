"""How text is cut into pieces: by one model, and by another one that replaces it."""

import os
import re
from itertools import chain
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Set, Tuple

import numpy as np

from ..files import FileError
from ..timing import progress_bar
from .subwords import SubwordModel

_BATCH = 1 << 20  # bytes of text, which SentencePiece cuts with all cores
_LONGEST = 1 << 24  # bytes of a line
_EXAMPLES = 10  # of what is unknown
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class Reading(NamedTuple):
    """A model, and which of its pieces the reader of its output knows.

    Attributes:
        known: by id; the unknown symbol is not among them.
    """

    model: SubwordModel
    known: np.ndarray

    @classmethod
    def of(cls, model: SubwordModel, symbols: Set[str]) -> "Reading":
        known = [piece.text in symbols for piece in model.pieces]
        known[model.unknown] = False
        return cls(model, np.array(known))


class Compared(NamedTuple):
    """A text as two models cut it.

    Attributes:
        tokens: of the whole model.
        differently: how many of these the other model does not have in their place.
        unknown_before: how many of these the reader does not know.
        tokens_after: of the other model.
        unknown: how many of those the reader does not know.
        examples: of what that is.
    """

    tokens: int
    differently: int
    unknown_before: int
    tokens_after: int
    unknown: int
    examples: List[str]


def count(model: SubwordModel, files: Sequence[str], flag: str) -> np.ndarray:
    """How often the model writes each piece, by id: int64.

    Raises:
        FileError: there is no text in the files, or what cannot be read.
    """
    counts = np.zeros(len(model.pieces), np.int64)
    for lines in _batches(files, flag, "counting pieces"):
        _add(counts, model.encode(lines, int))
    if not counts.any():
        raise FileError(f"{flag} {' '.join(files)}: expected text, found none")
    return counts


def compare(
    whole: Reading, other: Reading, files: Sequence[str], flag: str
) -> Tuple[Compared, np.ndarray]:
    """Cut a text with two models.

    Returns:
        how they compare, and how often the other one writes each of its pieces.

    Raises:
        FileError: as ``count``.
    """
    number = {piece.text: i for i, piece in enumerate(other.model.pieces)}
    same = [number.get(piece.text, -1) for piece in whole.model.pieces]
    before = np.zeros(len(whole.model.pieces), np.int64)
    after = np.zeros(len(other.model.pieces), np.int64)
    differently = 0
    examples: Dict[str, None] = {}
    unknown = set(np.flatnonzero(~other.known).tolist())
    encode_whole, encode_other = whole.model.encode, other.model.encode
    for lines in _batches(files, flag, "comparing"):
        ours, theirs = encode_whole(lines, int), encode_other(lines, int)
        _add(before, ours)
        _add(after, theirs)
        for line, mine, its in zip(lines, ours, theirs):
            if [same[token] for token in mine] != its:
                written = _places(encode_other(line, str))
                differently += len(_places(encode_whole(line, str)) - written)
            if len(examples) < _EXAMPLES and not unknown.isdisjoint(its):
                pieces = encode_other(line, str)
                examples.update((p, None) for p, token in zip(pieces, its) if token in unknown)
    compared = Compared(
        tokens=int(before.sum()),
        differently=differently,
        unknown_before=int(before[~whole.known].sum()),
        tokens_after=int(after.sum()),
        unknown=int(after[~other.known].sum()),
        examples=list(examples)[:_EXAMPLES],
    )
    if compared.tokens == 0:
        raise FileError(f"{flag} {' '.join(files)}: expected text, found none")
    return compared, after


def _add(counts: np.ndarray, sentences: List[List[int]]) -> None:
    tokens = np.fromiter(chain.from_iterable(sentences), np.int64)
    counts += np.bincount(tokens, minlength=len(counts))


def _places(pieces: Sequence[str]) -> Set[Tuple[int, str]]:
    """The pieces of a sentence, each with where it begins in the normalised text, in bytes."""
    found, at = set(), 0
    for piece in pieces:
        found.add((at, piece))
        at += 1 if _BYTE.fullmatch(piece) else len(piece.encode("utf-8"))
    return found


def _batches(files: Sequence[str], flag: str, doing: str) -> Iterator[List[str]]:
    """Lines without their ends, some at a time."""
    total = sum(os.path.getsize(path) for path in files)
    with progress_bar(total, doing, "B", unit_scale=True) as progress:
        for path in files:
            for lines in _lines(path, flag, progress):
                yield lines


def _lines(path: str, flag: str, progress: Any) -> Iterator[List[str]]:
    lines: List[str] = []
    size = number = 0
    with open(path, "rb") as file:
        for line in iter(lambda: file.readline(_LONGEST + 1), b""):
            number += 1
            if len(line) > _LONGEST:
                raise FileError(
                    f"{flag} {path}: line {number} has more than {_LONGEST:,} bytes; expected a "
                    "sentence in each line"
                )
            try:
                lines.append(line.decode("utf-8").rstrip("\r\n"))
            except UnicodeDecodeError as error:
                raise FileError(
                    f"{flag} {path}: line {number} is not UTF-8 (byte {error.start + 1} of it)"
                ) from None
            size += len(line)
            if size >= _BATCH:
                yield lines
                progress.update(size)
                lines, size = [], 0
    if lines:
        yield lines
        progress.update(size)
