"""Sequence-level distillation: training on the teacher's translations (Kim & Rush 2016)."""

from .asked import ENGINES, Asked
from .choice import SELECTORS, Choice, choose
from .filters import Filters
from .hypotheses import HypothesisStore
from .inspection import inspect
from .language import OWN_LANGUAGES
from .mixing import ORDERS, ORIGINAL, Wanted, parse_mix
from .output import Output, summary_lines
from .pipeline import make
from .student import Student
from .values import METRICS

__all__ = [
    "ENGINES",
    "METRICS",
    "OWN_LANGUAGES",
    "ORDERS",
    "ORIGINAL",
    "SELECTORS",
    "Asked",
    "Choice",
    "Filters",
    "HypothesisStore",
    "Output",
    "Student",
    "Wanted",
    "choose",
    "inspect",
    "make",
    "parse_mix",
    "summary_lines",
]
