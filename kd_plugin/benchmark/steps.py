"""What whole training steps cost, plain and with what teaches the student."""

import contextlib
import tempfile
from argparse import Namespace
from copy import deepcopy
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from fairseq import utils
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.tasks import TASK_REGISTRY
from fairseq.trainer import Trainer
from omegaconf import open_dict

from ..cache import rows_of_batch
from ..errors import UserError
from ..flags import (
    BEYOND_OUTPUTS,
    RUN_TEACHER,
    KDLabelSmoothedCrossEntropyCriterionConfig,
    TeacherConfig,
)
from ..plan import choice_value
from ..timing import Timings, peak_memory

STEP, TEACHER = "plain step", "teacher forward"
DISTILLED, CACHED = "distilled step", "cached step"
OUTPUTS = "the same, outputs alone"
VALIDATION, CACHING = "teacher's validation", "caching"
_CRITERION = KDLabelSmoothedCrossEntropyCriterionConfig()
# What is left out, by what teaches. A cache has outputs at references alone, enough for ranking
_LEFT_OUT: Dict[Optional[str], Sequence[str]] = {
    "outputs": BEYOND_OUTPUTS,
    "cached": [name for name in BEYOND_OUTPUTS if not name.startswith("kd_ranking")],
}
# What is to be compared with what, where both were timed
_RATIOS = (
    (DISTILLED, (STEP,)),
    (DISTILLED, (STEP, TEACHER)),
    (DISTILLED, (OUTPUTS,)),
    (CACHED, (STEP,)),
    (CACHING, (VALIDATION,)),
)


class Steps:
    """Training steps of one student on the same batches, plain and with what teaches it.

    Args:
        cfg: fairseq's configuration of a distillation run, of any task with a teacher, with one
            to run, a cache, or both.
        batches: how many of its batches to take, from the shortest to the longest sentences.

    Raises:
        UserError: by all methods, where fairseq cannot set up such a training.
    """

    def __init__(self, cfg: Any, batches: int) -> None:
        with open_dict(cfg):
            cfg.distributed_training.distributed_world_size = 1
        self.cfg, self.batches = cfg, batches
        self.taught: Any = TASK_REGISTRY[cfg.task._name]
        self.stock: Any = TASK_REGISTRY[self.taught.kind.task]

    def works(self, names: Iterable[str] = ()) -> Dict[str, Callable[[], None]]:
        """Each goes once over all batches, fetching them included; by default all there are."""
        makers: Dict[str, Callable[[], Callable[[], None]]] = {
            STEP: lambda: self._steps(self._trainer(with_teacher=None))
        }
        if self.cfg.task.teacher_checkpoint_path:
            makers[TEACHER] = self._teacher_forward
            makers[DISTILLED] = lambda: self._steps(self._trainer("run"))
            if self._looks_beyond_outputs():
                makers[OUTPUTS] = lambda: self._steps(self._trainer("outputs"))
            makers[VALIDATION] = self._validation
            makers[CACHING] = self._caching
        if self.cfg.task.teacher_cache:
            makers[CACHED] = lambda: self._steps(self._trainer("cached"))
            for t in self._other_temperatures():
                makers[f"{CACHED}, T = {t:g}"] = self._cached_at(t)
        return {name: makers[name]() for name in (names or makers)}

    def costs(self, repeats: int) -> Dict[str, Any]:
        """Seconds of one round over the batches, and how they compare."""
        timings = Timings(self.works(), repeats, "steps")
        _, dataset, batches = self._trainer(with_teacher=None)
        tokens = sum(dataset.collater([dataset[i] for i in ids])["ntokens"] for ids in batches)
        costs: Dict[str, Any] = {}
        for name in timings.seconds:
            spread = timings.quartiles(name)
            costs[name] = {
                "seconds": spread._asdict(),
                "tokens_per_second": tokens / spread.median,
            }
        ratios = {
            f"{name} / {' + '.join(to)}": timings.ratio(name, *to)._asdict()
            for work in costs
            for name, to in ((work, to) for start, to in _RATIOS if work.startswith(start))
            if set(to) <= set(costs)
        }
        return {"batches": len(batches), "target_tokens": tokens, "costs": costs, "ratios": ratios}

    def peak_memory(self, name: str) -> int:
        """Peak bytes of this process (on a GPU: of what it allocates) when it does only this."""
        (work,) = self.works([name]).values()
        if torch.cuda.is_available() and not self.cfg.common.cpu:
            torch.cuda.reset_peak_memory_stats()
            work()
            return torch.cuda.max_memory_allocated()
        work()
        return peak_memory()

    def _trainer(self, with_teacher: Optional[str], temperature: Optional[float] = None) -> Any:
        """A trainer, its data, and the batches.

        Args:
            with_teacher: None, "cached", "run", or "outputs": run, and nothing but its
                distributions learnt.
        """
        cfg = deepcopy(self.cfg)
        none = TeacherConfig()
        # as fairseq keeps it for tasks without a dataclass, it is not copied along
        of_task = deepcopy(cfg.task) if isinstance(cfg.task, Namespace) else cfg.task
        with open_dict(cfg):
            of_task.restore_file = ""  # no checkpoint is opened
            for name in _LEFT_OUT.get(with_teacher, ()):
                setattr(cfg.criterion, name, getattr(_CRITERION, name))
            if with_teacher in ("run", "outputs"):
                of_task.teacher_cache = None
                if not cfg.criterion.kd_top_k:
                    cfg.criterion.kd_tail = None  # the cache's
            else:
                for name in RUN_TEACHER:
                    setattr(of_task, name, getattr(none, name))
            if temperature is not None:
                cfg.criterion.kd_temperature = temperature
        utils.set_torch_seed(cfg.common.seed)
        with _refusing_as_fairseq():
            task = (self.taught if with_teacher else self.stock).setup_task(of_task)
            model = task.build_model(cfg.model)
        if with_teacher:
            criterion = task.build_criterion(cfg.criterion)
        else:
            criterion = _stock_criterion(task, cfg)
        trainer = Trainer(cfg, task, model, criterion)
        iterator = trainer.get_train_iterator(epoch=1)
        trainer.lr_step_begin_epoch(1)
        task.begin_epoch(1, trainer.get_model())
        every = iterator.frozen_batches
        chosen = np.linspace(0, len(every) - 1, min(self.batches, len(every))).astype(int)
        return trainer, task.dataset(cfg.dataset.train_subset), [every[i] for i in chosen]

    def _looks_beyond_outputs(self) -> bool:
        both = (self.cfg.criterion, _CRITERION)
        values = ([choice_value(getattr(one, name)) for one in both] for name in BEYOND_OUTPUTS)
        return any(own != usual for own, usual in values)

    @staticmethod
    def _steps(setup: Any) -> Callable[[], None]:
        trainer, dataset, batches = setup

        def work() -> None:
            for batch in batches:
                trainer.train_step([dataset.collater([dataset[i] for i in batch])])

        return work

    def _cached_at(self, t: float) -> Callable[[], Callable[[], None]]:
        return lambda: self._steps(self._trainer("cached", t))

    def _other_temperatures(self) -> List[float]:
        """At which the cache can be trained from as the flags say, beside their own."""
        trainer, _, _ = self._trainer("cached")
        plan, cache = trainer.get_criterion().plan, trainer.task.source.cache
        if plan.temperature.steps or plan.divergence.of_logits or plan.tail == "sample":
            return []
        return [t for t in sorted({1.0, *cache.temperatures} - {plan.temperature(None)})]

    def _teacher_forward(self) -> Callable[[], None]:
        """As fairseq runs a model that it does not train: to all of its logits."""
        trainer, dataset, batches = self._trainer("run")
        asked = [one for ids in batches for one in _asked(trainer, dataset, ids)]

        def work() -> None:
            with torch.no_grad():
                for teacher, batch in asked:
                    for member in teacher.members:
                        member.model(**member.inputs(batch))

        return work

    def _validation(self) -> Callable[[], None]:
        """What fairseq-validate does with the teacher."""
        trainer, dataset, batches = self._trainer("run")
        pad = trainer.task.target_dictionary.pad()
        stock = self.stock.setup_task(deepcopy(self.cfg.task))
        criterion = _stock_criterion(stock, self.cfg)
        criterion.eval()

        def work() -> None:
            for batch in batches:
                for teacher, sample in _asked(trainer, dataset, batch):
                    for member in teacher.members:
                        inputs = member.inputs(sample)
                        # tags before the target are no words to predict
                        padding = (member.view.longer[1], 0)
                        target = F.pad(sample["target"], padding, value=pad)
                        own = {**sample, "net_input": inputs, "target": target}
                        stock.valid_step(own, member.model, criterion)

        return work

    def _caching(self) -> Callable[[], None]:
        """What fairseq-kd-cache does, with its defaults."""
        trainer, dataset, batches = self._trainer("run")
        vocabulary = len(trainer.task.target_dictionary)
        header = {"vocabulary": vocabulary, "k": min(8, vocabulary), "temperatures": []}

        def work() -> None:
            with tempfile.TemporaryFile() as file:
                asked = (one for batch in batches for one in _asked(trainer, dataset, batch))
                for teacher, sample in asked:
                    ids = np.arange(len(sample["target"]))
                    sample = {**sample, "id": torch.from_numpy(ids)}
                    rows = rows_of_batch(trainer.task, teacher, sample, ids, header=header)
                    for array in rows.values():
                        file.write(array.tobytes())

        return work


@contextlib.contextmanager
def _refusing_as_fairseq() -> Iterator[None]:
    """Flags and data that fairseq refuses, by an assertion or an error of no special kind.

    Raises:
        UserError: instead of these errors; others, which are mistakes of ours, pass.
    """
    try:
        yield
    except Exception as error:
        if type(error) not in (Exception, ValueError, AssertionError, NotImplementedError):
            raise
        raise UserError(
            f"fairseq cannot set up this training: {str(error) or repr(error)}"
        ) from error


def _stock_criterion(task: Any, cfg: Any) -> LabelSmoothedCrossEntropyCriterion:
    return LabelSmoothedCrossEntropyCriterion(
        task,
        cfg.criterion.sentence_avg,
        cfg.criterion.label_smoothing,
        cfg.criterion.ignore_prefix_size,
        cfg.criterion.report_accuracy,
    )


def _asked(trainer: Any, dataset: Any, ids: Sequence[int]) -> Iterator[Any]:
    """The teachers that are run on a batch, each with the sentences that it is asked about."""
    batch = _on_device(trainer, dataset.collater([dataset[i] for i in ids]))
    return trainer.task.source.asked(batch)


def _on_device(trainer: Any, batch: Dict[str, Any]) -> Dict[str, Any]:
    return utils.move_to_cuda(batch) if trainer.cuda else batch
