"""Write a cache: in shards that append batch by batch and go on after a kill, merged at the end."""

import math
import shutil
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import calibration
from ..files import all_or_nothing, size
from ..objective.answer import Dense
from ..shards import ShardedStore, fixed_rows
from . import layout
from .layout import CacheError

# Rows that are merged at a time, and bins of the covered mass from 0 to 1
_MERGE_ROWS = 1 << 17
_BINS = 10000
_TINY, _HUGE = 1e-30, 1e30


def teacher_rows(
    answer: Dense,
    target: Tensor,
    k: int,
    temperatures: Sequence[float],
    uniform: Optional[np.ndarray] = None,
) -> Dict[str, np.ndarray]:
    """What a cache holds of some rows; see ``layout``.

    Args:
        answer: the teacher's logits, (n, V).
        target: references, (n,).
        uniform: float64 in [0, 1), (n, S): draw S symbols of each row's tail with them.
    """
    log_p = answer.plain.log_probabilities()
    top, symbols = log_p.topk(k, dim=-1)
    values = {"log_probs": top, "reference": -answer.nll(target), "entropy": answer.entropy()}
    named, samples = {"symbols": symbols}, 0 if uniform is None else uniform.shape[1]
    if layout.rests(log_p.size(-1), k, temperatures):
        others = log_p.scatter(-1, symbols, -math.inf)
        values["rests"] = torch.stack([(others / t).logsumexp(-1) for t in temperatures], dim=-1)
        if uniform is not None:
            t, chances = temperatures[0], torch.from_numpy(uniform).to(others.device)
            named["drawn"] = draw(others / t, chances)
            values["tempered_entropy"] = Dense(log_p / t).entropy()
    rows = {name: _half(value) for name, value in values.items()}
    rows.update({name: value.cpu().numpy() for name, value in named.items()})
    types = layout.arrays(log_p.size(-1), k, temperatures, samples)
    return {name: rows[name].astype(array.dtype) for name, array in types.items()}


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Symbols drawn from the softmax of each row, one from each of S equal shares of its mass.

    Each draw by itself is right on average as independent ones are, and together they vary less
    (stratified sampling).

    Args:
        logits: (n, V); a row without any mass gives any symbols.
        uniform: float64 in [0, 1), (n, S).

    Returns:
        symbols, int64 (n, S).
    """
    mass = torch.softmax(logits.double(), dim=-1).nan_to_num_(nan=0.0).cumsum_(dim=-1)
    # above 0: the first symbol that reaches it has a probability, too
    share = torch.arange(1, uniform.size(1) + 1, dtype=torch.float64, device=logits.device)
    points = (share - uniform) / uniform.size(1) * mass[:, -1:]
    return torch.searchsorted(mass, points).clamp_(max=logits.size(1) - 1)


def uniform_of_sentence(seed: int, sentence: int, rows: int, samples: int) -> np.ndarray:
    """Random numbers that depend on nothing else, float64 in [0, 1), (rows, samples)."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, sentence], np.uint64)))
    return generator.random((rows, samples))


def _half(x: Tensor) -> np.ndarray:
    """float16, with what is too low for it at its lowest; -inf stays what it is."""
    lowest = torch.finfo(torch.float16).min
    x = torch.where(x.isinf(), x, x.clamp(min=lowest))
    return x.to(torch.float16).cpu().numpy()


class CacheWriter(ShardedStore):
    """Writes one subset, or one shard of it.

    Batches are planned once, for all shards together; see ``ShardedStore``.

    Args:
        cache: the cache's folder.
        header: what the manifest will say of what the cache is made from; with ``subset``, ``k``,
            ``temperatures`` and ``vocabulary``, and ``tail_samples`` if there are any.
        lengths: rows of each sentence; 0 for one that is left out.
        batches: sentences of each batch, of all shards.
        targets: the target token of each row of a sentence, for the summary.

    Raises:
        CacheError: the folder holds a cache, finished or not, that was made with other settings;
            or the disk has no room.
    """

    HEADER = f"{layout.PARTIAL}/{layout.HEADER}"
    SHARDS, RESULT = layout.PARTIAL, layout.MANIFEST
    CONTENT = "a cache"
    ADVICE = "Repeat the command that made it, choose another --cache, or delete that folder"
    ERROR = CacheError

    def __init__(
        self,
        cache: str,
        header: Dict[str, Any],
        lengths: np.ndarray,
        batches: Sequence[np.ndarray],
        *,
        targets: Callable[[int], np.ndarray],
        num_shards: int = 1,
        shard_id: int = 0,
    ) -> None:
        self.lengths, self.targets = np.asarray(lengths, dtype=np.int64), targets
        plan = zlib.crc32(b"".join(batch.tobytes() + b"|" for batch in batches))
        header = {
            "format": layout.FORMAT,
            "version": layout.VERSION,
            **header,
            "sentences": len(self.lengths),
            "rows": int(self.lengths.sum()),
            "plan": f"{plan:08x}",
        }
        self.types = layout.arrays(
            header["vocabulary"],
            header["k"],
            header["temperatures"],
            header.get("tail_samples", 0),
        )
        super().__init__(
            Path(cache) / header["subset"],
            header,
            {_file_name(name): fixed_rows(array.row_bytes) for name, array in self.types.items()},
            num_shards=num_shards,
            shard_id=shard_id,
        )
        self.use_plan(batches)

    def append(self, rows: Dict[str, np.ndarray]) -> None:
        """Write the rows of this shard's next batch, its sentences in the order of the plan."""
        expected = self.rows_in(self.batches[self.done])
        for name, array in self.types.items():
            shape = rows[name].shape
            assert shape == (expected, *array.width), (name, shape, expected)
        self.write({_file_name(name): _bytes(rows[name]) for name in self.types})

    def manifest(self) -> Dict[str, Any]:
        return layout.read_manifest(self.folder)

    # for the store

    def rows_in(self, batch: np.ndarray) -> int:
        return int(self.lengths[batch].sum())

    def settle_plan(self, plan: Optional[Sequence[np.ndarray]]) -> List[np.ndarray]:
        return self.plan  # any process makes the same: its checksum is in the header

    def found(self) -> Optional[Dict[str, Any]]:
        return self.manifest() if (self.folder / self.RESULT).is_file() else super().found()

    def comparable(self, header: Dict[str, Any]) -> Dict[str, Any]:
        """A teacher is the same wherever its file lies; digests of whole files tell of the data."""
        kept = {key: value for key, value in header.items() if key != "data"}
        teachers = header.get("teachers")
        if isinstance(teachers, list) and all(isinstance(one, dict) for one in teachers):
            place = ("path", "modified_ns")
            kept["teachers"] = [
                {k: v for k, v in one.items() if k not in place} for one in teachers
            ]
        return kept

    def check_room(self) -> None:
        """Twice the size: the shards, and what they are merged into."""
        self.folder.mkdir(parents=True, exist_ok=True)
        row = sum(array.row_bytes for array in self.types.values())
        there = sum(size(file) for file in self.folder.rglob("*.bin"))
        needed = 2 * row * self.header["rows"] - there
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise CacheError(
                f"the cache {self.folder} needs {needed / 1e9:.1f} GB more while it is "
                f"written ({row} bytes for each of {self.header['rows']} target tokens, twice "
                f"until its shards are merged), but only {free / 1e9:.1f} GB are free: make room, "
                "or use a smaller --top-k"
            )

    def merge(self) -> None:
        """The shards' rows in the order of sentences; the manifest last."""
        place = self._locate()
        checksums, of_blocks = {}, []
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype("<i8")
        for name in (layout.OFFSETS, *self.types):
            final = layout.array_file(self.folder, name)
            with all_or_nothing(final) as file:
                found = layout.Checksums()
                parts = [offsets] if name == layout.OFFSETS else self._merged(name, place)
                for part in parts:
                    found.update(_bytes(part))
                    file.write(_bytes(part))
            checksums[name] = f"{found.whole:08x}"
            of_blocks += [] if name == layout.OFFSETS else found.blocks
        with all_or_nothing(layout.array_file(self.folder, layout.BLOCKS)) as file:
            file.write(_bytes(np.array(of_blocks, dtype="<u4")))
        manifest = {
            **self.header,
            "checksums": checksums,
            "block_bytes": layout.BLOCK,
            "summary": self._summary(offsets),
        }
        layout.write_manifest(self.folder, manifest)

    def _locate(self) -> np.ndarray:
        """For each sentence its shard and its first row there, (sentences, 2)."""
        place = np.zeros((len(self.lengths), 2), dtype=np.int64)
        for i, (_, sentences) in enumerate(self.sentences_of_shards()):
            ends = np.cumsum(self.lengths[sentences])
            place[sentences, 0] = i
            place[sentences, 1] = ends - self.lengths[sentences]
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

    def _summary(self, offsets: np.ndarray) -> Dict[str, float]:
        """Means over all rows, of what the arrays hold.

        The calibration error is the expected one of the likeliest symbol (Guo et al. 2017, eq. 3,
        10 bins): how far its probability is from how often it is the reference.
        """
        rows = self.header["rows"]
        arrays = {
            name: _mapped(layout.array_file(self.folder, name), self.types[name])
            for name in ("log_probs", "reference", "entropy", "symbols")
        }
        covered, nll, entropy, tail, agreeing = 0.0, 0.0, 0.0, 0.0, 0
        others = max(self.header["vocabulary"] - self.header["k"], 1)
        histogram, sure = np.zeros(_BINS, dtype=np.int64), np.zeros(calibration.BINS)
        for sentences in self._blocks():
            here = slice(offsets[sentences.start], offsets[sentences.stop])
            log_p = arrays["log_probs"][here].astype(np.float64)
            p = np.exp(log_p)
            mass = p.sum(-1).clip(0, 1)
            covered += mass.sum()
            # KL from the teacher to one that shares the rest's mass out evenly
            rest = np.maximum(1 - mass, _TINY)
            head = -(p * np.maximum(log_p, -_HUGE)).sum(-1)
            tail_entropy = arrays["entropy"][here].astype(np.float64) - head
            tail += np.maximum(rest * np.log(others / rest) - tail_entropy, 0).sum()
            histogram += np.histogram(mass, _BINS, (0, 1))[0]
            nll -= arrays["reference"][here].astype(np.float64).sum()
            entropy += arrays["entropy"][here].astype(np.float64).sum()
            with_rows = [i for i in range(sentences.start, sentences.stop) if self.lengths[i]]
            if with_rows:
                reference = np.concatenate([self.targets(i) for i in with_rows])
                right = arrays["symbols"][here][:, 0] == reference
                agreeing += int(right.sum())
                sure += calibration.gaps(p[:, 0], right)
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
            tail * per_row / math.log(2),
            calibration.error(sure, rows),
        )
        return dict(zip((*layout.SUMMARY, *layout.MORE_SUMMARY), values))


def _file_name(array: str) -> str:
    return layout.array_file(Path(), array).name


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
