"""What all tests share: one thread per process, so that tests do not fight for cores; the runs that
many tests look at, made once for all processes of pytest; and the two sizes of the fault suite."""

import fcntl
import os
import pickle
import shutil
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any, Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from support import kd_arguments, script, transformer
from toy import Corpus, Distilled, binarise, train_teacher, write_text


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="the fault suite as a whole")


@pytest.fixture(scope="session")
def long(request) -> bool:
    """Whether the fault suite runs as a whole (hundreds of faults) or in its short form."""
    return request.config.getoption("--long")


_counts: Counter = Counter()


@pytest.fixture(scope="session")
def count() -> Callable[..., None]:
    """``count("kill -9 while training")`` for each fault that was really caused."""

    def add(what: str, number: int = 1) -> None:
        _counts[what] += number

    return add


class _ByName(OrderedDict):
    """Takes out the first by name."""

    def popitem(self, last=True):
        name = min(self)
        return name, self.pop(name)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """``--dist loadfile`` with end_to_end and faults first, where files take a minute or more.

    xdist begins with the files of many tests, and these have few: the last of them would leave all
    processes but one idle.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    scheduling = LoadFileScheduling(config, log)
    scheduling.workqueue = _ByName()
    return scheduling


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes that share the tests
        session.config.workeroutput["faults"] = dict(_counts)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    _counts.update(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_terminal_summary(terminalreporter):
    if _counts:
        terminalreporter.section("faults that were caused")
        for what, number in sorted(_counts.items()):
            terminalreporter.write_line(f"{number:>8,}  {what}")


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], Any]], Any]:
    """``once(name, make)`` is what ``make(folder)`` returned to the first process that asked.

    The others wait until it is made. Nobody may change what is in the folder.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    root = root / "shared"
    root.mkdir(exist_ok=True)

    def once(name: str, make: Callable[[Path], Any]) -> Any:
        folder, made = root / name, root / (name + ".pickle")
        with (root / (name + ".lock")).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                shutil.rmtree(str(folder), ignore_errors=True)  # of a process that failed
                folder.mkdir()
                made.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(made.read_bytes())

    return once


@pytest.fixture(scope="session")
def corpus(once) -> Corpus:
    def make(folder: Path) -> Corpus:
        text = write_text(folder / "text")
        valid = f"{text / 'valid'},{text / 'valid1'}"
        data = binarise(text, folder / "data", "--validpref", valid, "--testpref", text / "test")
        return Corpus(text, data)

    return once("corpus", make)


@pytest.fixture(scope="session")
def data(corpus) -> Path:
    return corpus.data


@pytest.fixture(scope="session")
def teacher(data, once) -> Path:
    """A teacher from stock fairseq that knows the language pair rather well.

    With dropout, so that one that is not in eval mode would show.
    """

    def make(folder: Path) -> Path:
        return train_teacher(data, folder, transformer(32), 300, "--dropout", 0.1)

    return once("teacher", make)


@pytest.fixture(scope="session")
def distilled(data, teacher, once) -> Distilled:
    """The ordinary distillation: the installed command, an epoch and a half, metrics reported.

    The teacher's file is gone afterwards.
    """

    def make(folder: Path) -> Distilled:
        passing = folder / "passing" / "teacher.pt"
        passing.parent.mkdir()
        shutil.copy(str(teacher), str(passing))
        arguments = kd_arguments(
            *(data, passing, folder, "--max-update", 60, "--report-accuracy"),
            *("--valid-subset", "valid,valid1"),
        )
        run = script("fairseq-train", *arguments).ok()
        passing.unlink()
        return Distilled(run, folder)

    return once("distilled", make)
