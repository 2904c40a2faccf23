"""What several processes write together: each one its shard, batch by batch, merged once.

A store goes on after a kill where it stopped, and its result is the same to the byte however many
shards wrote it. In its folder lie a header (all that the result depends on), a folder for each
shard until they are merged, and the result.
"""

import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Type

import numpy as np

from .files import (
    FileError,
    differences,
    leftovers,
    locked,
    no_link,
    read_json,
    remove,
    size,
    write_all,
    write_json,
)

# Where each whole row of a file ends, in bytes
RowEnds = Callable[[Path], Sequence[int]]


def fixed_rows(row_bytes: int) -> RowEnds:
    """Rows that all have the same number of bytes."""
    return lambda path: range(row_bytes, size(path) + 1, row_bytes)


def line_ends(path: Path) -> Any:
    """Rows that are lines, int64 (lines,)."""
    start, parts = 0, [np.zeros(0, dtype=np.int64)]
    if path.is_file():
        with open(path, "rb") as file:  # mapped, it would count as memory of this process
            while True:
                block = file.read(1 << 24)
                if not block:
                    break
                ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 10)
                parts.append(ends.astype(np.int64) + start + 1)
                start += len(block)
    return np.concatenate(parts)


class Shards:
    """A folder for each of several processes; one that is done has a mark, one at work a lock.

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

    def claim(self) -> bool:
        """Make this process's folder and lock it; False if its work is done already.

        Raises:
            Busy: another process has it.
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

    def mark_done(self) -> None:
        (self.own / "done").touch()
        self.release()

    def release(self, worker: int = 0) -> None:
        """Release the lock; in a worker process, too, which may outlive a killed parent."""
        if self._lock is not None:
            self._lock.close()


class ShardedStore:
    """A folder that several processes write together; see the module.

    One process, one shard::

        store.begin(plan)                       # finds out where this shard stopped
        while store.done < len(store.batches):
            store.append(...)                   # the rows of store.batches[store.done]
        store.finish()                          # True if all shards are done, and merged

    The plan is the batches of all shards, each an array of sentence ids; shard I of N has the
    batches I, I + N, ... A subclass names its files, says how many rows a batch has in them and
    where rows end, and merges.

    Args:
        folder: where it lies.
        header: all that the result depends on, as plain types.
        files: of each file of a shard, where its rows end.
    """

    HEADER: str  # these three are relative to the folder
    SHARDS: str
    RESULT: str  # written last: with it the store is complete
    CONTENT: str  # for messages: what the folder holds
    ADVICE: str  # what to do if it was made with other settings
    ERROR: Type[FileError] = FileError

    def __init__(
        self,
        folder: Path,
        header: Dict[str, Any],
        files: Dict[str, RowEnds],
        *,
        num_shards: int = 1,
        shard_id: int = 0,
    ) -> None:
        self.folder, self.header, self.files = Path(folder), header, files
        self.shards = Shards(self.folder / self.SHARDS, num_shards, shard_id)
        self.plan: List[np.ndarray] = []
        self.batches: List[np.ndarray] = []  # of this shard
        self.done = 0  # so many of them are on disk
        self._open: Dict[str, Any] = {}
        self._sizes: Dict[str, int] = {}

    # for subclasses

    def rows_in(self, batch: np.ndarray) -> int:
        """How many rows a batch has in each file."""
        raise NotImplementedError

    def merge(self) -> None:
        """Make the result of the shards, its ``RESULT`` last."""
        raise NotImplementedError

    def comparable(self, header: Dict[str, Any]) -> Dict[str, Any]:
        """A header without what makes no difference."""
        return header

    def found(self) -> Optional[Dict[str, Any]]:
        """The header of what is in the folder."""
        path = self.folder / self.HEADER
        return read_json(path) if path.is_file() else None

    def check_room(self) -> None:
        """Refuse to begin what the disk cannot hold."""

    def settle_plan(self, plan: Optional[Sequence[np.ndarray]]) -> List[np.ndarray]:
        """The plan that all shards follow, given the one that this process has made."""
        assert plan is not None
        return list(plan)

    # what is there

    @property
    def complete(self) -> bool:
        """Whether the result is there, and made from what the header says."""
        return (self.folder / self.RESULT).is_file() and not self.differences()

    def differences(self) -> List[str]:
        """In words: where the folder's header is not this one."""
        found = self.found()
        if found is None:
            return []
        ours = self.comparable(self.header)
        return differences(ours, self.comparable(found), ours)

    def refuse_others(self, advice: Optional[str] = None) -> None:
        """Raises ``ERROR``: the folder holds something that was made with other settings."""
        different = self.differences()
        if different:
            raise self.ERROR(
                f"{self.folder} holds {self.CONTENT} made with other settings: "
                f"{'; '.join(different)}. {advice or self.ADVICE}."
            )

    # writing

    def begin(self, plan: Optional[Sequence[np.ndarray]] = None) -> None:
        """Claim this shard, and find out where it stopped: ``done`` of its ``batches`` are there.

        Raises:
            FileError: what the folder holds was made with other settings.
            Busy: another process writes this shard.
        """
        self.refuse_others()
        if not self.complete:
            self.check_room()
            header = self.folder / self.HEADER
            if not header.is_file():
                header.parent.mkdir(parents=True, exist_ok=True)
                write_json(header, self.header)
        self.use_plan(self.settle_plan(plan))
        # other shards may have merged all in the meantime
        if self.complete or not self.shards.claim():
            self.done = len(self.batches)
        else:
            self._resume()

    def use_plan(self, plan: Sequence[np.ndarray]) -> None:
        self.plan = list(plan)
        self.batches = self.plan[self.shards.shard_id :: self.shards.num_shards]

    def _resume(self) -> None:
        """Cut off what a kill left behind the last whole batch."""
        ends = {}
        for name, row_ends in self.files.items():
            path = self.shards.own / name
            self._open[name] = open(path, "ab", buffering=0, opener=no_link)
            ends[name] = row_ends(path)
        needed = np.cumsum([self.rows_in(batch) for batch in self.batches], dtype=np.int64)
        self.done = int(np.searchsorted(needed, min(map(len, ends.values())), side="right"))
        rows = int(needed[self.done - 1]) if self.done else 0
        for name, file in self._open.items():
            self._sizes[name] = int(ends[name][rows - 1]) if rows else 0
            file.truncate(self._sizes[name])

    def write(self, blocks: Dict[str, Any]) -> None:
        """Append the rows of this shard's next batch, as bytes, to each file."""
        for name, file in self._open.items():
            block = memoryview(blocks[name])
            write_all(file, block)
            self._sizes[name] += len(block)
        self.done += 1

    def finish(self) -> bool:
        """Close this shard; if it was the last one, merge all. True if the store is complete.

        Raises:
            FileError: a shard does not hold what it should, or the folder something else by now.
        """
        if self.complete:
            self.clean_up()
            return True
        if not self.shards.done:
            assert self.done == len(self.batches)
            self.refuse_others()
            for name, file in self._open.items():
                os.fsync(file.fileno())
                file.close()
                if size(self.shards.own / name) != self._sizes[name]:
                    raise self.ERROR(
                        f"{self.shards.own / name} was written to by something else: delete "
                        f"{self.shards.own} and run the same command again"
                    )
            self.shards.mark_done()
        if not self.shards.all_done:
            return False
        try:
            self.merge()
        except FileNotFoundError:
            # another shard ended at the same moment, merged the same, and cleaned up
            if not self.complete:
                raise
        self.clean_up()
        return True

    def close(self) -> None:
        """Leave the rest for another time; whatever is done stays on disk."""
        for file in self._open.values():
            file.close()
        self.shards.release()

    def clean_up(self) -> None:
        """Once it is complete: the shards go, and what kills left of anything else."""
        shutil.rmtree(self.folder / self.SHARDS, ignore_errors=True)
        for path in leftovers(self.folder):
            remove(path)

    def sentences_of_shards(self) -> Iterator[Tuple[Path, np.ndarray]]:
        """Each shard's folder, and its sentences in the order in which they were written."""
        for i, folder in enumerate(self.shards):
            batches = self.plan[i :: self.shards.num_shards]
            yield folder, np.concatenate([np.zeros(0, np.int64), *batches])
