"""The task ``kd_language_modeling``: fairseq's ``language_modeling`` with a teacher."""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional

import numpy as np
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

from ..cache import CacheError
from ..checkpoints import LANGUAGE_MODEL, first
from ..errors import UserError
from ..plan import choice_value
from ..teachers import Student
from .distillation import Distillation, DistillationConfig


@dataclass
class KDLanguageModelingConfig(DistillationConfig, LanguageModelingConfig):
    pass


@register_task(LANGUAGE_MODEL.taught, dataclass=KDLanguageModelingConfig)
class KDLanguageModelingTask(Distillation, LanguageModelingTask):
    """Predict the next symbol of a text, taught by a bigger model."""

    kind = LANGUAGE_MODEL

    def __init__(self, cfg: KDLanguageModelingConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(cfg, *args, **kwargs)
        self.cfg: KDLanguageModelingConfig = cfg  # fairseq's has it as args alone
        if self.targets != ["future"]:
            raise UserError(
                f"--task {cfg._name} predicts the next symbol, which a teacher does, too: leave "
                f"out --self-target and --past-target; got the targets {', '.join(self.targets)}"
            )

    def load_dataset(self, *args: Any, **kwargs: Any) -> None:
        refuse_blocks(self.cfg)
        super().load_dataset(*args, **kwargs)

    def student(self) -> Student:
        return as_student(self, self.cfg)

    def lengths(self, dataset: Any) -> Optional[np.ndarray]:
        sizes = getattr(dataset, "sizes", None)
        if not isinstance(sizes, np.ndarray):
            return None  # text to go on with, or blocks with a window of context before them
        return np.stack([sizes, sizes], axis=1)

    def data_endings(self) -> List[str]:
        return [""]

    def data_settings(self) -> Dict[str, Any]:
        if choice_value(self.cfg.shorten_method) == "random_crop":
            raise CacheError(
                "a teacher cache cannot be used with --shorten-method random_crop, which crops "
                "otherwise in each epoch"
            )
        return describe_blocks(self.cfg)


def refuse_blocks(cfg: Any) -> None:
    """Refuse blocks that this fairseq cannot make.

    Args:
        cfg: fairseq's ``language_modeling``'s, as in all of these.

    Raises:
        UserError: they are such.
    """
    if choice_value(cfg.sample_break_mode) == "eos" and not hasattr(np, "compat"):
        raise UserError(
            "--sample-break-mode eos: fairseq makes such blocks with numpy below 2 alone, and "
            f"this is numpy {np.__version__}; take complete, or install an older numpy"
        )


def as_student(task: LanguageModelingTask, cfg: Any) -> Student:
    """What language models must fit to be read beside a task's own."""
    outputs = task.target_dictionary
    options: Dict[str, Any] = dict.fromkeys(("self_target", "past_target"), False)
    options["add_bos_token"] = cfg.add_bos_token
    if len(outputs) < len(task.dictionary):
        # <unk> stands for all others then, and a teacher of more symbols gives it nothing
        options["output_dictionary_size"] = len(outputs)
        outputs = first(outputs, len(outputs))  # fairseq's own list of its symbols is whole
    return Student(task.dictionary, outputs, "", "", LANGUAGE_MODEL, options)


def describe_blocks(cfg: Any) -> Dict[str, Any]:
    """How the text is cut into blocks, as plain types."""
    mode, shorten = choice_value(cfg.sample_break_mode), choice_value(cfg.shorten_method)
    cut = mode != "eos" or shorten != "none"  # otherwise blocks are sentences, however long
    return {
        "sample_break_mode": mode.lower(),
        "tokens_per_sample": cfg.tokens_per_sample if cut else None,
        "add_bos_token": cfg.add_bos_token,
        "shorten_method": shorten,
        "shorten_data_split_list": cfg.shorten_data_split_list,
    }
