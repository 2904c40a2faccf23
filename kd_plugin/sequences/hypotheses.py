"""A teacher's n-best lists on disk: written batch by batch in shards, merged in the data's order.

They lie in a folder::

    header.json         all that they depend on
    plan.npz            the batches: planned once, so that all shards and resumptions repeat them
    hypotheses.jsonl    a line for each sentence that was decoded, in the order of the data:
                        {"id": 7, "nbest": [{"score": -0.4, "finished": true, "subwords": "a b"}]}
                        or with "text" for "subwords", where the header has "written": "text"
    shards/             until then: a folder for each shard, with lines in the order of its batches
    source-*            a text's sentences in the teacher's indices
    ctranslate2-*       the teacher as CTranslate2 reads it
    values-*            what each hypothesis is worth by some measure, 8 bytes each in their order

The likeliest hypothesis is the first one. A score is fairseq's: the sum of the log-probabilities in
nats, divided by the length (end of sentence included) to the power of ``--lenpen``; null where
nobody gave one.

Subwords are those of the data's target dictionary, as a fairseq teacher writes them. Text is what
any other translator writes: running text in one line; ``Student`` says how it becomes subwords.
"""

import bisect
import hashlib
import io
import json
import math
import shutil
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from ..checkpoints.torchfile import check_stored
from ..decoding.engines import Hypothesis, TextHypothesis
from ..files import FileError, all_or_nothing
from ..shards import ShardedStore, line_ends
from .student import SUBWORDS, TEXT, AnyHypothesis

_PLAN, _LINES = "plan.npz", "hypotheses.jsonl"
_KINDS = ("source", "ctranslate2")
_VALUES = "values-"
_VERSION = 1
_ENCODE = json.JSONEncoder(ensure_ascii=False).encode
_DECODE = json.JSONDecoder().decode


class HypothesisStore(ShardedStore):
    """The n-best lists in a folder; one process writes one shard of them.

    Args:
        folder: where they lie.
        header: all that the lists depend on, as plain types. With ``"written": "text"`` they are
            lists of ``TextHypothesis``, else of ``Hypothesis``.
    """

    HEADER, SHARDS, RESULT = "header.json", "shards", _LINES
    CONTENT = "hypotheses"
    ADVICE = "Repeat the command that made them, or choose another folder"

    def __init__(
        self, folder: Path, header: Dict[str, Any], num_shards: int = 1, shard_id: int = 0
    ) -> None:
        super().__init__(
            folder,
            {"format": "kd_plugin hypotheses", "version": _VERSION, **header},
            {_LINES: line_ends},
            num_shards=num_shards,
            shard_id=shard_id,
        )
        self._kept: List[str] = []
        self.written = header.get("written", SUBWORDS)
        self.kind: Any = TextHypothesis if self.written == TEXT else Hypothesis

    def comparable(self, header: Dict[str, Any]) -> Dict[str, Any]:
        return {"written": SUBWORDS, **header}

    @property
    def planned(self) -> bool:
        """Whether the batches are on disk."""
        return (self.folder / _PLAN).is_file() and not self.differences()

    def clear(self) -> None:
        """Remove what lies there of this class, but not what ``beside`` has named."""
        kinds = [kind + "-*" for kind in _KINDS] + [_VALUES + "*"]
        # the header last: what a kill leaves must not pass for something else's
        for pattern in (_LINES, _PLAN, self.SHARDS, *kinds, self.HEADER):
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

    def values(self, depends_on: Dict[str, Any]) -> Path:
        """Where values of these hypotheses are kept.

        Args:
            depends_on: all that they depend on beside the lists, as plain types.
        """
        made_from = json.dumps(depends_on, sort_keys=True).encode("utf-8")
        return self.folder / f"{_VALUES}{hashlib.sha256(made_from).hexdigest()[:12]}"

    def append(self, nbest: Mapping[int, Sequence[AnyHypothesis]]) -> None:
        """Write the lists of this shard's next batch, by sentence."""
        lines = [_line(int(i), nbest[int(i)]) for i in self.batches[self.done]]
        self.write({_LINES: b"".join(lines)})

    def __iter__(self) -> Iterator[Tuple[int, List[AnyHypothesis]]]:
        """Sentences with their lists, in the order of the data.

        Raises:
            FileError: the file is damaged.
        """
        with open(self.folder / _LINES, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield _read_line(line, self.kind)
                except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
                    raise FileError(
                        f"{file.name}: line {number} is damaged. Delete {self.folder} and decode "
                        "again."
                    ) from None

    # for the store

    def rows_in(self, batch: np.ndarray) -> int:
        return len(batch)

    def settle_plan(self, plan: Optional[Sequence[np.ndarray]]) -> List[np.ndarray]:
        """The one that was made first; once it is ``planned``, none need be given."""
        if plan is not None and not self.planned:
            _write_plan(self.folder / _PLAN, plan)
        return _read_plan(self.folder / _PLAN)

    def merge(self) -> None:
        """Sort lines by sentence; only where each begins is held in memory."""
        total = sum(map(len, self.plan))
        sentences, begins = np.zeros(total, np.int64), np.zeros(total, np.int64)
        first, files = [0], []  # of each shard
        try:
            for shard, ids in self.sentences_of_shards():
                ends = line_ends(shard / _LINES)
                if len(ids) != len(ends):
                    raise FileError(
                        f"{shard} holds {len(ends)} sentences, expected {len(ids)}: delete that "
                        "folder and run its shard again"
                    )
                sentences[first[-1] : first[-1] + len(ids)] = ids
                begins[first[-1] + 1 : first[-1] + len(ids)] = ends[:-1]
                files.append(open(shard / _LINES, "rb"))
                first.append(first[-1] + len(ids))
            with all_or_nothing(self.folder / _LINES) as merged:
                for at in np.argsort(sentences, kind="stable"):
                    file = files[bisect.bisect_right(first, at) - 1]
                    file.seek(int(begins[at]))
                    line = file.readline()
                    if not line.startswith(b'{"id": %d,' % sentences[at]):
                        raise FileError(
                            f"{file.name} is damaged: delete its folder and run that shard again"
                        )
                    merged.write(line)
        finally:
            for file in files:
                file.close()
        self.use_plan(())  # large, and no longer needed


def _line(sentence: int, nbest: Sequence[AnyHypothesis]) -> bytes:
    lists = []
    for one in nbest:
        content, score, finished = one
        known = None if math.isnan(score) else score
        lists.append({one._fields[0]: content, "score": known, "finished": finished})
    return (_ENCODE({"id": sentence, "nbest": lists}) + "\n").encode("utf-8")


def _read_line(line: bytes, kind: Any) -> Tuple[int, List[AnyHypothesis]]:
    found = _DECODE(line.decode("utf-8"))
    written, nbest = kind._fields[0], []
    escaped = b"\\u" in line  # which alone can spell what is no text
    for one in found["nbest"]:
        content, score, finished = one[written], one["score"], one["finished"]
        if not isinstance(content, str) or "\n" in content:
            raise ValueError(f"no {written}")
        if not isinstance(finished, bool):
            raise ValueError("neither finished nor not")
        if escaped:
            content.encode("utf-8")
        nbest.append(kind(content, math.nan if score is None else float(score), finished))
    if type(found["id"]) is not int or found["id"] < 0 or not nbest:
        raise ValueError("no list of a sentence")
    return found["id"], nbest


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
