"""From fairseq's configuration and a teacher to a cache of its answers on the data."""

import copy
import functools
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from fairseq import tasks, utils
from omegaconf import open_dict

from ..checkpoints import Role
from ..errors import UserError
from .fill import fill, open_writer, summary_lines
from .layout import CacheError, Describe
from .reader import CachedSubset

ROLE = Role(
    "teacher",
    *("--trust-checkpoint", "--teacher-data", "--model-overrides", "--teacher-task"),
    languages="--teacher-langs",
)


class Asked(NamedTuple):
    """What is to be cached, and which part of it by this process.

    Attributes:
        cfg: fairseq's configuration, as ``fairseq-validate --task kd_translation`` makes it: the
            data, the teacher's checkpoints (``--path``), its subsets (``--gen-subset``) and flags.
        folder: the cache to write.
        k: symbols to keep for each target token.
        temperatures: other than 1, at which ``--kd-tail bucket`` will be trained.
        tail_samples: symbols to draw from the others, for ``--kd-tail sample`` at 1, or at the
            one temperature that is named.
        device, dtype: where the teacher runs, and in which precision.
        max_tokens, max_sentences: most of a batch, as fairseq's flags.
        num_shards, shard_id: this process writes every ``num_shards``-th batch.
    """

    cfg: Any
    folder: str
    k: int = 8
    temperatures: Sequence[float] = ()
    tail_samples: int = 0
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    max_tokens: Optional[int] = None
    max_sentences: Optional[int] = None
    num_shards: int = 1
    shard_id: int = 0


def make(asked: Asked) -> List[Dict[str, Any]]:
    """Write one shard of each subset's cache, from where it stopped.

    Returns:
        the manifests of the subsets that are complete now; the others wait for other shards.

    Raises:
        UserError: the data or the teacher cannot be read or do not go together, the folder holds
            another cache, or the teacher gives NaN. Busy: another process writes this shard.
    """
    cfg, task = _setup(asked)
    teacher = task.open_teacher(asked.device, asked.dtype, ROLE)
    limits = utils.resolve_max_positions(teacher.max_positions(), task.max_positions())
    described = teacher.describe()
    made: List[Dict[str, Any]] = []
    for number, part in enumerate(_parts(asked, cfg, task)):
        _read(cfg.task.data, part.load, task)
        writer = open_writer(
            task,
            limits,
            part.cache,
            {
                "subset": part.subset,
                "k": asked.k,
                **_tail(asked),
                **described,
                **part.describe(True),
            },
            max_tokens=asked.max_tokens,
            max_sentences=asked.max_sentences,
            num_shards=asked.num_shards,
            shard_id=asked.shard_id,
        )
        if number == 0:
            task.probe(teacher, part.subset)
        if fill(task, teacher, writer, cfg.dataset.num_workers):
            made.append(writer.manifest())
            lines = summary_lines(made[-1], writer.folder, task.kind.samples[0])
            print("\n".join(lines), flush=True)
        else:
            print(
                f"{writer.folder}: shard {asked.shard_id} of {asked.num_shards} is done; the last "
                "one to finish merges them",
                flush=True,
            )
    return made


def verify(asked: Asked) -> None:
    """Read each subset's cache and its data as a whole, and compare them with the checksums.

    Raises:
        CacheError: something is damaged, or the data is not what the cache was made from.
    """
    for part in _parts(asked, *_setup(asked)):
        cache = CachedSubset(part.cache, part.subset, part.describe, whole=True)
        cache.verify()
        print(f"{cache.folder}: {cache.manifest['rows']} rows, all as written", flush=True)


def _setup(asked: Asked) -> Tuple[Any, Any]:
    """The configuration with the teacher's flags where the task looks for them, and the task."""
    cfg = copy.deepcopy(asked.cfg)
    with open_dict(cfg):
        cfg.task.teacher_checkpoint_path = cfg.common_eval.path
        cfg.task.teacher_overrides = cfg.common_eval.model_overrides
    utils.import_user_module(cfg.common)
    task = _read(cfg.task.data, tasks.setup_task, cfg.task)
    if task.pairs and not (cfg.task.source_lang and cfg.task.target_lang):
        raise CacheError(
            f"a cache is of one pair of languages: name one of --lang-pairs {','.join(task.pairs)} "
            "with --source-lang and --target-lang, and make a cache for each"
        )
    return cfg, task


class _Part(NamedTuple):
    """One subset of one data folder, and where its cache lies."""

    cache: str
    subset: str
    combine: bool  # with train1, train2, ..., as in training
    turn: int  # which of the data folders
    describe: Describe

    def load(self, task: Any) -> None:
        task.load_dataset(self.subset, epoch=self.turn + 1, combine=self.combine)


def _parts(asked: Asked, cfg: Any, task: Any) -> Iterator[_Part]:
    """The subsets of ``--gen-subset``; those of training of every folder, others of the first.

    Raises:
        CacheError: there is not a cache for each data folder.
    """
    caches, folders = utils.split_paths(asked.folder), task.data_folders()
    if len(caches) != len(folders):
        raise CacheError(
            f"--cache: expected a folder for each of the {len(folders)} data folders, in their "
            f"order and with ':' between them; got {len(caches)}"
        )
    for turn, (cache, folder) in enumerate(zip(caches, folders)):
        for subset in cfg.dataset.gen_subset.split(","):
            train = subset == cfg.dataset.train_subset
            combine = train or (subset == "valid" and cfg.dataset.combine_valid_subsets)
            if train or turn == 0:  # fairseq reads the others of the first folder alone
                describe = functools.partial(task.describe_data, folder, subset, combine)
                yield _Part(cache, subset, combine, turn, describe)


def _tail(asked: Asked) -> Dict[str, Any]:
    """What a header says of the symbols that are not among the k."""
    if not asked.tail_samples:  # as caches said before there were draws
        return {"temperatures": list(asked.temperatures)}
    return {
        "temperatures": list(asked.temperatures) or [1.0],
        "tail_samples": asked.tail_samples,
    }


def _read(data: str, work: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """What fairseq raises when the data is not what it expects is a bare Exception or worse."""
    try:
        return work(*arguments, **more)
    except UserError:
        raise
    except Exception as error:
        raise CacheError(f"{data}: the data cannot be read: {error or repr(error)}") from error
