"""The folder that is written: a data-bin of the teacher's translations."""

import contextlib
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Set, Tuple

import numpy as np
from fairseq.data import Dictionary

from ..decoding import databin
from ..decoding.corpus import Corpus
from ..decoding.databin import DataBin
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
from . import dropped
from .choice import Chosen
from .filters import REASONS, in_words
from .hypotheses import HypothesisStore
from .mixing import RECORD, SHUFFLED, Mix, Pair, PairDigest, shuffled
from .student import Sentence, Student

logger = logging.getLogger(__name__)

TEXT_FOLDER = "text"
_RECORD, _TEXT, _LOCK = RECORD, TEXT_FOLDER, ".lock"
_DATA = "data"  # the folder in which the result is made
HYPOTHESES = "hypotheses"  # unless they are to lie somewhere else
_SPLIT = "train"


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
            self.found = read_record(self.folder)

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
        mix: Optional[Mix] = None,
    ) -> None:
        """Write the sentences with their chosen hypotheses.

        Args:
            mix: what comes before them.

        Raises:
            FileError: no sentence is left.
        """
        mixed = mix or Mix()
        kept = int((chosen.which >= 0).sum())
        counts = {
            "sentences": len(corpus.source),
            "dropped": chosen.dropped,
            "duplicates": chosen.duplicates,
            "distilled": kept,
        }
        if kept == 0:
            raise FileError(
                f"nothing is left: of {len(corpus.source)} sentences, "
                f"{in_words(chosen.dropped) or 'none was decoded'}. The hypotheses are kept; run "
                "the same command with other filters, or --no-filters."
            )

        def pairs(text: Path) -> Iterator[Pair]:
            yield from mixed.read(corpus.data, student)
            yield from _distilled(corpus, nbest, chosen, student, text / dropped.FILE)

        self._write(pairs, student, mixed, counts, chosen.means)

    def write_mixture(self, data: DataBin, student: Student, mix: Mix) -> None:
        """Write nothing but what is mixed.

        Args:
            data: whose dictionaries the original training set is in.

        Raises:
            FileError: there is nothing in it.
        """
        if mix.originals + mix.others == 0:
            raise FileError("--mix: of so few sentences such a share is none; give more weight")
        counts = {"sentences": 0, "dropped": {}, "duplicates": 0, "distilled": 0}
        means = dict.fromkeys(("score_per_token", "closeness", "backward"))
        self._write(lambda text: mix.read(data, student), student, mix, counts, means)

    def _write(
        self,
        pairs: Callable[[Path], Iterable[Pair]],
        student: Student,
        mix: Mix,
        counts: Dict[str, Any],
        means: Mapping[str, Optional[float]],
    ) -> None:
        """Everything under another name first; then what is to be replaced goes, its record first;
        the new record comes last.

        Args:
            pairs: gives them; it may write into the folder of texts.
        """
        for left in [*self._unfinished(), *self._unfinished(_RECORD)]:
            remove(left)
        new = temporary(self.folder / _DATA)
        (new / _TEXT).mkdir(parents=True)
        total = counts["distilled"] + mix.originals + mix.others
        try:
            with naming(new):
                databin.carry(student.data, new)
                found = pairs(new / _TEXT)
                if mix.order == SHUFFLED:
                    found = shuffled(found, total, mix.seed, new)
                tokens, digest = _write_split(new, found, total, student)
            record = {
                "settings": self.settings,
                "counts": {**counts, "original": mix.originals, "mixed": mix.others, **tokens},
                "means": means,
                "mix": mix.describe() if mix.parts else None,
                "pairs": digest,
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


def read_record(folder: Path) -> Dict[str, Any]:
    """The record of finished data.

    Raises:
        FileError: it cannot be read, or is of something else.
    """
    found = read_json(folder / _RECORD)
    try:
        known = isinstance(found["settings"], dict) and all(
            type(name) is str for name in found["files"]
        )
        summary_lines(found, folder)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        known = False
    if not known:
        raise FileError(f"{folder / _RECORD} is not a record of this command")
    return found


def _write_split(
    new: Path, pairs: Iterable[Pair], total: int, student: Student
) -> Tuple[Dict[str, int], Dict[str, Any]]:
    """Write the training set, binarised and as text.

    Returns:
        how many tokens there are, and what ``PairDigest`` says.
    """
    langs, digest = student.data.langs, PairDigest()
    dictionaries: List[Dictionary] = [student.data.source, student.data.target]
    sides = [
        databin.Writer(new / "{}.{}-{}.{}".format(_SPLIT, *langs, lang), len(dictionary))
        for lang, dictionary in zip(langs, dictionaries)
    ]
    files = [
        [
            open(str(new / _TEXT / f"{_SPLIT}{kind}.{lang}"), "w", encoding="utf-8")
            for kind in ("", ".subwords")
        ]
        for lang in langs
    ]
    unknown, unks = [0, 0], [dictionary.unk() for dictionary in dictionaries]
    tags: List[Set[str]] = [set(), set()]
    try:
        with progress_bar(total, "writing", "sentences") as progress:
            for pair in pairs:
                tokens = []
                for side, sentence in enumerate(pair):
                    if sentence.tags:
                        tags[side].update(sentence.tags)
                    indices = sentence.indices
                    if indices is None:
                        indices = databin.indices(dictionaries[side], sentence.subwords)
                    tokens.append(np.array(indices, dtype=np.int32))
                    unknown[side] += indices.count(unks[side])
                    sides[side].add(tokens[side])
                    files[side][0].write(sentence.text + "\n")
                    files[side][1].write(sentence.subwords + "\n")
                digest.add(tokens[0], tokens[1])
                progress.update(1)
    finally:
        for file in [*files[0], *files[1]]:
            file.close()
    for writer, lang, dictionary, count, seen in zip(sides, langs, dictionaries, unknown, tags):
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
    }, digest.describe()


def _distilled(
    corpus: Corpus, nbest: HypothesisStore, chosen: Chosen, student: Student, left_out: Path
) -> Iterator[Pair]:
    """Sentences with what was chosen; what was dropped is written to ``left_out``."""
    last = -1

    same = student.recode is None and student.data is corpus.data

    def read(i: int) -> Sentence:
        indices = corpus.source[i].tolist()
        found = student.sentence(databin.decode(corpus.data.source, indices))
        return found._replace(indices=indices) if same else found

    with open(str(left_out), "w", encoding="utf-8", newline="\n") as file:

        def drop(i: int, why: int, source: Sentence, hypothesis: Optional[Any] = None) -> None:
            content = (hypothesis and student.text(hypothesis)) or ""
            score = hypothesis.score if hypothesis else None
            file.write(dropped.Dropped(i + 1, REASONS[why], source.text, content, score).line())

        def skip(sentences: Iterable[int]) -> None:
            for i in sentences:
                if chosen.why[i, 0] >= 0:
                    drop(i, chosen.why[i, 0], read(i))

        for i, hypotheses in nbest:
            skip(range(last + 1, i))
            last, source = i, read(i)
            for j, why in zip(chosen.tried[i], chosen.why[i]):
                if why >= 0:
                    drop(i, why, source, hypotheses[j])
                elif j >= 0:
                    yield source, student.hypothesis(hypotheses[j])
        skip(range(last + 1, len(corpus.source)))


def score_in_words(record: Dict[str, Any]) -> Tuple[str, str]:
    """The mean score of what was chosen, and what it is: only a teacher's is a log-probability."""
    score = record["means"]["score_per_token"]
    if "imported" in (record["settings"].get("hypotheses") or {}):
        return "mean score", f"{score:.3f}"
    return "teacher's log-probability per token", f"{score / math.log(2):.3f} bits"


def summary_lines(record: Dict[str, Any], folder: Path) -> List[str]:
    """What a user wants to know of finished data."""
    counts, means = record["counts"], record["means"]
    lost = sum(counts["dropped"].values())
    mixed = counts.get("mixed", 0)  # records from before other data were mixed have none
    if counts["sentences"]:
        sentences = f"{counts['distilled']} distilled sentences"
        sentences += f" and {counts['original']} original ones" if counts["original"] else ""
        sentences += f" and {mixed} of other data" if mixed else ""
    else:
        sentences = f"{counts['original']} original sentences and {mixed} of other data"
    unknown = f" ({counts['unknown_tokens']} unknown)" if counts["unknown_tokens"] else ""
    reasons = f": {in_words(counts['dropped'])}" if lost else ""
    found = []
    if means["score_per_token"] is not None:
        found.append(" ".join(score_in_words(record)))
    if means["closeness"] is not None:
        found.append(f"mean closeness to the references {means['closeness']:.1f}")
    if means.get("backward") is not None:
        bits = means["backward"] / math.log(2)
        found.append(f"log-probability of the source per token {bits:.3f} bits")
    duplicates = counts.get("duplicates", 0)  # records from before several were kept have none
    passed = f"; {duplicates} duplicates were passed over" if duplicates else ""
    return [
        f"{folder}: {sentences}, "
        f"{counts['source_tokens']} source and {counts['target_tokens']} target tokens{unknown}",
        *(
            [f"  of {counts['sentences']} sentences {lost} were dropped{reasons}{passed}"]
            if counts["sentences"]
            else []
        ),
        *(["  " + ", ".join(found)] if found else []),
    ]
