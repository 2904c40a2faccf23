"""SentencePiece models that tests make, trained or piece by piece."""

import io
import struct
from typing import Any, List, Sequence, Set

import sentencepiece


def train(lines: Sequence[str], kind: str, size: int, **more: Any) -> bytes:
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{"sentence_iterator": iter(lines), "model_writer": content, "minloglevel": 2},
        **{"vocab_size": size, "model_type": kind, "hard_vocab_limit": False, **more},
    )
    return content.getvalue()


def encode(model: bytes, lines: Sequence[str]) -> List[List[str]]:
    processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [processor.encode(line, out_type=str) for line in lines]


def written(model: bytes) -> Set[str]:
    """The ordinary pieces of a model, which it may write."""
    processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
    return {
        processor.id_to_piece(i)
        for i in range(processor.get_piece_size())
        if not (
            processor.is_unknown(i)
            or processor.is_control(i)
            or processor.is_unused(i)
            or processor.is_byte(i)
        )
    }


# protobuf, by hand


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def piece(text: str, score: float, kind: int = 1) -> bytes:
    """A piece as a field of a model."""
    content = text.encode("utf-8")
    message = b"\x0a" + varint(len(content)) + content + b"\x15" + struct.pack("<f", score)
    message += b"" if kind == 1 else b"\x18" + varint(kind)
    return b"\x0a" + varint(len(message)) + message


SPECIAL = [piece("<unk>", 0, 2), piece("<s>", 0, 3), piece("</s>", 0, 3)]
