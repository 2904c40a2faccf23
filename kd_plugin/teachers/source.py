"""Where a training's answers come from: no teacher, one that runs, or one in a cache.

The task chooses its source once, when training or validation is set up, and asks it about every
batch. What speaks against a source is noted as data come in, and told when training begins: until
then nobody knows whether this is a training, which cannot go on without its teacher, or a
validation, which can.
"""

import logging
import math
import os
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..cache import CachedSubset, CacheError, Describe, TaughtDataset
from ..checkpoints import TRANSLATION
from ..errors import UserError
from ..objective import Answer, CachedAnswer, LayerPair, Schedule
from ..objective.states import FLAG
from .probe import probe
from .run import Teacher, TeacherError, TeacherSettings
from .states import lacking
from .view import Student

logger = logging.getLogger(__name__)

Lengths = Callable[[], Optional[np.ndarray]]
_ALONE = "without kd_loss, teacher_nll_loss and agreement"


class Step(NamedTuple):
    """What the trainer knows about a batch.

    Attributes:
        update: updates that training has done; None outside training.
        is_dummy: whether the batch only keeps a rank busy and must leave no trace.
        amp: whether the student's forward pass runs under CUDA autocast.
        inputs: who wrote what the decoder reads: "reference", or how the student made it
            (``flags.INPUTS``). There the batch's target is the student's own, too.
    """

    update: Optional[int] = None
    is_dummy: bool = False
    amp: bool = False
    inputs: str = "reference"

    @property
    def by_student(self) -> bool:
        """Whether the batch has no reference."""
        return self.inputs != "reference"


class Needs(NamedTuple):
    """What must be asked of a teacher at each target position.

    Attributes:
        top_k: its likeliest symbols; 0 is all that the source knows.
        ranked: how many of these are ranked; 0 is none.
        rest_at: the temperature, by update, at which the mass of all other symbols is needed; None
            if it is not.
        drawn_at: that at which symbols drawn from the others are needed; None if they are not.
        layers: which of the student's learn from the inside of which of the teacher's.
    """

    top_k: int = 0
    rest_at: Optional[Schedule] = None
    drawn_at: Optional[Schedule] = None
    ranked: int = 0
    layers: Tuple[LayerPair, ...] = ()

    def unmet(self, k: int, temperatures: List[float], whole: bool, samples: int = 0) -> List[str]:
        """Why a cache cannot give it, every reason.

        Args:
            k: symbols in each of its rows.
            temperatures: at which, beside 1, it knows the mass of all other symbols.
            whole: whether k is the whole vocabulary.
            samples: symbols drawn from the others, at the one temperature.
        """
        reasons = []
        if self.ranked > k:
            reasons.append(f"--kd-ranking-top-k {self.ranked} is more than the {k} of the cache")
        if self.layers:
            flags = " and ".join(dict.fromkeys(FLAG[pair.kind] for pair in self.layers))
            reasons.append(
                f"a cache holds nothing of the teacher's inside: leave out {flags}, or give "
                "--teacher-checkpoint-path instead of --teacher-cache"
            )
        if self.drawn_at is not None:
            return reasons + ([] if whole else self._undrawn(temperatures, samples))
        if k == 1 and self.rest_at is None:
            reasons.append(
                "one symbol with --kd-tail renormalise leaves nothing to learn, because it has "
                "probability 1 on both sides: take --kd-tail bucket, or cache more symbols"
            )
        if self.top_k > k:
            reasons.append(f"--kd-top-k {self.top_k} is more than the {k} of the cache")
        if self.rest_at is None or whole:
            return reasons
        held = ", ".join(f"{t:g}" for t in sorted({1.0, *temperatures}))
        if self.rest_at.steps:
            reasons.append(
                "--kd-temperature-schedule with --kd-tail bucket needs the mass of the other "
                f"symbols at every temperature, and the cache holds it at {held}: take --kd-tail "
                "renormalise"
            )
        elif self.rest_at(None) not in (1.0, *temperatures):
            reasons.append(
                f"--kd-temperature {self.rest_at(None):g} with --kd-tail bucket: the cache holds "
                f"the mass of the other symbols at {held}; take --kd-tail renormalise, or cache "
                "with --temperatures"
            )
        return reasons

    def _undrawn(self, temperatures: List[float], samples: int) -> List[str]:
        assert self.drawn_at is not None
        if not samples:
            return [
                "--kd-tail sample needs symbols drawn from the tail, and the cache holds none: "
                "take --kd-tail bucket, or make the cache with fairseq-kd-cache --tail-samples"
            ]
        if self.drawn_at.steps or self.drawn_at(None) != temperatures[0]:
            asked = f"--kd-temperature {self.drawn_at(None):g}"
            return [
                f"{'--kd-temperature-schedule' if self.drawn_at.steps else asked} with --kd-tail "
                f"sample: the cache's symbols were drawn at temperature {temperatures[0]:g}, which "
                "must be training's: cache with --temperatures, or take --kd-tail bucket"
            ]
        return []


class Source:
    """Where the teacher's answers come from; as it stands here, from nowhere.

    fairseq's calls come in this order: ``join`` and ``look_over`` as subsets are loaded, then
    ``begin_training`` or ``begin_validation``, then ``answer`` for every batch.
    """

    def join(
        self, dataset: Any, subset: str, describe: Sequence[Describe], *, turn: int, required: bool
    ) -> Any:
        """The dataset, with what the source knows of its sentences.

        Args:
            describe: for each of the task's data folders, gives what is to be known of the subset
                there; called if needed.
            turn: which of the folders it is from.
            required: whether training is taught on this subset.
        """
        return dataset

    def look_over(self, dataset: Any, lengths: np.ndarray, kept: np.ndarray) -> None:
        """Note what batches of a dataset will ask of the teacher.

        Args:
            lengths: source and target tokens of each sentence as the teacher reads it, (n, 2).
            kept: which sentences batches are made of, bool (n,).
        """

    def begin_training(self, model: Any, dataset: Any, lengths: Lengths, subset: str) -> None:
        """Open the teacher, or refuse to train.

        Args:
            model: the student, where it will be trained.
            dataset: the training data; ``subset`` is its name.
            lengths: gives source and target tokens of each of its samples as read by the teacher,
                (n, 2), or None of a text without targets; called only when the teacher is opened.

        Raises:
            UserError: anything speaks against this teacher.
        """

    def begin_validation(self, model: Any) -> None:
        """Outside training, open the teacher if it is there; it is welcome but not needed."""

    def longest_target(self) -> float:
        """Of how many tokens a target may be at most that it is asked about."""
        return math.inf

    def answer(self, batch: Dict[str, Any], step: Step) -> Optional[Answer]:
        """The teacher's answer about a batch; None if it has none."""
        return None

    def asked(self, batch: Dict[str, Any]) -> Iterator[Tuple[Teacher, Dict[str, Any]]]:
        """The teachers that are run on a batch, and on which of its sentences."""
        return iter(())


class NoTeacher(Source):
    """No flag names a teacher: fine for translating, not for training.

    Args:
        plain: the task that trains without one.
    """

    def __init__(self, plain: str = TRANSLATION.task) -> None:
        self.plain, self._warned = plain, False

    def begin_training(self, model: Any, dataset: Any, lengths: Lengths, subset: str) -> None:
        raise TeacherError(
            "the task needs a teacher: give --teacher-checkpoint-path or --teacher-cache (for "
            f"training without one use --task {self.plain})"
        )

    def begin_validation(self, model: Any) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(f"no teacher is named: validating the student alone, {_ALONE}")


class RunningTeacher(Source):
    """A teacher that reads every batch when the student does.

    Args:
        settings: which, and how it is run.
        student: the vocabularies and languages that it must fit.
        layers: which of the student's learn from the inside of which of its own.
        ignored: how many of each target's first symbols the loss leaves out.
        other: one with the same teacher for other languages, opened before it.
        first: the number of its first model among all models of the training's teachers.
    """

    def __init__(
        self,
        settings: TeacherSettings,
        student: Student,
        layers: Sequence[LayerPair] = (),
        ignored: int = 0,
        other: Optional["RunningTeacher"] = None,
        first: int = 0,
    ) -> None:
        self.settings, self.student, self.layers = settings, student, layers
        self._ignored, self._other, self._first = ignored, other, first
        self._places = list(dict.fromkeys(pair.of_teacher for pair in layers))
        self.teacher: Optional[Teacher] = None
        self._looked = False
        self._longest = np.zeros(2, dtype=np.int64)  # source and target tokens in any batch

    def look_over(self, dataset: Any, lengths: np.ndarray, kept: np.ndarray) -> None:
        if kept.any():
            self._longest = np.maximum(self._longest, lengths[kept].max(axis=0))

    def begin_training(self, model: Any, dataset: Any, lengths: Lengths, subset: str) -> None:
        if self.teacher is None:
            probe(self._open(model), dataset, lengths(), self.student, subset)
        self._check_lengths()

    def begin_validation(self, model: Any) -> None:
        if self.teacher is not None or self._looked:
            return
        self._looked = True
        if all(os.path.isfile(path) for path in self.settings.paths):
            self._open(model)
            self._check_lengths()
        else:
            logger.warning(
                f"no teacher at {':'.join(self.settings.paths)}: validating the student alone, "
                f"{_ALONE}"
            )

    def longest_target(self) -> float:
        return math.inf if self.teacher is None else self.teacher.max_positions()[1]

    def answer(self, batch: Dict[str, Any], step: Step) -> Optional[Answer]:
        if self.teacher is None:
            return None
        amp = step.amp and self.settings.dtype == "same"
        return self.teacher(batch, amp, self._places, self._first)

    def asked(self, batch: Dict[str, Any]) -> Iterator[Tuple[Teacher, Dict[str, Any]]]:
        if self.teacher is not None:
            yield self.teacher, batch

    def _open(self, model: Any) -> Teacher:
        parameter = next(model.parameters())
        placement = self.settings.placement(parameter.device, parameter.dtype)
        other = None if self._other is None else self._other.teacher
        self.teacher = Teacher.open(self.settings, self.student, other).place(*placement)
        if self.layers:
            self._check_layers(model)
        unknown = max(member.view.unknown for member in self.teacher.members)
        refuse_tags("the teacher", unknown, self._ignored)
        return self.teacher

    def _check_layers(self, model: Any) -> None:
        assert self.teacher is not None
        places = [pair.of_student for pair in self.layers]
        reasons = lacking(model, places, "the student", learns=True)
        for member in self.teacher.members:
            reasons += lacking(member.model, self._places, f"teacher {member.path}")
        if reasons:
            raise TeacherError("; ".join(reasons))

    def _check_lengths(self) -> None:
        assert self.teacher is not None
        limits, tags = self.teacher.max_positions(), self.teacher.longer
        if (self._longest > limits).any():
            beside = f" beside its tags, which take {tags[0]} and {tags[1]}"
            beside = beside if max(tags) > 0 <= min(tags) else ""
            kind = self.student.kind
            raise TeacherError(
                f"the data holds {kind.samples[0]} of up to {kind.lengths(*self._longest)}, the "
                f"teacher reads at most {kind.lengths(*limits)}{beside}. "
                f"{kind.shorten.format(*limits)}"
            )


def refuse_tags(teacher: str, unknown: int, ignored: int) -> None:
    """Refuse targets whose tags the loss counts and the teacher knows nothing of.

    Args:
        teacher: what it is called.
        unknown: with how many such symbols each target begins.
        ignored: how many of its first symbols the loss leaves out.

    Raises:
        TeacherError: they are fewer.
    """
    if unknown > ignored:
        raise TeacherError(
            f"the target begins with a token of its language, about which {teacher} says nothing: "
            f"give --ignore-prefix-size {unknown}, which leaves it out of the loss (a translation "
            "is decoded with it given)"
        )


class CachedTeacher(Source):
    """A teacher whose answers were written to disk by ``fairseq-kd-cache``.

    Args:
        folders: the caches, one for each data folder.
        data: the data folders.
        needs: what training asks of it.
        student: the data that it has answers about.
        faults: what already speaks against it.
    """

    def __init__(
        self,
        folders: Sequence[str],
        data: Sequence[str],
        needs: Needs,
        student: Student,
        faults: Sequence[str] = (),
    ) -> None:
        self.folders, self.needs, self.student = folders, needs, student
        self.cache: Optional[CachedSubset] = None  # of any subset: they are alike
        self.faults = [*faults]
        if len(folders) != len(data):
            self.faults.append(
                f"--teacher-cache: expected a cache for each of the {len(data)} data folders, in "
                f"their order and with ':' between them; got {len(folders)}"
            )
        self._warned, self._begun = False, False

    def join(
        self, dataset: Any, subset: str, describe: Sequence[Describe], *, turn: int, required: bool
    ) -> Any:
        if turn >= len(self.folders):
            return dataset
        folder = self.folders[turn]
        if not required and not CachedSubset.exists(folder, subset):
            logger.info(f"no subset {subset} in the cache {folder}: it is validated {_ALONE}")
            return dataset
        try:
            cache = self._open(subset, describe, turn)
            student = self.student
            joined = TaughtDataset(dataset, cache, student.target.pad(), student.tags.longer[1])
            if required and not self._begun:  # those of later epochs, too: not to stop only then
                self._begun = True
                for other in range(min(len(describe), len(self.folders))):
                    if other != turn:
                        self._open(subset, describe, other, beside=cache)
        except UserError as error:
            self.faults.append(str(error))
            return dataset
        self.cache = cache
        logger.info(f"teacher of {subset}: the {cache.k} likeliest symbols from {cache.folder}")
        return joined

    def _open(
        self,
        subset: str,
        describe: Sequence[Describe],
        turn: int,
        beside: Optional[CachedSubset] = None,
    ) -> CachedSubset:
        """The cache of one data folder.

        Raises:
            CacheError: it does not fit the data, another cache, or what training needs.
        """
        cache = CachedSubset(self.folders[turn], subset, describe[turn])
        beside = beside or self.cache
        if beside is not None and not beside.compatible_with(cache):
            raise CacheError(
                f"the caches {cache.folder} and {beside.folder} were not made with the same "
                "teachers, top k, temperatures and tail samples: make one of them again"
            )
        unmet = self.needs.unmet(cache.k, cache.temperatures, cache.whole, cache.samples)
        if unmet:
            raise CacheError("--teacher-cache: " + "; ".join(unmet))
        return cache

    def look_over(self, dataset: Any, lengths: np.ndarray, kept: np.ndarray) -> None:
        if not isinstance(dataset, TaughtDataset):
            return
        untaught = kept & ~dataset.has_rows
        if untaught.any():
            kind, longest = self.student.kind, lengths[untaught].max(axis=0)
            self.faults.append(
                f"the cache {dataset.cache.folder} has no rows for {untaught.sum()} "
                f"{kind.samples[0]} of up to {kind.lengths(*longest)}: they were longer than the "
                "teacher, or the limits that the cache was made with, allow. "
                f"{kind.shorten.format('N', 'M')}"
            )

    def begin_training(self, model: Any, dataset: Any, lengths: Lengths, subset: str) -> None:
        if self.faults:
            raise CacheError("; ".join(dict.fromkeys(self.faults)))

    def begin_validation(self, model: Any) -> None:
        if self.faults and not self._warned:
            self._warned = True
            logger.warning(f"validating the student alone: {'; '.join(dict.fromkeys(self.faults))}")

    def answer(self, batch: Dict[str, Any], step: Step) -> Optional[Answer]:
        if self.cache is None:
            return None
        words = self.student.words(batch["target"])
        known = self.cache.temperatures, self.cache.whole
        if "teacher" in batch:
            return CachedAnswer(batch["teacher"], words, *known)
        if step.is_dummy:
            # a batch of a validation without cache, which the trainer kept; yet all ranks must log
            # the same keys
            return CachedAnswer.blank(words, self.cache.k, *known)
        return None
