"""Write a cache: in shards that append batch by batch and go on after a kill, merged at the end."""

import contextlib
import math
import os
import shutil
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..files import (
    UNFINISHED,
    Shards,
    all_or_nothing,
    differences,
    no_link,
    read_json,
    size,
    write_all,
    write_json,
)
from ..objective.answer import Dense
from . import layout
from .layout import CacheError

# Rows that are merged at a time, and bins of the covered mass from 0 to 1
_MERGE_ROWS = 1 << 17
_BINS = 10000


def teacher_rows(
    word: Dense, target: Tensor, k: int, temperatures: Sequence[float]
) -> Dict[str, np.ndarray]:
    """What a cache holds of some rows; see ``format``.

    Args:
        word: the teacher's logits, (n, V).
        target: references, (n,).
    """
    log_p = word.plain.log_probabilities()
    top, symbols = log_p.topk(k, dim=-1)
    values = {"log_probs": top, "reference": -word.nll(target), "entropy": word.entropy()}
    if layout.rests(log_p.size(-1), k, temperatures):
        others = log_p.scatter(-1, symbols, -math.inf)
        values["rests"] = torch.stack([(others / t).logsumexp(-1) for t in temperatures], dim=-1)
    types = layout.arrays(log_p.size(-1), k, temperatures)
    rows = {name: _half(value) for name, value in values.items()}
    rows["symbols"] = symbols.cpu().numpy()
    return {name: rows[name].astype(array.dtype) for name, array in types.items()}


def _half(x: Tensor) -> np.ndarray:
    """float16, with what is too low for it at its lowest; -inf stays what it is."""
    lowest = torch.finfo(torch.float16).min
    x = torch.where(x.isinf(), x, x.clamp(min=lowest))
    return x.to(torch.float16).cpu().numpy()


class CacheWriter:
    """Writes one subset, or one shard of it.

    Batches are planned once, for all shards together, and belong to them in turn: shard I of N has
    the batches I, I + N, ... However many shards there are, the cache is the same to the byte.

    Args:
        cache: the cache's folder.
        header: what the manifest will say of what the cache is made from; with ``subset``, ``k``,
            ``temperatures`` and ``vocabulary``.
        lengths: rows of each sentence; 0 for one that is left out.
        batches: sentences of each batch, of all shards.

    Raises:
        CacheError: the folder holds a cache, or the beginning of one, that was made from something
            else; or the disk has no room.
    """

    def __init__(
        self,
        cache: str,
        header: Dict[str, Any],
        lengths: np.ndarray,
        batches: Sequence[np.ndarray],
        num_shards: int = 1,
        shard_id: int = 0,
    ) -> None:
        self.folder = Path(cache) / header["subset"]
        self.shards = Shards(self.folder / layout.PARTIAL, num_shards, shard_id)
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.all_batches = list(batches)
        self.batches = self.all_batches[shard_id::num_shards]
        plan = zlib.crc32(b"".join(batch.tobytes() + b"|" for batch in self.all_batches))
        self.header = {
            "format": layout.FORMAT,
            "version": layout.VERSION,
            **header,
            "sentences": len(self.lengths),
            "rows": int(self.lengths.sum()),
            "plan": f"{plan:08x}",
        }
        self.types = layout.arrays(header["vocabulary"], header["k"], header["temperatures"])
        self.done = 0  # batches of this shard that are on disk
        self._files: Dict[str, Any] = {}

    # writing

    @property
    def complete(self) -> bool:
        return (self.folder / layout.MANIFEST).is_file()

    def begin(self) -> None:
        """Find out where this shard stopped; ``done`` batches are on disk already."""
        if self.complete:
            self._same_as(self.manifest(), "is complete, but")
            self.done = len(self.batches)
            return
        self._check_space()
        header = self.folder / layout.PARTIAL / layout.HEADER
        if header.is_file():
            self._same_as(read_json(header), "was begun, but")
        else:
            header.parent.mkdir(parents=True, exist_ok=True)
            write_json(header, self.header)
        if not self.shards.begin():
            self.done = len(self.batches)
            return
        rows = min(
            size(layout.array_file(self.shards.own, name)) // array.row_bytes
            for name, array in self.types.items()
        )
        ends = np.cumsum([self.lengths[batch].sum() for batch in self.batches], dtype=np.int64)
        self.done = int(np.searchsorted(ends, rows, side="right"))
        whole = int(ends[self.done - 1]) if self.done else 0
        self._rows = int(ends[-1]) if len(ends) else 0
        for name, array in self.types.items():
            # what a kill left behind the last whole batch is cut off
            path = layout.array_file(self.shards.own, name)
            file = open(path, "ab", buffering=0, opener=no_link)
            file.truncate(whole * array.row_bytes)
            self._files[name] = file

    def append(self, rows: Dict[str, np.ndarray]) -> None:
        """Write the rows of this shard's next batch, its sentences in the order of the plan."""
        expected = int(self.lengths[self.batches[self.done]].sum())
        for name, array in self.types.items():
            block = rows[name]
            assert block.shape == (expected, *array.width), (name, block.shape, expected)
            write_all(self._files[name], _bytes(block))
        self.done += 1

    def finish(self, targets: Callable[[int], np.ndarray]) -> bool:
        """Close this shard; if it was the last one, merge all. True if the cache is complete.

        Args:
            targets: the target symbols of a sentence, for the summary.
        """
        if self.complete:
            self._clean_up()
            return True
        if not self.shards.done:
            assert self.done == len(self.batches)
            header = self.folder / layout.PARTIAL / layout.HEADER
            self._same_as(read_json(header), "was begun, but")
            for name, file in self._files.items():
                os.fsync(file.fileno())
                file.close()
                if size(Path(file.name)) != self._rows * self.types[name].row_bytes:
                    raise CacheError(
                        f"{file.name} was written to by something else: delete {self.shards.own} "
                        "and run the same command again"
                    )
            self.shards.end()
        if not self.shards.all_done:
            return False
        try:
            self._merge(targets)
        except FileNotFoundError:
            # another shard ended at the same moment, merged the same bytes, and cleaned up
            if not self.complete:
                raise
        self._clean_up()
        return True

    def manifest(self) -> Dict[str, Any]:
        return layout.read_manifest(self.folder)

    def _same_as(self, found: Dict[str, Any], what: str) -> None:
        ours, theirs = _without_paths(self.header), _without_paths(found)
        different = differences(ours, theirs, ours)
        if different:
            raise CacheError(
                f"the cache {self.folder} {what} with something else: {'; '.join(different)}. "
                "Repeat the command that made it, choose another --cache, or delete that folder."
            )

    def _check_space(self) -> None:
        """Twice the size: the shards, and what they are merged into."""
        self.folder.mkdir(parents=True, exist_ok=True)
        row = sum(array.row_bytes for array in self.types.values())
        there = sum(size(file) for file in self.folder.rglob("*.bin"))
        needed = 2 * row * self.header["rows"] - there
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise CacheError(
                f"the cache {self.folder} needs {needed / 1000000000.0:.1f} GB more while it is "
                f"written ({row} bytes for each of {self.header['rows']} target tokens, twice "
                f"until its shards are merged), and {free / 1000000000.0:.1f} GB are free: make "
                "room, or take a smaller --top-k"
            )

    # merging

    def _merge(self, targets: Callable[[int], np.ndarray]) -> None:
        """The shards' rows in the order of sentences; the manifest last."""
        shards = self._locate()
        checksums = {}
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype("<i8")
        for name in (*self.types, layout.OFFSETS):
            final = layout.array_file(self.folder, name)
            with all_or_nothing(final) as file:
                value = 0
                blocks = [offsets] if name == layout.OFFSETS else self._merged(name, shards)
                for block in blocks:
                    value = zlib.crc32(_bytes(block), value)
                    file.write(_bytes(block))
            checksums[name] = f"{value:08x}"
        summary = self._summary(offsets, targets)
        manifest = {**self.header, "checksums": checksums, "summary": summary}
        layout.write_manifest(self.folder, manifest)

    def _clean_up(self) -> None:
        """Of a complete cache: the shards, and what a kill left of a merge."""
        shutil.rmtree(self.folder / layout.PARTIAL, ignore_errors=True)
        for file in self.folder.glob("*" + UNFINISHED):
            with contextlib.suppress(OSError):
                file.unlink()

    def _locate(self) -> np.ndarray:
        """For each sentence its shard and its first row there, (sentences, 2)."""
        place = np.zeros((len(self.lengths), 2), dtype=np.int64)
        for i in range(self.shards.num_shards):
            batches = self.all_batches[i :: self.shards.num_shards]
            if batches:
                order = np.concatenate(batches)
                ends = np.cumsum(self.lengths[order])
                place[order, 0] = i
                place[order, 1] = ends - self.lengths[order]
        return place

    def _merged(self, name: str, place: np.ndarray) -> Iterator[np.ndarray]:
        array = self.types[name]
        sources = [_mapped(layout.array_file(shard, name), array) for shard in self.shards]
        for sentences in self._blocks():
            lengths = self.lengths[sentences]
            block = np.empty((int(lengths.sum()), *array.width), array.dtype)
            starts = np.cumsum(lengths) - lengths
            for i, source in enumerate(sources):
                of_shard = place[sentences, 0] == i
                to = _ranges(starts[of_shard], lengths[of_shard])
                block[to] = source[_ranges(place[sentences, 1][of_shard], lengths[of_shard])]
            yield block

    def _blocks(self) -> Iterator[slice]:
        """Sentences in order, so many at a time that their rows fit into memory."""
        ends = np.cumsum(self.lengths)
        start = 0
        while start < len(ends):
            before = ends[start - 1] if start else 0
            end = max(int(np.searchsorted(ends, before + _MERGE_ROWS, side="right")), start + 1)
            yield slice(start, end)
            start = end

    def _summary(
        self, offsets: np.ndarray, targets: Callable[[int], np.ndarray]
    ) -> Dict[str, float]:
        """Means over all rows, of what the arrays hold."""
        rows = self.header["rows"]
        arrays = {
            name: _mapped(layout.array_file(self.folder, name), self.types[name])
            for name in ("log_probs", "reference", "entropy", "symbols")
        }
        covered, nll, entropy, agreeing = 0.0, 0.0, 0.0, 0
        histogram = np.zeros(_BINS, dtype=np.int64)
        for sentences in self._blocks():
            here = slice(offsets[sentences.start], offsets[sentences.stop])
            mass = np.exp(arrays["log_probs"][here].astype(np.float64)).sum(-1).clip(0, 1)
            covered += mass.sum()
            histogram += np.histogram(mass, _BINS, (0, 1))[0]
            nll -= arrays["reference"][here].astype(np.float64).sum()
            entropy += arrays["entropy"][here].astype(np.float64).sum()
            with_rows = [i for i in range(sentences.start, sentences.stop) if self.lengths[i]]
            if with_rows:
                reference = np.concatenate([targets(i) for i in with_rows])
                agreeing += int((arrays["symbols"][here][:, 0] == reference).sum())
        bytes_ = sum(size(layout.array_file(self.folder, n)) for n in (*self.types, "offsets"))
        per_row = 1 / max(rows, 1)
        low = int(np.searchsorted(np.cumsum(histogram), 0.01 * rows))
        values = (
            bytes_,
            bytes_ * per_row,
            covered * per_row,
            low / _BINS,
            nll * per_row / math.log(2),
            entropy * per_row / math.log(2),
            agreeing * per_row,
        )
        return dict(zip(layout.SUMMARY, values))


def _without_paths(header: Dict[str, Any]) -> Dict[str, Any]:
    """A teacher is the same wherever its file lies."""
    teachers = header.get("teachers")
    if not isinstance(teachers, list) or not all(isinstance(one, dict) for one in teachers):
        return header
    kept = [{k: v for k, v in one.items() if k != "path"} for one in teachers]
    return {**header, "teachers": kept}


def _bytes(block: np.ndarray) -> memoryview:
    return np.ascontiguousarray(block).reshape(-1).view(np.uint8).data


def _mapped(path: Path, array: layout.Array) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty((0, *array.width), array.dtype)
    return np.memmap(path, array.dtype, mode="r").reshape(-1, *array.width)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... for as many as each length says, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
