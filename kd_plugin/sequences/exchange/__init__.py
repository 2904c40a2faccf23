"""Translations made elsewhere, and n-best lists for elsewhere."""

from .align import (
    CHECK,
    IGNORE,
    USE,
    Checked,
    Sources,
    TextSources,
    Translations,
    are_subwords,
    check,
    fill,
)
from .formats import FORMATS
from .imported import Imported
from .lines import readable_twice
from .write import ENDINGS, write_nbest

__all__ = [
    "CHECK",
    "ENDINGS",
    "FORMATS",
    "IGNORE",
    "USE",
    "Checked",
    "Imported",
    "Sources",
    "TextSources",
    "Translations",
    "are_subwords",
    "check",
    "fill",
    "readable_twice",
    "write_nbest",
]
