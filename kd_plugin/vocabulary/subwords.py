"""SentencePiece models as files: read, cut to some of their pieces, written.

A model is one protobuf message. Only the few fields that a cut changes are taken apart here; all
others, the normaliser and whatever later versions add among them, are copied byte by byte. (The
message classes that SentencePiece ships need the package protobuf, and those of its older releases
fail with today's; they would also need more memory and say less of a damaged file.)
"""

import math
import os
import struct
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np
import sentencepiece

from ..errors import UserError
from ..files import FileError

_LARGEST = 1 << 28  # bytes; 256,000 pieces are 5 MB
_LONGEST = 1000  # characters of a piece; SentencePiece's trainer makes none above 16 by default
_UNIGRAM, _BPE = 1, 2
_TYPES = {_UNIGRAM: "unigram", _BPE: "bpe", 3: "word", 4: "char"}

# Types of pieces
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Fields: of a model, of a piece, of the trainer's settings, of a normaliser
_PIECES, _TRAINER, _NORMALISERS, _SELF_TEST = 1, 2, (3, 5), 4
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _IDS = 3, 4, (40, 41, 42, 43)
_TABLE = 2
# Wire types
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Piece(NamedTuple):
    """A piece, and its message as it lies in the file."""

    text: str
    score: float
    type: int
    message: bytes


class SubwordModel:
    """A unigram or BPE model of SentencePiece.

    Args:
        content: the file's.
        name: for messages: "--spm FILE", say.

    Attributes:
        content, name: as given.
        pieces: by id.
        type: "unigram" or "bpe".
        unknown: the id of what no piece stands for.

    Raises:
        FileError: it is no such model, it is damaged, or its type is another one.
    """

    def __init__(self, content: bytes, name: str) -> None:
        self.content, self.name = content, name
        try:
            self._fields = list(_fields(content))
            self.pieces = [
                _piece(number, value)
                for number, value in enumerate(
                    [field.value for field in self._fields if field.number == _PIECES]
                )
            ]
            kinds = list(self._settings((_TRAINER,), _MODEL_TYPE))
            for table in self._settings(_NORMALISERS, _TABLE):
                _refuse_table(_expect_bytes(table))
            if not self.pieces:
                raise _Damaged("it has no pieces")
        except _Damaged as error:
            raise FileError(
                f"{name}: expected a SentencePiece model, whole and undamaged ({error})"
            ) from None
        kind = kinds[-1] if kinds else _UNIGRAM
        self.type = _TYPES.get(kind, str(kind))
        if kind not in (_UNIGRAM, _BPE):
            raise FileError(
                f"{name}: its type is {self.type}, and only unigram and bpe models can be cut"
            )
        self.processor = _load(content, name)
        self.unknown: int = self.processor.unk_id()

    @classmethod
    def open(cls, path: str, flag: str) -> "SubwordModel":
        """Args:
            flag: that names the file, for messages.

        Raises:
            FileError: it cannot be read as such a model.
        """
        name = f"{flag} {path}"
        if not os.path.isfile(path):
            raise FileError(f"{name}: no such file")
        size = os.path.getsize(path)
        if size > _LARGEST:
            raise FileError(f"{name}: expected a SentencePiece model; it has {size:,} bytes")
        with open(path, "rb") as file:
            return cls(file.read(_LARGEST), name)

    def _settings(self, messages: Sequence[int], number: int) -> Iterator[Any]:
        """The values of a field of messages within the model."""
        for field in self._fields:
            if field.number in messages:
                for setting in _fields(_expect_bytes(field.value)):
                    if setting.number == number:
                        yield setting.value

    def texts(self, *types: int) -> List[str]:
        """The texts of all pieces of these types."""
        return [piece.text for piece in self.pieces if piece.type in types]

    def encode(self, text: Any, out_type: Any) -> Any:
        """SentencePiece's ``encode``, of a sentence or several.

        Raises:
            FileError: it fails, as it does where a damaged normaliser makes what is no text.
        """
        try:
            return self.processor.encode(text, out_type=out_type)
        except (RuntimeError, SystemError, UnicodeError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise FileError(
                f"{self.name}: SentencePiece cannot cut text with this model ({reason[:300]}); it "
                "is damaged"
            ) from None

    def cut(self, keep: Set[str]) -> bytes:
        """The model with these of its normal and user-defined pieces alone, as a file's content.

        Scores stay as they are, and so do control symbols, bytes, the unknown symbol and the
        normaliser. Text whose pieces in the whole model are all kept is cut into just these:

        - **Unigram.** The best way to cut a text stays the best of fewer ways.
        - **BPE.** Two neighbours are merged if what they make is a piece; the pair whose piece has
          the highest score goes first, and of equal ones the leftmost. A piece is reached through
          smaller ones, and which these are does not depend on what stands around it: no merge on
          the way crosses its ends. Those that are not kept stay as *unused* ones, with which
          SentencePiece merges, but which it splits again instead of writing them. The merges of
          a text whose pieces are kept are then the same in the same order, for those left out
          never took place in it.

        Args:
            keep: texts of pieces; others than normal and user-defined ones change nothing.
        """
        unused = self._passed(keep) - keep if self.type == "bpe" else set()
        messages: List[bytes] = []
        position: Dict[int, int] = {}  # of each id, in the cut model
        for old, piece in enumerate(self.pieces):
            optional = piece.type in (NORMAL, USER_DEFINED, UNUSED)
            if not optional or (piece.text in keep and piece.type != UNUSED):
                message = piece.message
            elif piece.text in unused:
                message = _with_type(piece, UNUSED)
            else:
                continue
            position[old] = len(messages)
            messages.append(message)
        content = [_bytes_field(_PIECES, message) for message in messages]
        for field in self._fields:
            if field.number == _TRAINER:
                settings = _expect_bytes(field.value)
                content.append(_bytes_field(_TRAINER, _adapted(settings, position)))
            elif field.number not in (_PIECES, _SELF_TEST):  # tests of the whole model would fail
                content.append(field.record)
        return b"".join(content)

    def _passed(self, keep: Set[str]) -> Set[str]:
        """Pieces that merging makes on the way to these."""
        scores = {
            piece.text: piece.score
            for piece in self.pieces
            if piece.type in (NORMAL, USER_DEFINED, UNUSED)
        }
        return {passed for text in keep for passed in _merges(text, scores)}


def _merges(text: str, scores: Dict[str, float]) -> List[str]:
    """The pieces that SentencePiece's BPE makes of a text's characters, one after the other."""
    symbols: List[str] = list(text)
    made: List[str] = []
    while True:
        best: Optional[Tuple[float, int]] = None
        for left in range(len(symbols) - 1):
            score = scores.get(symbols[left] + symbols[left + 1])
            if score is not None and (best is None or score > best[0]):
                best = score, left
        if best is None:
            return made
        left = best[1]
        symbols[left : left + 2] = [symbols[left] + symbols[left + 1]]
        made.append(symbols[left])


def _load(content: bytes, name: str) -> Any:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise FileError(
            f"{name}: cannot be read as a SentencePiece model ({reason[:300]})"
        ) from None


def _piece(number: int, message: Any) -> Piece:
    text, score, kind = b"", 0.0, NORMAL
    for field in _fields(_expect_bytes(message)):
        if field.number == _TEXT:
            text = _expect_bytes(field.value)
        elif field.number == _SCORE and isinstance(field.value, float):
            score = field.value
        elif field.number == _TYPE and field.value in range(NORMAL, BYTE + 1):
            kind = field.value
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError:
        raise _Damaged(f"piece {number} is not UTF-8") from None
    if not decoded or len(decoded) > _LONGEST:
        raise _Damaged(f"piece {number} has {len(decoded)} characters")
    if not math.isfinite(score):
        raise _Damaged(f"the score of piece {number} is {score}")
    return Piece(decoded, score, kind, message)


def _with_type(piece: Piece, kind: int) -> bytes:
    rest = [field.record for field in _fields(piece.message) if field.number != _TYPE]
    return b"".join([*rest, _varint_field(_TYPE, kind)])


def _adapted(settings: bytes, position: Dict[int, int]) -> bytes:
    """The trainer's settings of a model that has been cut: its size, and the special ids."""
    changed = []
    for field in _fields(settings):
        if field.number == _VOCAB_SIZE:
            changed.append(_varint_field(_VOCAB_SIZE, len(position)))
        elif field.number in _IDS and field.value in position:
            changed.append(_varint_field(field.number, position[field.value]))
        else:
            changed.append(field.record)
    return b"".join(changed)


def _refuse_table(table: bytes) -> None:
    """Of a normaliser, what it replaces by what: older SentencePiece (0.2.0) believes all it says.

    The size of a double array in bytes, its units of 32 bits, and the replacements, each of which
    ends with a 0. From a unit one gets to those in a block of 256, and some lead to a replacement.

    Raises:
        _Damaged: it leads beyond its end.
    """
    if not table:
        return
    size = int.from_bytes(table[:4], "little")
    replacements = table[4 + size :]
    if size % 4 or not replacements or replacements[-1]:
        raise _Damaged("its normaliser is cut short")
    units = np.frombuffer(table, "<u4", size // 4, 4).astype(np.int64)
    inner = np.flatnonzero(units >> 31 == 0)
    first = inner ^ units[inner] >> 10 << ((units[inner] & 512) >> 6)
    good = size > 0 and (first | 255).max(initial=0) < len(units)
    if good:
        ends = units[first[units[inner] & 256 > 0]] & (1 << 31) - 1
        good = ends.max(initial=0) < len(replacements)
    if not good:
        raise _Damaged("its normaliser leads beyond its own end")


# Protocol buffers


class _Damaged(UserError):
    """No message of protobuf, or not the one that is expected; a part of a message for users."""


class _Field(NamedTuple):
    """A field of a message.

    Attributes:
        value: an int, a float (of 32 bits) or bytes; None for a number of 64 bits.
        record: the whole field, as it lies in the message.
    """

    number: int
    value: Any
    record: bytes


def _fields(message: bytes) -> Iterator[_Field]:
    """Raises:
    _Damaged: it is no message, or it is cut short.
    """
    at, end = 0, len(message)
    while at < end:
        start = at
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        value: Any = None
        if wire == _VARINT:
            value, at = _varint(message, at)
        elif wire == _BYTES:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        elif wire == _FIXED32:
            at += 4
            if at <= end:
                (value,) = struct.unpack_from("<f", message, at - 4)
        elif wire == _FIXED64:
            at += 8
        else:
            raise _Damaged(f"byte {start} begins no field")
        if number == 0:
            raise _Damaged(f"byte {start} begins no field")
        if at > end:
            raise _Damaged(f"it ends within the field that begins at byte {start}")
        yield _Field(number, value, message[start:at])


def _varint(message: bytes, at: int) -> Tuple[int, int]:
    """A number of variable length, and where it ends."""
    value = 0
    for place, byte in enumerate(message[at : at + 10]):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise _Damaged(f"no number ends behind byte {at}")


def _expect_bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise _Damaged("a number stands where a message is expected")
    return value


def _encode(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _varint_field(number: int, value: int) -> bytes:
    return _encode(number << 3 | _VARINT) + _encode(value)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _encode(number << 3 | _BYTES) + _encode(len(value)) + value
