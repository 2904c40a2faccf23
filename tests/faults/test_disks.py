"""Disks that are full or read-only: what is said, what stays, and that the same command goes on."""

import os
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple

import pytest
from support import (
    LANGUAGES,
    Run,
    assert_same_weights,
    distil,
    fairseq,
    write_cache,
    write_sequences,
)


def mount(*arguments: Any) -> bool:
    """Only root may, and not even root everywhere."""
    try:
        command = ["mount", *map(str, arguments)]
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Disk:
    """A disk of 16 MB that can be filled."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._ballast = folder, folder / "ballast"

    def leave(self, room: int) -> None:
        found = os.statvfs(str(self.folder))
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - room)

    def make_room(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", folder):
        pytest.skip("a small disk can be mounted by root alone")
    yield Disk(folder)
    unmount(folder)


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], None]]:
    """Make folders read-only, as far as this user's rights go."""
    mounted: List[Path] = []

    def make(folder: Path) -> None:
        if mount("--bind", folder, folder):
            mounted.append(folder)
            assert mount("-o", "remount,bind,ro", folder)
        elif os.geteuid() != 0:
            folder.chmod(0o555)
        else:
            pytest.skip("root writes everywhere, and may not mount here")

    yield make
    for folder in mounted:
        unmount(folder)


# the commands


class Command(NamedTuple):
    """A command, and where it writes.

    Attributes:
        arguments: without the output.
        to: the flag that names the output.
        earlier: arguments that make another output in the same place.
        again: what the command needs to replace that one.
        varies: endings of files that two runs write differently.
    """

    tool: str
    arguments: List[Any]
    to: str
    earlier: List[Any] = []
    again: List[Any] = []
    varies: Any = ()

    def run(self, output: Path, *more: Any, **how: Any) -> Run:
        return fairseq(self.tool, *self.arguments, self.to, output, *more, **how)

    def made(self, output: Path, varies: bool = False) -> Dict[str, bytes]:
        """The output's files; with ``varies`` all of them."""
        files = [output] if output.is_file() else [p for p in output.rglob("*") if p.is_file()]
        return {
            str(file.relative_to(output)): file.read_bytes()
            for file in files
            if file.name != ".lock" and (varies or not file.name.endswith(self.varies))
        }


COMMANDS = ["cache", "sequences", "report", "export", "ctranslate2"]


@pytest.fixture(scope="module", params=COMMANDS)
def command(request, data, teacher, distilled, long) -> Command:
    how = ["--cpu", *LANGUAGES, "--num-workers", 0, "--batch-size", 64]
    student = ["--path", distilled.checkpoint, "--data", data, "--no-verify"]
    if request.param == "cache":
        return Command("fairseq-kd-cache", [data, "--path", teacher, *how], "--cache")
    if request.param == "sequences":
        arguments = [data, "--path", teacher, *how, "--beam", 2]
        earlier = ["--max-length", 6]
        return Command("fairseq-kd-sequences", arguments, "--output", earlier, ["--overwrite"])
    if request.param == "report":
        if not long:
            pytest.skip("its processes take long to start: in the long form")
        models = ["--models", f"teacher={teacher}"]
        arguments = [data, *models, *how, "--repeats", 1]
        varies = (".html", ".json", ".md", ".png")  # they tell times
        earlier = ["--lenpen", 2]
        return Command("fairseq-kd-report", arguments, "--output", earlier, ["--overwrite"], varies)
    earlier = ["--path", teacher]
    if request.param == "ctranslate2":
        pytest.importorskip("ctranslate2")
        student += ["--format", "ctranslate2"]
    return Command("fairseq-kd-export", student, "--output", earlier, ["--overwrite"])


class Made(NamedTuple):
    """What a command makes when nothing is in its way."""

    files: Dict[str, bytes]
    total: int
    largest: int


@pytest.fixture(scope="module")
def made(command, tmp_path_factory) -> Made:
    output = tmp_path_factory.mktemp("undisturbed") / "output"
    command.run(output).ok()
    sizes = [len(content) for content in command.made(output, varies=True).values()]
    return Made(command.made(output), sum(sizes), max(sizes))


def assert_refused(command: Command, run: Run, place: Path, *reasons: str) -> None:
    """The last line says why, in one of these ways, and where."""
    assert run.code == 1 and "Traceback" not in run.text, run.text[-3000:]
    line = run.text.strip().splitlines()[-1]
    error = re.compile(rf"{command.tool}: (\[Errno \d+\] )?({'|'.join(reasons)})")
    assert error.match(line) and str(place) in line, line


def test_full_disk(command, made, disk, long, count):
    """With room for a part, drawn at random; every other time another output is to be replaced."""
    rng = random.Random(command.tool + command.to)
    for number in range(8 if long else 1):
        output = disk.folder / str(number)
        before, room = {}, 0.9 * made.total
        if command.earlier and number % 2 == 0:
            command.run(output, *command.earlier).ok()
            before, room = command.made(output, varies=True), 16000  # not all is made again
        disk.leave(int(rng.uniform(0, room)))
        run = command.run(output, *command.again)
        no_room = "the cache .* but only .* make room"
        assert_refused(command, run, disk.folder, "No space left on device", no_room)
        assert before.items() <= command.made(output, varies=True).items()
        count("full disk: " + command.tool)
        disk.make_room()
        command.run(output, *command.again).ok()
        assert command.made(output) == made.files


def test_too_long_a_file(command, made, tmp_path, long, count):
    """As a full disk, for which nobody needs to be root: a limit on the size of files."""
    rng = random.Random(command.tool + command.to)
    for number in range(8 if long else 1):
        output = tmp_path / str(number)
        limit = int(rng.uniform(0.6, 0.95) * made.largest)
        run = command.run(output, file_limit=limit)
        assert_refused(command, run, output, "File too large")
        count("limit on the size of files: " + command.tool)
        command.run(output).ok()
        assert command.made(output) == made.files


def test_read_only_folder(command, read_only, tmp_path, count):
    folder = tmp_path / "folder"
    folder.mkdir()
    read_only(folder)
    run = command.run(folder / "output")
    assert_refused(command, run, folder, "Read-only file system", "Permission denied")
    count("read-only folder")


# training


def test_training_on_a_full_disk(data, teacher, disk, tmp_path, long, count):
    """The error is fairseq's own; what was saved before stays, and training goes on from it."""
    options = ("--max-update", 20, "--save-interval-updates", 4)
    distil(data, teacher, tmp_path, *options).ok()
    size = (tmp_path / "checkpoint_last.pt").stat().st_size
    rng = random.Random(1)
    for number in range(8 if long else 1):
        folder = disk.folder / str(number)
        distil(data, teacher, folder, *options, "--max-update", 8).ok()
        before = {path.name: path.read_bytes() for path in folder.glob("checkpoint_1_*.pt")}
        assert len(before) == 2
        disk.leave(int(rng.uniform(0, 3 * size)))
        full = distil(data, teacher, folder, *options)
        # torch 1.12 ends the process with an assertion of its own
        assert full.code != 0 and re.search("No space left on device|enforce fail", full.text)
        assert before.items() <= {p.name: p.read_bytes() for p in folder.glob("*.pt")}.items()
        count("full disk: fairseq-train")
        disk.make_room()
        run = distil(data, teacher, folder, *options).ok()
        assert run.series("train_inner", "num_updates")[0] > 8
        assert_same_weights(folder / "checkpoint_last.pt", tmp_path / "checkpoint_last.pt")


def test_training_into_a_read_only_folder(data, teacher, read_only, tmp_path, count):
    """It ends before the first update."""
    folder = tmp_path / "folder"
    folder.mkdir()
    read_only(folder)
    run = distil(data, teacher, folder / "student", "--max-update", 4)
    assert "Read-only file system" in run.error or "Permission denied" in run.error
    assert str(folder) in run.error and not run.records("train_inner")
    count("read-only folder")


def test_what_is_only_read_may_be_read_only(data, teacher, read_only, tmp_path, count):
    """Data, teachers, caches; finished outputs, too, at which a command only looks again."""
    shared = tmp_path / "shared"
    shutil.copytree(str(data), str(shared / "data"))
    shutil.copy(str(teacher), str(shared / "teacher.pt"))
    inputs = shared / "data", shared / "teacher.pt"
    write_cache(*inputs, shared / "cache").ok()
    write_sequences(*inputs, shared / "distilled").ok()
    read_only(shared)
    write_cache(*inputs, shared / "cache").ok()
    write_sequences(*inputs, shared / "distilled").ok()
    cached = ("--teacher-cache", shared / "cache", "--max-update", 2)
    distil(shared / "data", None, tmp_path / "cached", *cached).ok()
    distil(shared / "distilled", inputs[1], tmp_path / "online", "--max-update", 2).ok()
    count("read-only folder that is only read")
