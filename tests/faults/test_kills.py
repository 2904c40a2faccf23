"""kill -9 at random moments; the same command again ends where an undisturbed one does."""

import random
import re
import shutil
import signal
import time
import zipfile
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Optional

import pytest
import support
from support import (
    Run,
    Started,
    assert_same_files,
    assert_same_weights,
    fairseq,
    load,
    start_two_ranks,
    validate,
    write_cache,
)

UPDATES = 50  # more than an epoch
TRAINING = ("--max-update", UPDATES, "--dropout", 0.1, "--save-interval-updates", 4)
QUEUE = (
    *("--kd-selection", "global", "--kd-queue-size", 300, "--kd-divergence", "js"),
    *("--kd-weight-schedule", "linear:0.2:1:40", "--kd-temperature-schedule", "cosine:1:2:30"),
)
LAST = "checkpoint_last.pt"
CUT_SHORT = re.compile(r"(\S+) is cut short.* --restore-file (\S+), once")
PATIENCE = 60  # seconds in which a rank must notice that the other one is dead


class Job(NamedTuple):
    """Commands that run at the same time: shards or ranks of one work, or one alone.

    Attributes:
        start: start them all; given more arguments, with them.
        last: a training's checkpoint_last.pt.
        ranks: they wait for each other, and one alone is killed.
    """

    start: Callable[..., List[Started]]
    last: Optional[Path] = None
    ranks: bool = False


def written(one: Started) -> int:
    """Bytes that a process has written so far, logs included; 0 once it has ended."""
    try:
        said = Path(f"/proc/{one.process.pid}/io").read_text()
    except OSError:
        return 0
    found = re.search(r"^wchar: (\d+)$", said, re.MULTILINE)
    return int(found.group(1)) if found else 0


def wait_for_bytes(started: List[Started], size: float) -> int:
    """Until they have written so many, or have ended; returns how many."""
    seen = [0] * len(started)
    while sum(seen) < size and any(one.process.is_alive() for one in started):
        seen = [max(before, written(one)) for before, one in zip(seen, started)]
        time.sleep(0.001)
    return sum(seen)


def wait_for_copy(started: List[Started], path: Path) -> None:
    """Until fairseq copies to a file: what was there goes first."""
    before = path.stat().st_size if path.exists() else 0
    while any(one.process.is_alive() for one in started):
        if before > (path.stat().st_size if path.exists() else 0):
            break
        time.sleep(0.0001)  # so that it takes no core from what it waits for


def undisturbed(job: Job) -> int:
    """Run it to its end; returns how many bytes it writes."""
    started = job.start()
    size = wait_for_bytes(started, float("inf"))
    assert [one.finish().code for one in started] == [0] * len(started)
    return size


def killed(job: Job, more: List[Any], moment: float, rng: random.Random) -> List[Run]:
    """kill -9 when so many bytes are written, or a little later, unless it ends before."""
    started = job.start(*more)
    while job.ranks and started[0].process.is_alive():
        # until they have found each other torch would wait half an hour
        if "| train_inner |" in started[0].text:
            break
        time.sleep(0.01)
    wait_for_bytes(started, moment)
    later = rng.choice(["at once", "soon", "copying"])
    if later == "soon":
        time.sleep(rng.uniform(0, 0.1))
    elif later == "copying" and job.last is not None:
        wait_for_copy(started, job.last)
    # the process alone, as for want of memory, or with its data workers, as when a node dies
    kill = rng.choice([Started.stop, Started.kill_all])
    for one in [rng.choice(started)] if job.ranks else started:
        kill(one)
    return [one.finish(PATIENCE if job.ranks else 180) for one in started]


def through(last: Path) -> bool:
    """Whether a training was killed after its last save: started again, fairseq would go beyond
    --max-update, by one update each time."""
    if not last.exists() or not zipfile.is_zipfile(str(last)):
        return False
    return load(last)["optimizer_history"][-1]["num_updates"] >= UPDATES


def finish_in_spite_of_kills(job: Job, total: int, rng: random.Random, most: int, count) -> int:
    """Start a job again and again until it ends by itself; returns how often it was killed.

    Args:
        total: bytes that it writes when nothing disturbs it.
        most: so many kills, after which it is left alone.
    """
    kills, more, copies = 0, [], set()
    while True:
        moment = rng.uniform(0, 0.5 * total) if kills < most else float("inf")
        runs = killed(job, more, moment, rng)
        codes = [run.code for run in runs]
        if codes == [0] * len(codes):
            return kills
        if -signal.SIGKILL in codes:
            kills += 1
            more = []
            for other in (run for run in runs if run.code not in (0, -signal.SIGKILL)):
                assert job.ranks and re.search("peer|onnection", other.error), other.text[-3000:]
                count("rank that ended with an error when the other was killed")
            if job.last is not None and through(job.last):
                return kills
            continue
        # a kill inside fairseq's own copy to checkpoint_last.pt, which is not atomic
        found = CUT_SHORT.search(runs[0].error)
        assert found and not more, runs[0].text[-3000:]
        copy = job.last.stat().st_mtime_ns  # it may stay so for several starts
        if copy not in copies:
            copies.add(copy)
            count("kill -9 inside fairseq's copy to checkpoint_last.pt (of those while training)")
        newest = Path(found.group(2))
        if through(newest):
            shutil.copy(str(newest), str(job.last))
            return kills
        more = ["--restore-file", newest]


def disturb(make, total: int, kills: int, what: str, same, count) -> None:
    """Kill jobs until there were so many kills.

    Args:
        make: a new job, of its number.
        total: as above.
        what: the job does.
        same: looks at what job number so and so has left.
    """
    rng, number, left = random.Random(what), 0, kills
    while left > 0:
        number += 1
        caused = finish_in_spite_of_kills(make(number), total, rng, left, count)
        count(f"kill -9 while {what}", caused)
        left -= caused
        same(number)


# training


@pytest.fixture(scope="module")
def cache(data, teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write_cache(data, teacher, folder, "--top-k", 8, "--batch-size", 64).ok()
    return folder


class Training(NamedTuple):
    """One that nothing has disturbed."""

    what: str
    arguments: Callable[[Path], List[Any]]
    folder: Path
    total: int

    def job(self, save_dir: Path) -> Job:
        return _training(self.arguments(save_dir), save_dir)

    def assert_same(self, folder: Path) -> None:
        assert_same_weights(folder / LAST, self.folder / LAST)
        ours, theirs = [load(one / LAST)["extra_state"] for one in (folder, self.folder)]
        assert ours.get("best") == theirs.get("best")
        ours, theirs = [one["train_iterator"].get("kd_queue") for one in (ours, theirs)]
        assert (ours or {}).keys() == (theirs or {}).keys()
        assert not theirs or ours["scores"].tolist() == theirs["scores"].tolist()


def _training(arguments: List[Any], save_dir: Path) -> Job:
    def start(*more):
        return [support.start("fairseq-train", *arguments, *more, leads_group=True)]

    return Job(start, save_dir / LAST)


@pytest.fixture(scope="module")
def training(request, data, teacher, cache, tmp_path_factory) -> Training:
    what, given, more = {
        "online": ("online training", teacher, QUEUE),
        # without validation, each of which would start workers of its own
        "cached": (
            *("cached training", None),
            ("--teacher-cache", cache, "--num-workers", 1, "--disable-validation"),
        ),
    }[request.param]

    def arguments(save_dir):
        return support.kd_arguments(data, given, save_dir, *TRAINING, *more)

    folder = tmp_path_factory.mktemp("undisturbed")
    total = undisturbed(_training(arguments(folder), folder))
    return Training(what, arguments, folder, total)


@pytest.mark.parametrize("training", ["online", "cached"], indirect=True)
def test_training(training, tmp_path, long, count):
    disturb(
        *(lambda number: training.job(tmp_path / str(number)), training.total),
        *(20 if long else 1, training.what),
        *(lambda number: training.assert_same(tmp_path / str(number)), count),
    )


@pytest.mark.parametrize("training", ["online"], indirect=True)
def test_checkpoint_last_cut_short(training, data, tmp_path, count):
    """As by a kill inside fairseq's copy to it: it is said how to go on, and that works."""
    for name in ("checkpoint_1_20.pt", "checkpoint_1_24.pt"):
        shutil.copy(str(training.folder / name), str(tmp_path / name))
    whole = (tmp_path / "checkpoint_1_24.pt").read_bytes()
    (tmp_path / LAST).write_bytes(whole[: len(whole) // 2])
    before = support.tree(tmp_path)
    run = fairseq("fairseq-train", *training.arguments(tmp_path))
    found = CUT_SHORT.search(run.error)
    assert found and found.groups() == (str(tmp_path / LAST), str(tmp_path / "checkpoint_1_24.pt"))
    assert support.tree(tmp_path) == before
    # to others than a training it is no matter
    validate(data, tmp_path / "checkpoint_1_20.pt").ok()
    restore = ("--restore-file", found.group(2))
    run = fairseq("fairseq-train", *training.arguments(tmp_path), *restore).ok()
    assert run.series("train_inner", "num_updates")[0] == 25
    training.assert_same(tmp_path)
    count("checkpoint_last.pt cut short")


def test_one_of_two_ranks(data, teacher, tmp_path, long, count):
    """The other one ends with an error; both started again end where undisturbed ones do."""

    def make(number):
        save_dir = tmp_path / str(number)
        arguments = support.kd_arguments(data, teacher, save_dir, *TRAINING, *QUEUE)
        arguments += ["--ddp-backend", "legacy_ddp"]

        def start(*more):
            return start_two_ranks(*arguments, *more, leads_group=True)

        return Job(start, save_dir / LAST, ranks=True)

    total = undisturbed(make(0))
    disturb(
        *(make, total, 10 if long else 1, "one of two ranks was training"),
        lambda number: assert_same_weights(tmp_path / str(number) / LAST, tmp_path / "0" / LAST),
        count,
    )


# caching and decoding


@pytest.mark.parametrize(
    "tool, what, arguments",
    [
        ("fairseq-kd-cache", "caching", support.cache_arguments),
        ("fairseq-kd-sequences", "decoding sequences", support.sequence_arguments),
    ],
)
def test_caching_and_decoding(tool, what, arguments, data, teacher, tmp_path, long, count):
    """In two shards, which run at the same time and are killed together, or in one."""
    more = ["--batch-size", 16, "--num-workers", 1]
    if tool == "fairseq-kd-sequences":
        more += ["--beam", 4, "--nbest", 4, "--select", "closest", "--metric", "chrf"]

    def make(number):
        shards = 1 + number % 2
        given = [*arguments(data, teacher, tmp_path / str(number), *more), "--num-shards", shards]

        def start():
            return [
                support.start(tool, *given, "--shard-id", shard, leads_group=True)
                for shard in range(shards)
            ]

        return Job(start)

    total = undisturbed(make(0))
    disturb(
        *(make, total, 20 if long else 1, what),
        lambda number: assert_same_files(tmp_path / str(number), tmp_path / "0"),
        count,
    )
