"""Open a cache, or refuse it; give the rows of a sentence."""

import logging
import os
from pathlib import Path
from typing import Any, Dict, List

import numpy as np

from ..files import digest
from . import layout
from .layout import CacheError

logger = logging.getLogger(__name__)


class CachedSubset:
    """One subset of a cache, memory-mapped: what processes read of it they share.

    Args:
        cache: the cache's folder.
        subset: ``train``, say.
        data: what ``describe_data`` says of the data that it is to be used with.

    Raises:
        CacheError: there is none, it is unfinished, damaged, of another version, or was made from
            something else.
    """

    def __init__(self, cache: str, subset: str, data: Dict[str, Any]) -> None:
        self.folder = Path(cache) / subset
        self.manifest = self._read_manifest(subset)
        self.k: int = self.manifest["k"]
        self.vocabulary: int = self.manifest["vocabulary"]
        self.temperatures: List[float] = self.manifest["temperatures"]
        self.samples: int = self.manifest.get("tail_samples", 0)
        found = layout.data_differences(data, self.manifest)
        if found:
            raise CacheError(
                f"the cache {self.folder} was made from something other than what it is used with: "
                f"{'; '.join(found)}. Use it with its own data, dictionaries and settings, or "
                "make a new one with fairseq-kd-cache."
            )
        self._types = layout.arrays(self.vocabulary, self.k, self.temperatures, self.samples)
        try:
            self._check_files()
            self._open()
        except OSError as error:
            raise CacheError(f"the cache {self.folder} cannot be read: {error}") from None
        self._check_offsets()
        self._check_symbols()
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

    def _made_with(self) -> Any:
        teachers = [(one["sha256"], one.get("weight")) for one in self.manifest["teachers"]]
        return self.k, self.temperatures, self.samples, teachers

    def __len__(self) -> int:
        return self.manifest["sentences"]

    def lengths(self) -> np.ndarray:
        """Number of rows of each sentence."""
        return np.diff(self.offsets)

    def rows(self, sentence: int) -> Dict[str, np.ndarray]:
        """All arrays of one sentence, views into the maps."""
        start, end = self.offsets[sentence], self.offsets[sentence + 1]
        return {name: array[start:end] for name, array in self._arrays.items()}

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

    def _check_files(self) -> None:
        sentences, rows = self.manifest["sentences"], self.manifest["rows"]
        expected = {name: rows * array.row_bytes for name, array in self._types.items()}
        expected[layout.OFFSETS] = 8 * (sentences + 1)
        for name, size in expected.items():
            path = layout.array_file(self.folder, name)
            if not path.is_file():
                raise CacheError(f"{path} is missing: make the cache again")
            if path.stat().st_size != size:
                raise CacheError(
                    f"{_damaged(path)}: expected {size} bytes, found {path.stat().st_size}. "
                    f"Delete {self.folder} and make the cache again."
                )
            if layout.checksum(path) != self.manifest["checksums"].get(name):
                raise CacheError(
                    f"{_damaged(path)}: its checksum is not the manifest's. Delete {self.folder} "
                    "and make the cache again."
                )

    def _open(self) -> None:
        rows = self.manifest["rows"]
        self.offsets = _mapped(layout.array_file(self.folder, layout.OFFSETS), "<i8", (-1,))
        self._arrays = {
            name: _mapped(layout.array_file(self.folder, name), array.dtype, (rows, *array.width))
            for name, array in self._types.items()
        }

    def _check_offsets(self) -> None:
        lengths = self.lengths()
        if self.offsets[0] != 0 or self.offsets[-1] != self.manifest["rows"] or (lengths < 0).any():
            path = layout.array_file(self.folder, layout.OFFSETS)
            raise CacheError(f"{_damaged(path)}: make the cache again")

    def _check_symbols(self) -> None:
        for name in ("symbols", "drawn"):
            symbols = self._arrays.get(name)
            if symbols is not None and len(symbols) and symbols.max() >= self.vocabulary:
                path = layout.array_file(self.folder, name)
                raise CacheError(
                    f"{_damaged(path)}: symbol {symbols.max()} of a vocabulary of "
                    f"{self.vocabulary}. Make the cache again."
                )

    def _warn_of_other_teachers(self) -> None:
        for teacher in self.manifest["teachers"]:
            path, size = teacher["path"], teacher["bytes"]
            try:
                if not os.path.isfile(path):  # gone, or nothing that ends
                    continue
                same = os.path.getsize(path) == size and digest(path) == teacher["sha256"]
            except (OSError, ValueError):  # not ours to read, or no path at all
                continue
            if not same:
                logger.warning(
                    f"the teacher {path} is no longer the one that the cache {self.folder} was "
                    "made with; training continues with what the cache holds"
                )

    # A worker process that does not share this one's memory opens the maps anew: pickled, a map
    # would be a copy of the whole file.

    def __getstate__(self) -> Dict[str, Any]:
        state = dict(self.__dict__)
        del state["offsets"], state["_arrays"]
        return state

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _mapped(path: Path, dtype: str, shape: Any) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty([max(n, 0) for n in shape], dtype)
    return np.memmap(path, dtype, mode="r").reshape(shape)


def _damaged(path: Path) -> str:
    return f"{path} is damaged"
