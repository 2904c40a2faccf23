"""What makes a fairseq task one with a teacher.

``Distillation`` is mixed into a task of fairseq's. Its methods are fairseq's calls, in the order in
which they come. The task asks its source about every batch and puts the answer into a shallow copy
of the batch, as ``sample["teacher"]``, beside what the trainer knows, ``sample["step"]``; the
criterion finds both there.
"""

import logging
import math
import os
from dataclasses import dataclass
from functools import partial
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
import torch.distributed as dist
from fairseq import utils
from fairseq.distributed import utils as distributed_utils
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.tasks import FairseqTask
from omegaconf import II

from ..cache import Describe, data_files, describe_data
from ..checkpoints import Kind, Role, is_autoregressive, refuse_cut_short
from ..errors import UserError
from ..files import read_whole, reading_binarised
from ..flags import CRITERION, TeacherConfig
from ..objective import ScoreQueue
from ..objective.states import first_maps
from ..plan import Plan, read_teachers
from ..teachers import (
    TRAINING,
    CachedTeacher,
    NoTeacher,
    RunningTeacher,
    Source,
    Step,
    Student,
    Teacher,
    TeacherError,
    distinct,
    hidden_widths,
    probe,
    width,
)
from .inputs import StudentInputs

logger = logging.getLogger(__name__)


@dataclass
class DistillationConfig(TeacherConfig):
    """The teacher's flags, and those of fairseq's that tasks are not told otherwise."""

    train_subset: str = II("dataset.train_subset")
    disable_validation: bool = II("dataset.disable_validation")
    save_dir: str = II("checkpoint.save_dir")
    restore_file: str = II("checkpoint.restore_file")
    update_ordered_indices_seed: bool = II("dataset.update_ordered_indices_seed")
    seed: int = II("common.seed")


class Distillation(FairseqTask):
    """Mixed into a fairseq task, before its class.

    What a task must say of itself is ``kind``, ``student``, ``lengths``, ``data_endings`` and
    ``data_settings``.
    """

    kind: Kind
    pairs: Sequence[str] = ()  # of languages, of a task with several
    repair = "Binarise it again with fairseq-preprocess"  # data that are damaged

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.source: Source = NoTeacher()
        self.queue: Optional[ScoreQueue] = None  # the criterion's, which travels in checkpoints
        self.inputs: Optional[StudentInputs] = None  # None is references alone
        self._has_checkpoint = False
        self._built: Any = None  # the student, until the criterion knows how wide it is

    # What differs between tasks

    def student(self) -> Student:
        """The data that a teacher must fit."""
        raise NotImplementedError

    def lengths(self, dataset: Any) -> Optional[np.ndarray]:
        """Source and target tokens of each sample, (n, 2), as fairseq's length filter counts them;
        None of data without targets."""
        raise NotImplementedError

    def lengths_read(self, dataset: Any) -> Optional[np.ndarray]:
        """The same, of what the teacher reads."""
        return self.lengths(dataset)

    def prepared(self, dataset: Any, split: str) -> Any:
        """What fairseq loaded, as a dataset whose samples are dictionaries with an ``id``, their
        place in it."""
        return dataset

    def parts(self, dataset: Any) -> Sequence[Any]:
        """The datasets of one pair of languages each that it is made of."""
        return [dataset]

    def data_endings(self) -> Sequence[str]:
        """How the names of a subset's files end, behind ``train``, say, and before ``.bin``; of
        sentence pairs, unless a task says otherwise."""
        pair = self.student().languages
        return [f".{a}-{b}.{lang}" for a, b in (pair, pair[::-1]) for lang in (a, b)]

    def data_settings(self) -> Dict[str, Any]:
        """The flags on which it depends what the task makes of the files, as plain types.

        Raises:
            CacheError: no cache can hold a teacher's answers about it.
        """
        raise NotImplementedError

    # fairseq's calls. First, only where a model is there already (validating, translating):

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Nothing: the dictionaries are those of the data folder."""
        self._has_checkpoint = True

    def build_model(self, *args: Any, **kwargs: Any) -> Any:
        self._built = super().build_model(*args, **kwargs)
        return self._built

    # The loss; for training and validation alone

    def build_criterion(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        name = getattr(cfg, "_name", None) or getattr(cfg, "criterion", None)
        if name != CRITERION:
            raise UserError(
                f"--task {self.cfg._name} needs --criterion {CRITERION}, which learns from the "
                f"teacher; got {name}. For training without a teacher use --task {self.kind.task}."
            )
        if not self._has_checkpoint:
            # nothing of ours is asked again before fairseq opens the checkpoint to go on from
            path = self.cfg.restore_file
            if path == "checkpoint_last.pt":
                path = os.path.join(self.cfg.save_dir, path)
            refuse_cut_short(path)
        criterion = super().build_criterion(cfg, *args, **kwargs)
        self.source = self._source(criterion.plan)
        if not self._has_checkpoint:
            self._add_maps(criterion)
        self._built = None
        self.queue = criterion.queue
        if criterion.plan.inputs.by_student:
            self.inputs = StudentInputs(criterion.plan.inputs, self)
        return criterion

    def _add_maps(self, criterion: Any) -> None:
        """The linear maps of --kd-hidden mse, before fairseq builds the optimizer.

        Until then nothing opens the teacher: its checkpoint's configuration tells its widths. If
        there is none, training is refused later, and a validation needs no maps.
        """
        plan = criterion.plan
        pairs = [pair for term in plan.inside if term.has_maps for pair in term.layers]
        teachers = distinct(plan.teachers)
        paths = [path for teacher in teachers for path in teacher.paths]
        if not pairs or not paths or not all(map(os.path.isfile, paths)):
            return
        kinds = [pair.kind for pair in pairs]
        every = [found for teacher in teachers for found in hidden_widths(teacher, kinds)]
        widths = []
        for pair in pairs:
            ours = width(self._built, pair.kind)
            for path, of_model in zip(paths, every):
                theirs = of_model[pair.kind]
                if ours is None or theirs is None:
                    who = "the student" if ours is None else f"teacher {path}"
                    raise TeacherError(
                        f"--kd-hidden mse: {who} does not say how wide the states of its "
                        f"{pair.kind} are: take --kd-hidden relations"
                    )
                widths.append((theirs, ours))
        criterion.add_maps(first_maps(widths))

    def _source(self, plan: Plan) -> Source:
        if plan.caches:
            return self.cached(plan.caches[0], plan)
        if plan.teachers:
            return RunningTeacher(plan.teachers[0], self.student(), plan.needs.layers)
        return NoTeacher(self.kind.task)

    def cached(self, caches: str, plan: Plan) -> CachedTeacher:
        """The source that reads these caches, one for each data folder."""
        folders = utils.split_paths(caches), self.data_folders()
        return CachedTeacher(*folders, plan.needs, self.student(), plan.beside_cache)

    # The data: validation's, then training's

    def load_dataset(
        self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any
    ) -> None:
        if str(getattr(self.cfg, "dataset_impl", None)) == "lazy":
            self.cfg.dataset_impl = None  # the same files, read whole
        before = self.datasets.get(split)
        with reading_binarised(f"{self.cfg.data}: {split}", self.repair):
            super().load_dataset(split, epoch, combine, **kwargs)
            if self.datasets[split] is before:
                return  # fairseq goes on with it
            read_whole(self.datasets[split])
        dataset = self.prepared(self.datasets[split], split)
        self.datasets[split] = self.joined(dataset, split, epoch, combine)

    def joined(self, dataset: Any, split: str, epoch: int, combine: bool) -> Any:
        """A prepared dataset with what the source knows of its samples."""
        describe, train = self.descriptions(split, combine), split == self.cfg.train_subset
        # training reads data folders in turn, an epoch from each
        turn = (epoch - 1) % len(describe) if train else 0
        return self.source.join(dataset, split, describe, turn=turn, required=train)

    def descriptions(self, split: str, combine: bool) -> List[Describe]:
        """For each data folder, what gives ``describe_data``."""
        return [partial(self.describe_data, own, split, combine) for own in self.data_folders()]

    def data_folders(self) -> List[str]:
        return utils.split_paths(self.cfg.data)

    def describe_data(self, folder: str, subset: str, combine: bool, whole: bool) -> Dict[str, Any]:
        """What the meaning of a cached row depends on, as plain types.

        Args:
            folder: where the subset is read.
            combine: whether train1, train2, ... belong to it.
            whole: look at all of its files, and not at samples of them alone.

        Raises:
            CacheError: no cache can hold a teacher's answers about it.
        """
        student, settings = self.student(), self.data_settings()
        return describe_data(
            {"source": student.source.symbols, "target": student.target.symbols},
            settings,
            self.data_paths(folder, subset, combine),
            whole,
        )

    def data_paths(self, folder: str, subset: str, combine: bool) -> List[str]:
        """The files that a subset is read from."""
        return data_files(folder, subset, combine, self.data_endings())

    def get_batch_iterator(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        max_positions = kwargs.get("max_positions", args[2] if len(args) > 2 else None)
        self._look_over(dataset, max_positions)
        iterator = self._batches(dataset, *args, **kwargs)
        if self.queue is not None and dataset is self.datasets.get(self.cfg.train_subset):
            _remember(iterator, self.queue)
        return iterator

    def _batches(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """fairseq's iterator; of a resumed training, the one that it would have had without a stop.

        Where fairseq keeps the batches of the first epoch for all of them, they come of a seed that
        has the epoch added to it (in newer versions, and with --update-ordered-indices-seed): a
        training resumed later than in epoch 1 would repeat some sentences and leave out others.
        """
        fresh = kwargs.get("disable_iterator_cache") or kwargs.get("update_epoch_batch_itr")
        kept = not fresh and self.can_reuse_epoch_itr(dataset)
        epoch = kwargs.get("epoch", 1)
        if not kept or epoch <= 1 or dataset in self.dataset_to_epoch_iter:
            return super().get_batch_iterator(dataset, *args, **kwargs)
        first = {**kwargs, "epoch": 1}
        if self.cfg.update_ordered_indices_seed:
            first["seed"] = kwargs["seed"] - (epoch - 1)
        iterator = super().get_batch_iterator(dataset, *args, **first)
        iterator.epoch = epoch
        dataset.set_epoch(epoch)
        return iterator

    def _look_over(self, dataset: Any, max_positions: Any) -> None:
        """Let the source know the sentences that fairseq's length filter keeps."""
        for part in self.parts(dataset):
            lengths, read = self.lengths(part), self.lengths_read(part)
            if lengths is None or read is None:
                continue
            kept: np.ndarray = np.ones(len(lengths), dtype=bool)
            if max_positions is not None:
                pair = isinstance(max_positions, (tuple, list))
                limits = max_positions if pair else [max_positions] * 2
                kept = np.all(lengths <= [limit or math.inf for limit in limits], axis=1)
            self.source.look_over(part, read, kept)

    # Training

    def begin_epoch(self, epoch: int, model: Any) -> None:
        super().begin_epoch(epoch, model)
        _refuse_student(model)
        if not self.cfg.disable_validation:
            # fairseq 0.12.2 asks for validation's batches only when it is too late to refuse them
            limits = utils.resolve_max_positions(self.max_positions(), model.max_positions())
            for split, dataset in self.datasets.items():
                if split != self.cfg.train_subset:
                    self._look_over(dataset, limits)
        subset = self.cfg.train_subset
        for part in self.parts(self.datasets[subset]):
            self.source.begin_training(model, part, partial(self.lengths_read, part), subset)
        if self.inputs is not None:
            self.inputs.begin(model, self.source.longest_target())

    def train_step(
        self, sample, model, criterion, optimizer, update_num, ignore_grad=False, **kwargs
    ):
        if update_num > 0 and self.queue is not None and self.queue.is_new:
            logger.warning(
                "this training goes on without the scores of earlier tokens for --kd-selection, "
                "which the checkpoint lacks or --reset-dataloader drops: every token is distilled "
                "until the first update is done"
            )
        amp = isinstance(optimizer, AMPOptimizer)
        step = Step(update=update_num, is_dummy=ignore_grad, amp=amp)
        if self.inputs is not None:
            sample, step = self.inputs(sample, step, next(criterion.batches))
        return super().train_step(
            self._taught(sample, step),
            *(model, criterion, optimizer, update_num),
            ignore_grad=ignore_grad,
            **kwargs,
        )

    def optimizer_step(self, optimizer, model, update_num):
        if self.queue is None:
            return super().optimizer_step(optimizer, model, update_num)
        scale = optimizer.scaler.get_scale() if isinstance(optimizer, AMPOptimizer) else None
        super().optimizer_step(optimizer, model, update_num)
        # amp's scaler skips an overflowed step by itself and then lowers its scale; the other
        # loss scalers never come here with one
        if scale is None or optimizer.scaler.get_scale() >= scale:
            distributed = dist.is_available() and dist.is_initialized()
            self.queue.commit(
                distributed_utils.get_data_parallel_group() if distributed else None,
                next(model.parameters()).device,
            )

    # Validation, of a training or by itself

    def valid_step(self, sample, model, criterion, **kwargs):
        self.source.begin_validation(model)
        return super().valid_step(self._taught(sample, Step()), model, criterion, **kwargs)

    def _taught(self, sample: Dict[str, Any], step: Step) -> Dict[str, Any]:
        """A shallow copy of the batch with the teacher's answer and the trainer's step.

        A copy, because on a CPU the trainer passes its own batch and keeps it as the dummy batch.
        """
        return {**sample, "teacher": self.source.answer(sample, step), "step": step}

    # The checkpoint: the vocabulary, so that a student can teach

    def state_dict(self) -> Dict[str, Any]:
        student = self.student()
        source = student.target if self.kind.reads_frames else student.source
        return {
            "source_symbols": list(source.symbols),
            "target_symbols": list(student.target.symbols),
        }

    # Not fairseq's: for commands that run the teacher without a student

    def open_teacher(
        self, device: torch.device, dtype: torch.dtype, role: Role = TRAINING
    ) -> Teacher:
        """The teacher of the flags, placed where and in the precision that they say.

        Args:
            device, dtype: the run's, which are the teacher's too unless told otherwise.
            role: the teacher's, with the flags of the command at hand.

        Raises:
            UserError: no flag names one, or it cannot teach.
        """
        found = read_teachers(self.cfg, self.pairs)
        if not found:
            raise TeacherError("no teacher: give --teacher-checkpoint-path")
        settings = found[0]._replace(role=role)
        teacher = Teacher.open(settings, self.student())
        return teacher.place(*settings.placement(device, dtype))

    def samples(self, subset: str) -> Any:
        """Those of a loaded subset, in the data's order; of one pair of languages."""
        (dataset,) = self.parts(self.dataset(subset))
        return dataset

    def probe(self, teacher: Teacher, subset: str) -> None:
        """Refuse a teacher that is worse than a uniform guess on a loaded subset.

        Raises:
            UserError: it is.
        """
        dataset = self.samples(subset)
        probe(teacher, dataset, self.lengths_read(dataset), self.student(), subset)


def _refuse_student(student: Any) -> None:
    """Refuse one that gives no distribution over the next symbol.

    Raises:
        UserError: it is one.
    """
    if not is_autoregressive(student):
        raise UserError(
            f"the student is a {type(student).__name__}, which is not autoregressive and gives no "
            "distribution over the next symbol to distil into; train it with --task "
            "translation_lev on the data that fairseq-kd-sequences makes"
        )
    # the built model tells; arguments name a cutoff for models that have none
    if getattr(getattr(student, "decoder", None), "adaptive_softmax", None) is not None:
        raise UserError(
            "the student has an adaptive softmax, which gives no distribution over the whole "
            "vocabulary to distil into; train it without --adaptive-softmax-cutoff"
        )


def _remember(iterator: Any, queue: ScoreQueue) -> None:
    """Let the queue travel in the train iterator's state, the only one that fairseq resumes."""
    if hasattr(iterator, "kd_queue"):
        return
    iterator.kd_queue = queue
    save, load = iterator.state_dict, iterator.load_state_dict

    def state_dict() -> Dict[str, Any]:
        return {**save(), "kd_queue": queue.state_dict()}

    def load_state_dict(state: Dict[str, Any]) -> None:
        load(state)
        if "kd_queue" in state:
            queue.load_state_dict(state["kd_queue"])

    iterator.state_dict, iterator.load_state_dict = state_dict, load_state_dict
