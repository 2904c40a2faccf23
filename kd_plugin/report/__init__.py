"""Judge students: how good, at what cost, and where they still differ from the teacher."""

from .metrics import METRICS, USUAL, check
from .page import summary
from .pipeline import Asked, make
from .score import TESTS
from .systems import named, pick, read_models

__all__ = [
    "METRICS",
    "TESTS",
    "USUAL",
    "Asked",
    "check",
    "make",
    "named",
    "pick",
    "read_models",
    "summary",
]
