"""The task ``kd_translation``: fairseq's ``translation`` with a teacher.

The task asks the teacher about every batch and puts the answer into a shallow copy of it as
``sample["teacher"]``, where the criterion finds it.
"""

import logging
import math
import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

import numpy as np
import torch
import torch.distributed as dist
from fairseq import utils
from fairseq.dataclass import ChoiceEnum
from fairseq.distributed import utils as distributed_utils
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import II

from ..cache import CachedSubset, CacheError, TaughtDataset, describe_data
from ..checkpoints import DTYPES, Role, parse_overrides, refuse_cut_short
from ..errors import UserError
from ..files import reading_binarised, refuse_unknown_numbers
from ..objective.answer import CachedAnswer, not_finite_teacher
from ..objective.selection import ScoreQueue
from ..plan import CRITERION, choice_value
from ..teachers.run import TRAINING, Student, Teacher, TeacherError, parse_weights

logger = logging.getLogger(__name__)

# Sentences on which a teacher must beat a uniform guess before it may teach
_PROBE_SENTENCES = 64


@dataclass
class KDTranslationConfig(TranslationConfig):
    teacher_checkpoint_path: Optional[str] = field(
        default=None,
        metadata={"help": "the teacher's checkpoint; several with ':' between are an ensemble"},
    )
    teacher_data: Optional[str] = field(
        default=None,
        metadata={
            "help": "folder with the teacher's dict.*.txt, one for all teachers or one each with "
            "':' between them (default: looked for in the checkpoint, beside it, and in the data "
            "folder that it names; if nowhere, the student's, with a warning)"
        },
    )
    teacher_weights: Optional[str] = field(
        default=None,
        metadata={
            "help": "weights of the teachers in the average of their probabilities, positive, as "
            "in 2,1,1 (default: uniform)"
        },
    )
    teacher_overrides: str = field(
        default="{}",
        metadata={"help": "dictionary of arguments that override those of the teacher's training"},
    )
    teacher_dtype: ChoiceEnum(["same", "fp32", "fp16", "bf16"]) = field(  # type: ignore
        default="same",
        metadata={
            "help": "precision of the teacher's forward pass; 'same' is the run's, and under --amp "
            "fp32 weights under autocast"
        },
    )
    teacher_device: ChoiceEnum(["same", "cpu"]) = field(  # type: ignore
        default="same",
        metadata={"help": "where the teacher runs: with the student, or on the CPU (in fp32)"},
    )
    teacher_cache: Optional[str] = field(
        default=None,
        metadata={
            "help": "folder that fairseq-kd-cache wrote: the teacher is read from it instead of "
            "being run"
        },
    )
    teacher_trust_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "open the teacher's checkpoint with the full pickle machinery, which runs "
            "whatever code the file asks for; only for files you trust"
        },
    )
    # fairseq's own, which tasks are not told otherwise
    disable_validation: bool = II("dataset.disable_validation")
    save_dir: str = II("checkpoint.save_dir")
    restore_file: str = II("checkpoint.restore_file")


# The fields that are about a teacher that is run, as opposed to one in a cache
RUN_TEACHER = (
    "teacher_checkpoint_path",
    "teacher_data",
    "teacher_weights",
    "teacher_overrides",
    "teacher_dtype",
    "teacher_device",
    "teacher_trust_checkpoint",
)


@register_task("kd_translation", dataclass=KDTranslationConfig)
class KDTranslationTask(TranslationTask):
    """Translate from one language to another, taught by a bigger model."""

    cfg: KDTranslationConfig
    asks_a_teacher = True

    def __init__(self, cfg: KDTranslationConfig, src_dict: Any, tgt_dict: Any) -> None:
        super().__init__(cfg, src_dict, tgt_dict)
        self.teacher: Optional[Teacher] = None  # opened when training begins
        self._training = self._stepped = False
        self._from_checkpoint = False  # as outside training: set up to run a model that there is
        # once there is one, this is a training or a validation, and datasets bring the teacher
        self._criterion: Any = None
        # of any subset: they are alike
        self.cache: Optional[CachedSubset] = None
        self._cache_fault: Optional[ValueError] = None
        self._looked_for_teacher = False
        # longest source and target sentence, in tokens, in the batches of any dataset so far
        self._longest = (0, 0)

    # what a checkpoint remembers of the task: the vocabulary, so that a student can teach

    def state_dict(self) -> Dict[str, Any]:
        return {
            "source_symbols": list(self.src_dict.symbols),
            "target_symbols": list(self.tgt_dict.symbols),
        }

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Nothing: the dictionaries are those of the data folder."""
        self._from_checkpoint = True

    def build_criterion(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        name = getattr(cfg, "_name", None) or getattr(cfg, "criterion", None)
        if name != CRITERION:
            raise ValueError(
                f"--task kd_translation needs --criterion {CRITERION}, which listens to the "
                f"teacher; got {name}. For training without a teacher use --task translation."
            )
        if not self._from_checkpoint:
            # nothing of ours is asked again before fairseq opens the checkpoint to go on from
            path = self.cfg.restore_file
            if path == "checkpoint_last.pt":
                path = os.path.join(self.cfg.save_dir, path)
            refuse_cut_short(path)
        faults = [] if self.cfg.teacher_cache else self._faults_of_teacher_flags()
        try:
            self._criterion = super().build_criterion(cfg, *args, **kwargs)
        except ValueError as error:
            faults.insert(0, str(error))
        if faults:
            raise ValueError("; ".join(faults))
        return self._criterion

    @property
    def _queue(self) -> Optional[ScoreQueue]:
        """Scores of the last tokens, where the selection compares with them."""
        return None if self._criterion is None else self._criterion.selection.queue

    def load_dataset(
        self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any
    ) -> None:
        with reading_binarised(f"{self.cfg.data}: {split}"):
            super().load_dataset(split, epoch, combine, **kwargs)
            dataset = self.datasets[split]
            if len(dataset) > 0:
                dataset[len(dataset) - 1]
        if self._criterion is not None and self.cfg.teacher_cache:
            try:
                self._refuse_beside_cache()
                self._join_cache(split, combine)
            except ValueError as error:
                # fatal for a training, which begin_epoch tells from a validation
                self._cache_fault = self._cache_fault or error

    def get_batch_iterator(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        max_positions = kwargs.get("max_positions", args[2] if len(args) > 2 else None)
        self._look_over(dataset, max_positions)
        # Newer fairseq draws the order of equally long sentences from seed + epoch and keeps the
        # batches that come of it: a run resumed later than in epoch 1 would get other batches.
        epoch, cached = kwargs.get("epoch", 1), self.dataset_to_epoch_iter.get(dataset)
        iterator = super().get_batch_iterator(dataset, *args, **{**kwargs, "epoch": 1})
        if iterator is not cached:
            iterator.epoch = max(epoch, 1)
            dataset.set_epoch(epoch)
        if self._queue is not None and dataset is self.datasets.get(self.cfg.train_subset):
            _remember(iterator, self._queue)
        return iterator

    def _look_over(self, dataset: Any, max_positions: Any) -> None:
        """Note what the sentences within these limits will ask of the teacher or the cache."""
        kept = _kept(dataset, max_positions)
        if isinstance(dataset, TaughtDataset):
            untaught = kept & ~dataset.has_rows
            if untaught.any():
                self._cache_fault = self._cache_fault or _untaught(dataset, untaught)
        elif kept.any():
            self._longest = (
                max(self._longest[0], int(dataset.src_sizes[kept].max())),
                max(self._longest[1], int(dataset.tgt_sizes[kept].max())),
            )

    # training and validation

    def begin_epoch(self, epoch: int, model: Any) -> None:
        super().begin_epoch(epoch, model)
        self._training = True
        _refuse_adaptive_softmax(model)
        if not self.cfg.disable_validation:
            # fairseq 0.12.2 asks for validation's batches only when it is too late to refuse them
            limits = utils.resolve_max_positions(self.max_positions(), model.max_positions())
            for split, dataset in self.datasets.items():
                if split != self.cfg.train_subset:
                    self._look_over(dataset, limits)
        if self._cache_fault is not None:
            raise self._cache_fault
        if self.cfg.teacher_cache:
            return
        if self.teacher is None:
            parameter = next(model.parameters())
            self.teacher = self.open_teacher(parameter.device, parameter.dtype)
            self.probe(self.teacher, self.cfg.train_subset)
        self._check_lengths(self.teacher)

    def train_step(
        self, sample, model, criterion, optimizer, update_num, ignore_grad=False, **kwargs
    ):
        if self._queue is not None and not self._stepped:
            self._stepped = True
            if update_num > 0 and not self._queue.scores.numel():
                logger.warning(
                    "this training goes on without the scores of earlier tokens for "
                    "--kd-selection, which the checkpoint lacks or --reset-dataloader drops: every "
                    "token is distilled until the first update is done"
                )
        sample = self._ask(
            sample,
            amp=isinstance(optimizer, AMPOptimizer),
            num_updates=update_num,
            is_dummy=ignore_grad,
        )
        return super().train_step(
            sample, model, criterion, optimizer, update_num, ignore_grad=ignore_grad, **kwargs
        )

    def optimizer_step(self, optimizer, model, update_num):
        if self._queue is None:
            return super().optimizer_step(optimizer, model, update_num)
        scale = optimizer.scaler.get_scale() if isinstance(optimizer, AMPOptimizer) else None
        super().optimizer_step(optimizer, model, update_num)
        # amp's scaler skips an overflowed step by itself and then lowers its scale; the other
        # loss scalers never come here with one
        if scale is None or optimizer.scaler.get_scale() >= scale:
            distributed = dist.is_available() and dist.is_initialized()
            self._queue.enter_waiting(
                distributed_utils.get_data_parallel_group() if distributed else None,
                next(model.parameters()).device,
            )

    def valid_step(self, sample, model, criterion, **kwargs):
        if not self._training and not self._looked_for_teacher:
            self._look_for_teacher(model)
        return super().valid_step(self._ask(sample), model, criterion, **kwargs)

    def _ask(self, sample: Dict[str, Any], amp: bool = False, **about: Any) -> Dict[str, Any]:
        """A shallow copy of the batch with the teacher's signal in it.

        A copy, because on a CPU the trainer passes its own batch and keeps it as the dummy batch.
        """
        if self.cache is not None:
            shape = self.cache.temperatures, self.cache.whole
            real = sample["target"].ne(self.tgt_dict.pad())
            if "teacher" in sample:
                return {**sample, "teacher": CachedAnswer(sample["teacher"], real, *shape, **about)}
            if about.get("is_dummy"):
                # a batch of a validation without cache, which the trainer kept; yet all ranks must
                # log the same keys
                blank = CachedAnswer.blank(real, self.cache.k, *shape, **about)
                return {**sample, "teacher": blank}
            return sample
        if self.teacher is None:
            return sample
        amp = amp and choice_value(self.cfg.teacher_dtype) == "same"
        return {**sample, "teacher": self.teacher(sample["net_input"], amp=amp, **about)}

    # the teacher

    def _paths(self) -> List[str]:
        return [path for path in utils.split_paths(self.cfg.teacher_checkpoint_path or "") if path]

    def _weights(self) -> Optional[List[float]]:
        return parse_weights(self.cfg.teacher_weights, len(self._paths()))

    def _overrides(self) -> Dict[str, Any]:
        return parse_overrides(self.cfg.teacher_overrides, "--teacher-overrides")

    def _precision(self) -> str:
        precision = choice_value(self.cfg.teacher_dtype)
        if choice_value(self.cfg.teacher_device) != "cpu":
            return precision
        if precision not in ("same", "fp32"):
            raise TeacherError(
                f"--teacher-device cpu runs the teacher in fp32; --teacher-dtype {precision} "
                "cannot be had there"
            )
        return "fp32"

    def _faults_of_teacher_flags(self) -> List[str]:
        """What can be said against them before any file is opened."""
        faults = []
        for read in (self._weights, self._overrides, self._precision):
            try:
                read()
            except UserError as error:
                faults.append(str(error))
        return faults

    def open_teacher(
        self, device: torch.device, dtype: torch.dtype, role: Role = TRAINING
    ) -> Teacher:
        """The teacher of the flags, placed where and in the precision that they say.

        Args:
            device, dtype: the run's, which are the teacher's too unless told otherwise.
            role: the flags' names.
        """
        paths = self._paths()
        if not paths:
            raise TeacherError(
                "--task kd_translation needs a teacher: give --teacher-checkpoint-path or "
                "--teacher-cache (for training without one use --task translation)"
            )
        teacher = Teacher.open(
            paths,
            Student(self.src_dict, self.tgt_dict, self.cfg.source_lang, self.cfg.target_lang),
            data=utils.split_paths(self.cfg.teacher_data) if self.cfg.teacher_data else (),
            weights=self._weights(),
            overrides=self._overrides(),
            trust=self.cfg.teacher_trust_checkpoint,
            role=role,
        )
        precision = self._precision()
        if choice_value(self.cfg.teacher_device) == "cpu":
            device = torch.device("cpu")
        return teacher.place(device, dtype if precision == "same" else DTYPES[precision])

    def _look_for_teacher(self, model: Any) -> None:
        """Outside training the teacher is welcome but not needed."""
        self._looked_for_teacher = True
        if self.cfg.teacher_cache:
            if self._cache_fault is not None:
                logger.warning(f"validating the student alone: {self._cache_fault}")
            return
        paths = self._paths()
        if paths and all(os.path.isfile(path) for path in paths):
            parameter = next(model.parameters())
            self.teacher = self.open_teacher(parameter.device, parameter.dtype)
            self._check_lengths(self.teacher)
        else:
            logger.warning(
                f"no teacher at {self.cfg.teacher_checkpoint_path}: validating the student alone, "
                "without kd_loss, teacher_nll_loss and agreement"
            )

    # the teacher on disk

    def _refuse_beside_cache(self) -> None:
        """Flags of a running teacher mean nothing beside a cache."""
        default = KDTranslationConfig()
        useless = [
            "--" + name.replace("_", "-")
            for name in RUN_TEACHER
            if choice_value(getattr(self.cfg, name)) != choice_value(getattr(default, name))
        ]
        if useless:
            raise CacheError(
                f"with --teacher-cache no teacher is run: leave out {', '.join(useless)}, or "
                "leave out --teacher-cache"
            )

    def _join_cache(self, split: str, combine: bool) -> None:
        """Let a subset's batches bring what the cache holds of them."""
        folder = str(self.cfg.teacher_cache)
        if split != self.cfg.train_subset and not CachedSubset.exists(folder, split):
            logger.info(
                f"no subset {split} in the cache {folder}: it is validated without kd_loss, "
                "teacher_nll_loss and agreement"
            )
            return
        cache = CachedSubset(folder, split, describe_data(self, split, combine))
        if self.cache is not None and not self.cache.compatible_with(cache):
            raise CacheError(
                f"the caches {cache.folder} and {self.cache.folder} are not of the same teachers, "
                "top k and temperatures: make one of them again"
            )
        self._criterion.refuse_cache(cache.k, cache.temperatures, cache.whole)
        self.cache = cache
        self.datasets[split] = TaughtDataset(self.datasets[split], cache, self.tgt_dict.pad())
        logger.info(f"teacher of {split}: the {cache.k} likeliest symbols from {cache.folder}")

    def _check_lengths(self, teacher: Teacher) -> None:
        limits = teacher.max_positions()
        if any(length > limit for length, limit in zip(self._longest, limits)):
            raise TeacherError(
                "the data holds sentences of up to {} source and {} target tokens, the teacher "
                "reads at most {} and {}. Leave the longer ones out with --max-source-positions {} "
                "--max-target-positions {} (for validation data also "
                "--skip-invalid-size-inputs-valid-test), or cut sources with "
                "--truncate-source.".format(*self._longest, *limits, *limits)
            )

    def probe(self, teacher: Teacher, subset: str) -> None:
        """The last net: a teacher worse than a uniform guess on this data is the wrong one."""
        dataset = self.dataset(subset)
        limits = teacher.max_positions()
        fits = np.flatnonzero(
            (dataset.src_sizes <= limits[0]) & (dataset.tgt_sizes <= min(limits[1], 512))
        )
        if len(fits) == 0:
            return
        chosen = fits[np.linspace(0, len(fits) - 1, min(_PROBE_SENTENCES, len(fits))).astype(int)]
        nll, count = 0.0, 0
        for start in range(0, len(chosen), 8):
            batch = dataset.collater([dataset[int(i)] for i in chosen[start : start + 8]])
            target = batch["target"].flatten()
            refuse_unknown_numbers(batch["net_input"]["src_tokens"].flatten(), len(self.src_dict))
            refuse_unknown_numbers(target, len(self.tgt_dict))
            rows = target.ne(self.tgt_dict.pad()).nonzero().squeeze(-1)
            signal = teacher(batch["net_input"])
            logits = signal.logits(rows).cpu()
            bad = rows[~torch.logsumexp(logits, dim=-1).isfinite()]
            if bad.numel():
                sentences = torch.div(bad, batch["target"].size(1), rounding_mode="floor").unique()
                names = " and ".join(signal.not_finite(bad))
                raise not_finite_teacher(names, batch["id"][sentences].tolist())
            nll += torch.nn.functional.cross_entropy(logits, target[rows], reduction="sum").item()
            count += rows.numel()
        guess = math.log(len(self.tgt_dict))
        logger.info(
            f"teacher on {len(chosen)} sentences of {subset}: nll_loss "
            f"{nll / count / math.log(2):.3f} (a uniform guess has {guess / math.log(2):.3f})"
        )
        if not nll / count <= guess:
            raise TeacherError(
                f"the teacher knows nothing of this data: on {len(chosen)} sentences of {subset} "
                f"its nll_loss is {nll / count / math.log(2):.2f} bits per token, a uniform guess "
                f"over the {len(self.tgt_dict)} symbols has {guess / math.log(2):.2f}. Likely "
                "causes: its vocabulary has another order than the dictionaries found for it "
                "(--teacher-data), it translates in another direction, or its subword model is "
                "another one."
            )


def _refuse_adaptive_softmax(student: Any) -> None:
    # the built model tells; arguments name a cutoff for models that have none
    if getattr(getattr(student, "decoder", None), "adaptive_softmax", None) is not None:
        raise ValueError(
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


def _kept(dataset: Any, max_positions: Any) -> np.ndarray:
    """Which sentences fairseq's length filter keeps; none of a text to be translated."""
    source, target = dataset.src_sizes, dataset.tgt_sizes
    if target is None:
        return np.zeros(len(source), dtype=bool)
    if max_positions is None:
        return np.ones(len(source), dtype=bool)
    limits = max_positions if isinstance(max_positions, (tuple, list)) else [max_positions] * 2
    return (source <= (limits[0] or math.inf)) & (target <= (limits[1] or math.inf))


def _untaught(dataset: TaughtDataset, which: np.ndarray) -> CacheError:
    return CacheError(
        f"the cache {dataset.cache.folder} has no rows for {which.sum()} sentences of up to "
        f"{dataset.src_sizes[which].max()} source and {dataset.tgt_sizes[which].max()} target "
        "tokens: they were longer than the teacher, or the limits that the cache was made with, "
        "allow. Leave them out with --max-source-positions and --max-target-positions (for "
        "validation data also --skip-invalid-size-inputs-valid-test)."
    )
