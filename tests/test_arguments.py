"""What the commands share: arguments, refusals, and how they end."""

import argparse
import errno
import importlib

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


def test_a_rank_that_is_no_number(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "one"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    options = argparse.Namespace(num_shards=1, shard_id=0, device_id=0)
    with pytest.raises(UserError, match="WORLD_SIZE, RANK, LOCAL_RANK: expected integers"):
        arguments.shard_of_process(options)
