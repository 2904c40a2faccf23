"""What a user did wrong, told in one harmless message."""

import pytest

from kd_plugin.errors import Faults, UserError, out_of_memory
from kd_plugin.files import FileError


def test_a_message_cannot_harm_a_terminal():
    assert str(UserError("a\x1b[2Jb\n\u202e")) == "a\\x1b[2Jb\n\\u202e"
    assert str(FileError("é\x07")) == "é\\x07"
    assert len(str(UserError("x" * 100_000))) < 5000


def test_all_faults_are_told_at_once():
    faults = Faults()
    assert not faults
    assert faults.check(True, "unused") is True
    assert faults.check(False, "--beam: expected 1 or more") is False
    faults.add("--nbest cannot be used")
    with faults.collecting():
        raise FileError("no such file: a.pt")
    with faults.collecting(KeyError, OSError):
        raise FileNotFoundError("b.pt")
    assert faults
    with pytest.raises(UserError) as caught:
        faults.raise_if_any()
    assert type(caught.value) is UserError
    assert str(caught.value) == (
        "--beam: expected 1 or more; --nbest cannot be used; no such file: a.pt; b.pt"
    )


def test_faults_are_raised_as_the_kind_that_is_asked_for():
    faults = Faults()
    faults.raise_if_any()  # none: nothing happens
    faults.add("expected NAME=FILE, got 'a'")
    with pytest.raises(FileError, match=r"^--logs: expected NAME=FILE, got 'a'$"):
        faults.raise_if_any(FileError, prefix="--logs: ")


def test_a_mistake_of_ours_is_not_collected():
    with pytest.raises(KeyError), Faults().collecting():
        raise KeyError("ours")


def test_what_is_out_of_memory():
    expected = "there is not enough memory; smaller batches need less"
    assert out_of_memory(MemoryError()) == expected
    told = out_of_memory(RuntimeError("CUDA failed with error out of memory\nat line 5"))
    assert told is not None and "(CUDA failed with error out of memory); smaller" in told
    assert out_of_memory(RuntimeError("shapes differ")) is None
    assert out_of_memory(ValueError("out of memory")) is None
