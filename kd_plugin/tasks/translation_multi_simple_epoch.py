"""The task ``kd_translation_multi_simple_epoch``: fairseq's multilingual translation with teachers.

One student translates several pairs of languages, and learns each from a teacher of its own, or
all from a multilingual one.
"""

from argparse import ArgumentParser, Namespace
from typing import Any, Dict, List, Optional

import numpy as np
from fairseq.data import BaseWrapperDataset, Dictionary
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.tasks import register_task
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask
from omegaconf import OmegaConf

from ..checkpoints import MULTILINGUAL_TRANSLATION, SIMPLE_EPOCH, added_symbols, tags_of
from ..errors import Faults
from ..flags import TeacherConfig
from ..plan import Plan
from ..teachers import Source, Student, TeacherOfEachPair
from .distillation import Distillation


class _OfPair(BaseWrapperDataset):
    """The sentences of one pair of languages, whose ids say which of ``pairs`` it is.

    fairseq's are numbers within the pair, and its batches mix pairs.
    """

    def __init__(self, dataset: Any, pair: int, pairs: int) -> None:
        super().__init__(dataset)
        self.pair, self.pairs = pair, pairs

    def __getitem__(self, index: int) -> Dict[str, Any]:
        sample = self.dataset[index]
        return {**sample, "id": sample["id"] * self.pairs + self.pair}

    def collater(self, samples: List[Dict[str, Any]], **more: Any) -> Dict[str, Any]:
        return self.dataset.collater(samples, **more)


@register_task("kd_translation_multi_simple_epoch")
class KDTranslationMultiSimpleEpochTask(Distillation, TranslationMultiSimpleEpochTask):
    """Translate between several pairs of languages, taught by bigger models."""

    kind = MULTILINGUAL_TRANSLATION
    cacheable = False

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
        super().__init__(args, langs, dicts, training)
        self.cfg = args
        self.pairs = self.lang_pairs
        faults = Faults()
        twice = ", ".join(sorted({p for p in self.pairs if self.pairs.count(p) > 1}))
        faults.check(not twice, f"--lang-pairs names {twice} twice")
        faults.check(
            not (args.extra_data or args.extra_lang_pairs),
            "leave out --extra-data and --extra-lang-pairs: no teacher is asked about such data",
        )
        faults.raise_if_any()

    def student(self, pair: str = "-") -> Student:
        source, target = pair.split("-")
        options = {**vars(self.args), "langs": self.langs}
        return Student(
            *(self.source_dictionary, self.target_dictionary, source, target, self.kind),
            tags=tags_of(SIMPLE_EPOCH, options, (source, target)),
            needless=added_symbols(SIMPLE_EPOCH, options),
        )

    def _source(self, plan: Plan) -> Source:
        if not plan.teachers:
            return super()._source(plan)
        students = [self.student(pair) for pair in self.pairs]
        return TeacherOfEachPair(plan.teachers, students, plan.ignored)

    # The data

    def load_dataset(
        self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any
    ) -> None:
        before = self.datasets.get(split)
        super().load_dataset(split, epoch, combine, **kwargs)
        dataset: Any = self.datasets[split]
        if dataset is before:
            return  # fairseq reads the next part of the data later
        dataset.datasets = [
            _OfPair(own, number, len(self.pairs)) for number, own in enumerate(dataset.datasets)
        ]
        if before is None and not self.has_sharded_data(split):
            # a resumed training goes on in the order in which it began to go through the data
            done = (epoch - 1) % getattr(dataset, "num_virtual_epochs", 1)
            dataset.set_epoch(epoch - done)
            dataset.set_epoch(epoch)

    def parts(self, dataset: Any) -> List[Any]:
        return getattr(dataset, "datasets", [dataset])

    def lengths(self, dataset: Any) -> Optional[np.ndarray]:
        sizes = np.asarray(dataset.sizes)
        return sizes if sizes.ndim == 2 else None

    def numbered(self, sample: Dict[str, Any]) -> Dict[str, Any]:
        """The batch with the number of each sentence's pair, and its own number within the pair."""
        number, pairs = sample["id"], len(self.pairs)
        return {**sample, "id": number // pairs, "pair": number % pairs}
