"""Sequence-level distillation: training on the teacher's translations (Kim & Rush 2016)."""

from .choice import METRICS, SELECTORS, Choice, choose
from .filters import Filters
from .hypotheses import HypothesisStore
from .output import Output, summary_lines
from .pipeline import ENGINES, Asked, make
from .student import Student

__all__ = [
    "ENGINES",
    "METRICS",
    "SELECTORS",
    "Asked",
    "Choice",
    "Filters",
    "HypothesisStore",
    "Output",
    "Student",
    "choose",
    "make",
    "summary_lines",
]
