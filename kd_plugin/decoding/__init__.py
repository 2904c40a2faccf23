"""Models that translate: data-bins, what is decoded in which batches, and what decodes it."""

from .bleu import Tokenizer
from .converted import VOCABULARY_MAP, Converted, vocabularies
from .corpus import DEFAULT_MAX_TOKENS, Corpus, batch_limits, describe, plan
from .databin import DataBin, infer_languages, parse_languages
from .engines import (
    BATCH_ON_CPU,
    CTranslate2Engine,
    FairseqEngine,
    Hypothesis,
    TextHypothesis,
    open_translator,
    refining_flags,
    threads,
)
from .huggingface import TransformersTokens
from .models import build_models, open_checkpoints, own_task, placement, set_up_task
from .reading import Around, SymbolReading, TextReading
from .sentencepieces import open_sentencepiece
from .text import describe_text, text_functions
from .tokens import SentencePieceTokens

__all__ = [
    "Around",
    "VOCABULARY_MAP",
    "Converted",
    "SentencePieceTokens",
    "SymbolReading",
    "TextReading",
    "TransformersTokens",
    "open_sentencepiece",
    "vocabularies",
    "BATCH_ON_CPU",
    "DEFAULT_MAX_TOKENS",
    "CTranslate2Engine",
    "open_translator",
    "Corpus",
    "DataBin",
    "FairseqEngine",
    "Hypothesis",
    "TextHypothesis",
    "Tokenizer",
    "batch_limits",
    "build_models",
    "describe",
    "describe_text",
    "infer_languages",
    "open_checkpoints",
    "own_task",
    "parse_languages",
    "placement",
    "plan",
    "refining_flags",
    "set_up_task",
    "text_functions",
    "threads",
]
