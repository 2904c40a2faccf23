"""A teacher, running or cached, for each pair of languages of a multilingual student."""

from itertools import accumulate
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch

from ..cache import CachedSubset, CacheError
from ..checkpoints import AskedTags
from ..errors import Faults
from ..objective import Answer, LayerPair, MixedAnswer, Part, RunningAnswer
from .run import Teacher, TeacherError, TeacherSettings
from .source import CachedTeacher, Lengths, RunningTeacher, Source, Step, refuse_tags
from .view import Student


class _OfEachPair(Source):
    """A source for each pair.

    A dataset says of which pair its sentences are: ``dataset.pair``, a number. The sentences as the
    pair's source knows them are ``dataset.dataset``; there ``join`` puts them.
    """

    sources: Sequence[Any]

    def join(self, dataset: Any, *of_subset: Any, **more: Any) -> Any:
        dataset.dataset = self.sources[dataset.pair].join(dataset.dataset, *of_subset, **more)
        return dataset

    def look_over(self, dataset: Any, lengths: np.ndarray, kept: np.ndarray) -> None:
        self.sources[dataset.pair].look_over(dataset.dataset, lengths, kept)

    def begin_training(self, model: Any, dataset: Any, lengths: Lengths, subset: str) -> None:
        source, faults = self.sources[dataset.pair], Faults()
        with faults.collecting():
            source.begin_training(model, dataset.dataset, lengths, subset)
        faults.raise_if_any(TeacherError, f"{_pair(source)}: ")

    def begin_validation(self, model: Any) -> None:
        for source in self.sources:
            source.begin_validation(model)

    def longest_target(self) -> float:
        return min(source.longest_target() for source in self.sources)


class CachedTeachers(_OfEachPair):
    """A cache for each pair of languages. Batches come with the rows of all their sentences.

    Args:
        sources: of each pair.
        ignored: how many of each target's first symbols the loss leaves out.

    Raises:
        TeacherError: there are more tags in the student's targets.
    """

    def __init__(self, sources: Sequence[CachedTeacher], ignored: int) -> None:
        self.sources = sources
        refuse_tags("a cache", sources[0].student.tags.longer[1], ignored)

    @property
    def cache(self) -> Optional[CachedSubset]:
        """Of any pair: their rows are alike."""
        return self.sources[0].cache

    def begin_training(self, model: Any, dataset: Any, lengths: Lengths, subset: str) -> None:
        faults = Faults()
        for source in self.sources:
            for fault in dict.fromkeys(source.faults):
                faults.add(f"{_pair(source)}: {fault}")
        faults.raise_if_any(CacheError)
        one, other = self.cache, self.sources[dataset.pair].cache
        if one is not None and other is not None and one.rows_hold != other.rows_hold:
            raise CacheError(
                f"the caches {one.folder} and {other.folder} were not made with the same top k, "
                "temperatures and tail samples: make one of them again"
            )

    def answer(self, batch: Dict[str, Any], step: Step) -> Optional[Answer]:
        return self.sources[0].answer(batch, step)


class RunningTeachers(_OfEachPair):
    """Asks about each sentence of a batch the teacher of its pair of languages.

    A batch says of which pair each sentence is: ``batch["pair"]``, int64 (B,).

    Args:
        settings: of each pair's teacher; pairs of equal ones share its models.
        students: the languages and tags of each pair.
        layers: which of the student's learn from the inside of which of the teachers'.
        ignored: how many of each target's first symbols the loss leaves out.
    """

    def __init__(
        self,
        settings: Sequence[TeacherSettings],
        students: Sequence[Student],
        layers: Sequence[LayerPair],
        ignored: int,
    ) -> None:
        self.sources: List[RunningTeacher] = []
        every = distinct(settings)
        # as the linear maps of the criterion are in order
        first = [0, *accumulate(len(one.paths) for one in every)]
        opened: Dict[int, RunningTeacher] = {}
        for own, student in zip(settings, students):
            number = first[every.index(_models(own))]
            source = RunningTeacher(own, student, layers, ignored, opened.get(number), number)
            opened.setdefault(number, source)
            self.sources.append(source)

    def answer(self, batch: Dict[str, Any], step: Step) -> Optional[Answer]:
        if any(source.teacher is None for source in self.sources):
            return None  # a validation: without all of them, it is the student's alone
        answers = []
        for source, own, part in self._parts(batch):
            answer = source.answer(own, step)
            if part is None:
                return answer
            assert isinstance(answer, RunningAnswer)
            answers.append((answer, part))
        return MixedAnswer(answers, batch["target"].size(1))

    def asked(self, batch: Dict[str, Any]) -> Iterator[Tuple[Teacher, Dict[str, Any]]]:
        for source, own, _ in self._parts(batch):
            yield from source.asked(own)

    def _parts(
        self, batch: Dict[str, Any]
    ) -> Iterator[Tuple[RunningTeacher, Dict[str, Any], Optional[Part]]]:
        """Whom to ask about what, and which part of the batch it is; None is all of it."""
        together: Dict[Any, List[int]] = {}
        first: Dict[Any, RunningTeacher] = {}
        for sentence, pair in enumerate(batch["pair"].tolist()):
            source = self.sources[pair]
            key = source.teacher and source.teacher.reads
            together.setdefault(key, []).append(sentence)
            first.setdefault(key, source)
        if len(together) == 1:
            (source,) = first.values()
            yield source, batch, None
            return
        for key, numbers in together.items():
            sentences = torch.tensor(numbers, device=batch["target"].device)
            inputs = {k: v[sentences] for k, v in batch["net_input"].items()}
            # an LSTM wants the longest source to fill the width
            read = inputs["src_tokens"].ne(first[key].student.source.pad()).any(0)
            (columns,) = read.nonzero(as_tuple=True)
            inputs["src_tokens"] = inputs["src_tokens"][:, columns]
            own = {**batch, "net_input": inputs, "target": batch["target"][sentences]}
            yield first[key], own, Part(sentences, columns)


def _pair(source: Any) -> str:
    return "-".join(source.student.languages)


def distinct(settings: Sequence[TeacherSettings]) -> List[TeacherSettings]:
    """Of each teacher one, whatever tags it is asked with, in the order of their maps."""
    found: List[TeacherSettings] = []
    for own in map(_models, settings):
        if own not in found:
            found.append(own)
    return found


def _models(settings: TeacherSettings) -> TeacherSettings:
    """What the models depend on."""
    return settings._replace(tags=AskedTags())
