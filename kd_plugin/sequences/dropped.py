"""``text/dropped.tsv``: a line for each hypothesis that was dropped, with the reason.

Number of the sentence in the data that was translated, from 1; reason, one of ``REASONS``; source;
hypothesis; the teacher's score. Between them are tabs; in them, ``\\t``, ``\\n``, ``\\r`` and
``\\\\`` stand for a tab, ends of lines and a backslash. A sentence without any hypothesis has the
last two empty.
"""

import math
import re
from pathlib import Path
from typing import Iterator, NamedTuple, Optional

from ..files import FileError

FILE = "dropped.tsv"
LONGEST_LINE = 1 << 24  # bytes that are read of a line
_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_UNESCAPES = {escaped: plain for plain, escaped in _ESCAPES.items()}


class Dropped(NamedTuple):
    """A line of the file.

    Attributes:
        score: as the teacher gave it; None without one.
    """

    sentence: int
    reason: str
    source: str
    hypothesis: str = ""
    score: Optional[float] = None

    def line(self) -> str:
        given = self.score is not None and not math.isnan(self.score)
        fields = (
            str(self.sentence),
            self.reason,
            _escape(self.source),
            _escape(self.hypothesis),
            f"{self.score:.6g}" if given else "",
        )
        return "\t".join(fields) + "\n"


def read(path: Path) -> Iterator[Dropped]:
    """The lines of a file.

    Raises:
        FileError: one is no such line.
    """
    for number, line in enumerate(lines_of(path), 1):
        fields = line.split("\t")
        try:
            sentence, reason, source, hypothesis, score = fields
            yield Dropped(
                int(sentence),
                reason,
                _unescape(source),
                _unescape(hypothesis),
                float(score) if score else None,
            )
        except ValueError:
            raise FileError(
                f"{path}: line {number} is damaged: expected a number, a reason, source, "
                "hypothesis and score, with tabs between"
            ) from None


def lines_of(path: Path) -> Iterator[str]:
    """Lines of a text, which end with a line feed alone.

    Raises:
        FileError: it is no text in UTF-8, or has a line that no sentence is as long as.
    """
    with open(path, "rb") as file:
        for number in range(1, 1 << 62):
            line = file.readline(LONGEST_LINE)
            if not line:
                return
            if len(line) == LONGEST_LINE:
                raise FileError(f"{path}: line {number} has {LONGEST_LINE} bytes or more")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise FileError(f"{path}: line {number} is not UTF-8 ({error})") from None
            yield text[:-1] if text.endswith("\n") else text


def _escape(text: str) -> str:
    return re.sub(r"[\\\t\n\r]", lambda found: _ESCAPES[found.group()], text)


def _unescape(text: str) -> str:
    return re.sub(r"\\[\\tnr]", lambda found: _UNESCAPES[found.group()], text)
