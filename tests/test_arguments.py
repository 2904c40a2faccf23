"""What the commands share: arguments, refusals, and how they end."""

import argparse
import errno
import importlib
import os
import sys

import pytest
import torch

from kd_plugin.commands import arguments
from kd_plugin.errors import Faults, UserError
from kd_plugin.files import FileError


@pytest.mark.parametrize(
    "command, flags",
    [
        ("cache", ("--cache DIR", "--temperatures T[,T...]", "--max-source-positions")),
        ("export", ("--output OUT", "--average")),
        ("report", ("--output DIR", "--max-source-positions")),
        ("sequences", ("--output DIR", "--student-spm MODEL", "--max-source-positions")),
    ],
)
def test_help_needs_no_other_flag(command, flags, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("kd_plugin.commands." + command).main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and all(flag in shown for flag in flags)
    assert "(default: )" not in shown and "(default: None)" not in shown


# how commands end


def ends(error, **options):
    def work():
        raise error

    return arguments.exit_code("prog", work, **options)


def test_what_a_user_did_wrong_is_one_sentence(capsys):
    assert arguments.exit_code("prog", lambda: None) == 0
    assert capsys.readouterr().err == ""
    for error, told in (
        (FileError("a.pt: no such\x1b[2J file"), "a.pt: no such\\x1b[2J file"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a\x07"), "[Errno 2] No such file: 'a"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "[Errno 13] Permission denied"),
        (MemoryError(), "there is not enough memory"),
        (
            RuntimeError("CUDA out of memory. Tried 2 GiB\nmore"),
            "(CUDA out of memory. Tried 2 GiB)",
        ),
    ):
        assert ends(error) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("prog: ") and told in lines[0], lines


def test_what_torch_cannot_allocate_is_one_sentence(capsys):
    assert arguments.exit_code("prog", lambda: torch.empty(10**15)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("prog: there is not enough memory (") and "allocate memory" in line


def test_a_full_disk_keeps_what_a_command_can_go_on_from(capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "f")
    assert ends(full) == 1
    assert "run the same command again to continue" in capsys.readouterr().err
    assert ends(full, resumable=False) == 1
    assert capsys.readouterr().err == "prog: [Errno 28] No space left on device: 'f'\n"


def test_an_interruption_is_one_line(capsys):
    assert ends(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "prog: run the same command again to continue\n"
    assert ends(KeyboardInterrupt(), resumable=False) == 130
    assert capsys.readouterr().err == "prog: interrupted\n"


@pytest.mark.parametrize(
    "bug", (ValueError("ours"), RuntimeError("ours"), KeyError("ours"), TypeError("ours"))
)
def test_a_mistake_of_ours_keeps_its_traceback(bug):
    with pytest.raises(type(bug), match="ours"):
        ends(bug)


def test_a_level_of_logging_that_does_not_exist(capsys, monkeypatch):
    monkeypatch.setenv("LOGLEVEL", "loud")
    assert arguments.exit_code("prog", lambda: None) == 1
    assert "LOGLEVEL=LOUD: expected DEBUG, INFO" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, told",
    [
        (("--user-dir", "no/such/folder"), "--user-dir: no such folder: "),
        (("--fp16", "--bf16"), "Cannot combine --fp16 and --tpu"),
    ],
)
def test_flags_that_fairseq_refuses(more, told, capsys):
    from kd_plugin.commands import report

    given = ["data", "--output", "out", "--models", "a=a.pt", "--cpu", *more]
    assert report.main(given) == 1
    assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "command, rest",
    [
        ("benchmark", ["data", "--arch", "transformer"]),
        ("cache", ["data", "--cache", "c", "--path", "t.pt"]),
        ("report", ["data", "--output", "out", "--models", "a=a.pt"]),
        ("sequences", ["data", "--output", "out", "--path", "t.pt"]),
    ],
)
@pytest.mark.parametrize("folder", ["no/such/folder", "no/such/kd_plugin"])
def test_a_user_dir_that_is_not_there(command, rest, folder, capsys, monkeypatch):
    """From a command line, where fairseq imports it as soon as a parser is made."""
    module = importlib.import_module("kd_plugin.commands." + command)
    monkeypatch.setattr(sys, "argv", [module.PROG, *rest, "--user-dir", folder])
    assert module.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{module.PROG}: --user-dir: no such folder: {os.path.abspath(folder)}"


# refusals


def test_unsupported_flags_are_all_named_at_once():
    options = argparse.Namespace(
        **{"lm_path": "x", "prefix_size": 1, "amp": True, "data": "a:b", "replace_unk": None},
        **{"beam": 0, "nbest": 1, "max_tokens": None, "batch_size": -2},
    )
    faults = Faults()
    arguments.refuse_unsupported(options, faults)
    assert faults.messages == [
        "--lm-path cannot be used here",
        "--prefix-size cannot be used here",
        "--amp is for training: give --fp16, --bf16 or neither",
        "DATA: expected one folder, got several",
        "--beam must be 1 or more, got 0",
        "--batch-size must be 1 or more, got -2",
    ]


@pytest.mark.parametrize(
    "flags, environment, gpus, expected",
    [
        ((1, 0, 7), {}, 2, 7),  # the user's own: decoding.placement refuses it
        ((4, 3, 7), {}, 2, 7),
        ((1, 0, 1), dict(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0"), 2, 1),
        ((1, 0, 0), dict(WORLD_SIZE="8", RANK="5", LOCAL_RANK="5"), 2, 1),  # they share GPUs
        ((1, 0, 0), dict(WORLD_SIZE="8", RANK="5", LOCAL_RANK="5"), 0, 0),
        ((1, 0, 7), {}, 0, 0),
    ],
)
def test_the_gpu_of_a_process(flags, environment, gpus, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    options = argparse.Namespace(**dict(zip(("num_shards", "shard_id", "device_id"), flags)))
    assert arguments.shard_of_process(options).device_id == expected


def test_a_rank_that_is_no_number(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "one"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    options = argparse.Namespace(num_shards=1, shard_id=0, device_id=0)
    with pytest.raises(UserError, match="WORLD_SIZE, RANK, LOCAL_RANK: expected integers"):
        arguments.shard_of_process(options)
