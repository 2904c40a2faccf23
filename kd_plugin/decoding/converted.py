"""A model in CTranslate2's format, whatever it was converted from: what its folder says of it."""

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

from fairseq.data import Dictionary

from ..checkpoints import nearest
from ..files import FileError, digest, read_json

_MODEL, _CONFIG = "model.bin", "config.json"
VOCABULARY_MAP = "vmap.txt"  # target symbols by source symbol, which a model may have
_TRANSLATES = "TransformerSpec"  # CTranslate2's name of encoder and decoder
_POSITIONS = "{}/position_encodings/encodings"
_VERSIONS = (2, 6)  # of the binary format, oldest and newest
_MOST_VARIABLES, _MOST_DIMENSIONS = 1 << 20, 16
_MOST_MAPPED = 16  # source symbols in a row that a vocabulary map has candidates for
_PADS = ("<pad>", "<blank>")  # the latter for fairseq's and OpenNMT's


class Converted(NamedTuple):
    """A translation model of CTranslate2's.

    Attributes:
        folder: where it lies.
        source, target: its vocabularies.
        positions: tokens of the longest source and target, its own additions included; None where
            the model has no limit.
        end: the end of a sentence.
        start: what the decoder begins with, before any prefix; None if the prefix says it.
        adds: what the model itself puts around a source, before it and behind it.
        special: tokens that are no text.
    """

    folder: Path
    source: Set[str]
    target: Set[str]
    positions: Tuple[Optional[int], Optional[int]]
    end: str
    start: Optional[str]
    adds: Tuple[bool, bool]
    special: Set[str]

    @classmethod
    def open(cls, folder: Path) -> "Converted":
        """Read what is small: all but the weights, of which only names and shapes.

        Raises:
            FileError: it is no model that translates, or it is damaged.
        """
        if not (folder / _MODEL).is_file():
            raise FileError(
                f"{folder}: expected a folder with a model of CTranslate2, found no {_MODEL} in it"
            )
        name, shapes = _read_header(folder / _MODEL)
        if name != _TRANSLATES:
            raise FileError(
                f"{folder} holds a model of the kind {name!r}: expected one that translates, "
                f"{_TRANSLATES!r}"
            )
        source, target = vocabularies(folder)
        config = read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
        tokens = {
            key: _text(config, key, default, folder)
            for key, default in (
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
                ("unk_token", "<unk>"),
                ("decoder_start_token", "<s>"),
            )
        }
        end = tokens["eos_token"] or "</s>"
        positions = [
            shape[0] if shape and len(shape) == 2 else None
            for shape in (shapes.get(_POSITIONS.format(side)) for side in ("encoder", "decoder"))
        ]
        special = {tokens["bos_token"], end, tokens["decoder_start_token"], *_PADS} - {None}
        return cls(
            *(folder, source, target, (positions[0], positions[1]), end),
            start=tokens["decoder_start_token"],
            adds=(config.get("add_source_bos") is True, config.get("add_source_eos") is True),
            special={str(token) for token in special},
        )

    @property
    def ends_source(self) -> bool:
        """Whether sentences have to be given with their end.

        Models whose decoder begins with the end of a sentence, a pad or a language were trained on
        sources with an end (Hugging Face's); others, OpenNMT's, were not.
        """
        return not self.adds[1] and (self.start in (self.end, "<pad>", None))

    def has_symbols_of(self, source: Dictionary, target: Dictionary) -> bool:
        """Whether its vocabularies are these dictionaries, but for what is special."""
        for dictionary, known in ((source, self.source), (target, self.target)):
            special = {*self.special, *dictionary.symbols[: dictionary.nspecial]}
            if set(dictionary.symbols) - special != known - special:
                return False
        return True

    def files(self) -> Dict[str, str]:
        """SHA-256 of the files that translations depend on, by name."""
        return {
            path.name: digest(str(path))
            for path in sorted(self.folder.iterdir())
            if path.name in (_MODEL, _CONFIG, VOCABULARY_MAP) or "vocabulary" in path.name
        }


def check_vocabulary_map(folder: Path) -> None:
    """Refuse a vocabulary map that CTranslate2 would crash or run out of memory over.

    Raises:
        FileError: there is one, and it is empty or damaged.
    """
    path = folder / VOCABULARY_MAP
    if not path.is_file():
        return
    with open(path, "rb") as file:
        most = max((line.split(b"\t", 1)[0].count(b" ") for line in file), default=None)
    if most is None or most >= _MOST_MAPPED:
        reason = "it is empty" if most is None else f"a line has {most + 1} source symbols"
        raise FileError(
            f"{path} is no vocabulary map, or damaged ({reason}): write it again, or delete it to "
            "translate without"
        )


def lacking_tokens(tokens: Sequence[str], known: Set[str], flag: str) -> List[str]:
    """Faults of a flag's tokens that a teacher does not know; the nearest ones are named."""
    found = []
    for token in tokens:
        if token not in known:
            near = nearest(token, known)
            alike = f"; it has {', '.join(map(repr, near))}" if near else ""
            found.append(f"{flag}: the teacher's vocabulary lacks {token!r}{alike}")
    return found


def vocabularies(folder: Path) -> Tuple[Set[str], Set[str]]:
    """The source and target tokens that a CTranslate2 folder knows.

    Raises:
        FileError: its vocabularies cannot be read.
    """
    found = []
    for side in ("source", "target"):
        files = [
            folder / f"{name}_vocabulary.{ending}"
            for name in ("shared", side)
            for ending in ("json", "txt")  # the latter of CTranslate2 before 3.6
        ]
        path = next((file for file in files if file.is_file()), files[2])
        try:
            text = path.read_text(encoding="utf-8")
            tokens = json.loads(text) if path.suffix == ".json" else text.split("\n")
            if not isinstance(tokens, list) or not all(type(token) is str for token in tokens):
                raise ValueError("expected a list of tokens")
        except (OSError, ValueError, RecursionError) as error:
            raise FileError(
                f"{folder}: expected a model of CTranslate2 with its vocabularies ({error})"
            ) from None
        found.append(set(tokens))
    return found[0], found[1]


def _text(config: Dict[str, Any], key: str, default: str, folder: Path) -> Optional[str]:
    value = config.get(key, default)
    if value is not None and type(value) is not str:
        raise FileError(f"{folder / _CONFIG}: {key} is {value!r:.80}, expected a token")
    return value


# The file of weights: names, shapes, raw numbers, then other names for some of them


def _read_header(path: Path) -> Tuple[str, Dict[str, Tuple[int, ...]]]:
    """The kind of a model, and the shape of each of its variables; numbers are passed over.

    Raises:
        FileError: it is damaged, or of another version.
    """
    try:
        with open(path, "rb") as file:
            return _header(file, path.stat().st_size)
    except (ValueError, struct.error) as error:
        raise FileError(
            f"{path} is no model of CTranslate2, or damaged ({error}): convert it again"
        ) from None


def _header(file: BinaryIO, size: int) -> Tuple[str, Dict[str, Tuple[int, ...]]]:
    (version,) = _unpack("<I", file)
    if not _VERSIONS[0] <= version <= _VERSIONS[1]:
        raise ValueError(f"its version is {version}")
    name, _, count = _string(file), _unpack("<I", file), _unpack("<I", file)[0]
    if count > _MOST_VARIABLES:
        raise ValueError(f"it claims {count} variables")
    shapes = {}
    for _ in range(count):
        variable, (rank,) = _string(file), _unpack("<B", file)
        if rank > _MOST_DIMENSIONS:
            raise ValueError(f"{variable} claims {rank} dimensions")
        shapes[variable] = _unpack(f"<{rank}I", file)
        # before version 4: bytes of a number and how many there are
        first, second = _unpack("<BI", file)
        end = file.tell() + (second if version >= 4 else first * second)
        if end > size:
            raise ValueError(f"{variable} would end at byte {end} of {size}")
        file.seek(end)
    if version >= 3:
        (count,) = _unpack("<I", file)
        if count > _MOST_VARIABLES:
            raise ValueError(f"it claims {count} other names")
        for _ in range(count):
            other, variable = _string(file), _string(file)
            if variable in shapes:
                shapes[other] = shapes[variable]
    return name, shapes


def _unpack(layout: str, file: BinaryIO) -> Tuple[int, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _string(file: BinaryIO) -> str:
    (length,) = _unpack("<H", file)
    content = file.read(length)
    if len(content) != length:
        raise ValueError("it ends in a name")
    return content.rstrip(b"\0").decode("utf-8")
