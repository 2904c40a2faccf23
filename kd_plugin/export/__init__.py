"""Models that need no plugin, for stock fairseq or CTranslate2, proved to be the same."""

from .ctranslate2 import QUANTIZATIONS

__all__ = ["QUANTIZATIONS"]
