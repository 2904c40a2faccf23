"""The task ``kd_translation_multi_simple_epoch``: fairseq's multilingual translation with teachers.

One student translates several pairs of languages, and learns each from a teacher of its own, or
all from a multilingual one.
"""

import copy
from argparse import ArgumentParser, Namespace
from typing import Any, Dict, List, Optional

import numpy as np
from fairseq.data import Dictionary
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.tasks import register_task
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask
from omegaconf import OmegaConf

from ..checkpoints import MULTILINGUAL_TRANSLATION, SIMPLE_EPOCH, added_symbols, tags_of
from ..errors import Faults
from ..flags import TeacherConfig
from ..plan import Plan
from ..teachers import CachedTeachers, RunningTeachers, Source, Student
from .distillation import Distillation
from .pairs import PairsDataset, PairsManager
from .translation import describe_pair


@register_task(MULTILINGUAL_TRANSLATION.taught)
class KDTranslationMultiSimpleEpochTask(Distillation, TranslationMultiSimpleEpochTask):
    """Translate between several pairs of languages, taught by bigger models."""

    kind = MULTILINGUAL_TRANSLATION

    @staticmethod
    def add_args(parser: Any) -> None:
        TranslationMultiSimpleEpochTask.add_args(parser)
        gen_parser_from_dataclass(parser, TeacherConfig())

    @classmethod
    def setup_task(cls, args: Any, **kwargs: Any) -> "KDTranslationMultiSimpleEpochTask":
        if not isinstance(args, Namespace):  # of fairseq-hydra-train: what its file says, no more
            parser = ArgumentParser()
            cls.add_args(parser)
            given: Any = OmegaConf.to_container(args)
            args = Namespace(**{**vars(parser.parse_args([args.data])), **given})
        return super().setup_task(args, **kwargs)

    def __init__(
        self, args: Any, langs: List[str], dicts: Dict[str, Dictionary], training: bool
    ) -> None:
        if not training:
            args.virtual_epoch_size = None  # its parts of the data are training's alone
        super().__init__(args, langs, dicts, training)
        self.cfg = args
        self.pairs = self.lang_pairs
        own = (args, self.lang_pairs, langs, dicts, self.sampling_method)
        self.data_manager = PairsManager(*own)
        faults = Faults()
        twice = ", ".join(sorted({p for p in self.pairs if self.pairs.count(p) > 1}))
        faults.check(not twice, f"--lang-pairs names {twice} twice")
        faults.check(
            not (args.extra_data or args.extra_lang_pairs),
            "leave out --extra-data and --extra-lang-pairs: no teacher is asked about such data",
        )
        faults.check(
            not args.enable_reservsed_directions_shared_datasets,
            "leave out --enable-reservsed-directions-shared-datasets: fairseq then reads a pair "
            "from the files of its reversed one, with that one's tokens of languages, and cut as "
            "that one's sentences are",
        )
        faults.raise_if_any()

    def of_pair(self, number: int) -> "KDTranslationMultiSimpleEpochTask":
        """What it is of one of its pairs alone."""
        task = copy.copy(self)
        task.pairs = [self.pairs[number]]
        return task

    def student(self) -> Student:
        """Of its pair; of several, what they have in common."""
        source, target = self.pairs[0].split("-") if len(self.pairs) == 1 else ("", "")
        options = {**vars(self.args), "langs": self.langs}
        return Student(
            *(self.source_dictionary, self.target_dictionary, source, target, self.kind),
            tags=tags_of(SIMPLE_EPOCH, options, (source, target)),
            needless=added_symbols(SIMPLE_EPOCH, options),
        )

    def _source(self, plan: Plan) -> Source:
        every = [self.of_pair(number) for number in range(len(self.pairs))]
        if plan.caches:
            caches = [of.cached(own, plan) for of, own in zip(every, plan.caches)]
            return CachedTeachers(caches, plan.ignored)
        if plan.teachers:
            students, layers = [of.student() for of in every], plan.needs.layers
            return RunningTeachers(plan.teachers, students, layers, plan.ignored)
        return super()._source(plan)

    # The data

    def load_dataset(
        self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any
    ) -> None:
        first = split not in self.datasets
        super().load_dataset(split, epoch, combine, **kwargs)
        if first and not self.has_sharded_data(split):
            # a resumed training goes on in the order in which it began to go through the data
            dataset: Any = self.datasets[split]
            done = (epoch - 1) % getattr(dataset, "num_virtual_epochs", 1)
            dataset.set_epoch(epoch - done)
            dataset.set_epoch(epoch)

    def joined(self, dataset: Any, split: str, epoch: int, combine: bool) -> PairsDataset:
        required = split == self.cfg.train_subset
        for part in dataset.datasets:
            describe = self.of_pair(part.pair).descriptions(split, combine)
            turn = part.turn if required else 0
            self.source.join(part, split, describe, turn=turn, required=required)
        return PairsDataset(dataset, self.student())

    def parts(self, dataset: Any) -> List[Any]:
        return dataset.datasets

    def lengths(self, dataset: Any) -> Optional[np.ndarray]:
        sizes = np.asarray(dataset.sizes)
        return sizes if sizes.ndim == 2 else None

    def data_folders(self) -> List[str]:
        return self.data_manager.folders(self.pairs[0], self.cfg.train_subset)

    def data_settings(self) -> Dict[str, Any]:
        tokens = added_symbols(SIMPLE_EPOCH, {**vars(self.args), "langs": self.langs})
        return {**describe_pair(self.cfg, self.student()), "language_tokens": tokens}
