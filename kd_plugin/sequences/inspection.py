"""What a person looks at before a training: counts, lengths, what was dropped and why, examples.

All of it comes from the folder that ``Output`` has written, its record and its ``text/``: neither a
data-bin nor a teacher is opened. Folders from before ``dropped.tsv`` and mixing are told, too.
"""

import math
import random
import re
import unicodedata
from pathlib import Path
from typing import (
    Any,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

from ..decoding.databin import words
from ..errors import printable
from ..files import FileError, all_or_nothing
from ..pages import Table, html_page, markdown_page
from ..timing import progress_bar
from . import dropped
from .mixing import IN_ORDER, ORIGINAL, RECORD
from .output import TEXT_FOLDER, read_record, score_in_words

ENDINGS = (".html", ".md")
_EXAMPLES, _PAIRS, _SEED = 5, 20, 1
_LONGEST = 1000  # characters of a text on the page
_NONE = "–"
_LENGTHS = (0, 5, 10, 20, 30, 50, 100, 250)  # the last of each row
_RATIOS = (0.5, 0.8, 1.0, 1.25, 2.0)
_DAMAGED = (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError)


def inspect(folder: str, output: Optional[str] = None) -> Optional[str]:
    """A page about finished data.

    Args:
        folder: what ``fairseq-kd-sequences`` has written.
        output: the file to write, HTML or Markdown by its name; it says so, too.

    Returns:
        Markdown, safe for a terminal; None if it was written.

    Raises:
        FileError: the folder is another one, unfinished or damaged.
    """
    refuse_ending(output)
    title = f"Distilled data: {folder}"
    tables = list(_tables(Path(folder)))
    if output is not None and output.endswith(".html"):
        page = html_page(_visible(title), [table.each_text(_visible) for table in tables])
    else:
        page = markdown_page(printable(title), [table.each_text(printable) for table in tables])
    if output is None:
        return page
    with all_or_nothing(Path(output)) as file:
        file.write(page.encode("utf-8", "backslashreplace"))
    return None


def refuse_ending(output: Optional[str]) -> None:
    """Raises FileError: ``output`` is the name of no such page."""
    if output is not None and not output.endswith(ENDINGS):
        raise FileError(
            f"--inspect-output {output}: expected a name that ends with {' or '.join(ENDINGS)}"
        )


def _tables(folder: Path) -> Iterator[Table]:
    if not (folder / RECORD).is_file():
        raise FileError(
            f"--inspect {folder}: expected a folder that fairseq-kd-sequences has finished; it "
            f"has no {RECORD}"
        )
    record = read_record(folder)
    try:
        langs = _languages(record)
        parts, in_order = _parts(record), _in_order(record)
        first = [_overview(record, parts), *_mixed(record, parts), *_settings(record)]
    except _DAMAGED as error:
        reason = error if isinstance(error, FileError) else f"{type(error).__name__}: {error}"
        raise FileError(
            f"--inspect {folder}: {RECORD} is damaged, or of something else ({reason})"
        ) from None
    text = folder / TEXT_FOLDER
    seen = _look(text, langs, _written(record))
    yield from first
    yield from seen.tables(langs)
    yield from _reasons(text / dropped.FILE, record["counts"]["dropped"])
    yield _examples(seen.pairs, langs, parts if in_order else [])


# From the record


class _Part(NamedTuple):
    """What lies in the training set one behind the other; ``written`` sentences of it."""

    name: str
    weight: str
    sentences: str
    written: int
    pairs: str


def _languages(record: Dict[str, Any]) -> Tuple[str, str]:
    """Source and target, from the names of the files."""
    files = set(record["files"])
    found = [re.fullmatch(r"dict\.([^/]+)\.txt", name) for name in sorted(files)]
    names = [one.group(1) for one in found if one]
    for source in names:
        for target in names:
            if f"train.{source}-{target}.{source}.idx" in files:
                return source, target
    raise FileError("it names no training set")


def _written(record: Dict[str, Any]) -> int:
    counts = record["counts"]
    written = int(counts["distilled"] + counts["original"] + counts.get("mixed", 0))
    if not 0 <= written < 1 << 62:
        raise ValueError(f"{written:.0e} sentences")
    return written


def _parts(record: Dict[str, Any]) -> List[_Part]:
    mix, counts = record.get("mix"), record["counts"]
    if mix is not None:
        return [
            _Part(
                str(part["name"]),
                f"{part['weight']:g}",
                f"{part['sentences']:,}",
                int(part["written"]),
                str(part["pairs"])[:12],
            )
            for part in mix["parts"]
        ]
    original = int(counts["original"])  # as older records have it
    return [_Part(ORIGINAL, _NONE, _NONE, original, _NONE)] if original else []


def _in_order(record: Dict[str, Any]) -> bool:
    return (record.get("mix") or {"order": IN_ORDER})["order"] == IN_ORDER


def _overview(record: Dict[str, Any], parts: Sequence[_Part]) -> Table:
    counts, means = record["counts"], record["means"]
    lost = sum(counts["dropped"].values())
    rows = [["sentences of the training set", f"{_written(record):,}"]]
    if counts["sentences"]:
        rows += [
            ["distilled", f"{counts['distilled']:,}"],
            ["sentences to distil", f"{counts['sentences']:,}"],
            ["dropped hypotheses and sentences", f"{lost:,}"],
            ["equal to a better one of the sentence", f"{counts.get('duplicates', 0):,}"],
        ]
    if parts:
        rows.append(["mixed in", f"{sum(part.written for part in parts):,}"])
    for side in ("source", "target", "unknown"):
        rows.append([f"{side} tokens", f"{counts[side + '_tokens']:,}"])
    if means.get("score_per_token") is not None:
        rows.append([*score_in_words(record)])
    for key, label, form, unit in (
        ("closeness", "closeness to the reference", "{:.1f}", 1),
        ("backward", "log-probability of the source per token", "{:.3f} bits", math.log(2)),
    ):
        if means.get(key) is not None:
            rows.append([label, form.format(means[key] / unit)])
    return Table("At a glance", ["", ""], rows)


def _mixed(record: Dict[str, Any], parts: Sequence[_Part]) -> Iterator[Table]:
    if not parts:
        return
    rows = [
        [_cut(part.name), part.weight, part.sentences, f"{part.written:,}", part.pairs]
        for part in parts
    ]
    if record["counts"]["distilled"]:
        written = f"{record['counts']['distilled']:,}"
        rows.append(["distilled here", _NONE, _NONE, written, _NONE])
    order = "In this order." if _in_order(record) else "In a random order."
    header = ["", "weight", "sentences", "written", "checksum of pairs"]
    yield Table("What was mixed", header, rows, [order])


def _settings(record: Dict[str, Any]) -> Iterator[Table]:
    """Those that are plain values; the rest is in the record."""
    settings = record["settings"]
    if not settings.get("select"):
        return  # nothing but a mixture
    rows = []
    for group in (settings, settings.get("filters") or {}):
        for key, value in sorted(group.items()):
            plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
            if (plain or value is True) and len(str(value)) <= 40:
                rows.append([_cut(_words(str(key))), str(value)])
    if rows:
        yield Table("How it was chosen", ["", ""], rows)


# From the texts


class _Sample:
    """Some of many, each as likely as any other; the same ones each time."""

    def __init__(self, size: int) -> None:
        self.found: List[Any] = []
        self._size, self._seen, self._random = size, 0, random.Random(_SEED)

    def add(self, one: Any) -> None:
        self._seen += 1
        if len(self.found) < self._size:
            self.found.append(one)
        else:
            place = self._random.randrange(self._seen)
            if place < self._size:
                self.found[place] = one


class _Histogram:
    """Counts by the last value of each row; the row behind the last has what is larger."""

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges, self.counts, self.total = edges, [0] * (len(edges) + 1), 0.0

    def add(self, value: float) -> None:
        self.total += value
        for i, edge in enumerate(self.edges):
            if value <= edge:
                self.counts[i] += 1
                return
        self.counts[-1] += 1

    def labels(self, first: str, between: str, last: str) -> List[str]:
        pairs = zip(self.edges, self.edges[1:])
        return [
            first.format(self.edges[0]),
            *(between.format(low, high) for low, high in pairs),
            last.format(self.edges[-1]),
        ]

    def cell(self, i: int) -> str:
        return f"{self.counts[i]:,} ({self.counts[i] / max(sum(self.counts), 1):.1%})"

    def mean(self) -> float:
        return self.total / max(sum(self.counts), 1)


class _Seen:
    """What one reading of the texts has told."""

    def __init__(self) -> None:
        self.lengths = _Histogram(_LENGTHS), _Histogram(_LENGTHS)
        self.ratio = _Histogram(_RATIOS)
        self.pairs = _Sample(_PAIRS)

    def add(self, number: int, texts: Tuple[str, str], subwords: Sequence[str]) -> None:
        lengths = [len(words(side)) for side in subwords]
        for histogram, length in zip(self.lengths, lengths):
            histogram.add(length)
        self.ratio.add((lengths[1] + 1) / (lengths[0] + 1))
        self.pairs.add((number, *map(_cut, texts)))

    def tables(self, langs: Tuple[str, str]) -> Iterator[Table]:
        source, target = self.lengths
        labels = source.labels("{}", "{} to {}", "above {}")
        # what is above one edge is at least one more
        labels[1:-1] = [f"{low + 1} to {high}" for low, high in zip(_LENGTHS, _LENGTHS[1:])]
        rows = [[label, source.cell(i), target.cell(i)] for i, label in enumerate(labels)]
        rows.append(["mean", f"{source.mean():.1f}", f"{target.mean():.1f}"])
        names = [f"{kind} ({lang})" for kind, lang in zip(("source", "target"), langs)]
        yield Table("Lengths in subwords", ["", *names], rows)
        labels = self.ratio.labels("up to {}", "above {}, up to {}", "above {}")
        rows = [[label, self.ratio.cell(i)] for i, label in enumerate(labels)]
        rows.append(["mean", f"{self.ratio.mean():.3f}"])
        yield Table(
            "Target's length to the source's",
            ["ratio", "sentences"],
            rows,
            ["Ends of sentences included."],
        )


def _look(text: Path, langs: Tuple[str, str], expected: int) -> _Seen:
    """Read the texts once.

    Raises:
        FileError: one is missing, or has another number of lines than the record says.
    """
    paths = [text / f"train{kind}.{lang}" for kind in ("", ".subwords") for lang in langs]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileError(f"--inspect {text.parent}: missing: {', '.join(missing)}")
    seen = _Seen()
    iterators = [dropped.lines_of(path) for path in paths]
    counts = [0] * len(paths)
    with progress_bar(expected, "reading", "sentences") as progress:
        while True:
            lines = [next(iterator, None) for iterator in iterators]
            counts = [count + (line is not None) for count, line in zip(counts, lines)]
            if None in lines:
                break
            source, target, *subwords = map(str, lines)
            seen.add(counts[0], (source, target), subwords)
            progress.update(1)
    if any(line is not None for line in lines) or counts[0] != expected:
        found = ", ".join(
            f"{path.name} has {count}{'' if line is None else ' or more'}"
            for path, count, line in zip(paths, counts, lines)
        )
        raise FileError(
            f"--inspect {text.parent}: {RECORD} says {expected} sentences, and {found}: it was "
            "changed since"
        )
    return seen


def _reasons(path: Path, counts: Dict[str, int]) -> Iterator[Table]:
    """Counts by reason, and examples."""
    rows = [[_words(reason), f"{n:,}"] for reason, n in counts.items() if n]
    if not rows:
        return
    samples = {reason: _Sample(_EXAMPLES) for reason in counts}
    found = dict.fromkeys(counts, 0)
    notes, failures = [], []
    if path.is_file():
        for one in dropped.read(path):
            if one.reason not in samples:
                raise FileError(f"{path}: {RECORD} has no reason {one.reason!r}")
            samples[one.reason].add(one)
            found[one.reason] += 1
        for reason, n in counts.items():
            if found[reason] != n:
                failures.append(
                    f"{path.name} has {found[reason]:,} of the {n:,} {_words(reason)}: it was "
                    "changed since, or is cut short."
                )
        notes.append(f"{TEXT_FOLDER}/{path.name} has all of them.")
    else:
        notes.append(f"There is no {TEXT_FOLDER}/{path.name}, so no examples: an older version.")
    yield Table("What was dropped", ["reason", "hypotheses"], rows, notes, failures)
    for reason, sample in samples.items():
        if sample.found:
            yield Table(
                f"Dropped: {_words(reason)}",
                ["sentence", "source", "hypothesis", "score"],
                [
                    [
                        f"{one.sentence:,}",
                        _cut(one.source),
                        _cut(one.hypothesis),
                        _NONE if one.score is None else f"{one.score:.3f}",
                    ]
                    for one in sorted(sample.found, key=lambda one: one.sentence)
                ],
                level=3,
                texts=True,
            )


def _examples(sample: _Sample, langs: Tuple[str, str], parts: Sequence[_Part]) -> Table:
    """Some pairs.

    Args:
        parts: what comes before the distilled pairs, in order; to say where a pair is from.
    """
    header, rows = ["line", *langs], []
    for number, source, target in sorted(sample.found):
        rows.append([f"{number:,}", source, target])
        if parts:
            rows[-1].append(_cut(_part_of(number, parts)))
    if parts:
        header.append("from")
    return Table(f"{len(rows)} random pairs", header, rows, texts=True)


def _part_of(number: int, parts: Sequence[_Part]) -> str:
    for part in parts:
        if number <= part.written:
            return part.name
        number -= part.written
    return "distilled here"


def _words(reason: str) -> str:
    return reason.replace("_", " ")


# Strangers' texts


def _visible(text: str) -> str:
    """Without control characters; unlike in a terminal, what joins or separates letters stays."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
