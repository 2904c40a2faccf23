"""What the commands share in reading arguments."""

import argparse
import errno
import io
import logging
import os
import sys
from typing import Any, Callable, List, Optional, Tuple

import torch
from fairseq import options as fairseq_options
from fairseq import utils

_LONGEST = 4000  # characters of a message


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Every default shown once, and none where there is none."""

    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        if action.default in (None, "", argparse.SUPPRESS) or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def run_like_fairseq(
    prog: str,
    make_parser: Callable[[], argparse.ArgumentParser],
    run: Callable[[Any], Any],
    arguments: Optional[List[str]],
) -> int:
    """The whole of a command that takes fairseq's flags, too; its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    accept_user_dir(arguments)
    options = parse_like_fairseq(make_parser(), arguments)
    return exit_code(prog, lambda: run(options))


def add_trust(add: Callable[..., Any], **options: Any) -> None:
    add(
        "--trust-checkpoint",
        action="store_true",
        help="open checkpoints with the full pickle machinery, which runs whatever code they ask "
        "for",
        **options,
    )


def parse_like_fairseq(parser: argparse.ArgumentParser, arguments: List[str]) -> Any:
    """Also the arguments of the task; unlike fairseq's own, --help shows these, too."""
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
    return fairseq_options.parse_args_and_arch(parser, rest, modify_parser=modify)


def accept_user_dir(arguments: List[str]) -> None:
    """Let --user-dir name any copy of this plugin; fairseq refuses a second folder of its name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--user-dir")
    user_dir = parser.parse_known_args(arguments)[0].user_dir
    folder = os.path.abspath(user_dir or "")
    if user_dir and os.path.basename(folder) == "kd_plugin":
        imported: Any = getattr(utils.import_user_module, "memo", set())
        utils.import_user_module.memo = imported | {folder}


def shard_of_process(options: Any) -> Tuple[int, int, int]:
    """Number of shards, this one's, and the GPU: of the flags, or of torchrun or srun.

    A batch script that SLURM runs has no step; only what it starts with srun has.
    """
    shards, shard, device = options.num_shards, options.shard_id, options.device_id
    for names in (
        ("WORLD_SIZE", "RANK", "LOCAL_RANK"),
        ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    ):
        if shards == 1 and all(name in os.environ for name in names):
            shards, shard, device = [int(os.environ[name]) for name in names]
    gpus = torch.cuda.device_count()
    return shards, shard, device % gpus if gpus else 0


def useless_for_decoding(options: Any) -> List[str]:
    """What is wrong with flags of fairseq-generate that none of our commands can do."""
    without = {
        "lm_path": None,
        "replace_unk": None,
        "constraints": None,
        "print_alignment": None,
        "score_reference": False,
        "prefix_size": 0,
        "retain_dropout": False,
        "results_path": None,
        "iter_decode_with_beam": 1,
    }
    faults = [
        f"--{name.replace('_', '-')} cannot be used here"
        for name, default in without.items()
        if getattr(options, name, default) not in (default, None)
    ]
    if getattr(options, "amp", False):
        faults.append("--amp is for training: take --fp16, --bf16 or neither")
    if len(utils.split_paths(options.data or "")) > 1:
        faults.append("DATA: one folder, not several")
    return faults


def exit_code(prog: str, work: Callable[[], Any], goes_on: bool = True) -> int:
    """Do a command's work; what can go wrong with a user's files and flags is one line.

    Args:
        goes_on: where it stopped, if it is run again.
    """
    _log_like_fairseq()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    try:
        work()
        return 0
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        message = str(error)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
        kept = ". What is written is kept: run the same command again to go on."
        message = f"{error}{kept if full and goes_on else ''}"
    except MemoryError:
        message = "there is not enough memory"
    except KeyboardInterrupt:
        advice = "run the same command again to go on" if goes_on else "interrupted"
        print(f"{prog}: {advice}", file=sys.stderr)
        return 130
    print(f"{prog}: {_printable(message)}", file=sys.stderr)
    return 1


def _printable(text: str) -> str:
    """What a file's content in a message could do to a terminal, escaped."""
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def _log_like_fairseq() -> None:
    logging.basicConfig(
        format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=os.environ.get("LOGLEVEL", "INFO").upper(),
        force=True,
    )
    for noisy in ("hydra", "fairseq.data.data_utils", "fairseq.tasks.fairseq_task"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
