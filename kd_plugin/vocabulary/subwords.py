"""SentencePiece models as files: read, cut to some of their pieces, written.

A model is one protobuf message. Only the few fields that a cut changes are taken apart here; all
others, the normaliser and whatever later versions add among them, are copied byte by byte.
"""

import math
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple

from ..decoding.sentencepieces import (
    Damaged,
    bytes_field,
    expect_bytes,
    fields,
    load,
    read_whole,
    refuse_normalisers,
    varint_field,
)
from ..files import FileError

_LONGEST = 1000  # characters of a piece; SentencePiece's trainer makes none above 16 by default
_UNIGRAM, _BPE = 1, 2
_TYPES = {_UNIGRAM: "unigram", _BPE: "bpe", 3: "word", 4: "char"}

# Types of pieces
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Fields: of a model, of a piece, of the trainer's settings
_PIECES, _TRAINER, _SELF_TEST = 1, 2, 4
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _IDS = 3, 4, (40, 41, 42, 43)


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
            self._fields = list(fields(content))
            self.pieces = [
                _piece(number, value)
                for number, value in enumerate(
                    [field.value for field in self._fields if field.number == _PIECES]
                )
            ]
            kinds = [
                setting.value
                for field in self._fields
                if field.number == _TRAINER
                for setting in fields(expect_bytes(field.value))
                if setting.number == _MODEL_TYPE
            ]
            refuse_normalisers(self._fields)
            if not self.pieces:
                raise Damaged("it has no pieces")
        except Damaged as error:
            raise FileError(
                f"{name}: expected a SentencePiece model, whole and undamaged ({error})"
            ) from None
        kind = kinds[-1] if kinds else _UNIGRAM
        self.type = _TYPES.get(kind, str(kind))
        if kind not in (_UNIGRAM, _BPE):
            raise FileError(
                f"{name}: its type is {self.type}, and only unigram and bpe models can be cut"
            )
        self.processor = load(content, name)
        self.unknown: int = self.processor.unk_id()

    @classmethod
    def open(cls, path: str, flag: str) -> "SubwordModel":
        """Args:
            flag: that names the file, for messages.

        Raises:
            FileError: it cannot be read as such a model.
        """
        name = f"{flag} {path}"
        return cls(read_whole(path, name), name)

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
        content = [bytes_field(_PIECES, message) for message in messages]
        for field in self._fields:
            if field.number == _TRAINER:
                settings = expect_bytes(field.value)
                content.append(bytes_field(_TRAINER, _adapted(settings, position)))
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


def _piece(number: int, message: Any) -> Piece:
    text, score, kind = b"", 0.0, NORMAL
    for field in fields(expect_bytes(message)):
        if field.number == _TEXT:
            text = expect_bytes(field.value)
        elif field.number == _SCORE and isinstance(field.value, float):
            score = field.value
        elif field.number == _TYPE and field.value in range(NORMAL, BYTE + 1):
            kind = field.value
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError:
        raise Damaged(f"piece {number} is not UTF-8") from None
    if not decoded or len(decoded) > _LONGEST:
        raise Damaged(f"piece {number} has {len(decoded)} characters")
    if not math.isfinite(score):
        raise Damaged(f"the score of piece {number} is {score}")
    return Piece(decoded, score, kind, message)


def _with_type(piece: Piece, kind: int) -> bytes:
    rest = [field.record for field in fields(piece.message) if field.number != _TYPE]
    return b"".join([*rest, varint_field(_TYPE, kind)])


def _adapted(settings: bytes, position: Dict[int, int]) -> bytes:
    """The trainer's settings of a model that has been cut: its size, and the special ids."""
    changed = []
    for field in fields(settings):
        if field.number == _VOCAB_SIZE:
            changed.append(varint_field(_VOCAB_SIZE, len(position)))
        elif field.number in _IDS and field.value in position:
            changed.append(varint_field(field.number, position[field.value]))
        else:
            changed.append(field.record)
    return b"".join(changed)
