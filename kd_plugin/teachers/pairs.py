"""A teacher for each pair of languages of a multilingual student."""

from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from ..checkpoints import AskedTags
from ..errors import Faults
from ..objective import Answer, MixedAnswer, RunningAnswer
from .run import Teacher, TeacherError, TeacherSettings
from .source import Lengths, RunningTeacher, Source, Step
from .view import Student


class TeacherOfEachPair(Source):
    """Asks about each sentence of a batch the teacher of its pair of languages.

    A dataset says of which pair its sentences are by its number, ``dataset.pair``; a batch that of
    each sentence, ``batch["pair"]``, int64 (B,).

    Args:
        settings: of each pair's teacher; pairs of equal ones share its models.
        students: the languages and tags of each pair.
        ignored: how many of each target's first symbols the loss leaves out.
    """

    def __init__(
        self, settings: Sequence[TeacherSettings], students: Sequence[Student], ignored: int
    ) -> None:
        self.sources: List[RunningTeacher] = []
        for own, student in zip(settings, students):
            same = (one for one in self.sources if _models(one.settings) == _models(own))
            source = RunningTeacher(own, student, ignored=ignored, other=next(same, None))
            self.sources.append(source)

    def look_over(self, dataset: Any, lengths: np.ndarray, kept: np.ndarray) -> None:
        self.sources[dataset.pair].look_over(dataset, lengths, kept)

    def begin_training(self, model: Any, dataset: Any, lengths: Lengths, subset: str) -> None:
        source, faults = self.sources[dataset.pair], Faults()
        with faults.collecting():
            source.begin_training(model, dataset, lengths, subset)
        faults.raise_if_any(TeacherError, f"{'-'.join(source.student.languages)}: ")

    def begin_validation(self, model: Any) -> None:
        for source in self.sources:
            source.begin_validation(model)

    def answer(self, batch: Dict[str, Any], step: Step) -> Optional[Answer]:
        if any(source.teacher is None for source in self.sources):
            return None  # a validation: without all of them, it is the student's alone
        answers = []
        for source, part, sentences in self._parts(batch):
            answer = source.answer(part, step)
            if len(sentences) == len(batch["pair"]):
                return answer
            assert isinstance(answer, RunningAnswer)
            answers.append((answer, sentences))
        return MixedAnswer(answers, batch["target"].size(1))

    def asked(self, batch: Dict[str, Any]) -> Iterator[Tuple[Teacher, Dict[str, Any]]]:
        for source, part, _ in self._parts(batch):
            yield from source.asked(part)

    def _parts(
        self, batch: Dict[str, Any]
    ) -> Iterator[Tuple[RunningTeacher, Dict[str, Any], Tensor]]:
        """Whom to ask about what, and which sentences of the batch these are, (n,)."""
        together: Dict[Any, List[int]] = {}
        first: Dict[Any, RunningTeacher] = {}
        for sentence, pair in enumerate(batch["pair"].tolist()):
            source = self.sources[pair]
            key = source.teacher and source.teacher.reads
            together.setdefault(key, []).append(sentence)
            first.setdefault(key, source)
        for key, own in together.items():
            sentences = torch.tensor(own, device=batch["target"].device)
            part = batch
            if len(together) > 1:
                inputs = {k: v[sentences] for k, v in batch["net_input"].items()}
                # an LSTM wants the longest source to fill the width
                symbols = inputs["src_tokens"].ne(first[key].student.source.pad()).any(0)
                inputs["src_tokens"] = inputs["src_tokens"][:, symbols]
                part = {**batch, "net_input": inputs, "target": batch["target"][sentences]}
            yield first[key], part, sentences


def _models(settings: TeacherSettings) -> TeacherSettings:
    """What the models depend on."""
    return settings._replace(tags=AskedTags())
