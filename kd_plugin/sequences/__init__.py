"""Sequence-level distillation: data that say what the teacher says (Kim & Rush 2016)."""

from .corpus import Corpus, describe, describe_text, plan, text_functions
from .databin import DataBin, carried_files
from .distil import Choice, Output, Student, alone, choose, decode, summary_lines
from .engines import CTranslate2Engine, FairseqEngine, converted
from .hypotheses import Hypothesis, HypothesisStore
from .select import METRICS, Filters
from .teachers import build_teachers, placement, read_teachers, set_up_task

__all__ = [
    "METRICS",
    "CTranslate2Engine",
    "Choice",
    "Corpus",
    "DataBin",
    "FairseqEngine",
    "Filters",
    "Hypothesis",
    "HypothesisStore",
    "Output",
    "Student",
    "alone",
    "build_teachers",
    "carried_files",
    "choose",
    "converted",
    "decode",
    "describe",
    "describe_text",
    "placement",
    "plan",
    "read_teachers",
    "set_up_task",
    "summary_lines",
    "text_functions",
]
