"""The task ``kd_translation``: fairseq's ``translation`` with a teacher."""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional

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


@register_task("kd_translation", dataclass=KDTranslationConfig)
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

    def data_endings(self) -> List[str]:
        pair = (self.cfg.source_lang, self.cfg.target_lang)
        return [f".{a}-{b}.{lang}" for a, b in (pair, pair[::-1]) for lang in (a, b)]

    def data_settings(self) -> Dict[str, Any]:
        cfg = self.cfg
        if cfg.num_batch_buckets > 0:
            raise CacheError("a teacher cache cannot be used with --num-batch-buckets")
        return {
            "source_lang": cfg.source_lang,
            "target_lang": cfg.target_lang,
            "upsample_primary": cfg.upsample_primary,
            # only then does the position's limit change what the teacher reads
            "truncate_source": cfg.max_source_positions if cfg.truncate_source else None,
        }
