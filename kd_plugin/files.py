"""Files that are whole or not there, and work that several processes do in shards."""

import contextlib
import fcntl
import json
import os
import struct
import tempfile
import uuid
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Sequence

from .errors import UserError

UNFINISHED = ".new"  # what a kill in the middle of writing a whole file leaves behind


class FileError(UserError):
    """Files that cannot be used, or not be written; the message says why and what to do."""


def read_json(path: Path) -> Dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise FileError(f"{path}: expected a JSON object")
    return found


def temporary(path: Path) -> Path:
    """A name for a file until it is whole; no other process, here or elsewhere, has the same."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}{UNFINISHED}")


def passing_folder(path: Path) -> Any:
    """A folder for what is needed while a path is made: beside it, and named after it."""
    return tempfile.TemporaryDirectory(UNFINISHED, path.name + ".", str(path.parent))


def write_json(path: Path, content: Dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    with all_or_nothing(path) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def naming(path: Any) -> Iterator[None]:
    """Where a write fails, as on a full disk: the system says only why."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def reading_binarised(what: Any) -> Iterator[None]:
    """Data that a kill or a full disk cut short: fairseq says only which number did not fit.

    Its index is read first, and no sentence is missed before it is asked for; so ask for the last.

    Raises:
        FileError: instead of these errors.
    """
    try:
        yield
    except (ValueError, AssertionError, struct.error) as error:
        raise FileError(
            "{} cannot be read ({}): its .bin or .idx is damaged or cut short. Binarise it again "
            "with fairseq-preprocess.".format(what, (str(error) or repr(error)).split("\n")[0])
        ) from error


def refuse_unknown_numbers(tokens: Sequence[int], symbols: int) -> None:
    """Sentences of data, as numbers of a dictionary's symbols."""
    highest = int(max(tokens, default=0))
    if highest >= symbols:
        raise FileError(
            f"the data holds symbol number {highest}, and its dictionary has {symbols} symbols: "
            "it was binarised with another dict.*.txt than lies beside it, or is damaged"
        )


@contextlib.contextmanager
def all_or_nothing(path: Path) -> Iterator[Any]:
    """Write a file under another name first, then rename it."""
    new = temporary(path)
    try:
        with naming(path), open(new, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def differences(ours: Any, theirs: Any, keys: Iterable[Any]) -> List[str]:
    """In words: where the second of two dictionaries says something else than the first."""
    found = []
    for key in keys:
        mine, other = ours.get(key), theirs.get(key)
        if mine == other:
            continue
        if isinstance(mine, list) and isinstance(other, list) and len(mine) == len(other):
            mine, other = dict(enumerate(mine)), dict(enumerate(other))
        if isinstance(mine, dict) and isinstance(other, dict):
            parts = differences(mine, other, sorted({*mine, *other}, key=str))
            found += [f"{key}: {part}" for part in parts]
        elif _is_checksum(mine) and _is_checksum(other):
            found.append(f"{key} differs")
        elif None in (mine, other) and _is_checksum(mine or other):
            found.append(f"{key} is {'there' if mine is None else 'here'} only")
        else:
            found.append(f"{key} is {mine} here, {other} there")
    return found


def _is_checksum(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64


def size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def no_link(path: str, flags: int) -> int:
    """An ``opener``: through a link that somebody has put there, another file would be changed.

    Raises:
        FileError: it is a link.
    """
    if os.path.islink(path):
        raise FileError(f"{path} is a link: expected a file that this command has written")
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_all(file: Any, block: memoryview) -> None:
    """To an unbuffered file, which may take less at a time."""
    with naming(file.name):
        while len(block):
            block = block[file.write(block) :]


class Shards:
    """A folder for each of several processes; who is done leaves a mark, who works holds a lock.

    Args:
        folder: where they lie.

    Raises:
        FileError: there is no such shard.
    """

    def __init__(self, folder: Path, num_shards: int, shard_id: int) -> None:
        if not 0 <= shard_id < num_shards:
            raise FileError(
                f"--shard-id must be from 0 to --num-shards - 1 = {num_shards - 1}, got {shard_id}"
            )
        self.folder, self.num_shards, self.shard_id = folder, num_shards, shard_id
        self._lock: Any = None

    def __getstate__(self) -> Dict[str, Any]:
        return {**vars(self), "_lock": None}  # for a worker process that is not forked

    def __iter__(self) -> Iterator[Path]:
        return map(self._path, range(self.num_shards))

    @property
    def own(self) -> Path:
        return self._path(self.shard_id)

    def _path(self, i: int) -> Path:
        return self.folder / f"shard-{i}-of-{self.num_shards}"

    def begin(self) -> bool:
        """Make this process's folder and lock it; False if its work is done already.

        Raises:
            FileError: another process is at it.
        """
        self.own.mkdir(parents=True, exist_ok=True)
        if self.done:
            return False
        self._lock = locked(self.own / "lock")
        return True

    @property
    def done(self) -> bool:
        return (self.own / "done").is_file()

    @property
    def all_done(self) -> bool:
        return all((path / "done").is_file() for path in self)

    def let_go(self, worker: int = 0) -> None:
        """Release the lock; in a worker process, too, which may live on when this one is killed."""
        if self._lock is not None:
            self._lock.close()

    def end(self) -> None:
        (self.own / "done").touch()
        self.let_go()


def locked(path: Path, wait: bool = False) -> Any:
    """Hold a file for this process; its end, however it comes, releases it.

    Raises:
        FileError: another process holds it, and this one is not to wait.
    """
    file = open(path, "w", opener=no_link)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise FileError(
            f"another process is writing {path.parent}: wait for it, or stop it first"
        ) from None
    except OSError:
        pass  # a file system without locks
    return file
