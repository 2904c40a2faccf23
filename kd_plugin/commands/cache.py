"""``fairseq-kd-cache``: run the teacher once and keep its likeliest symbols on disk."""

import argparse
import sys
from typing import List, Optional

from fairseq import options as fairseq_options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks import TASK_REGISTRY

from .. import cache, decoding
from ..cache import CacheError
from ..checkpoints import TRANSLATION, parse_overrides
from ..errors import Faults
from ..tasks.distillation import Distillation
from .arguments import Help, add_trust, flag_of, run_like_fairseq, shard_of_process

PROG = "fairseq-kd-cache"


def make_parser() -> argparse.ArgumentParser:
    parser = fairseq_options.get_validation_parser(default_task=TRANSLATION.taught)
    parser.prog, parser.description, parser.formatter_class = PROG, __doc__, Help
    parser.usage = (
        "%(prog)s DATA --path TEACHER[:MORE] --cache DIR [options]\n"
        "       %(prog)s DATA --cache DIR --verify"
    )
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
        "token each; naming 1 too stores its tail mass exactly)",
    )
    group.add_argument(
        "--tail-samples",
        type=int,
        metavar="S",
        help="also draw S symbols from the others, for --kd-tail sample (2 bytes per token each, "
        "4 above 65,536 symbols), at temperature 1 or the one of --temperatures",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="write nothing: read the cache and its data as a whole, and compare them with their "
        "checksums (training compares what it reads)",
    )
    add_trust(group.add_argument, dest="teacher_trust_checkpoint")  # the task's, as elsewhere
    return parser


def main(arguments: Optional[List[str]] = None) -> int:
    return run_like_fairseq(PROG, make_parser, run, arguments)


def run(options: argparse.Namespace) -> None:
    _refuse(options)
    cfg = convert_namespace_to_omegaconf(options)
    if options.verify:
        cache.verify(cache.Asked(cfg=cfg, folder=options.cache))
        return
    shard = shard_of_process(options)
    device, dtype = decoding.placement(cfg, shard.device_id)
    max_tokens, max_sentences = decoding.batch_limits(cfg)
    cache.make(
        cache.Asked(
            cfg=cfg,
            folder=options.cache,
            k=options.top_k,
            temperatures=_temperatures(options.temperatures),
            tail_samples=options.tail_samples or 0,
            device=device,
            dtype=dtype,
            max_tokens=max_tokens,
            max_sentences=max_sentences,
            num_shards=shard.num_shards,
            shard_id=shard.shard_id,
        )
    )


def _refuse(options: argparse.Namespace) -> None:
    """Flags that fairseq's parsers bring along and that would mean nothing, or something else."""
    instead = {
        "teacher_checkpoint_path": "--path",
        "teacher_overrides": "--model-overrides",
        "teacher_cache": "--cache",
    }
    faults = Faults()
    for name, flag in instead.items():
        faults.check(
            getattr(options, name, None) in (None, "{}"),
            f"instead of {flag_of(name)} give {flag}",
        )
    faults.check(
        options.path or options.verify,
        "--path: expected the teacher's checkpoint, or several with ':' between",
    )
    faults.check(
        issubclass(TASK_REGISTRY.get(options.task, object), Distillation),
        f"--task must be {TRANSLATION.taught}, or another task with a teacher, whatever the "
        "teacher was trained with",
    )
    faults.check(
        not getattr(options, "amp", False), "--amp is for training: give --fp16, --bf16 or neither"
    )
    with faults.collecting():
        parse_overrides(options.model_overrides, "--model-overrides")
    temperatures = []
    with faults.collecting():
        temperatures = _temperatures(options.temperatures)
    if options.tail_samples is not None:
        faults.check(
            1 <= options.tail_samples <= 1 << 16,
            f"--tail-samples must be from 1 to 65536, got {options.tail_samples}",
        )
        faults.check(
            len(temperatures) <= 1,
            "--tail-samples are drawn at one temperature, and --temperatures names "
            f"{len(temperatures)}",
        )
    faults.raise_if_any(CacheError)


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
