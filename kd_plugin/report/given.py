"""Scores that are computed elsewhere, of each sentence: by COMET, by MetricX, by people."""

import math
import re
import shlex
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence

from ..errors import Faults
from ..files import FileError, all_or_nothing, leftovers, remove

# The texts that others score, as files: what comet-score is given
SOURCE, REFERENCE = "src.txt", "ref.txt"
_METRIC = re.compile(r"[^\W_][\w .+/()-]{0,39}")
# Known to count errors
_LOWER = re.compile(r"metricx|(?<![a-z])(h?ter|[wc]er)$", re.IGNORECASE)
_MOST = 1e6  # beyond it is no score, and nothing that a table could show
_FEW_DECIMALS = 2  # scores that stay below need more of them

Values = Dict[str, Dict[str, List[float]]]  # of each sentence, by metric and system


class ScoreFile(NamedTuple):
    """A file of scores.

    Attributes:
        system: the one that they are of, as its file of translations is called; "" for all whose
            names the file itself gives.
        metric: what they are called.
        path: of the file.
    """

    system: str
    metric: str
    path: str


def read_flags(pairs: Sequence[str]) -> List[ScoreFile]:
    """The files of ``--scores``: NAME=METRIC:FILE, or METRIC:FILE.

    Raises:
        UserError: one has another form; all faults in one message.
    """
    found, faults = [], Faults()
    for pair in pairs:
        first, colon, path = pair.partition(":")
        system, equals, metric = first.rpartition("=")
        if not (colon and path and metric and bool(system) == bool(equals)):
            faults.add(f"expected NAME=METRIC:FILE, or METRIC:FILE for a TSV, got {pair!r}")
        elif faults.check(
            _METRIC.fullmatch(metric),
            f"{metric!r} cannot be a metric's name: expected up to 40 letters, digits and . _ + - "
            "/ ( ), the first a letter or digit",
        ):
            found.append(ScoreFile(system, metric, path))
    faults.raise_if_any(prefix="--scores: ")
    return found


def read(
    files: Sequence[ScoreFile], systems: Dict[str, str], sentences: int, taken: Sequence[str]
) -> Values:
    """The scores of some systems.

    Args:
        systems: names in tables, by what files of translations are called.
        sentences: how many each must have.
        taken: metrics that are computed here.

    Raises:
        UserError: something does not fit; all faults in one message.
    """
    values: Values = {}
    faults = Faults()
    for file in files:
        flag = f"--scores {file.metric}:{file.path}: "
        if file.metric.lower() in [name.lower() for name in taken]:
            faults.add(f"{flag}{file.metric} is computed here: call the scores something else")
        elif file.system and file.system not in systems:
            faults.add(f"{flag}{_unknown(file.system, systems)}")
        else:
            with faults.collecting():
                for system, own in _scores(file, flag, systems, sentences).items():
                    column = values.setdefault(file.metric, {})
                    twice = f"{flag}{system} has {file.metric} from another file already"
                    if faults.check(systems[system] not in column, twice):
                        column[systems[system]] = own
    faults.raise_if_any()
    return values


def describe(values: Values, files: Sequence[ScoreFile]) -> List[Dict[str, Any]]:
    """What a reader should know of each column, as ``metrics.describe`` says it of others."""
    found = []
    for metric, systems in values.items():
        largest = max(abs(value) for own in systems.values() for value in own)
        found.append(
            {
                "name": metric,
                "source": "given by " + ", ".join(f.path for f in files if f.metric == metric),
                "lower_is_better": bool(_LOWER.search(metric)),
                "at_a_glance": True,
                "decimals": 2 if largest >= _FEW_DECIMALS else 4,
            }
        )
    return found


def _scores(
    file: ScoreFile, flag: str, systems: Dict[str, str], sentences: int
) -> Dict[str, List[float]]:
    """By system as files call it."""
    try:
        text = Path(file.path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{flag}cannot be read ({error})") from None
    lines = text.split("\n")
    if not lines[-1].strip():
        del lines[-1]
    if not any("\t" in line for line in lines):
        if not file.system:
            raise FileError(
                f"{flag}expected a TSV with the system's name in the first column; for a file with "
                f"one score a line say whose they are: --scores NAME={file.metric}:{file.path}"
            )
        found = {file.system: [_number(line, i, flag) for i, line in enumerate(lines, 1)]}
    else:
        found = _of_rows(_rows(lines, systems, flag), file.system, systems, flag)
    for system, own in found.items():
        if len(own) != sentences:
            raise FileError(
                f"{flag}expected {sentences} scores of {system}, one for each sentence; got "
                f"{len(own)}"
            )
    return found


class _Row(NamedTuple):
    line: int
    system: str
    sentence: Optional[int]  # from 1; None: the system's next one
    score: float


def _rows(lines: Sequence[str], systems: Dict[str, str], flag: str) -> Iterator[_Row]:
    """Of a TSV: system, sentence from 1 if it is there, score; or what comet-score prints.

    That is the file of translations, "Segment 0" and "score: 0.8437"; and, at the end, their means.
    """
    for i, line in enumerate(lines, 1):
        cells = [cell.strip() for cell in line.split("\t")]
        if i == 1 and cells[0].lower() in ("system", "model") and cells[0] not in systems:
            continue
        if len(cells) == 2 and cells[1].startswith("score: "):
            continue
        if len(cells) not in (2, 3):
            raise FileError(
                f"{flag}line {i}: expected system, sentence (from 1) and score, or system and "
                f"score; got {len(cells)} columns"
            )
        sentence = None
        if len(cells) == 3:
            segment = re.fullmatch(r"(Segment )?(\d{1,9})", cells[1], re.ASCII)
            sentence = int(segment[2]) + bool(segment[1]) if segment else 0
            if not sentence:
                raise FileError(
                    f"{flag}line {i}: expected the number of a sentence, from 1, in the second "
                    f"column; got {cells[1][:40]!r}"
                )
        yield _Row(i, cells[0], sentence, _number(cells[-1].replace("score: ", "", 1), i, flag))


def _of_rows(
    rows: Iterator[_Row], only: str, systems: Dict[str, str], flag: str
) -> Dict[str, List[float]]:
    """Scores in the order of their sentences, by system.

    Args:
        only: the system that is wanted; "" for all, which then must be known.
    """
    found: Dict[str, Dict[int, float]] = {}
    for row in rows:
        name = row.system
        if name not in systems:  # a path, as of comet-score
            name = re.sub(r"\.txt$", "", name.replace("\\", "/").rpartition("/")[2])
        if only not in ("", name):
            continue
        if name not in systems:
            raise FileError(f"{flag}line {row.line}: {_unknown(row.system, systems)}")
        own = found.setdefault(name, {})
        sentence = row.sentence or len(own) + 1
        if sentence in own:
            raise FileError(f"{flag}line {row.line}: sentence {sentence} of {name} occurs twice")
        own[sentence] = row.score
    if not found:
        raise FileError(f"{flag}it has no scores of {only or 'any system'}")
    for name, own in found.items():
        last = max(own)
        if last > len(own):
            missing = next(i for i in range(1, last) if i not in own)
            raise FileError(f"{flag}no score of sentence {missing} of {name}")
    return {name: [own[i] for i in sorted(own)] for name, own in found.items()}


def _number(text: str, line: int, flag: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= _MOST:  # nor NaN
        raise FileError(
            f"{flag}line {line}: expected a number between -1e6 and 1e6, got {text.strip()[:40]!r}"
        )
    return value


def _unknown(system: str, systems: Dict[str, str]) -> str:
    return f"no system is named {system[:80]!r}; they are {', '.join(systems)}"


# What others need to score translations


def check_folder(folder: Path, texts: Dict[str, Sequence[str]], systems: Sequence[str]) -> None:
    """That the folder is new, or was written for this test set.

    Args:
        texts: lines of source and references, by file.
        systems: whose translations will be written beside them.

    Raises:
        FileError: it holds other files, or a system's file would have the name of another text.
    """
    faults = Faults()
    flag = f"--write-for-scoring {folder}: "
    for name in systems:
        faults.check(
            name + ".txt" not in texts, f"{flag}a model cannot be called {name}, as its text is"
        )
    if folder.exists() and not folder.is_dir():
        faults.add(f"{flag}expected a folder, found a file")
    elif folder.is_dir():
        found = {path.name for path in {*folder.iterdir()}.difference(leftovers(folder))}
        same = all(
            (folder / name).is_file() and (folder / name).read_bytes() == _content(texts[name])
            for name in found.intersection(texts)
        )
        # translations come last: beside them, or anything else, both texts are there
        faults.check(
            same and (found.issuperset(texts) or found.issubset(texts)),
            f"{flag}it holds other files than those of this test set: choose another folder",
        )
    faults.raise_if_any(FileError)


def make_folder(folder: Path) -> None:
    """Make it if need be, without what kills have left there.

    Raises:
        FileError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"--write-for-scoring {folder}: it cannot be made ({error})") from None
    for path in leftovers(folder):
        remove(path)


def write(folder: Path, texts: Dict[str, Sequence[str]]) -> None:
    """Texts by file, a sentence a line, whatever ends a line for those who read them."""
    for name, lines in texts.items():
        with all_or_nothing(folder / name) as file:
            file.write(_content(lines))


def _content(lines: Sequence[str]) -> bytes:
    whole = (" ".join(line.splitlines()) + "\n" for line in lines)
    return "".join(whole).encode("utf-8", "backslashreplace")


def command(folder: str, systems: Sequence[str]) -> str:
    """How comet-score scores what is in a folder."""
    source, reference, *translations = (
        shlex.quote(str(Path(folder) / name))
        for name in (SOURCE, REFERENCE, *(system + ".txt" for system in systems))
    )
    return f"comet-score -s {source} -t {' '.join(translations)} -r {reference}"
