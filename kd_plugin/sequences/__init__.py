"""Sequence-level distillation: data that say what the teacher says (Kim & Rush 2016)."""

from .choice import METRICS, Filters
from .hypotheses import HypothesisStore
from .pipeline import Choice, Output, Student, alone, choose, converted, decode, summary_lines

__all__ = [
    "METRICS",
    "Choice",
    "Filters",
    "HypothesisStore",
    "Output",
    "Student",
    "alone",
    "choose",
    "converted",
    "decode",
    "summary_lines",
]
