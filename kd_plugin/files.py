"""Files that are whole or not there, locks, and reading what a command has written.

On file systems without locks (some network file systems) everything works but the refusal of a
second process that writes the same files.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import random
import re
import shutil
import struct
import uuid
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Sequence

from .errors import UserError

_SAMPLED = 1 << 12  # bytes of a block of a sample
UNFINISHED = ".new"  # what a kill in the middle of writing a whole file leaves behind
# A name of ``temporary``, also where an ending was put behind it: nobody else writes such names
_TEMPORARY = re.compile(rf".+\.[0-9a-f]{{32}}{re.escape(UNFINISHED)}(\..+)?")

logger = logging.getLogger(__name__)


class FileError(UserError):
    """Files that cannot be used, or not be written; the message says why and what to do."""


class Busy(FileError):
    """Another process holds a lock; nothing else is a reason for this error."""


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


def leftovers(folder: Path) -> List[Path]:
    """What kills have left directly in a folder: files and folders with a ``temporary`` name."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name)]


def remove(path: Path) -> None:
    """A file or a folder, as far as the system allows."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def passing_folder(path: Path) -> Iterator[str]:
    """A folder for what is needed while a path is made: beside it, with a ``temporary`` name."""
    folder = temporary(path)
    folder.mkdir(mode=0o700)
    try:
        yield str(folder)
    finally:
        remove(folder)


@contextlib.contextmanager
def replacing(output: Path, overwrite: bool) -> Iterator[Path]:
    """Where to write a file or a folder; it becomes ``output`` if all goes well, and leaves
    nothing otherwise.

    Args:
        overwrite: whether something may be there already.

    Raises:
        FileError: something is, which may not.
    """
    new = temporary(output)
    try:
        yield new
        if output.exists() and not overwrite:
            raise FileError(f"{output} already exists: it was made while this command ran")
        if output.is_dir():
            old = temporary(output)
            os.replace(output, old)
            os.replace(new, output)
            shutil.rmtree(old)
        else:
            os.replace(new, output)
    finally:
        if new.is_dir():
            shutil.rmtree(new)
        elif new.exists():
            new.unlink()


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
def reading_binarised(
    what: Any, advice: str = "Binarise it again with fairseq-preprocess"
) -> Iterator[None]:
    """Data that a kill or a full disk cut short: fairseq says only which number did not fit.

    Its index is read first, and no sentence is missed before it is asked for; so ask for the last.

    Args:
        what: the data, for the message.
        advice: what to do about it.

    Raises:
        FileError: instead of these errors.
    """
    try:
        yield
    except (ValueError, AssertionError, struct.error) as error:
        reason = (str(error) or repr(error)).split("\n")[0]
        raise FileError(
            f"{what} cannot be read ({reason}): it is damaged or cut short. {advice}."
        ) from error


def read_whole(dataset: Any) -> None:
    """Ask a dataset for the last sentence of every file of it; to be called in
    ``reading_binarised``.

    fairseq's older format, of ``--dataset-impl lazy``, is fetched into memory. Read sentence by
    sentence it is one open file, where forked processes move each other's place: they would get
    other sentences than they ask for.
    """
    for part in _parts(dataset):
        if hasattr(part, "data_offsets"):
            _refuse_cut_short(part)
    if getattr(dataset, "supports_prefetch", False):
        dataset.prefetch(range(len(dataset)))
    for part in _parts(dataset):
        if len(part) > 0:
            part[len(part) - 1]


def _parts(dataset: Any) -> Iterator[Any]:
    """What a dataset of fairseq's is made of: a part for each file."""
    inner = [getattr(dataset, name, None) for name in ("src", "tgt", "align_dataset", "dataset")]
    inner = [part for part in (*inner, *getattr(dataset, "datasets", ())) if part is not None]
    for part in inner:
        yield from _parts(part)
    if not inner:
        yield dataset


def _refuse_cut_short(dataset: Any) -> None:
    """Of the older format fairseq reads what is there, and leaves the rest to chance."""
    index = 48 + 8 * (2 * (len(dataset) + 1) + dataset.s)
    sentences = int(dataset.data_offsets[-1]) * dataset.element_size
    for ending, expected in ((".idx", index), (".bin", sentences)):
        found = os.path.getsize(dataset.path + ending)
        if found < expected:
            raise ValueError(f"{ending} has {found} of {expected} bytes")


def refuse_unknown_numbers(tokens: Sequence[int], symbols: int) -> None:
    """Sentences of data, as numbers of a dictionary's symbols."""
    highest = int(max(tokens, default=0))
    if highest >= symbols:
        raise FileError(
            f"the data holds symbol number {highest}, and its dictionary has {symbols} symbols: "
            "it was binarised with a different dict.*.txt from the one beside it, or is damaged"
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


def digest(path: str) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            found.update(block)
    return found.hexdigest()


def digest_of_sample(path: str) -> str:
    """SHA-256 of a file's size and up to 16 MiB of its content, hexadecimal.

    Of a larger file 1 MiB in small blocks, the first and the last among them: the same ones of
    every file of its size. What it costs does not grow with the file.
    """
    size = os.path.getsize(path)
    found = hashlib.sha256(f"{size} ".encode())
    with open(path, "rb") as file:
        if size <= 1 << 24:
            found.update(file.read())
        else:
            last = size - _SAMPLED
            places = random.Random(size).sample(range(1, last), 254)
            for place in sorted([0, *places, last]):
                file.seek(place)
                found.update(file.read(_SAMPLED))
    return found.hexdigest()


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


def locked(path: Path, wait: bool = False) -> Any:
    """Hold a file for this process; closing it, or the end of the process, releases it.

    Raises:
        Busy: another process holds it, and this one is not to wait.
    """
    file = open(path, "w", opener=no_link)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        raise Busy(
            f"another process is writing {path.parent}: wait for it, or stop it first"
        ) from None
    except OSError as error:
        logger.warning(
            f"{path.parent} cannot be locked ({error}): make sure that no other process writes it"
        )
    return file
