"""The task ``kd_translation``: fairseq's ``translation`` with a teacher."""

from dataclasses import dataclass
from typing import Any, Dict, Optional

import numpy as np
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import II

from ..cache import describe_data
from ..flags import TeacherConfig
from ..teachers import Student
from .distillation import Distillation


@dataclass
class KDTranslationConfig(TeacherConfig, TranslationConfig):
    # fairseq's own, which tasks are not told otherwise
    disable_validation: bool = II("dataset.disable_validation")
    save_dir: str = II("checkpoint.save_dir")
    restore_file: str = II("checkpoint.restore_file")
    update_ordered_indices_seed: bool = II("dataset.update_ordered_indices_seed")
    seed: int = II("common.seed")


@register_task("kd_translation", dataclass=KDTranslationConfig)
class KDTranslationTask(Distillation, TranslationTask):
    """Translate from one language to another, taught by a bigger model."""

    cfg: KDTranslationConfig

    def load_dataset(self, split: str, *args: Any, **kwargs: Any) -> None:
        if str(self.cfg.dataset_impl) == "lazy":
            self.cfg.dataset_impl = None  # the same files, read whole
        super().load_dataset(split, *args, **kwargs)

    def student(self) -> Student:
        return Student(self.src_dict, self.tgt_dict, self.cfg.source_lang, self.cfg.target_lang)

    def lengths(self, dataset: Any) -> Optional[np.ndarray]:
        if dataset.tgt_sizes is None:
            return None
        return np.stack([dataset.src_sizes, dataset.tgt_sizes], axis=1)

    def describe_data(self, *of: Any) -> Dict[str, Any]:
        return describe_data(self, *of)
