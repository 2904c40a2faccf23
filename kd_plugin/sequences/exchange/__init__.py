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
from .lines import readable_twice
from .write import ENDINGS, write_nbest

__all__ = [
    "CHECK",
    "ENDINGS",
    "FORMATS",
    "IGNORE",
    "USE",
    "Checked",
    "Sources",
    "TextSources",
    "Translations",
    "are_subwords",
    "check",
    "fill",
    "readable_twice",
    "write_nbest",
]
