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
from .databin import DataBin, infer_languages, parse_languages
from .engines import CTranslate2Engine, FairseqEngine, Hypothesis
from .models import build_models, open_checkpoints, placement, set_up_task

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "CTranslate2Engine",
    "Corpus",
    "DataBin",
    "FairseqEngine",
    "Hypothesis",
    "batch_limits",
    "build_models",
    "describe",
    "describe_text",
    "infer_languages",
    "open_checkpoints",
    "parse_languages",
    "placement",
    "plan",
    "set_up_task",
    "text_functions",
]
