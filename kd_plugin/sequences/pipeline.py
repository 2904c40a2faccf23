"""From a corpus and a teacher's n-best lists to a data-bin of what the teacher says."""

import contextlib
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from fairseq.data import Dictionary
from tqdm import tqdm

from ..checkpoints import Checkpoint
from ..decoding import databin
from ..decoding.corpus import Corpus
from ..decoding.databin import DataBin
from ..export import ExportError, export_ctranslate2
from ..files import (
    UNFINISHED,
    FileError,
    differences,
    locked,
    naming,
    read_json,
    temporary,
    write_json,
)
from .choice import Filters, closeness, closest, new_counts, per_token
from .hypotheses import HypothesisStore

_RECORD, _TEXT = "record.json", "text"
_SPLIT = "train"


def decode(
    corpus: Corpus,
    engine: Any,
    store: HypothesisStore,
    plan: Optional[Sequence[np.ndarray]],
    num_workers: int,
) -> Tuple[int, int]:
    """Decode one shard, from where it stopped.

    Args:
        engine: has ``decode``, which turns collated batches into n-best lists, in turn.
        plan: the sentences of each batch; None if the store has one.

    Returns:
        numbers of sentences and of subwords that were decoded now.
    """
    store.begin(plan)
    if any((batch >= len(corpus.dataset)).any() for batch in store.batches):
        raise FileError(f"{store.folder} is a plan for other sentences")
    total = sum(map(len, store.batches))
    before = sum(map(len, store.batches[: store.done]))
    batches: Any = store.batches[store.done :]
    loader = torch.utils.data.DataLoader(
        corpus.dataset,
        batch_sampler=batches,
        collate_fn=corpus.dataset.collater,
        num_workers=num_workers,
        worker_init_fn=store.shards.let_go,
    )
    subwords = 0
    with _progress(total, "decoding", before) as progress:
        for nbest in engine.decode(loader):
            store.append(nbest)
            subwords += sum(len(databin.words(n[0].subwords)) + 1 for n in nbest.values())
            progress.update(len(nbest))
    return total - before, subwords


class Choice(NamedTuple):
    """How hypotheses are chosen, and sentences dropped.

    Attributes:
        select: "best" is the highest score, "closest" the highest closeness to the reference.
        metric: of the closeness: "bleu" or "chrf".
        min_closeness: least closeness of what is chosen, 0 to 100.
        min_score_quantile: share of sentences to drop, those with the teacher's lowest score per
            token.
    """

    select: str = "best"
    metric: str = "bleu"
    filters: Filters = Filters()
    min_closeness: Optional[float] = None
    min_score_quantile: float = 0.0

    @property
    def needs_references(self) -> bool:
        return self.select == "closest" or self.min_closeness is not None


class Student(NamedTuple):
    """What the data is written for.

    Attributes:
        data: its dictionaries, and what is carried over.
        detokenise: from subwords to running text.
        recode: from running text to its own subwords; None if they are the teacher's.
    """

    data: DataBin
    detokenise: Callable[[str], str]
    recode: Optional[Callable[[str], str]]


class Chosen(NamedTuple):
    """For each sentence the number of its hypothesis, or -1; and what became of all."""

    which: np.ndarray
    dropped: Dict[str, int]
    means: Dict[str, Optional[float]]


def choose(
    corpus: Corpus,
    nbest: HypothesisStore,
    student: Student,
    choice: Choice,
    lenpen: float,
    unnormalized: bool,
) -> Chosen:
    """Choose a hypothesis of each sentence, and drop what the filters drop."""
    sentences = len(corpus.source)
    which = np.full(sentences, -1, dtype=np.int32)
    scores = np.full(sentences, -np.inf, dtype=np.float64)
    close = np.full(sentences, np.nan, dtype=np.float64)
    dropped = new_counts()
    measure = closeness(choice.metric)
    decoded, last = 0, -1
    with _progress(sentences, "choosing") as progress:
        for i, hypotheses in nbest:
            if not last < i < sentences:
                raise FileError(
                    f"{nbest.folder} has sentence {i} where another was expected: it is damaged. "
                    "Delete it and decode again."
                )
            progress.update(1)
            decoded, last = decoded + 1, i
            source = databin.decode(corpus.data.source, corpus.source[i].tolist())
            text = student.detokenise
            reference = None
            if corpus.references is not None:
                target = corpus.references[i].tolist()
                reference = text(databin.decode(corpus.data.target, target))
            best = 0
            if choice.needs_references:
                assert reference is not None
                candidates = hypotheses if choice.select == "closest" else hypotheses[:1]
                measured = [measure(text(one.subwords), reference) for one in candidates]
                best = closest(measured)
                close[i] = measured[best]
            chosen = hypotheses[best]
            fault = choice.filters.fault(
                source, chosen, (text(source), text(chosen.subwords), reference)
            )
            if fault is None and student.recode is not None:
                unknown = corpus.data.source.unk_string()
                if unknown in databin.words(source) + databin.words(chosen.subwords):
                    fault = "unknown_symbol"  # whose text nobody knows
            if fault is None and choice.min_closeness is not None:
                if close[i] < choice.min_closeness:
                    fault = "far_from_reference"
            if fault is not None:
                dropped[fault] += 1
                continue
            which[i] = best
            scores[i] = per_token(chosen, lenpen, unnormalized)
    dropped["longer_than_the_teacher_reads"] = sentences - decoded
    if choice.min_score_quantile > 0 and (which >= 0).any():
        least = np.quantile(scores[which >= 0], choice.min_score_quantile)
        low = (which >= 0) & (scores < least)
        which[low] = -1
        dropped["low_score"] = int(low.sum())
    kept = which >= 0
    return Chosen(
        which,
        dropped,
        {
            "score_per_token": float(scores[kept].mean()) if kept.any() else None,
            "closeness": float(close[kept].mean())
            if kept.any() and choice.needs_references
            else None,
        },
    )


class Output:
    """The folder that is written: a data-bin, the text that it came from, and a record.

    Args:
        folder: it.
        settings: all that what is written depends on.

    Raises:
        FileError: the folder holds something else.
    """

    def __init__(self, folder: str, settings: Dict[str, Any]) -> None:
        self.folder, self.settings = Path(folder), settings
        self.found: Optional[Dict[str, Any]] = None
        self.look()
        if self.found is not None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise FileError(f"--output {folder}: expected a folder, found a file")
        elif self.folder.is_dir() and set(os.listdir(self.folder)) - {"hypotheses", ".lock"}:
            if not self._unfinished():
                raise FileError(
                    f"--output {folder} holds files that this command did not write: choose "
                    "another folder"
                )

    def look(self) -> None:
        """Read the record, if by now there is one."""
        if (self.folder / _RECORD).is_file():
            self.found = read_json(self.folder / _RECORD)
            try:
                known = isinstance(self.found["settings"], dict) and all(
                    type(name) is str for name in self.found["files"]
                )
                summary_lines(self.found, self.folder)
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
                known = False
            if not known:
                raise FileError(f"{self.folder / _RECORD} is not a record of this command")

    def _unfinished(self) -> List[Path]:
        """What a kill has left; it is removed last, so without it nothing of ours is there."""
        return list(self.folder.glob("data.*" + UNFINISHED))

    def clean_up(self) -> None:
        """Of complete data: what a kill left after the record."""
        for left in self._unfinished():
            with contextlib.suppress(OSError):  # not empty: another process is at it
                left.rmdir()

    def differences(self) -> List[str]:
        """Where what is there was made with other settings."""
        if self.found is None:
            return []
        return differences(self.settings, self.found["settings"], self.settings)

    @property
    def complete(self) -> bool:
        return self.found is not None and not self.differences()

    def record(self) -> Dict[str, Any]:
        """Settings, counts and means of what is complete."""
        assert self.found is not None
        return self.found

    def contents(self) -> str:
        """What ``write`` replaces."""
        names = self.record().get("files", [])
        return (
            f"{len(names)} files of {self.folder}: {', '.join(map(str, names))}, {_TEXT}/ and "
            f"{_RECORD}"
        )

    def write(
        self,
        corpus: Corpus,
        nbest: HypothesisStore,
        chosen: Chosen,
        student: Student,
        originals: Optional[Tuple[Any, Any]],
        repeat: int,
    ) -> None:
        """Everything under another name first; then what is to be replaced goes, its record first;
        the new record comes last.

        Args:
            originals: source and target sentences to put before the distilled ones, so many times.

        Raises:
            FileError: no sentence is left.
        """
        kept = int((chosen.which >= 0).sum())
        counts = {
            "sentences": len(corpus.source),
            "dropped": chosen.dropped,
            "distilled": kept,
            "original": repeat * len(originals[0]) if originals else 0,
        }
        if kept == 0:
            raise FileError(
                f"nothing is left: of {len(corpus.source)} sentences, "
                f"{said(chosen.dropped) or 'none was decoded'}. The hypotheses are kept; run the "
                "same command with other filters, or --no-filters."
            )
        for left in self._unfinished():
            shutil.rmtree(left)
        for left in self.folder.glob(_RECORD + ".*" + UNFINISHED):
            left.unlink()
        new = temporary(self.folder / "data")
        new.mkdir(parents=True)
        try:
            with naming(new):
                databin.copy(databin.carried_files(student.data), new)
                tokens = self._write_split(new, corpus, nbest, chosen, student, originals, repeat)
            record = {
                "settings": self.settings,
                "counts": {**counts, **tokens},
                "means": chosen.means,
                "files": sorted(path.name for path in new.iterdir() if path.is_file()),
            }
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        self._remove()
        for path in list(new.iterdir()):
            os.replace(path, self.folder / path.name)
        write_json(self.folder / _RECORD, record)
        shutil.rmtree(new, ignore_errors=True)
        self.found = record

    def _remove(self) -> None:
        """What this command wrote there, and nothing else."""
        if self.found is not None:
            (self.folder / _RECORD).unlink()
            for name in self.found.get("files", []):
                path = self.folder / os.path.basename(str(name))
                if path.is_file():
                    path.unlink()
        shutil.rmtree(self.folder / _TEXT, ignore_errors=True)

    def _write_split(
        self,
        new: Path,
        corpus: Corpus,
        nbest: HypothesisStore,
        chosen: Chosen,
        student: Student,
        originals: Optional[Tuple[Any, Any]],
        repeat: int,
    ) -> Dict[str, int]:
        text = new / _TEXT
        text.mkdir()
        pair = student.data.langs
        dictionaries: List[Dictionary] = [student.data.source, student.data.target]
        sides = [
            databin.Writer(new / "{}.{}-{}.{}".format(_SPLIT, *pair, lang), len(dictionary))
            for lang, dictionary in zip(pair, dictionaries)
        ]
        files = [
            [
                open(str(text / f"{_SPLIT}{kind}.{lang}"), "w", encoding="utf-8")
                for kind in ("", ".subwords")
            ]
            for lang in pair
        ]
        unknown = [0, 0]
        total = int((chosen.which >= 0).sum()) + (repeat * len(originals[0]) if originals else 0)
        try:
            with _progress(total, "writing") as progress:
                for sentence in self._pairs(corpus, nbest, chosen, originals, repeat):
                    for side in (0, 1):
                        subwords = sentence[side]
                        running = student.detokenise(subwords)
                        if student.recode is not None:
                            subwords = student.recode(running)
                        tokens = databin.encode(dictionaries[side], subwords)
                        unknown[side] += int(tokens.eq(dictionaries[side].unk()).sum())
                        sides[side].add(tokens)
                        files[side][0].write(running + "\n")
                        files[side][1].write(subwords + "\n")
                    progress.update(1)
        finally:
            for file in [*files[0], *files[1]]:
                file.close()
        for writer, lang, count in zip(sides, pair, unknown):
            writer.close()
            databin.warn_of_unknown(count, writer.tokens, f"{_SPLIT}.{lang}")
        return {
            "source_tokens": sides[0].tokens,
            "target_tokens": sides[1].tokens,
            "unknown_tokens": sum(unknown),
        }

    @staticmethod
    def _pairs(
        corpus: Corpus,
        nbest: HypothesisStore,
        chosen: Chosen,
        originals: Optional[Tuple[Any, Any]],
        repeat: int,
    ) -> Iterator[Tuple[str, str]]:
        source, target = corpus.data.source, corpus.data.target
        if originals is not None:
            for _ in range(repeat):
                for i in range(len(originals[0])):
                    yield (
                        databin.decode(source, originals[0][i].tolist()),
                        databin.decode(target, originals[1][i].tolist()),
                    )
        for i, hypotheses in nbest:
            if chosen.which[i] >= 0:
                yield (
                    databin.decode(source, corpus.source[i].tolist()),
                    hypotheses[chosen.which[i]].subwords,
                )


def alone(folder: Path, wait: bool = False) -> Any:
    """Hold a folder for this process, or None if another one does and this one is not to wait."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return locked(folder / ".lock", wait)
    except FileError:
        return None


def said(counts: Dict[str, int]) -> str:
    return ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in counts.items() if n)


def summary_lines(record: Dict[str, Any], folder: Path) -> List[str]:
    """What a user wants to know of finished data."""
    counts, means = record["counts"], record["means"]
    dropped = sum(counts["dropped"].values())
    lines = [
        "{}: {} distilled sentences{}, {} source and {} target tokens{}".format(
            folder,
            counts["distilled"],
            " and {} original ones".format(counts["original"]) if counts["original"] else "",
            counts["source_tokens"],
            counts["target_tokens"],
            " ({} unknown)".format(counts["unknown_tokens"]) if counts["unknown_tokens"] else "",
        ),
        f"  of {counts['sentences']} sentences {dropped} were "
        f"dropped{': ' + said(counts['dropped']) if dropped else ''}",
        "  teacher's log-probability per token {:.3f} bits{}".format(
            means["score_per_token"] / math.log(2),
            ""
            if means["closeness"] is None
            else ", mean closeness to the references {:.1f}".format(means["closeness"]),
        ),
    ]
    return lines


def _progress(total: int, what: str, done: int = 0) -> Any:
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit="sentences",
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )


def converted(checkpoint: Checkpoint, task: Any, folder: Path) -> Path:
    """A teacher as CTranslate2 reads it, kept in ``folder`` for the next time.

    Args:
        task: a translation task with its dictionaries.

    Raises:
        FileError: CTranslate2 is not installed, or takes no such model.
    """
    if (folder / "model.bin").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = temporary(folder)
    langs = task.cfg.source_lang, task.cfg.target_lang
    try:
        dictionaries = task.source_dictionary, task.target_dictionary
        export_ctranslate2(checkpoint, *dictionaries, langs, new)
        with contextlib.suppress(OSError):  # another process was first
            os.replace(new, folder)
    except ExportError as error:
        raise FileError(f"--engine ctranslate2: {error}. --engine fairseq takes any.") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder
