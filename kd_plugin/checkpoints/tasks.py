"""Which tasks of fairseq translate, and how: what a checkpoint's task means for using its model."""

from inspect import getattr_static
from typing import Any, Optional

from fairseq.tasks import TASK_REGISTRY
from fairseq.tasks.multilingual_translation import MultilingualTranslationTask
from fairseq.tasks.translation import TranslationTask
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask

from .tags import EACH_DIRECTION, PRETRAINED_BART, SIMPLE_EPOCH


def taught(task: str) -> str:
    """What the plugin calls a task of fairseq's with a teacher."""
    return f"kd_{task}"


def untaught(name: str) -> str:
    """fairseq's task that one of the plugin's is with a teacher; any other is itself."""
    stock = name[len(taught("")) :]
    return stock if name == taught(stock) and stock in TASK_REGISTRY else name


# Tasks whose models translate from one of our dictionaries to another, and add no symbols to them
TRANSLATION_TASKS = ("translation", taught("translation"))

# What makes a model's input of a data-bin, and its output of the model
_DECODING = (
    "load_dataset",
    "build_dataset_for_inference",
    "build_generator",
    "inference_step",
    "load_dictionary",
    "source_dictionary",
    "target_dictionary",
)
_OTHERS = (TranslationTask, MultilingualTranslationTask, TranslationMultiSimpleEpochTask)
# fairseq's own among the subclasses of these; more would run or open what a checkpoint says
STOCK_OTHERS = (EACH_DIRECTION, PRETRAINED_BART, "translation_lev", SIMPLE_EPOCH)


def is_translation(name: Optional[str]) -> bool:
    """Whether a task is fairseq's ``translation``, by that name or, in a fork, by another."""
    return name in TRANSLATION_TASKS or reads_as_translation(TASK_REGISTRY.get(name))


def reads_as_translation(kind: Any) -> bool:
    """Whether a task's class reads data and decodes as ``translation`` does; training may differ.

    Args:
        kind: the class; None is none.
    """
    if kind is None:
        return False
    if any(kind is TASK_REGISTRY.get(name) for name in TRANSLATION_TASKS):
        return True
    return issubclass(kind, TranslationTask) and all(
        getattr_static(kind, name) is getattr_static(TranslationTask, name) for name in _DECODING
    )


def is_registered(name: Optional[str]) -> bool:
    """Whether this fairseq, with what --user-dir has imported, knows a task."""
    return name in TASK_REGISTRY


def translates_otherwise(name: Optional[str]) -> bool:
    """Whether a task other than ``translation`` translates data-bins, and can be set up from what a
    stranger's checkpoint says of it."""
    kind = TASK_REGISTRY.get(name)
    if kind is None or is_translation(name) or not issubclass(kind, _OTHERS):
        return False
    return name in STOCK_OTHERS or not kind.__module__.startswith("fairseq.")
