"""Files that go while a job uses them: it goes on with what it has opened; a restart says it."""

import os
import shutil
import time
from pathlib import Path
from typing import Any, Callable, List, NamedTuple

import pytest
import support
from support import assert_same_files, assert_same_weights, distil, write_cache

# more than the 40 updates of an epoch
TRAINING = ("--max-update", 50, "--dropout", 0.1)


def when(started, there) -> None:
    """Wait until a command has come so far; if it has ended by then, so be it."""
    while not there() and started.process.is_alive():
        time.sleep(0.001)


@pytest.fixture(scope="module")
def undisturbed(data, teacher, tmp_path_factory):
    """Online and cached training when nothing goes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_cache(data, teacher, folder / "cache").ok()
    distil(data, teacher, folder / "online", *TRAINING).ok()
    distil(data, None, folder / "cached", *TRAINING, "--teacher-cache", folder / "cache").ok()
    return folder


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(str(path))
    else:
        path.unlink()


def replace(path: Path) -> None:
    content = path.read_bytes()
    new = path.with_name("new")
    new.write_bytes(content[:-2] + bytes(2))
    os.replace(str(new), str(path))


@pytest.mark.parametrize(
    "kind, lost, lose, words",
    [
        ("online", "teacher.pt", remove, "{}: no such checkpoint file"),
        ("online", "data", remove, "{}"),
        ("cached", "cache/train/log_probs.bin", remove, "{} is missing: make the cache again"),
        ("cached", "cache/train/log_probs.bin", replace, "{} is damaged: the checksum of"),
    ],
)
def test_training(kind, lost, lose, words, data, teacher, undisturbed, tmp_path, count):
    shutil.copytree(str(data), str(tmp_path / "data"))
    shutil.copy(str(teacher), str(tmp_path / "teacher.pt"))
    shutil.copytree(str(undisturbed / "cache"), str(tmp_path / "cache"))
    given, more = tmp_path / "teacher.pt", ()
    if kind == "cached":
        given, more = None, ("--teacher-cache", tmp_path / "cache", "--num-workers", 1)
    arguments = support.kd_arguments(tmp_path / "data", given, tmp_path / "s", *TRAINING, *more)
    started = support.start("fairseq-train", *arguments)
    when(started, lambda: "| train_inner |" in started.text)
    lose(tmp_path / lost)
    count("file or folder lost under a running training")
    started.finish().ok()
    last = tmp_path / "s" / "checkpoint_last.pt"
    assert_same_weights(last, undisturbed / kind / "checkpoint_last.pt")

    before = last.read_bytes()
    run = support.fairseq("fairseq-train", *arguments, "--max-update", 60)
    assert words.format(tmp_path / lost) in run.error
    assert last.read_bytes() == before


class Work(NamedTuple):
    """A command with inputs of its own, and what it writes when nothing goes."""

    tool: str
    inputs: List[Path]
    arguments: Callable[[Path], List[Any]]
    undisturbed: Path


@pytest.fixture(scope="module", params=["fairseq-kd-cache", "fairseq-kd-sequences"])
def work(request, data, teacher, tmp_path_factory) -> Work:
    folder = tmp_path_factory.mktemp("work")
    inputs = [folder / "data", folder / "teacher.pt"]
    shutil.copytree(str(data), str(inputs[0]))
    shutil.copy(str(teacher), str(inputs[1]))
    make = {
        "fairseq-kd-cache": support.cache_arguments,
        "fairseq-kd-sequences": support.sequence_arguments,
    }[request.param]

    def arguments(output):
        return make(*inputs, output, "--batch-size", 16)

    support.fairseq(request.param, *arguments(folder / "undisturbed")).ok()
    return Work(request.param, inputs, arguments, folder / "undisturbed")


@pytest.mark.parametrize("lost", ["inputs", "output"])
def test_caching_and_decoding(lost, work, tmp_path, count):
    """It ends as if nothing had happened, or says what is missing; then it goes on."""
    output = tmp_path / "output"
    started = support.start(work.tool, *work.arguments(output))
    when(started, lambda: [p for p in output.glob("**/shard-*/*") if p.stat().st_size])
    gone = work.inputs if lost == "inputs" else [output]
    for path in gone:
        os.rename(str(path), str(path) + ".gone")
        count("file or folder lost under a running command")
    run = started.finish()
    assert "Traceback" not in run.text
    if run.code != 0:
        assert any(str(path) in run.text.strip().splitlines()[-1] for path in gone)
    for path in work.inputs:
        if not path.exists():
            os.rename(str(path) + ".gone", str(path))
    support.fairseq(work.tool, *work.arguments(output)).ok()
    assert_same_files(output, work.undisturbed)
