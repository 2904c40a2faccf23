"""SentencePiece models as files of strangers: the one place that opens them.

A model is one protobuf message. What SentencePiece itself believes without looking is looked at
first. (The message classes that it ships need the package protobuf, and those of its older releases
fail with today's; they would also need more memory and say less of a damaged file.)
"""

import os
import struct
from typing import Any, Iterable, Iterator, NamedTuple, Tuple

import numpy as np
import sentencepiece

from ..errors import UserError
from ..files import FileError

_LARGEST = 1 << 28  # bytes; 256,000 pieces are 5 MB
_NORMALISERS, _TABLE = (3, 5), 2  # fields of a model, and of a normaliser
# Wire types
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def open_sentencepiece(path: str, flag: str) -> Any:
    """The processor of a SentencePiece model that a flag names.

    Raises:
        FileError: it cannot be read, or is damaged.
    """
    name = f"{flag} {path}"
    content = read_whole(path, name)
    try:
        if not content:  # which SentencePiece takes for no model given
            raise Damaged("it is empty")
        refuse_normalisers(fields(content))
    except Damaged as error:
        raise FileError(f"{name}: cannot be read as a SentencePiece model ({error})") from None
    return load(content, name)


def read_whole(path: str, name: str) -> bytes:
    """The content of a model's file.

    Args:
        name: for messages: "--spm FILE", say.

    Raises:
        FileError: there is none, or it is too large for one.
    """
    if not os.path.isfile(path):
        raise FileError(f"{name}: no such file")
    size = os.path.getsize(path)
    if size > _LARGEST:
        raise FileError(f"{name}: expected a SentencePiece model; it has {size:,} bytes")
    with open(path, "rb") as file:
        return file.read(_LARGEST)


def load(content: bytes, name: str) -> Any:
    """The processor of a model whose normalisers have been looked at.

    Raises:
        FileError: SentencePiece does not read it.
    """
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise FileError(
            f"{name}: cannot be read as a SentencePiece model ({reason[:300]})"
        ) from None


def refuse_normalisers(model: "Iterable[Field]") -> None:
    """Raises Damaged: a normaliser of these fields of a model leads beyond its own end."""
    for field in model:
        if field.number in _NORMALISERS:
            for setting in fields(expect_bytes(field.value)):
                if setting.number == _TABLE:
                    _refuse_table(expect_bytes(setting.value))


def _refuse_table(table: bytes) -> None:
    """Of a normaliser, what it replaces by what: older SentencePiece (0.2.0) believes all it says.

    The size of a double array in bytes, its units of 32 bits, and the replacements, each of which
    ends with a 0. From a unit one gets to those in a block of 256, and some lead to a replacement.

    Raises:
        Damaged: it leads beyond its end.
    """
    if not table:
        return
    size = int.from_bytes(table[:4], "little")
    replacements = table[4 + size :]
    if size % 4 or not replacements or replacements[-1]:
        raise Damaged("its normaliser is cut short")
    units = np.frombuffer(table, "<u4", size // 4, 4).astype(np.int64)
    inner = np.flatnonzero(units >> 31 == 0)
    first = inner ^ units[inner] >> 10 << ((units[inner] & 512) >> 6)
    good = size > 0 and (first | 255).max(initial=0) < len(units)
    if good:
        ends = units[first[units[inner] & 256 > 0]] & (1 << 31) - 1
        good = ends.max(initial=0) < len(replacements)
    if not good:
        raise Damaged("its normaliser leads beyond its own end")


# Protocol buffers


class Damaged(UserError):
    """No message of protobuf, or not the one that is expected; a part of a message for users."""


class Field(NamedTuple):
    """A field of a message.

    Attributes:
        value: an int, a float (of 32 bits) or bytes; None for a number of 64 bits.
        record: the whole field, as it lies in the message.
    """

    number: int
    value: Any
    record: bytes


def fields(message: bytes) -> Iterator[Field]:
    """Raises:
    Damaged: it is no message, or it is cut short.
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
            raise Damaged(f"byte {start} begins no field")
        if number == 0:
            raise Damaged(f"byte {start} begins no field")
        if at > end:
            raise Damaged(f"it ends within the field that begins at byte {start}")
        yield Field(number, value, message[start:at])


def _varint(message: bytes, at: int) -> Tuple[int, int]:
    """A number of variable length, and where it ends."""
    value = 0
    for place, byte in enumerate(message[at : at + 10]):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise Damaged(f"no number ends behind byte {at}")


def expect_bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise Damaged("a number stands where a message is expected")
    return value


def _encode(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def varint_field(number: int, value: int) -> bytes:
    return _encode(number << 3 | _VARINT) + _encode(value)


def bytes_field(number: int, value: bytes) -> bytes:
    return _encode(number << 3 | _BYTES) + _encode(len(value)) + value
