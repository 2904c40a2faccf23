"""A teacher's n-best lists on disk: written batch by batch in shards, merged in the data's order.

They lie in a folder::

    header.json         all that they depend on
    plan.npz            the batches: planned once, so that all shards and resumptions repeat them
    hypotheses.jsonl    a line for each sentence that was decoded, in the order of the data:
                        {"id": 7, "nbest": [{"score": -0.4, "finished": true, "subwords": "a b"}]}
    shards/             until then: a folder for each shard, with lines in the order of its batches
    source-*            a text's sentences in the teacher's indices
    ctranslate2-*       the teacher as CTranslate2 reads it

The likeliest hypothesis is the first one. A score is fairseq's: the sum of the log-probabilities in
nats, divided by the length (end of sentence included) to the power of ``--lenpen``.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from ..checkpoints.torchfile import check_stored
from ..decoding.engines import Hypothesis
from ..files import (
    UNFINISHED,
    FileError,
    Shards,
    all_or_nothing,
    differences,
    no_link,
    read_json,
    size,
    write_all,
    write_json,
)

_HEADER, _PLAN, _LINES, _SHARDS = "header.json", "plan.npz", "hypotheses.jsonl", "shards"
_KINDS = ("source", "ctranslate2")
_VERSION = 1


class HypothesisStore:
    """The n-best lists in a folder; one process writes one shard of them.

    Args:
        folder: where they lie.
        header: all that the lists depend on, as plain types.
    """

    def __init__(
        self, folder: Path, header: Dict[str, Any], num_shards: int = 1, shard_id: int = 0
    ) -> None:
        self.folder = Path(folder)
        self.header = {"format": "kd_plugin hypotheses", "version": _VERSION, **header}
        self.shards = Shards(self.folder / _SHARDS, num_shards, shard_id)
        self._kept: List[str] = []
        self.done = 0  # batches of this shard that are on disk
        self.batches: List[np.ndarray] = []  # of this shard
        self._all_batches: List[np.ndarray] = []

    @property
    def complete(self) -> bool:
        return (self.folder / _LINES).is_file() and not self.differences()

    @property
    def planned(self) -> bool:
        """Whether the batches are on disk."""
        return (self.folder / _PLAN).is_file() and not self.differences()

    def differences(self) -> List[str]:
        """Where the folder holds lists of something else."""
        path = self.folder / _HEADER
        return differences(self.header, read_json(path), self.header) if path.is_file() else []

    def refuse_others(
        self, advice: str = "Repeat the command that made them, or choose another folder"
    ) -> None:
        """Raises FileError: the folder holds lists of something else."""
        different = self.differences()
        if different:
            raise FileError(
                f"{self.folder} holds hypotheses made with something else: "
                f"{'; '.join(different)}. {advice}."
            )

    def clear(self) -> None:
        """Remove what lies there of this class, but not what ``beside`` has named."""
        kinds = [kind + "-*" for kind in _KINDS]
        # the header last: what a kill leaves must not pass for something else's
        for pattern in (_LINES, _PLAN, _SHARDS, *kinds, _HEADER):
            for path in self.folder.glob(pattern):
                if path.name.startswith(tuple(self._kept)):
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def beside(self, kind: str, *keys: str) -> Path:
        """Where something is kept for the next time.

        Args:
            keys: the parts of the header that it depends on. They are in its name, for it is
                written before the header is.
        """
        assert kind in _KINDS
        made_from = json.dumps({key: self.header[key] for key in keys}, sort_keys=True)
        name = f"{kind}-{hashlib.sha256(made_from.encode('utf-8')).hexdigest()[:12]}"
        self._kept.append(name)
        return self.folder / name

    def begin(self, plan: Optional[Sequence[np.ndarray]] = None) -> None:
        """Find out where this shard stopped: ``done`` of its ``batches`` are on disk already.

        Args:
            plan: the sentences of each batch, of all shards together. Shard I of N has the batches
                I, I + N, ... of the plan that was made first. Once ``planned``, none is needed.

        Raises:
            FileError: the folder holds lists of something else, or another process is at it.
        """
        self.refuse_others()
        self.folder.mkdir(parents=True, exist_ok=True)
        # before the plan, which then never is another header's
        if not (self.folder / _HEADER).is_file():
            write_json(self.folder / _HEADER, self.header)
        if plan is not None and not self.planned:
            _write_plan(self.folder / _PLAN, plan)
        self._all_batches = _read_plan(self.folder / _PLAN)
        self.batches = self._all_batches[self.shards.shard_id :: self.shards.num_shards]
        # other shards may have merged all while this process opened its teacher
        if self.complete or not self.shards.begin():
            self.done = len(self.batches)
            return
        # what a kill left behind the last whole batch is cut off
        self._file = open(self.shards.own / _LINES, "ab", buffering=0, opener=no_link)
        ends = _line_ends(self.shards.own / _LINES)
        lines = np.cumsum([len(batch) for batch in self.batches], dtype=np.int64)
        self.done = int(np.searchsorted(lines, len(ends), side="right"))
        self._file.truncate(int(ends[lines[self.done - 1] - 1]) if self.done else 0)

    def append(self, nbest: Dict[int, List[Hypothesis]]) -> None:
        """Write the lists of this shard's next batch, by sentence."""
        lines = [_line(int(i), nbest[int(i)]) for i in self.batches[self.done]]
        write_all(self._file, memoryview(b"".join(lines)))
        self.done += 1

    def finish(self) -> bool:
        """Close this shard; if it was the last one, merge all. True if the lists are complete.

        Raises:
            FileError: a shard does not hold what it should, or its folder holds others by now.
        """
        if self.complete:
            self.clean_up()
            return True
        if not self.shards.done:
            assert self.done == len(self.batches)
            self.refuse_others()
            os.fsync(self._file.fileno())
            self._file.close()
            self.shards.end()
        if not self.shards.all_done:
            return False
        try:
            self._merge()
        except FileNotFoundError:
            # another shard ended at the same moment, merged the same lines, and cleaned up
            if not self.complete:
                raise
        self.clean_up()
        return True

    def clean_up(self) -> None:
        """Of complete lists: the shards, and what kills left of anything else."""
        shutil.rmtree(self.folder / _SHARDS, ignore_errors=True)
        for path in self.folder.glob("*" + UNFINISHED + "*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()

    def __iter__(self) -> Iterator[Tuple[int, List[Hypothesis]]]:
        """Sentences with their lists, in the order of the data.

        Raises:
            FileError: the file is damaged.
        """
        with open(self.folder / _LINES, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield _read_line(line)
                except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
                    raise FileError(
                        f"{file.name}: line {number} is damaged. Delete {self.folder} and decode "
                        "again."
                    ) from None

    def _merge(self) -> None:
        """Sort lines by sentence; only where each begins is held in memory."""
        sentences, where, files = [], [], []
        try:
            for i, shard in enumerate(self.shards):
                batches = self._all_batches[i :: self.shards.num_shards]
                ends = _line_ends(shard / _LINES)
                ids = np.concatenate([np.zeros(0, np.int64), *batches])
                if len(ids) != len(ends):
                    raise FileError(
                        f"{shard} holds {len(ends)} sentences, expected {len(ids)}: delete that "
                        "folder and run its shard again"
                    )
                begins = np.concatenate([np.zeros(1, np.int64), ends])[: len(ids)]
                sentences.append(ids)
                where.append(np.stack([np.full(len(ids), i), begins], axis=1))
                files.append(open(shard / _LINES, "rb"))
            ids = np.concatenate(sentences)
            place = np.concatenate(where)
            with all_or_nothing(self.folder / _LINES) as merged:
                for at in np.argsort(ids, kind="stable"):
                    file = files[place[at, 0]]
                    file.seek(int(place[at, 1]))
                    line = file.readline()
                    if not line.startswith(b'{"id": %d,' % ids[at]):
                        raise FileError(
                            f"{file.name} is damaged: delete its folder and run that shard again"
                        )
                    merged.write(line)
        finally:
            for file in files:
                file.close()


def _line(sentence: int, nbest: Sequence[Hypothesis]) -> bytes:
    content = {"id": sentence, "nbest": [dict(one._asdict()) for one in nbest]}
    return json.dumps(content, ensure_ascii=False).encode("utf-8") + b"\n"


def _read_line(line: bytes) -> Tuple[int, List[Hypothesis]]:
    found = json.loads(line.decode("utf-8"))
    nbest = [
        Hypothesis(one["subwords"], float(one["score"]), one["finished"]) for one in found["nbest"]
    ]
    for one in nbest:
        if not isinstance(one.subwords, str) or "\n" in one.subwords:
            raise ValueError("no subwords")
        if not isinstance(one.finished, bool):
            raise ValueError("neither finished nor not")
        one.subwords.encode("utf-8")
    if type(found["id"]) is not int or found["id"] < 0 or not nbest:
        raise ValueError("no list of a sentence")
    return found["id"], nbest


def _line_ends(path: Path) -> np.ndarray:
    """Where each whole line of a file ends, in bytes."""
    if size(path) == 0:
        return np.zeros(0, dtype=np.int64)
    content = np.memmap(path, np.uint8, mode="r")
    block = 1 << 24
    parts = [
        np.flatnonzero(content[start : start + block] == 10) + start + 1
        for start in range(0, len(content), block)
    ]
    return np.concatenate(parts).astype(np.int64)


def _write_plan(path: Path, plan: Sequence[np.ndarray]) -> None:
    sentences = np.concatenate([np.zeros(0, np.int64), *plan]).astype(np.int64)
    lengths = np.array([len(batch) for batch in plan], dtype=np.int64)
    # A zip file on a full disk also prints a traceback when it is freed.
    content = io.BytesIO()
    np.savez(content, sentences=sentences, lengths=lengths)
    with all_or_nothing(path) as file:
        file.write(content.getbuffer())


def _read_plan(path: Path) -> List[np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            check_stored(archive)
        with np.load(path, allow_pickle=False) as found:
            sentences, lengths = found["sentences"], found["lengths"]
        for array in (sentences, lengths):
            if array.dtype != np.int64 or array.ndim != 1 or (array < 0).any():
                raise ValueError("expected natural numbers")
        if lengths.sum() != len(sentences) or len(np.unique(sentences)) != len(sentences):
            raise ValueError("expected each sentence once")
        return np.split(sentences, np.cumsum(lengths)[:-1]) if len(lengths) else []
    except Exception as error:  # of a zip file's, nearly any
        raise FileError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
