"""``fairseq-kd-benchmark``: what distillation costs on this machine, with your teacher and data.

Give it the arguments of a distilling fairseq-train: it times some of that training's steps, plain
and distilled, and the teacher's forward pass. Without any it times the objective alone. With
--preset it times translations by students that nobody has trained yet.
"""

import argparse
import logging
import os
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from fairseq import options as fairseq_options
from fairseq.data import Dictionary
from fairseq.dataclass.configs import OptimizationConfig
from fairseq.dataclass.utils import convert_namespace_to_omegaconf, gen_parser_from_dataclass
from fairseq.tasks import TASK_REGISTRY

from .. import benchmark
from ..checkpoints import DTYPES, TRANSLATION
from ..errors import UserError
from ..flags import CRITERION, KDLabelSmoothedCrossEntropyCriterionConfig
from ..tasks.distillation import Distillation
from ..tasks.translation import KDTranslationConfig
from .arguments import Help, exit_code, import_user_dir, parse_like_fairseq

PROG = "fairseq-kd-benchmark"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage="%(prog)s [--output FILE] [options] [the arguments of a distilling fairseq-train]",
        description=__doc__,
        formatter_class=Help,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this and stop")
    parser.add_argument("--repeats", type=int, default=9, help="how many rounds to measure")
    parser.add_argument("--output", metavar="FILE", help="write all figures there, as JSON")
    steps = parser.add_argument_group("steps")
    steps.add_argument(
        "--batches", type=int, default=4, help="batches of a round, from shortest to longest"
    )
    steps.add_argument("--peak-memory-of", help=argparse.SUPPRESS)
    objective = parser.add_argument_group("objective")
    objective.add_argument(
        "--rows", type=int, default=4096, help="target tokens of a batch (0: leave this part out)"
    )
    objective.add_argument(
        "--vocabularies", type=_sizes, default="8000,32000", help="vocabulary sizes to time"
    )
    objective.add_argument(
        "--objective-dtype", choices=DTYPES, default="fp32", help="precision of the logits"
    )
    objective.add_argument(
        "--every-divergence",
        action="store_true",
        help="also time the other divergences and top-k 8",
    )
    students = parser.add_argument_group("students").add_argument
    students(
        "--preset",
        nargs="+",
        metavar="FILE",
        help="files with a student's flags of fairseq-train, as recipes/presets has them: time "
        "translations by each, in int8 with CTranslate2 and random weights, with each of the "
        "--vocabularies; and nothing else",
    )
    students(
        "--sentence-length",
        type=int,
        default=25,
        metavar="N",
        help="subwords of each of their sources and translations",
    )
    students(
        "--map-leaves",
        type=int,
        metavar="N",
        help="time them also with a vocabulary map that leaves N target symbols of each batch",
    )
    return parser


def _sizes(text: str) -> List[int]:
    sizes = [int(size) for size in text.split(",") if size.isdigit()]
    if len(sizes) != text.count(",") + 1 or min(sizes) < 2:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers above 1 as in 8000,32000; got {text!r}"
        )
    return sizes


def main(arguments: Optional[List[str]] = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    return exit_code(PROG, lambda: run(arguments), resumable=False)


def run(arguments: List[str]) -> None:
    parser = make_parser()
    options, training = parser.parse_known_args(arguments)
    if options.help:
        _add_training_flags(parser)
        parser.print_help()
        return
    if options.repeats < 1 or options.batches < 1:
        parser.error("--repeats and --batches must be at least 1")
    if options.output and not Path(options.output).resolve().parent.is_dir():
        parser.error(f"--output {options.output}: there is no such folder")

    if options.preset:
        if training:
            parser.error(f"--preset takes files, and no other arguments; got {training[0]}")
        leaves = 1 if options.map_leaves is None else options.map_leaves
        if options.sentence_length < 1 or leaves < 1:
            parser.error("--sentence-length and --map-leaves must be at least 1")
        if min(options.vocabularies) <= Dictionary().nspecial:
            parser.error("--vocabularies must be larger, for a student's own symbols")
    elif options.map_leaves is not None:
        parser.error("--map-leaves needs --preset")

    # fairseq tells at length what it sets up, again for each work
    logging.getLogger().setLevel(os.environ.get("LOGLEVEL", "WARNING").upper())
    steps = benchmark.Steps(_configuration(training), options.batches) if training else None
    if options.peak_memory_of:
        assert steps is not None
        print(steps.peak_memory(options.peak_memory_of))
        return
    students = None
    if options.preset:
        configurations = _presets(options.preset)
        students = benchmark.Students(configurations, options.sentence_length, options.map_leaves)
    on_cpu = students is not None or (steps is not None and steps.cfg.common.cpu)
    benchmark.make(
        benchmark.Asked(
            device=torch.device("cuda" if torch.cuda.is_available() and not on_cpu else "cpu"),
            repeats=options.repeats,
            vocabularies=options.vocabularies if options.rows > 0 or students else (),
            rows=options.rows,
            dtype=DTYPES[options.objective_dtype],
            every_divergence=options.every_divergence,
            steps=steps,
            students=students,
            peak_command=("-m", "kd_plugin.commands.benchmark", *arguments, "--peak-memory-of"),
            output=options.output,
        )
    )


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that fairseq-train --help cannot show, because it stops before it knows them."""
    task = parser.add_argument_group(f"task {TRANSLATION.taught}")
    gen_parser_from_dataclass(task, KDTranslationConfig())
    criterion = parser.add_argument_group("criterion " + CRITERION)
    gen_parser_from_dataclass(criterion, KDLabelSmoothedCrossEntropyCriterionConfig())
    # the trainer's, which the criterion obeys
    (sentence_avg,) = [f for f in fields(OptimizationConfig) if f.name == "sentence_avg"]
    criterion.add_argument("--sentence-avg", action="store_true", **sentence_avg.metadata)


def _presets(files: Sequence[str]) -> Dict[str, Any]:
    """fairseq's configuration of each student, by the file's name.

    Raises:
        UserError: a file cannot be read, or fairseq refuses a flag in it.
    """
    names = [Path(file).stem for file in files]
    if len(set(names)) < len(names):
        names = list(files)
    return {name: _preset(file) for name, file in zip(names, files)}


def _preset(file: str) -> Any:
    try:
        flags = shlex.split(Path(file).read_text(encoding="utf-8"), comments=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--preset {file} cannot be read: {error}") from None
    if not {"--arch", "-a"} & set(flags):
        raise UserError(f"--preset {file}: expected flags of fairseq-train, --arch among them")
    training = ["data-bin", "--task", "translation", *flags]
    import_user_dir(training)

    def fail(reason: str) -> None:
        raise UserError(f"--preset {file}: fairseq refuses its flags: {reason}")

    parser: Any = fairseq_options.get_training_parser(default_task="translation")
    parser.error = fail
    return convert_namespace_to_omegaconf(parse_like_fairseq(parser, training))


def _configuration(training: List[str]) -> Any:
    """fairseq's configuration of a distillation run."""
    training = ["--task", TRANSLATION.taught, "--criterion", CRITERION, *training]
    import_user_dir(training)
    arch = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    arch.add_argument("--arch", "-a")
    if arch.parse_known_args(training)[0].arch is None:
        make_parser().error(  # fairseq's error says nothing
            "expected the arguments of a distillation run, and got no --arch of a student"
        )
    parser = fairseq_options.get_training_parser()
    cfg = convert_namespace_to_omegaconf(parse_like_fairseq(parser, training))
    taught = issubclass(TASK_REGISTRY.get(cfg.task._name, object), Distillation)
    if not taught or cfg.criterion._name != CRITERION:
        make_parser().error(  # fairseq's would print its hundreds of flags first
            f"expected the arguments of a distillation run (--task {TRANSLATION.taught} "
            f"--criterion {CRITERION}); plain steps are timed as well"
        )
    return cfg


if __name__ == "__main__":
    sys.exit(main())
