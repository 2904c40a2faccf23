"""A teacher is often somebody else's file: opening it must run nothing that is in it."""

import os
import pickle
from fractions import Fraction

import pytest
import torch
from support import distil, fairseq, load, script, write_cache, write_sequences


class Evil:
    """Unpickling it runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class EvilImport:
    """The same through a builtin, nested in another call's arguments."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return eval, (f"open({str(self.marker)!r}, 'w').close()",)


def test_these_files_are_dangerous(tmp_path):
    """Otherwise the tests below show nothing."""
    for i, kind in enumerate((Evil, EvilImport)):
        marker = tmp_path / str(i)
        torch.save({"model": {}, "evil": kind(marker)}, str(tmp_path / "evil.pt"))
        load(tmp_path / "evil.pt")
        assert marker.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "kind, name", [(Evil, "posix.system"), (EvilImport, "eval")], ids=["system", "eval"]
)
def test_malicious_checkpoint(kind, name, zipped, data, teacher, tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "evil.pt"
    state = load(teacher)
    state["extra_state"]["evil"] = [kind(marker)]
    torch.save(state, str(path), _use_new_zipfile_serialization=zipped)
    student = tmp_path / "student"
    tool = script if kind is Evil and zipped else fairseq  # once as a user does
    run = distil(data, path, student, "--max-update", 1, tool=tool)

    message = run.error
    assert f"asks for {name}," in message.replace("builtins.", "")
    assert str(path) in message
    assert "--teacher-trust-checkpoint" in message
    assert not marker.exists()
    assert not list(student.glob("*.pt"))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_bare_malicious_pickle(protocol, data, tmp_path):
    """No torch file at all; torch's legacy reader would unpickle its first object."""
    marker, path = tmp_path / "executed", tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(Evil(marker), protocol=protocol))
    run = distil(data, path, tmp_path / "student", "--max-update", 1)
    assert str(path) in run.error
    assert not marker.exists()


def test_dotted_name_behind_an_allowed_module(data, tmp_path, monkeypatch):
    """Pickle protocol 4 walks attributes: argparse's own ``_os.system`` is no way in."""
    monkeypatch.chdir(tmp_path)
    marker, path = tmp_path / "executed", tmp_path / "evil.pt"
    # {"model": argparse._os.system("touch executed")}
    path.write_bytes(
        b"\x80\x04}\x8c\x05model\x8c\x08argparse\x8c\x0a_os.system\x93"
        b"\x8c\x0etouch executed\x85Rs."
    )
    pickle.loads(path.read_bytes())
    assert marker.exists()  # a dangerous file indeed
    marker.unlink()
    run = distil(data, path, tmp_path / "student", "--max-update", 1, cwd=tmp_path)
    assert str(path) in run.error
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_trusted_checkpoint(zipped, data, teacher, distilled, tmp_path):
    """A harmless class that fairseq does not use: refused by name, and opened when trusted."""
    path = tmp_path / "teacher.pt"
    state = load(teacher)
    state["extra_state"]["share"] = Fraction(1, 3)
    torch.save(state, str(path), _use_new_zipfile_serialization=zipped)

    refused = distil(data, path, tmp_path / "student", "--max-update", 3)
    assert "fractions.Fraction" in refused.error
    assert not list((tmp_path / "student").glob("*.pt"))

    run = distil(
        data, path, tmp_path / "student", "--max-update", 3, "--teacher-trust-checkpoint"
    ).ok()
    assert (
        run.series("train_inner", "kd_loss") == distilled.run.series("train_inner", "kd_loss")[:3]
    )


@pytest.mark.parametrize("command", ["cache", "sequences", "report", "export"])
def test_every_command_opens_what_is_trusted(command, data, teacher, tmp_path):
    """With the flag that its refusal names."""
    path, output = tmp_path / "teacher.pt", tmp_path / "output"
    state = load(teacher)
    state["extra_state"]["share"] = Fraction(1, 3)
    torch.save(state, str(path))

    def run(*trust):
        if command == "cache":
            return write_cache(data, path, output, "--gen-subset", "valid", *trust)
        if command == "sequences":
            return write_sequences(data, path, output, "--gen-subset", "valid", *trust)
        arguments = ["--output", output, *trust]
        if command == "export":
            return fairseq("fairseq-kd-export", "--path", path, "--data", data, *arguments)
        arguments += ["--cpu", "--beam", 1, "--repeats", 1]
        models = ("--models", f"teacher={path}")
        return fairseq("fairseq-kd-report", data, *models, *arguments)

    refused = run()
    assert refused.code == 1
    assert "fractions.Fraction" in refused.text and "--trust-checkpoint" in refused.text
    run("--trust-checkpoint").ok()
