"""What the commands share in reading arguments."""

import importlib

import pytest


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
