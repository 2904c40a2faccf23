"""The folder that is written: a data-bin of the teacher's translations."""

import contextlib
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import torch
from fairseq.data import Dictionary

from ..decoding import databin
from ..decoding.corpus import Corpus
from ..files import (
    FileError,
    differences,
    leftovers,
    locked,
    naming,
    read_json,
    remove,
    temporary,
    write_json,
)
from ..timing import progress_bar
from .choice import Chosen
from .filters import in_words
from .hypotheses import HypothesisStore
from .student import Sentence, Student

logger = logging.getLogger(__name__)

_RECORD, _TEXT, _LOCK = "record.json", "text", ".lock"
_DATA = "data"  # the folder in which the result is made
HYPOTHESES = "hypotheses"  # unless they are to lie somewhere else
_SPLIT = "train"


class Originals(NamedTuple):
    """A training set that is put before the distilled one.

    Attributes:
        source, target: sentences in the teacher's indices.
        repeat: how many times.
    """

    source: Sequence[torch.Tensor]
    target: Sequence[torch.Tensor]
    repeat: int = 1

    @property
    def sentences(self) -> int:
        return self.repeat * len(self.source)


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
        self.refresh()
        if self.found is not None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise FileError(f"--output {folder}: expected a folder, found a file")
        elif self.folder.is_dir() and set(os.listdir(self.folder)) - {HYPOTHESES, _LOCK}:
            if not self._unfinished():
                raise FileError(
                    f"--output {folder} holds files that this command did not write: choose "
                    "another folder"
                )

    def refresh(self) -> None:
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

    def lock(self, wait: bool = False) -> Any:
        """Hold the folder for this process until the result is closed.

        Raises:
            Busy: another process holds it, and this one is not to wait.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        return locked(self.folder / _LOCK, wait)

    def _unfinished(self, name: str = _DATA) -> List[Path]:
        """What a kill has left; it is removed last, so without it nothing of ours is there."""
        return [path for path in leftovers(self.folder) if path.name.startswith(name + ".")]

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
        *,
        originals: Optional[Originals] = None,
    ) -> None:
        """Everything under another name first; then what is to be replaced goes, its record first;
        the new record comes last.

        Args:
            originals: to be put before the distilled sentences.

        Raises:
            FileError: no sentence is left.
        """
        kept = int((chosen.which >= 0).sum())
        counts = {
            "sentences": len(corpus.source),
            "dropped": chosen.dropped,
            "duplicates": chosen.duplicates,
            "distilled": kept,
            "original": originals.sentences if originals else 0,
        }
        if kept == 0:
            raise FileError(
                f"nothing is left: of {len(corpus.source)} sentences, "
                f"{in_words(chosen.dropped) or 'none was decoded'}. The hypotheses are kept; run "
                "the same command with other filters, or --no-filters."
            )
        for left in [*self._unfinished(), *self._unfinished(_RECORD)]:
            remove(left)
        new = temporary(self.folder / _DATA)
        new.mkdir(parents=True)
        try:
            with naming(new):
                databin.carry(student.data, new)
                tokens = self._write_split(
                    new, corpus, nbest, chosen, student=student, originals=originals
                )
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
        *,
        student: Student,
        originals: Optional[Originals],
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
        unknown, unks = [0, 0], [dictionary.unk() for dictionary in dictionaries]
        tags: List[Set[str]] = [set(), set()]
        total = int((chosen.which >= 0).sum()) + (originals.sentences if originals else 0)
        try:
            with progress_bar(total, "writing", "sentences") as progress:
                for pair_ in self._pairs(corpus, nbest, chosen, student, originals=originals):
                    for side, sentence in enumerate(pair_):
                        if sentence.tags:
                            tags[side].update(sentence.tags)
                        tokens = databin.encode(dictionaries[side], sentence.subwords)
                        unknown[side] += int((tokens.numpy() == unks[side]).sum())
                        sides[side].add(tokens)
                        files[side][0].write(sentence.text + "\n")
                        files[side][1].write(sentence.subwords + "\n")
                    progress.update(1)
        finally:
            for file in [*files[0], *files[1]]:
                file.close()
        for writer, lang, dictionary, count, seen in zip(sides, pair, dictionaries, unknown, tags):
            writer.close()
            left_out = sorted(tag for tag in seen if tag not in dictionary.indices)
            if left_out:
                logger.warning(
                    f"{_SPLIT}.{lang} is written without tags of languages "
                    f"({', '.join(left_out[:5])}): they are no text, and the dictionary of "
                    "--student-data has none of them"
                )
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
        student: Student,
        *,
        originals: Optional[Originals],
    ) -> Iterator[Tuple[Sentence, Sentence]]:
        source, target = corpus.data.source, corpus.data.target
        if originals is not None:
            for _ in range(originals.repeat):
                for i in range(len(originals.source)):
                    yield (
                        student.sentence(databin.decode(source, originals.source[i].tolist())),
                        student.sentence(
                            databin.decode(target, originals.target[i].tolist()), target=True
                        ),
                    )
        for i, hypotheses in nbest:
            for j in chosen.which[i]:
                if j >= 0:
                    yield (
                        student.sentence(databin.decode(source, corpus.source[i].tolist())),
                        student.hypothesis(hypotheses[j]),
                    )


def summary_lines(record: Dict[str, Any], folder: Path) -> List[str]:
    """What a user wants to know of finished data."""
    counts, means = record["counts"], record["means"]
    dropped = sum(counts["dropped"].values())
    original = f" and {counts['original']} original ones" if counts["original"] else ""
    unknown = f" ({counts['unknown_tokens']} unknown)" if counts["unknown_tokens"] else ""
    reasons = f": {in_words(counts['dropped'])}" if dropped else ""
    found = []
    if means["score_per_token"] is not None:
        bits = means["score_per_token"] / math.log(2)
        found.append(f"teacher's log-probability per token {bits:.3f} bits")
    if means["closeness"] is not None:
        found.append(f"mean closeness to the references {means['closeness']:.1f}")
    if means.get("backward") is not None:
        bits = means["backward"] / math.log(2)
        found.append(f"log-probability of the source per token {bits:.3f} bits")
    duplicates = counts.get("duplicates", 0)  # records from before several were kept have none
    passed = f"; {duplicates} duplicates were passed over" if duplicates else ""
    return [
        f"{folder}: {counts['distilled']} distilled sentences{original}, "
        f"{counts['source_tokens']} source and {counts['target_tokens']} target tokens{unknown}",
        f"  of {counts['sentences']} sentences {dropped} were dropped{reasons}{passed}",
        *(["  " + ", ".join(found)] if found else []),
    ]
