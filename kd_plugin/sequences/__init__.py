"""Sequence-level distillation: training on the teacher's translations (Kim & Rush 2016)."""

from .choice import SELECTORS, Choice, choose
from .filters import Filters
from .hypotheses import HypothesisStore
from .language import OWN_LANGUAGES
from .output import Output, summary_lines
from .pipeline import ENGINES, Asked, make
from .student import Student
from .values import METRICS

__all__ = [
    "ENGINES",
    "METRICS",
    "OWN_LANGUAGES",
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
