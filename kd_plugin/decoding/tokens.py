"""Text and the tokens of a teacher that is no fairseq checkpoint: SentencePiece models.

Tokenizers of Hugging Face's, in ``huggingface``, have the same members.
"""

from typing import Any, Callable, List, Sequence

from ..files import digest
from .sentencepieces import open_sentencepiece

UNKNOWN = "<unk>"


class SentencePieceTokens:
    """Pieces of SentencePiece models.

    Args:
        models: one for both sides, or the source's and the target's.
        flag: that names them, for messages.

    Attributes:
        around: tokens that belong around every source by themselves.

    Raises:
        FileError: one cannot be read.
    """

    around: Sequence[str] = ()

    def __init__(self, models: Sequence[str], flag: str) -> None:
        self._files = list(models)
        opened = [open_sentencepiece(path, flag) for path in models]
        self._source, self._target = opened[0], opened[-1]

    def encode(self, text: str) -> List[str]:
        return self._source.encode(text, out_type=str)

    def decode(self, tokens: Sequence[str]) -> str:
        """Text, with ``UNKNOWN`` where the tokens have it."""
        return spelled(tokens, UNKNOWN, self._target.decode)

    def files(self) -> Any:
        """SHA-256 of all that the tokens depend on."""
        return [digest(path) for path in self._files]


def spelled(tokens: Sequence[str], unknown: str, decode: Callable[[List[str]], str]) -> str:
    """Text whose unknown tokens, which decoders leave out or write as they like, are marked."""
    parts: List[List[str]] = [[]]
    for token in tokens:
        if token == unknown:
            parts.append([])
        else:
            parts[-1].append(token)
    return f" {UNKNOWN} ".join(decode(part) if part else "" for part in parts)
