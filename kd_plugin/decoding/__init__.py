"""Models that translate: data-bins, what is decoded in which batches, and what decodes it."""

from .corpus import (
    DEFAULT_MAX_TOKENS,
    Corpus,
    batch_limits,
    describe,
    describe_text,
    plan,
    text_functions,
)
from .databin import DataBin, carried_files
from .engines import CTranslate2Engine, FairseqEngine, Hypothesis, refining_flags
from .models import build_models, open_checkpoints, own_task, placement, set_up_task

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "CTranslate2Engine",
    "Corpus",
    "DataBin",
    "FairseqEngine",
    "Hypothesis",
    "batch_limits",
    "build_models",
    "carried_files",
    "describe",
    "describe_text",
    "open_checkpoints",
    "own_task",
    "placement",
    "plan",
    "refining_flags",
    "set_up_task",
    "text_functions",
]
