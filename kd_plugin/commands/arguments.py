"""What the commands share: reading arguments, refusing flags, and how they end."""

import argparse
import errno
import io
import logging
import os
import sys
from typing import Any, Callable, List, NamedTuple, Optional, Sequence

import torch
from fairseq import options as fairseq_options
from fairseq import utils

from .. import checkpoints
from ..errors import Faults, UserError, out_of_memory, printable

INTERRUPTED = 130  # exit code, as of shells


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Every default shown once, and none where there is none."""

    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        if action.default in (None, "", argparse.SUPPRESS) or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class NeedsNoOther(argparse.Action):
    """A flag that is a command of its own: beside it nothing else is required."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: Optional[str] = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        for action in parser._actions:
            action.required = False


# Parsing


def run_like_fairseq(
    prog: str,
    make_parser: Callable[[], argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], None],
    arguments: Optional[List[str]],
) -> int:
    """Parse the arguments of a command that also takes fairseq's flags, and run it.

    Args:
        arguments: of the command line; None for ``sys.argv``.

    Returns:
        the exit code.
    """
    given = sys.argv[1:] if arguments is None else arguments

    def work() -> None:
        import_user_dir(given)
        run(parse_like_fairseq(make_parser(), given))

    return exit_code(prog, work)


def parse_like_fairseq(parser: argparse.ArgumentParser, arguments: List[str]) -> argparse.Namespace:
    """Parse fairseq's flags, the task's included; unlike fairseq's own, --help shows these, too.

    Returns:
        them, and ``task_given``: whether --task is among the arguments.

    Raises:
        UserError: fairseq refuses a flag.
    """
    help_wanted = {"-h", "--help"} & set(arguments)
    if help_wanted:
        for action in parser._actions:
            action.required = False
    calls = []

    def modify(parser: argparse.ArgumentParser) -> None:
        calls.append(parser)
        if help_wanted and len(calls) == 2:  # by now fairseq has added the task's
            parser.print_help()
            parser.exit()

    rest = [argument for argument in arguments if argument not in help_wanted]
    try:
        parsed = fairseq_options.parse_args_and_arch(parser, rest, modify_parser=modify)
    except ValueError as error:
        raise UserError(f"fairseq refuses these arguments: {error}") from error
    given = argparse.ArgumentParser(add_help=False)
    given.add_argument("--task")
    parsed.task_given = given.parse_known_args(rest)[0].task is not None
    return parsed


def import_user_dir(arguments: List[str]) -> None:
    """Import --user-dir before fairseq does, which happens as soon as a parser is made.

    Raises:
        UserError: there is no such folder, or it cannot be imported.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--user-dir")
    user_dir = parser.parse_known_args(arguments)[0].user_dir
    if user_dir is not None:
        checkpoints.import_user_dir(user_dir, "--user-dir")


def add_trust(add: Callable[..., Any], **options: Any) -> None:
    add(
        "--trust-checkpoint",
        action="store_true",
        help="open checkpoints with the full pickle machinery, which runs whatever code they ask "
        "for",
        **options,
    )


def add_bleu_tokenize(add: Callable[..., Any]) -> None:
    add(
        "--bleu-tokenize",
        metavar="NAME",
        help="tokenizer of BLEU, as sacrebleu --tokenize (default: the target language's)",
    )


class Shard(NamedTuple):
    """Which part of the work this process does, and on which GPU."""

    num_shards: int
    shard_id: int
    device_id: int


def shard_of_process(options: Any) -> Shard:
    """The shard of fairseq's flags or, without them, the rank that torchrun or srun gives.

    A batch script that SLURM runs has no step; only what it starts with srun has. Ranks that
    outnumber the GPUs share them; a --device-id of the user's stays as it is.

    Raises:
        UserError: a rank in the environment is not a number.
    """
    gpus = torch.cuda.device_count()
    given = Shard(options.num_shards, options.shard_id, options.device_id if gpus else 0)
    if given.num_shards > 1:
        return given
    for names in (
        ("WORLD_SIZE", "RANK", "LOCAL_RANK"),
        ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    ):
        if all(name in os.environ for name in names):
            try:
                found = Shard(*(int(os.environ[name]) for name in names))
            except ValueError as error:
                raise UserError(
                    f"the environment's {', '.join(names)}: expected integers ({error})"
                ) from None
            if found.num_shards > 1:
                return found._replace(device_id=found.device_id % max(gpus, 1))
    return given


# Refusing


def refuse_unsupported(options: Any, faults: Faults, but: Sequence[str] = ()) -> None:
    """Note flags of ``fairseq-generate`` that our commands do not support, and impossible values.

    Args:
        options: parsed by fairseq's parser for generation.
        faults: what is wrong is added.
        but: names of flags that are supported after all.
    """
    unsupported = {
        "lm_path": None,
        "replace_unk": None,
        "constraints": None,
        "print_alignment": None,
        "score_reference": False,
        "prefix_size": 0,
        "retain_dropout": False,
        "results_path": None,
        "iter_decode_with_external_reranker": False,
    }
    for name, default in unsupported.items():
        usual = name in but or getattr(options, name, default) in (default, None)
        faults.check(usual, f"{flag_of(name)} cannot be used here")
    faults.check(
        not getattr(options, "amp", False), "--amp is for training: give --fp16, --bf16 or neither"
    )
    folders = utils.split_paths(options.data or "")
    faults.check(len(folders) <= 1, "DATA: expected one folder, got several")
    at_least(
        *(options, faults, 1),
        *("beam", "nbest", "max_tokens", "batch_size", "required_batch_size_multiple"),
    )


def at_least(options: Any, faults: Faults, lowest: int, *names: str) -> None:
    """Note which of these flags, unless None, are below ``lowest``."""
    for name in names:
        value = getattr(options, name, None)
        faults.check(
            value is None or value >= lowest,
            f"{flag_of(name)} must be {lowest} or more, got {value}",
        )


def flag_of(name: str) -> str:
    """The flag that argparse puts under this name."""
    return "--" + name.replace("_", "-")


# Ending


def exit_code(prog: str, work: Callable[[], Any], *, resumable: bool = True) -> int:
    """Do a command's work; what a user can put right is told in one sentence on stderr.

    Args:
        work: raises ``UserError`` or ``OSError`` for what is wrong with files, flags or data.
            Any other exception is a mistake of ours: it passes, so that Python shows its
            traceback and exits with 1.
        resumable: whether the same command, run again, goes on where it stopped.

    Returns:
        0, 1 after an error, 130 after Ctrl-C.
    """
    try:
        _log_like_fairseq()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
        work()
        return 0
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
        if full and resumable:
            message += ". What has been written is kept: run the same command again to continue."
    except (MemoryError, RuntimeError) as error:
        reason = out_of_memory(error)
        if reason is None:
            raise
        message = reason
    except KeyboardInterrupt:
        advice = "run the same command again to continue" if resumable else "interrupted"
        print(f"{prog}: {advice}", file=sys.stderr)
        return INTERRUPTED
    print(f"{prog}: {printable(message)}", file=sys.stderr)
    return 1


def _log_like_fairseq() -> None:
    level = os.environ.get("LOGLEVEL", "INFO").upper()
    if not isinstance(logging.getLevelName(level), int):
        raise UserError(
            f"LOGLEVEL={level}: expected DEBUG, INFO, WARNING, ERROR or CRITICAL in the environment"
        )
    logging.basicConfig(
        format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=level,
        force=True,
    )
    for noisy in ("hydra", "fairseq.data.data_utils", "fairseq.tasks.fairseq_task"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
