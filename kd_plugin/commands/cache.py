"""``fairseq-kd-cache``: run the teacher once and keep its likeliest symbols on disk."""

import argparse
import sys
from typing import Any, Callable, List, Optional

from fairseq import options as fairseq_options
from fairseq import tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import open_dict

from ..cache import CacheError, fill, summary_lines
from ..checkpoints import Role, parse_overrides
from ..decoding import placement
from ..errors import UserError
from ..files import FileError
from .arguments import Help, add_trust, run_like_fairseq

PROG = "fairseq-kd-cache"
ROLE = Role("teacher", "--trust-checkpoint", "--teacher-data", "--model-overrides")


def make_parser() -> argparse.ArgumentParser:
    parser = fairseq_options.get_validation_parser(default_task="kd_translation")
    parser.prog, parser.description, parser.formatter_class = PROG, __doc__, Help
    parser.usage = "%(prog)s DATA --path TEACHER[:MORE] --cache DIR [options]"
    parser.set_defaults(gen_subset="train,valid")
    group = parser.add_argument_group("teacher cache")
    group.add_argument("--cache", required=True, metavar="DIR", help="folder to write")
    group.add_argument(
        "--top-k", type=int, default=8, metavar="K", help="symbols to keep for each target token"
    )
    group.add_argument(
        "--temperatures",
        default="",
        metavar="T[,T...]",
        help="temperatures other than 1 at which --kd-tail bucket will be trained (2 bytes per "
        "token each; 1 among them keeps even its smallest rests exactly)",
    )
    add_trust(group.add_argument, dest="teacher_trust_checkpoint")  # the task's, as elsewhere
    return parser


def main(arguments: Optional[List[str]] = None) -> int:
    return run_like_fairseq(PROG, make_parser, run, arguments)


def run(options: argparse.Namespace) -> None:
    temperatures = _temperatures(options.temperatures)
    _refuse(options)
    cfg = convert_namespace_to_omegaconf(options)
    with open_dict(cfg):
        cfg.task.teacher_checkpoint_path = cfg.common_eval.path
        cfg.task.teacher_overrides = cfg.common_eval.model_overrides
    utils.import_user_module(cfg.common)
    task = _read(cfg.task.data, tasks.setup_task, cfg.task)

    device, dtype = placement(cfg, cfg.distributed_training.device_id)
    teacher = task.open_teacher(device, dtype, ROLE)

    max_tokens, max_sentences = cfg.dataset.max_tokens, cfg.dataset.batch_size
    if max_tokens is None and max_sentences is None:
        max_tokens = 12000  # as fairseq-generate
    about_teacher = teacher.describe()
    for number, subset in enumerate(cfg.dataset.gen_subset.split(",")):
        # as training reads it: together with train1, train2, ...
        combine = subset == cfg.dataset.train_subset or (
            subset == "valid" and cfg.dataset.combine_valid_subsets
        )
        _read(cfg.task.data, task.load_dataset, subset, combine=combine)
        if number == 0:
            task.probe(teacher, subset)
        complete, writer = fill(
            task,
            teacher,
            subset,
            options.cache,
            options.top_k,
            temperatures,
            about_teacher,
            max_tokens,
            max_sentences,
            cfg.dataset.num_workers,
            cfg.dataset.num_shards,
            cfg.dataset.shard_id,
            combine,
        )
        if complete:
            print("\n".join(summary_lines(writer.manifest(), writer.folder)), flush=True)
        else:
            print(
                f"{writer.folder}: shard {writer.shards.shard_id} of {writer.shards.num_shards} "
                "is done; the last one to end merges them",
                flush=True,
            )


def _refuse(options: argparse.Namespace) -> None:
    """Flags that fairseq's parsers bring along and that would mean nothing, or something else."""
    instead = {
        "teacher_checkpoint_path": "--path",
        "teacher_overrides": "--model-overrides",
        "teacher_cache": "--cache",
    }
    faults = [
        f"instead of --{name.replace('_', '-')} give {flag}"
        for name, flag in instead.items()
        if getattr(options, name, None) not in (None, "{}")
    ]
    if not options.path:
        faults.append("--path: expected the teacher's checkpoint, or several with ':' between")
    if options.task != "kd_translation":
        faults.append("--task must be kd_translation, whatever the teacher was trained with")
    if getattr(options, "amp", False):
        faults.append("--amp is for training: take --fp16, --bf16 or neither")
    try:
        parse_overrides(options.model_overrides, "--model-overrides")
    except UserError as error:
        faults.append(str(error))
    if faults:
        raise CacheError("; ".join(faults))


def _read(data: str, work: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """What fairseq raises when the data is not what it expects is a bare Exception or worse."""
    try:
        return work(*arguments, **more)
    except FileError:
        raise
    except Exception as error:
        raise CacheError(f"{data}: the data cannot be read: {error or repr(error)}") from error


def _temperatures(text: str) -> List[float]:
    try:
        found = sorted({float(part) for part in text.split(",") if part})
        if all(0 < t < float("inf") for t in found):
            return found
    except ValueError:
        pass
    raise CacheError(f"--temperatures needs numbers above 0 as in 1,2; got {text!r}")


if __name__ == "__main__":
    sys.exit(main())
