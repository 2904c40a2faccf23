"""Training sets that are put together: which, how much of each, in which order.

``--mix original=2:mono=0.5`` names them. Everything about them is checked before anything is
written: one vocabulary, as many sources as targets, and, where a record has the checksum of pairs,
that the two sides are still those that were written.
"""

import hashlib
import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from ..checkpoints import dictionaries
from ..decoding import databin
from ..decoding.databin import DataBin
from ..errors import Faults
from ..files import FileError, read_json, refuse_unknown_numbers, remove, temporary
from ..timing import progress_bar
from .student import Sentence, Student

logger = logging.getLogger(__name__)

ORIGINAL = "original"  # the training set of DATA
IN_ORDER, SHUFFLED = ORDERS = ("in-order", "shuffled")
RECORD = "record.json"
_SPLIT = "train"
_HEAVIEST = 1000  # times that a training set may be repeated
_NUMBER = re.compile(r"\d+\.?\d*|\.\d+")

Pair = Tuple[Sentence, Sentence]


class Wanted(NamedTuple):
    """A training set to be mixed in.

    Attributes:
        name: ``ORIGINAL``, or a folder.
        weight: how many times; of a fraction, that share of its sentences.
    """

    name: str
    weight: float = 1.0


def parse_mix(text: str) -> List[Wanted]:
    """What ``--mix`` names: ``original=2:mono=0.5``.

    Raises:
        FileError: it is something else; every fault in one message.
    """
    faults, found = Faults(), []
    for item in text.split(":"):
        name, equals, weight = item.rpartition("=")
        if not equals or (not _NUMBER.fullmatch(weight) and os.path.isdir(item)):
            name, weight = item, "1"
        if not name:
            faults.add(
                f"--mix {text}: expected names of folders, with ':' between; got an empty one"
            )
        elif not _NUMBER.fullmatch(weight) or not 0 < float(weight) <= _HEAVIEST:
            faults.add(
                f"--mix {item}: expected a weight above 0 and up to {_HEAVIEST} behind '=', as in "
                f"{name}=2 or {name}=0.5"
            )
        else:
            found.append(Wanted(name, float(weight)))
    places = [one.name if one.name == ORIGINAL else os.path.realpath(one.name) for one in found]
    for i, one in enumerate(found):
        if places[i] in places[:i]:
            faults.add(f"--mix names {one.name} twice: give it once, with a weight")
    faults.raise_if_any(FileError)
    return found


class PairDigest:
    """The checksum of pairs, in their order: SHA-256.

    For each pair the source and then the target: the number of its symbols, end of sentence
    included, and their numbers in the dictionary, as int32, little-endian.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.pairs = 0

    def add(self, source: Any, target: Any) -> None:
        for side in (source, target):
            numbers = np.asarray(side, dtype="<i4")
            self._digest.update(len(numbers).to_bytes(4, "little") + numbers.tobytes())
        self.pairs += 1

    def describe(self) -> Dict[str, Any]:
        """As a record has it."""
        return {"sentences": self.pairs, "sha256": self._digest.hexdigest()}


class Part(NamedTuple):
    """A training set to be mixed in, read and checked.

    Attributes:
        name: ``ORIGINAL``, or its folder.
        source, target: its sentences.
        weight: as ``Wanted`` has it.
        own: whether these are in the student's indices, and not in those of the data that is read.
        pairs: what ``PairDigest`` says of it.
    """

    name: str
    source: Sequence[torch.Tensor]
    target: Sequence[torch.Tensor]
    weight: float = 1.0
    own: bool = False
    pairs: Optional[Dict[str, Any]] = None

    @property
    def sentences(self) -> int:
        """How many are written."""
        whole, sampled = self._shares()
        return whole * len(self.source) + sampled

    def places(self, seed: Sequence[int]) -> Iterator[int]:
        """Their numbers in turn; the sampled ones last, in their order, each at most once."""
        whole, sampled = self._shares()
        for _ in range(whole):
            yield from range(len(self.source))
        if sampled:
            numbers = np.arange(len(self.source), dtype=np.int64)
            # this generator's numbers are the same with every numpy
            np.random.RandomState(seed).shuffle(numbers)
            numbers[:sampled].sort()
            yield from map(int, numbers[:sampled])

    def _shares(self) -> Tuple[int, int]:
        whole = math.floor(self.weight)
        return whole, math.floor((self.weight - whole) * len(self.source) + 0.5)


class Mix(NamedTuple):
    """Training sets that come before what is distilled, and the order of the whole.

    Attributes:
        order: one of ``ORDERS``.
        seed: of samples and of the order.
    """

    parts: Sequence[Part] = ()
    order: str = IN_ORDER
    seed: int = 1

    @property
    def originals(self) -> int:
        return sum(part.sentences for part in self.parts if part.name == ORIGINAL)

    @property
    def others(self) -> int:
        return sum(part.sentences for part in self.parts if part.name != ORIGINAL)

    def settings(self, *, beside_teacher: bool) -> Dict[str, Any]:
        """What the data depend on: contents, not paths.

        Args:
            beside_teacher: whether something is distilled, too. The original training set alone is
                then told as in records from before other data were mixed.
        """
        brief = beside_teacher and self.order == IN_ORDER
        if brief and not self.parts:
            return {"original": 0, "mix": None}
        if brief and [part.name for part in self.parts] == [ORIGINAL]:
            times = self.parts[0].weight
            if times == math.floor(times):
                return {"original": math.floor(times), "mix": None}
        parts = [
            {
                "original": part.name == ORIGINAL,
                "weight": part.weight,
                "pairs": part.pairs and part.pairs["sha256"],
            }
            for part in self.parts
        ]
        return {"original": 0, "mix": {"parts": parts, "order": self.order, "seed": self.seed}}

    def describe(self) -> Dict[str, Any]:
        """What was mixed, as a record has it."""
        parts = [
            {
                "name": part.name,
                "weight": part.weight,
                "sentences": len(part.source),
                "written": part.sentences,
                "pairs": part.pairs and part.pairs["sha256"],
            }
            for part in self.parts
        ]
        return {"parts": parts, "order": self.order, "seed": self.seed}

    def read(self, data: DataBin, student: Student) -> Iterator[Pair]:
        """Its pairs.

        Args:
            data: whose dictionaries those parts are in that are not the student's own.
        """
        for number, part in enumerate(self.parts):
            for i in part.places([self.seed, number]):
                source, target = part.source[i], part.target[i]
                if part.own:
                    yield student.own(source), student.own(target, target=True)
                else:
                    yield (
                        student.sentence(databin.decode(data.source, source.tolist())),
                        student.sentence(databin.decode(data.target, target.tolist()), target=True),
                    )


def open_mix(
    wanted: Sequence[Wanted],
    order: str,
    seed: int,
    *,
    data: DataBin,
    subset: str,
    student: Student,
    output: str,
) -> Mix:
    """Read and check what is to be mixed.

    Args:
        data: where the original training set is, in its subset.
        output: the folder that is written.

    Raises:
        FileError: some of it cannot be mixed; every fault in one message.
    """
    faults, parts = Faults(), []
    for one in wanted:
        with faults.collecting():
            try:
                parts.append(_open_part(one, data, subset, student, output))
            except FileError as error:
                raise FileError(f"--mix {one.name}: {error}") from error
    faults.raise_if_any(FileError)
    return Mix(parts, order, seed)


def _open_part(wanted: Wanted, data: DataBin, subset: str, student: Student, output: str) -> Part:
    original = wanted.name == ORIGINAL
    if not original:
        if os.path.realpath(wanted.name) == os.path.realpath(output):
            raise FileError("that is --output: choose another folder for the mixture")
        if not os.path.isdir(wanted.name):
            raise FileError("expected a folder with a data-bin, or original; there is no such one")
        data, subset = DataBin(wanted.name, *student.data.langs), _SPLIT
        _refuse_other_dictionaries(data, student)
    source, target = [data.side(subset, lang) for lang in data.langs]
    if source is None or target is None:
        raise FileError(f"{data.folder} has no {subset} of both languages")
    if len(source) != len(target):
        raise FileError(
            f"{data.folder}: {subset} has {len(source)} sentences in {data.langs[0]} and "
            f"{len(target)} in {data.langs[1]}: expected as many; make it again from files with "
            "as many lines"
        )
    more = sorted(split for split in data.splits() if re.match(rf"{_SPLIT}\d+$", split))
    if more and not original:
        logger.warning(
            f"--mix {wanted.name}: only {_SPLIT} is mixed, and not {', '.join(more)}, which "
            "fairseq-train would read with it"
        )
    pairs = _checksum(source, target, data)
    _refuse_changed(data.folder, subset, pairs)
    return Part(wanted.name, source, target, wanted.weight, not original, pairs)


def _refuse_other_dictionaries(data: DataBin, student: Student) -> None:
    for lang, mine, theirs in (
        (data.langs[0], student.data.source, data.source),
        (data.langs[1], student.data.target, data.target),
    ):
        difference = dictionaries.difference(mine, theirs)
        if difference:
            raise FileError(
                f"dict.{lang}.txt is another dictionary than that of {student.data.folder} "
                f"({difference}): what is mixed has to be binarised with the student's dictionaries"
            )


def _checksum(source: Any, target: Any, data: DataBin) -> Dict[str, Any]:
    digest = PairDigest()
    limits = len(data.source), len(data.target)
    with progress_bar(len(source), f"checking {data.folder}", "sentences") as progress:
        for i in range(len(source)):
            pair = source[i], target[i]
            for tokens, limit in zip(pair, limits):
                if len(tokens):
                    refuse_unknown_numbers([int(tokens.max())], limit)
            digest.add(*pair)
            progress.update(1)
    return digest.describe()


def _refuse_changed(folder: Path, subset: str, pairs: Dict[str, Any]) -> None:
    """What this command wrote, and somebody has changed since."""
    if subset != _SPLIT or not (folder / RECORD).is_file():
        return
    recorded = read_json(folder / RECORD).get("pairs")
    if recorded is not None and recorded != pairs:
        raise FileError(
            f"the pairs of {folder} are not those that its {RECORD} has the checksum of: one side "
            "was changed since, or the two no longer belong together. Make it again."
        )


def shuffled(pairs: Iterable[Pair], total: int, seed: int, folder: Path) -> Iterator[Pair]:
    """The same pairs in a random order.

    They wait in a file in ``folder``; of each, 8 bytes are held in memory.
    """
    waiting = temporary(folder / "pairs")
    begins = np.zeros(total, dtype=np.int64)
    with open(waiting, "wb") as file, progress_bar(total, "gathering", "sentences") as progress:
        for i, pair in enumerate(pairs):
            begins[i] = file.tell()
            file.write(json.dumps(pair).encode("ascii") + b"\n")
            progress.update(1)
    np.random.RandomState([seed, 0, 1]).shuffle(begins)
    return _pairs_at(begins, waiting)


def _pairs_at(begins: np.ndarray, path: Path) -> Iterator[Pair]:
    """The pairs of a file that begin there; the file is removed in the end."""
    try:
        with open(path, "rb") as file:
            for begin in begins:
                file.seek(int(begin))
                source, target = json.loads(file.readline().decode("ascii"))
                yield Sentence(*source), Sentence(*target)
    finally:
        remove(path)
