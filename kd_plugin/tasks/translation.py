"""The task ``kd_translation``: fairseq's ``translation`` with a teacher."""

from dataclasses import dataclass
from typing import Any, Dict, Optional

import numpy as np
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from ..cache import CacheError
from ..checkpoints import TRANSLATION
from ..teachers import Student
from .distillation import Distillation, DistillationConfig


@dataclass
class KDTranslationConfig(DistillationConfig, TranslationConfig):
    pass


@register_task(TRANSLATION.taught, dataclass=KDTranslationConfig)
class KDTranslationTask(Distillation, TranslationTask):
    """Translate from one language to another, taught by a bigger model."""

    cfg: KDTranslationConfig
    kind = TRANSLATION

    def student(self) -> Student:
        return Student(self.src_dict, self.tgt_dict, self.cfg.source_lang, self.cfg.target_lang)

    def lengths(self, dataset: Any) -> Optional[np.ndarray]:
        if dataset.tgt_sizes is None:
            return None
        return np.stack([dataset.src_sizes, dataset.tgt_sizes], axis=1)

    def data_settings(self) -> Dict[str, Any]:
        if self.cfg.num_batch_buckets > 0:
            raise CacheError("a teacher cache cannot be used with --num-batch-buckets")
        return describe_pair(self.cfg, self.student())


def describe_pair(cfg: Any, student: Student) -> Dict[str, Any]:
    """What a task makes of the files of a pair of languages, as plain types."""
    return {
        "source_lang": student.source_lang,
        "target_lang": student.target_lang,
        "upsample_primary": cfg.upsample_primary,
        # only then does the position's limit change what the teacher reads
        "truncate_source": cfg.max_source_positions if cfg.truncate_source else None,
    }
