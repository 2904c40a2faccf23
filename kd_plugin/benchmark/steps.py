"""What distillation costs on this machine: of the objective alone, and of whole training steps.

All that is compared is timed in turns, round after round, so that a machine that slows down slows
all of them down.
"""

import gc
import resource
import sys
import tempfile
import time
from copy import deepcopy
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from fairseq import utils
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    label_smoothed_nll_loss,
)
from fairseq.tasks.translation import TranslationTask
from fairseq.trainer import Trainer
from omegaconf import open_dict
from torch import Tensor
from tqdm import tqdm

from ..cache import rows_of_batch
from ..objective.answer import Member, RunningAnswer
from ..objective.chunks import Settings, distillation_objective
from ..objective.divergences import NAMES, divergence
from ..tasks.translation import RUN_TEACHER, KDTranslationConfig, KDTranslationTask
from ..timing import Spread

STOCK = "label_smoothed_cross_entropy"


class Timings:
    """Seconds of several works, one of each per round."""

    def __init__(self, works: Dict[str, Callable[[], Any]], rounds: int, progress: str) -> None:
        self.seconds: Dict[str, List[float]] = {name: [] for name in works}
        # the first round warms up caches and allocators
        for measured in tqdm([False] + [True] * rounds, desc=progress, unit="round"):
            for name, work in works.items():
                start = _now()
                work()
                if measured:
                    self.seconds[name].append(_now() - start)

    def spread(self, name: str) -> Spread:
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, *to: str) -> Spread:
        """Of the seconds to the sum of the others', round by round."""
        sums = [sum(parts) for parts in zip(*(self.seconds[other] for other in to))]
        return Spread.of([x / y for x, y in zip(self.seconds[name], sums)])


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# The objective alone


def objective_costs(
    rows: int,
    vocabulary: int,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
    every_divergence: bool = False,
) -> Dict[str, Any]:
    """Forward and backward of the objective, the teacher's logits given, metrics off.

    Against fairseq's label-smoothed cross-entropy by itself, and against the usual dense KL on top
    of that. Extra memory is the most that is held at one time beyond the student's logits, their
    gradient and the teacher's logits, as a share of one logits tensor.
    """
    generator = torch.Generator().manual_seed(1)
    shape = (rows, vocabulary)
    student = (3 * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_()
    teacher = (3 * torch.randn(shape, generator=generator)).to(device, dtype)
    target = torch.randint(4, vocabulary, (rows,), generator=generator).to(device)
    every_row = torch.arange(rows, device=device)
    signal = RunningAnswer([Member("teacher", lambda some: teacher[some])])

    def stock() -> Tensor:
        log_q = torch.log_softmax(student, dim=-1, dtype=torch.float32)
        return label_smoothed_nll_loss(log_q, target, 0.1, ignore_index=1)[0]

    def dense(t: float) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            log_q = torch.log_softmax(student / t, dim=-1, dtype=torch.float32)
            p = torch.softmax(teacher / t, dim=-1, dtype=torch.float32)
            kl = F.kl_div(log_q, p, reduction="none").sum()
            return 0.5 * stock() + 0.5 * t * t * kl

        return loss

    def ours(**chosen: Any) -> Callable[[], Tensor]:
        settings = Settings(label_smoothing=0.1, **chosen)
        return lambda: distillation_objective(student, target, every_row, signal, settings).loss

    losses = {
        STOCK: stock,
        "dense KL, T = 1": dense(1.0),
        "dense KL, T = 1.7": dense(1.7),
        "forward-kl, T = 1": ours(),
        "forward-kl, T = 1.7": ours(temperature=1.7),
    }
    if every_divergence:
        losses.update({name: ours(divergence=divergence(name)) for name in NAMES[1:]})
        losses["forward-kl, top-k 8"] = ours(top_k=8)

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def work() -> None:
            student.grad = None
            loss().backward()

        return work

    works = {name: step(loss) for name, loss in losses.items()}
    timings = Timings(works, repeats, f"objective, V = {vocabulary}")
    one_tensor = student.numel() * student.element_size()
    costs = {}
    for name, work in works.items():
        costs[name] = {
            "seconds": timings.spread(name)._asdict(),
            "to_stock": timings.ratio(name, STOCK)._asdict(),
            # the gradient is what is left, and what every training has
            "extra_memory": max(_peak_allocated(work, device) - one_tensor, 0) / one_tensor,
        }
        usual = "dense KL, T = 1.7" if name.endswith("1.7") else "dense KL, T = 1"
        costs[name]["to_dense"] = timings.ratio(name, usual)._asdict()
    return {"rows": rows, "vocabulary": vocabulary, "costs": costs}


def _peak_allocated(work: Callable[[], None], device: torch.device) -> int:
    """The most bytes that the work's tensors hold at one time, of those it allocates itself."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    # The first work() leaves its gradient, which the second one frees: as much as it allocates
    freed = 0
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    if changes and changes[0] < 0:
        freed = -changes[0]
    return int(max(np.cumsum(changes), default=0)) + freed


# Whole training steps

STEP, TEACHER = "plain step", "teacher forward"
DISTILLED, CACHED = "distilled step", "cached step"
VALIDATION, CACHING = "teacher's validation", "caching"
# What is to be compared with what, where both were timed
_RATIOS = (
    (DISTILLED, (STEP,)),
    (DISTILLED, (STEP, TEACHER)),
    (CACHED, (STEP,)),
    (CACHING, (VALIDATION,)),
)


class Steps:
    """Training steps of one student on the same batches, plain and with what teaches it.

    Args:
        cfg: fairseq's configuration of a distilling training, with a teacher to run, a cache, or
            both.
        batches: how many of its batches to take, from the shortest to the longest sentences.
    """

    def __init__(self, cfg: Any, batches: int) -> None:
        with open_dict(cfg):
            cfg.distributed_training.distributed_world_size = 1
        self.cfg, self.batches = cfg, batches

    def works(self, names: Iterable[str] = ()) -> Dict[str, Callable[[], None]]:
        """Each goes once over all batches, fetching them included; by default all there are."""
        makers: Dict[str, Callable[[], Callable[[], None]]] = {
            STEP: lambda: self._steps(self._trainer(with_teacher=None))
        }
        if self.cfg.task.teacher_checkpoint_path:
            makers[TEACHER] = self._teacher_forward
            makers[DISTILLED] = lambda: self._steps(self._trainer("run"))
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
        tokens = int(sum(dataset.tgt_sizes[batch].sum() for batch in batches))
        costs: Dict[str, Any] = {}
        for name in timings.seconds:
            spread = timings.spread(name)
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
        return _peak_of_process()

    def _trainer(self, with_teacher: Optional[str], temperature: Optional[float] = None) -> Any:
        """A trainer, its data, and the batches: without a teacher, with a run or a cached one."""
        cfg = deepcopy(self.cfg)
        none = KDTranslationConfig()
        with open_dict(cfg):
            cfg.task.restore_file = ""  # no checkpoint is opened
            if with_teacher == "run":
                cfg.task.teacher_cache = None
                if not cfg.criterion.kd_top_k:
                    cfg.criterion.kd_tail = None  # the cache's
            else:
                for name in RUN_TEACHER:
                    setattr(cfg.task, name, getattr(none, name))
            if temperature is not None:
                cfg.criterion.kd_temperature = temperature
        utils.set_torch_seed(cfg.common.seed)
        task = (KDTranslationTask if with_teacher else TranslationTask).setup_task(cfg.task)
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
        criterion, cache = trainer.get_criterion(), trainer.task.cache
        if criterion.temperature.steps or self.cfg.criterion.kd_divergence == "logit-mse":
            return []
        return [t for t in sorted({1.0, *cache.temperatures} - {criterion.temperature(None)})]

    def _teacher_forward(self) -> Callable[[], None]:
        """As fairseq runs a model that it does not train: to all of its logits."""
        trainer, dataset, batches = self._trainer("run")
        inputs = [
            _on_device(trainer, dataset.collater([dataset[i] for i in ids]))["net_input"]
            for ids in batches
        ]

        def work() -> None:
            with torch.no_grad():
                for net_input in inputs:
                    for member in trainer.task.teacher.members:
                        member.model(*member.inputs(net_input))

        return work

    def _validation(self) -> Callable[[], None]:
        """What fairseq-validate does with the teacher."""
        trainer, dataset, batches = self._trainer("run")
        stock = TranslationTask(self.cfg.task, trainer.task.src_dict, trainer.task.tgt_dict)
        criterion = _stock_criterion(stock, self.cfg)
        criterion.eval()

        def work() -> None:
            for batch in batches:
                sample = _on_device(trainer, dataset.collater([dataset[i] for i in batch]))
                for member in trainer.task.teacher.members:
                    names = ("src_tokens", "src_lengths", "prev_output_tokens")
                    inputs = dict(zip(names, member.inputs(sample["net_input"])))
                    stock.valid_step({**sample, "net_input": inputs}, member.model, criterion)

        return work

    def _caching(self) -> Callable[[], None]:
        """What fairseq-kd-cache does, with its defaults."""
        trainer, dataset, batches = self._trainer("run")
        vocabulary = len(trainer.task.tgt_dict)
        header = {"vocabulary": vocabulary, "k": min(8, vocabulary), "temperatures": []}

        def work() -> None:
            with tempfile.TemporaryFile() as file:
                for batch in batches:
                    sample = dataset.collater([dataset[i] for i in batch])
                    ids = np.asarray(batch)
                    teacher = trainer.task.teacher
                    rows = rows_of_batch(trainer.task, teacher, sample, ids, header)
                    for array in rows.values():
                        file.write(array.tobytes())

        return work


def _stock_criterion(task: Any, cfg: Any) -> LabelSmoothedCrossEntropyCriterion:
    return LabelSmoothedCrossEntropyCriterion(
        task,
        cfg.criterion.sentence_avg,
        cfg.criterion.label_smoothing,
        cfg.criterion.ignore_prefix_size,
        cfg.criterion.report_accuracy,
    )


def _on_device(trainer: Any, batch: Dict[str, Any]) -> Dict[str, Any]:
    return utils.move_to_cuda(batch) if trainer.cuda else batch


def _peak_of_process() -> int:
    try:
        # Linux's getrusage also counts what the process was forked from
        (line,) = [x for x in open("/proc/self/status") if x.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# What is shown


def objective_table(objective: Dict[str, Any]) -> str:
    """What `objective_costs` measured: medians, and the quartiles of the rounds behind them."""
    return _table(
        "objective, both ways, {rows} rows, V = {vocabulary}".format(**objective),
        ("seconds", "to stock", "to dense KL", "extra memory"),
        [
            (
                name,
                _shown(cost["seconds"]),
                _shown(cost["to_stock"]),
                _shown(cost["to_dense"]),
                f"{cost['extra_memory']:.1%}",
            )
            for name, cost in objective["costs"].items()
        ],
    )


def step_tables(steps: Dict[str, Any]) -> str:
    """What `Steps.costs` measured, likewise."""
    costs = [
        (name, _shown(cost["seconds"]), f"{cost['tokens_per_second']:.0f}")
        for name, cost in steps["costs"].items()
    ]
    title = "steps, {batches} batches, {target_tokens} target tokens".format(**steps)
    ratios = [(name, _shown(ratio)) for name, ratio in steps["ratios"].items()]
    return "\n".join(
        [
            _table(title, ("seconds", "tokens/s"), costs),
            _table("", ("seconds to seconds",), ratios),
        ]
    )


def memory_table(peaks: Dict[str, int]) -> str:
    """What `Steps.peak_memory` measured, in bytes."""
    rows = [(name, f"{peak / 1000000.0:.0f} MB") for name, peak in peaks.items()]
    return _table("peak memory, each in a process of its own", ("",), rows)


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [("", *header), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [title] if title else []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text) + "\n"


def _shown(spread: Dict[str, float]) -> str:
    return "{median:.3f} ({low:.3f}-{high:.3f})".format(**spread)
