"""Open a cache, or refuse it; give the rows of a sentence.

Opening compares sizes alone, so that it costs nothing that grows with the cache. Content is
compared with its checksums block by block, each when a process first reads of it.
"""

import logging
import mmap
import os
import zlib
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np

from ..files import digest
from ..timing import progress_bar
from . import layout
from .layout import CacheError

_VERIFIED_ROWS = 1 << 14
_NONE = np.zeros(0, dtype=np.uint16)

logger = logging.getLogger(__name__)


class CachedSubset:
    """One subset of a cache, open for reading; processes share what the system keeps of it.

    Args:
        cache: the cache's folder.
        subset: ``train``, say.
        data: gives what ``describe_data`` says of the data that it is to be used with.
        whole: compare these files as a whole, where samples of them would do.

    Raises:
        CacheError: there is none, it is unfinished, damaged, of another version, or was made from
            something else.
    """

    def __init__(self, cache: str, subset: str, data: layout.Describe, whole: bool = False) -> None:
        self.folder = Path(cache) / subset
        self.manifest = self._read_manifest(subset)
        self.k: int = self.manifest["k"]
        self.vocabulary: int = self.manifest["vocabulary"]
        self.temperatures: List[float] = self.manifest["temperatures"]
        self.samples: int = self.manifest.get("tail_samples", 0)
        found = layout.data_differences(data, self.manifest, whole)
        if found:
            raise CacheError(
                f"the cache {self.folder} was made from something other than what it is used with: "
                f"{'; '.join(found)}. Use it with its own data, dictionaries and settings, or "
                "make a new one with fairseq-kd-cache."
            )
        types = layout.arrays(self.vocabulary, self.k, self.temperatures, self.samples)
        self._types = {layout.OFFSETS: layout.Array("<i8", ()), **types}
        try:
            self._open()
            if "block_bytes" not in self.manifest:
                self._verify_whole(self._types)
        except OSError as error:
            raise CacheError(f"the cache {self.folder} cannot be read: {error}") from None
        lengths = self.lengths()
        if self.offsets[0] != 0 or self.offsets[-1] != self.manifest["rows"] or (lengths < 0).any():
            raise self._files[layout.OFFSETS].damaged("these are no offsets")
        self._warn_of_other_teachers()

    @staticmethod
    def exists(cache: str, subset: str) -> bool:
        """Whether there is one, finished or not."""
        return (Path(cache) / subset).is_dir()

    @property
    def whole(self) -> bool:
        """Whether the k are the whole vocabulary."""
        return self.k == self.vocabulary

    def compatible_with(self, other: "CachedSubset") -> bool:
        """Whether one student can be taught from both: the same teachers and kinds of rows."""
        return self._made_with() == other._made_with()

    @property
    def rows_hold(self) -> Any:
        """Rows of two caches for which this is equal can be in one batch."""
        return self.k, self.temperatures, self.samples

    def _made_with(self) -> Any:
        teachers = [
            (one["sha256"], one.get("weight"), one.get("tags")) for one in self.manifest["teachers"]
        ]
        return self.rows_hold, teachers

    def __len__(self) -> int:
        return self.manifest["sentences"]

    def lengths(self) -> np.ndarray:
        """Number of rows of each sentence."""
        return np.diff(self.offsets)

    def rows(self, sentence: int) -> Dict[str, np.ndarray]:
        """All arrays of one sentence.

        Raises:
            CacheError: one of the blocks in which they lie is damaged, or not there any more.
        """
        return self._rows(int(self.offsets[sentence]), int(self.offsets[sentence + 1]))

    def _rows(self, start: int, end: int) -> Dict[str, np.ndarray]:
        rows = {
            name: file.rows(start, end)
            for name, file in self._files.items()
            if name != layout.OFFSETS
        }
        for name in ("symbols", "drawn"):
            symbols = rows.get(name, _NONE)
            if symbols.max(initial=0) >= self.vocabulary:
                raise self._files[name].damaged(
                    f"symbol {symbols.max()} of a vocabulary of {self.vocabulary}"
                )
        return rows

    def verify(self) -> None:
        """Read all, and compare it with its checksums; with progress.

        Raises:
            CacheError: something is damaged.
        """
        self.verify_offsets()
        total, name = self.manifest["rows"], f"verifying {self.folder}"
        with progress_bar(total, name, "rows", unit_scale=True) as progress:
            for start in range(0, total, _VERIFIED_ROWS):
                end = min(start + _VERIFIED_ROWS, total)
                self._rows(start, end)
                progress.update(end - start)

    def verify_offsets(self) -> None:
        """Raises CacheError: where sentences begin is damaged."""
        self._verify_whole([layout.OFFSETS])

    # opening

    def _read_manifest(self, subset: str) -> Dict[str, Any]:
        path = self.folder / layout.MANIFEST
        if not path.is_file():
            if (self.folder / layout.PARTIAL).is_dir():
                raise CacheError(
                    f"the cache {self.folder} is not finished: run the same fairseq-kd-cache "
                    "again, it goes on where it stopped (with --num-shards, each shard)"
                )
            cache = self.folder.parent
            raise CacheError(
                f"no cache of the subset {subset} in {cache}: make it with fairseq-kd-cache DATA "
                f"--path teacher.pt --cache {cache} --gen-subset {subset}"
            )
        return layout.read_manifest(self.folder)

    def _open(self) -> None:
        rows = {name: self.manifest["rows"] for name in self._types}
        rows[layout.OFFSETS] = self.manifest["sentences"] + 1
        self._files = {
            name: _ArrayFile(self.folder, name, array, rows[name])
            for name, array in self._types.items()
        }
        if "block_bytes" in self.manifest:
            files = [file for name, file in self._files.items() if name != layout.OFFSETS]
            blocks = [layout.blocks_in(file.size) for file in files]
            kind = layout.Array("<u4", ())
            checksums = _ArrayFile(self.folder, layout.BLOCKS, kind, sum(blocks)).map()
            for file, end, number in zip(files, np.cumsum(blocks), blocks):
                file.compare_with(checksums[end - number : end])
        self.offsets: np.ndarray = self._files[layout.OFFSETS].map()

    def _verify_whole(self, names: Any) -> None:
        for name in names:
            if layout.checksum(self._files[name].path) != self.manifest["checksums"].get(name):
                raise self._files[name].damaged("its checksum is not the manifest's")

    def _warn_of_other_teachers(self) -> None:
        for teacher in self.manifest["teachers"]:
            path = teacher["path"]
            try:
                if not os.path.isfile(path):  # gone, or nothing that ends
                    continue
                found = os.stat(path)
                same = found.st_size == teacher["bytes"] and (
                    found.st_mtime_ns == teacher.get("modified_ns")
                    or digest(path) == teacher["sha256"]
                )
            except (OSError, ValueError):  # not ours to read, or no path at all
                continue
            if not same:
                logger.warning(
                    f"the teacher {path} is no longer the one that the cache {self.folder} was "
                    "made with; training continues with what the cache holds"
                )

    # A worker process that does not share this one's memory opens the files anew

    def __getstate__(self) -> Dict[str, Any]:
        state = dict(self.__dict__)
        del state["offsets"], state["_files"]
        return state

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


class _ArrayFile:
    """A file of an array, open for reading.

    It is read and not mapped: where a mapped file shrinks, the system kills its readers.

    Raises:
        CacheError: it is missing, or of another size.
    """

    def __init__(self, folder: Path, name: str, array: layout.Array, rows: int) -> None:
        self.path, self.array = layout.array_file(folder, name), array
        self.size = rows * array.row_bytes
        if not self.path.is_file():
            raise CacheError(f"{self.path} is missing: make the cache again")
        self._file = open(self.path, "rb", buffering=0)
        found = os.fstat(self._file.fileno()).st_size
        if found != self.size:
            raise self.damaged(f"expected {self.size} bytes, found {found}")
        self._checksums: Optional[np.ndarray] = None

    def compare_with(self, checksums: np.ndarray) -> None:
        """With these, a number for each block, all that is read from now on."""
        self._checksums = checksums
        # shared with the worker processes that are forked, of this epoch and of later ones
        self._compared = np.frombuffer(mmap.mmap(-1, max(len(checksums), 1)), np.uint8)

    def map(self) -> np.ndarray:
        """All of it, mapped into memory."""
        if self.size == 0:
            return np.empty(0, self.array.dtype)
        return np.memmap(self.path, self.array.dtype, mode="r")

    def rows(self, start: int, end: int) -> np.ndarray:
        """Those from start to end, not to be written to."""
        first, last = start * self.array.row_bytes, end * self.array.row_bytes
        if self._checksums is not None and first < last:
            for block in range(first // layout.BLOCK, (last - 1) // layout.BLOCK + 1):
                if not self._compared[block]:
                    self._compare(block)
        content = self._read(first, last)
        return np.frombuffer(content, self.array.dtype).reshape(-1, *self.array.width)

    def _compare(self, block: int) -> None:
        assert self._checksums is not None
        start = block * layout.BLOCK
        content = self._read(start, min(start + layout.BLOCK, self.size))
        if zlib.crc32(content) != self._checksums[block]:
            raise self.damaged(f"the checksum of its bytes from {start} on is not the cache's")
        self._compared[block] = 1

    def _read(self, start: int, end: int) -> bytes:
        content = os.pread(self._file.fileno(), end - start, start)
        if len(content) != end - start:
            raise self.damaged(f"it has been cut short to less than {end} bytes")
        return content

    def damaged(self, how: str) -> CacheError:
        return CacheError(
            f"{self.path} is damaged: {how}. Delete {self.path.parent} and make the cache again."
        )
