"""Translations of elsewhere beside the sentences that they are of: checked first, then stored."""

import contextlib
import logging
import math
import unicodedata
from array import array
from itertools import islice
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

import numpy as np
from fairseq.data import Dictionary

from ...decoding import databin
from ...decoding.corpus import SourceLines
from ...decoding.engines import Hypothesis, TextHypothesis
from ...decoding.text import marks
from ...files import FileError, digest
from ...timing import progress_bar
from ..hypotheses import HypothesisStore
from ..student import SUBWORDS, TEXT, AnyHypothesis
from .formats import FORMATS, Item, recognise
from .lines import FLAG, Lines

logger = logging.getLogger(__name__)

CHECK, USE, IGNORE = "check", "use", "ignore"  # what the file's own sources are for
_BATCH = 1024  # sentences that are written at a time
_LOOKED_AT = 1000
_ENOUGH = 0.05  # of sentences with a mark of subwords, so that they are subwords
_SHOWN = 120


class Translations:
    """Files of one format, one after the other.

    Args:
        files: they are read again and again, and must not change in between.
        format: one of ``FORMATS``; None to recognise it.
        written: ``SUBWORDS`` or ``TEXT``; None to find out.
        dictionary: of the target; it has the subwords, and says how they are marked.
        encodes: whether something says how text becomes subwords.

    Attributes:
        written: of the two, what they are.
    """

    def __init__(
        self,
        files: Sequence[Lines],
        format: Optional[str],
        written: Optional[str],
        *,
        dictionary: Dictionary,
        encodes: bool,
    ) -> None:
        self.files, self.format = files, format or recognise(files[0])
        self.written = SUBWORDS
        if written is None:
            texts = (text for item in self for text, _ in item.translations)
            found = are_subwords(texts, dictionary, encodes)
            self.written = SUBWORDS if found else TEXT
        else:
            self.written = written
        names = ", ".join(file.name for file in files)
        how = "" if format and written else " (or say otherwise: --import-format, --import-as)"
        logger.info(f"{FLAG} {names}: format {self.format}, read as {self.written}{how}")

    def __iter__(self) -> Iterator[Item]:
        """Raises FileError: a line is not of this format."""
        for file in self.files:
            self._file = file
            yield from FORMATS[self.format](file, self.written == SUBWORDS)

    def fault(self, item: Item, message: str) -> FileError:
        """The error of what was read last."""
        return self._file.fault(message, item.line)

    @property
    def names(self) -> str:
        return f"{FLAG} {', '.join(file.name for file in self.files)}"

    def describe(self) -> Dict[str, Any]:
        """What hypotheses depend on: contents, not paths."""
        return {
            "imported": [{"sha256": digest(file.path)} for file in self.files],
            "format": self.format,
            "written": self.written,
        }

    def hypotheses(self, item: Item) -> List[AnyHypothesis]:
        """Those of a sentence that are not empty, the likeliest first; or an empty one."""
        kind: Any = TextHypothesis if self.written == TEXT else Hypothesis
        found = [kind(_one_line(text), score, True) for text, score in item.translations]
        found = [one for one in found if one[0]] or [kind("", math.nan, True)]
        if len(found) > 1 and not any(math.isnan(one.score) for one in found):
            found.sort(key=lambda one: -one.score)  # stable
        return found


def are_subwords(texts: Iterator[str], dictionary: Dictionary, encodes: bool) -> bool:
    """Whether lines are subwords of a dictionary, and not text.

    Args:
        encodes: whether something says how text becomes subwords, for dictionaries of symbols
            without marks.
    """
    of_subwords = marks(dictionary.symbols)
    if not of_subwords:
        return not encodes
    first = list(islice(texts, _LOOKED_AT))
    marked = sum(any(mark in text for mark in of_subwords) for text in first)
    return marked > 0 and marked >= _ENOUGH * len(first)


def _one_line(text: str) -> str:
    if "\n" in text or "\r" in text:
        text = " ".join(text.splitlines())
    return text.strip()


# Sources


class Sources:
    """The sentences that should have been translated.

    Args:
        name: where they are from.
        dictionary: of the source.
        sentences: its indices of each one, by its number.
        to_subwords: from running text to subwords of the dictionary.
    """

    def __init__(
        self,
        name: str,
        dictionary: Dictionary,
        sentences: Sequence[Any],
        to_text: Callable[[str], str],
        to_subwords: Callable[[str], str],
    ) -> None:
        self.name, self.dictionary, self._sentences = name, dictionary, sentences
        self._to_text, self._to_subwords = to_text, to_subwords

    def __len__(self) -> int:
        return len(self._sentences)

    def text(self, i: int) -> str:
        return self._to_text(databin.decode(self.dictionary, self._ids(i)))

    def difference(self, i: int, theirs: str) -> Optional[str]:
        """The text of sentence ``i``, if it is not ``theirs``; None if it is.

        ``theirs`` may be its subwords, too. Spaces make no difference, nor does what the data
        cannot hold: the form of characters that Unicode calls compatible, what subwords leave out,
        unknown symbols.
        """
        ours = self.text(i)
        if ours == theirs or _plain(ours) == _plain(theirs):
            return None
        for subwords in (theirs, self._to_subwords(theirs)):
            if databin.encode(self.dictionary, subwords).tolist() == self._ids(i):
                return None
        a, b = (_plain(unicodedata.normalize("NFKC", text)) for text in (ours, theirs))
        unknown = self.dictionary.unk_string()
        if a == b or (unknown in a and _fits(a.split(unknown), b)):
            return None
        return ours

    def _ids(self, i: int) -> List[int]:
        return self._sentences[i].tolist()


class TextSources(Sources):
    """Lines of a file.

    Args:
        name: the file.
        raw: whether its lines are text, not subwords.
    """

    def __init__(
        self,
        name: str,
        dictionary: Dictionary,
        to_text: Callable[[str], str],
        to_subwords: Callable[[str], str],
        *,
        raw: bool,
    ) -> None:
        super().__init__(name, dictionary, (), to_text, to_subwords)
        self._raw, self._lines = raw, SourceLines(name)

    def __len__(self) -> int:
        return len(self._lines)

    def text(self, i: int) -> str:
        return self._lines[i] if self._raw else self._to_text(self._lines[i])

    def _ids(self, i: int) -> List[int]:
        return databin.encode(self.dictionary, self._to_subwords(self._lines[i])).tolist()


def _plain(text: str) -> str:
    return " ".join(text.split())


def _fits(parts: Sequence[str], text: str) -> bool:
    """Whether a text is these parts with anything between them."""
    first, *middle, last = (part.strip() for part in parts)
    if not (text.startswith(first) and text.endswith(last)):
        return False
    at = len(first)
    for part in middle:
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return at <= len(text) - len(last)


# Checking, and storing


class Checked(NamedTuple):
    """What files hold that can be used.

    Attributes:
        sentences: int64, the number of each one, in the order of the files.
        scored: whether all translations have scores.
        empty: how many translations are empty.
    """

    sentences: np.ndarray
    scored: bool
    empty: int


def check(
    translations: Translations,
    sources: Optional[Sources],
    *,
    compare: bool,
    incomplete: bool = False,
) -> Checked:
    """Read all of them, and write nothing.

    Args:
        sources: what they should be of; None if it is the files' own sources.
        compare: whether these two are compared, where a file has sources.
        incomplete: whether some sentences may have no translation.

    Raises:
        FileError: they are no translations of these, with the first line that shows it.
    """
    numbers, scored, empty, compared, position, by_number = array("q"), True, 0, 0, -1, True
    total = None if sources is None else len(sources)
    seen = np.zeros(total or 0, dtype=bool)
    with progress_bar(total, "checking", "sentences") as progress:
        for position, item in enumerate(translations):
            if not item.translations:
                raise translations.fault(item, "a sentence without a translation")
            sentence = position
            if sources is None or total is None:
                if item.source is None:
                    raise translations.fault(item, "no source, which was to be taken from here")
            else:
                if item.sentence is None:
                    by_number = False
                else:
                    sentence = item.sentence
                if sentence >= total:
                    if item.sentence is None:
                        continue  # until their number is known
                    raise translations.fault(
                        item,
                        f"sentence {sentence}, and {sources.name} has {total} sentences, "
                        f"0 to {total - 1}",
                    )
                if seen[sentence]:
                    raise translations.fault(item, f"sentence {sentence} for a second time")
                seen[sentence] = True
                if compare and item.source is not None:
                    compared += 1
                    ours = sources.difference(sentence, item.source)
                    if ours is not None:
                        unquoted = item.source.strip('"').replace('""', '"')
                        if sources.difference(sentence, unquoted) is None:
                            raise translations.fault(
                                item,
                                f"its source is {item.source[:_SHOWN]!r}, with quotes as in CSV: "
                                "write the file without them, or as JSON lines",
                            )
                        raise translations.fault(
                            item,
                            f"its source is {item.source[:_SHOWN]!r}, and sentence {sentence} of "
                            f"{sources.name} is {ours[:_SHOWN]!r} (--import-source ignore would "
                            "not look, --import-source use would take the file's)",
                        )
            numbers.append(sentence)
            for text, score in item.translations:
                if not text or text.isspace():
                    empty += 1
                elif math.isnan(score):
                    scored = False
            progress.update(1)
    read = position + 1
    if not read:
        raise FileError(f"{translations.names}: expected at least one translation, found none")
    if sources is not None and read != total and not (incomplete and by_number):
        missing = np.flatnonzero(~seen)
        first = f"; the first without is {missing[0]}" if len(missing) else ""
        drop = " (--import-incomplete drops those without)" if by_number else ""
        if read == len(sources) + 1 and not by_number and item.translations[0][0] == "":
            drop = ": its last line is empty; delete it"
        raise FileError(
            f"{translations.names} has translations of {read} sentences, and {sources.name} has "
            f"{total}{first}{drop}"
        )
    if by_number and not compared and seen[1:2].any() and not seen[0]:
        raise FileError(
            f"{translations.names} has no sentence 0: ids count from 0. If these count from 1, "
            "subtract 1; if the first sentence has no translation, give it an empty one"
        )
    if sources is not None:
        same = f"; {compared} sources of theirs, all as in {sources.name}" if compared else ""
        logger.info(f"{translations.names}: translations of {read} sentences{same}")
    if empty:
        logger.warning(f"{translations.names}: {empty} empty translations are left out")
    return Checked(np.frombuffer(numbers, dtype=np.int64), scored, empty)


def fill(store: HypothesisStore, translations: Translations, checked: Checked) -> bool:
    """Store them, from where a kill has stopped it; True once the lists are complete.

    Raises:
        FileError: the files have changed since they were checked.
    """
    plan = np.split(checked.sentences, np.arange(_BATCH, len(checked.sentences), _BATCH))
    with contextlib.closing(store):
        store.begin(plan)
        before = sum(map(len, store.batches[: store.done]))
        items = islice(translations, before, None)
        with progress_bar(len(checked.sentences), "importing", "sentences", before) as progress:
            for batch in store.batches[store.done :]:
                found = [translations.hypotheses(item) for item in islice(items, len(batch))]
                if len(found) < len(batch):
                    raise FileError(f"{translations.names}: it has changed while it was read")
                store.append(dict(zip(batch.tolist(), found)))
                progress.update(len(batch))
        return store.finish()
