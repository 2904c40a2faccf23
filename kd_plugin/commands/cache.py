"""``fairseq-kd-cache``: run the teacher once and keep its likeliest symbols on disk."""

import argparse
import sys
from typing import Any, List, Optional

import torch
from fairseq import options as fairseq_options
from fairseq import tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import open_dict

from ..cache import CacheError, fill, summary_lines
from ..checkpoint import CheckpointError
from ..teacher import TeacherError
from ..vocabulary import VocabularyError
from .arguments import Help, accept_user_dir, parse_like_fairseq

PROG = "fairseq-kd-cache"


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
        default="1",
        metavar="T[,T...]",
        help="temperatures at which --kd-tail bucket will be trained with; 1 always is among them",
    )
    return parser


def main(arguments: Optional[List[str]] = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    accept_user_dir(arguments)
    options = parse_like_fairseq(make_parser(), arguments)
    try:
        run(options)
    except (TeacherError, CacheError, CheckpointError, VocabularyError, RuntimeError) as error:
        print("{}: {}".format(PROG, error), file=sys.stderr)
        return 1
    except FileNotFoundError as error:
        print("{}: {}".format(PROG, error), file=sys.stderr)
        return 1
    except OSError as error:
        print(
            "{}: {}. What is written is kept: run the same command again to go on.".format(
                PROG, error
            ),
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("{}: run the same command again to go on".format(PROG), file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    temperatures = _temperatures(options.temperatures)
    if not options.path:
        raise CacheError("--path: expected the teacher's checkpoint, or several with ':' between")
    cfg = convert_namespace_to_omegaconf(options)
    with open_dict(cfg):
        cfg.task.teacher_checkpoint_path = cfg.common_eval.path
        cfg.task.teacher_overrides = cfg.common_eval.model_overrides
    utils.import_user_module(cfg.common)
    task: Any = tasks.setup_task(cfg.task)

    cuda = torch.cuda.is_available() and not cfg.common.cpu
    dtype = torch.float32
    if cfg.common.fp16 or cfg.common.bf16:
        dtype = torch.float16 if cfg.common.fp16 else torch.bfloat16
    if dtype == torch.float16 and not cuda:
        raise TeacherError("--fp16 needs a GPU; on a CPU take --bf16 or neither")
    teacher = task.open_teacher(torch.device("cuda" if cuda else "cpu"), dtype)

    max_tokens, max_sentences = cfg.dataset.max_tokens, cfg.dataset.batch_size
    if max_tokens is None and max_sentences is None:
        max_tokens = 12000  # as fairseq-generate
    for subset in cfg.dataset.gen_subset.split(","):
        # as training reads it: together with train1, train2, ...
        combine = subset == cfg.dataset.train_subset
        task.load_dataset(subset, combine=combine)
        if subset == cfg.dataset.train_subset:
            task.probe(teacher, subset)
        complete, writer = fill(
            task,
            teacher,
            subset,
            options.cache,
            options.top_k,
            temperatures,
            teacher.describe(),
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
                "{}: shard {} of {} is done; the last one to end merges them".format(
                    writer.folder, writer.shard_id, writer.num_shards
                ),
                flush=True,
            )


def _temperatures(text: str) -> List[float]:
    try:
        found = sorted({float(part) for part in text.split(",")})
        if all(0 < t < float("inf") for t in found):
            return found
    except ValueError:
        pass
    raise CacheError("--temperatures needs numbers above 0 as in 1,2; got {!r}".format(text))


if __name__ == "__main__":
    sys.exit(main())
