"""Formats in which translators leave their translations; each is read line by line.

    lines     one translation in each line
    fairseq   what fairseq-generate prints: S-7, T-7, H-7 and D-7 with tabs, in any order of ids
    nbest     Marian's and Moses': id ||| text ||| features ||| score
    tsv       source, translation[, score] with tabs; or a first line that names the columns
    jsonl     a JSON object in each line: {"source": "...", "translations": [{"text": "...",
              "score": -0.4}]} and what else is usual, see ``_json_lines``

To add one: a function from ``Lines`` to items, and its entry in ``FORMATS``.
"""

import json
import math
import os
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

from ...files import FileError
from .lines import Lines

Translation = Tuple[str, float]  # text, and its score; NaN where there is none


class Item(NamedTuple):
    """A sentence, and what it was translated to.

    Attributes:
        sentence: its number in the data, from 0; None for the one behind the last.
        source: as the file has it; None if it has none.
        translations: in the order of the file.
        line: where that begins to speak of it.
    """

    sentence: Optional[int]
    source: Optional[str]
    translations: List[Translation]
    line: int


_SOURCES = ("source", "src")
_TARGETS = ("translation", "hypothesis", "target", "tgt", "mt", "text")
_SCORES = ("score", "logprob")
_LISTS = ("translations", "hypotheses", "nbest")
_BITS = math.log(2)  # nats
_SHOWN = 60  # characters of a stranger's line in a message


def _one_in_each_line(lines: Lines, subwords: bool) -> Iterator[Item]:
    for text in lines:
        yield Item(None, None, [(text, math.nan)], lines.number)


def _fairseq(lines: Lines, subwords: bool) -> Iterator[Item]:
    """H- lines, or of text D- lines. fairseq prints scores in bits."""
    now: Optional[Item] = None  # with the H- lines
    plain: List[Translation] = []

    def item(now: Item) -> Item:
        if len(plain) not in (0, len(now.translations)):
            raise lines.fault(
                f"before it, {len(now.translations)} H-{now.sentence} and {len(plain)} "
                f"D-{now.sentence}"
            )
        return now._replace(translations=plain) if plain and not subwords else now

    for line in lines:
        head, _, rest = line.partition("\t")
        kind, digits = head[:2], head[2:]
        if kind not in ("S-", "T-", "H-", "D-") or not _is_number(digits):
            continue
        if now is None or int(digits) != now.sentence:
            if now is not None:
                yield item(now)
            now, plain = Item(int(digits), None, [], lines.number), []
        if kind == "S-":
            now = now._replace(source=rest)
        elif kind != "T-":
            score, tab, text = rest.partition("\t")
            if not tab:
                raise lines.fault(f"expected {head}, a score and a text with tabs between")
            one = (text, _number(score, lines) * _BITS)
            (now.translations if kind == "H-" else plain).append(one)
    if now is not None:
        yield item(now)


def _nbest(lines: Lines, subwords: bool) -> Iterator[Item]:
    now: Optional[Item] = None
    last, written = -1, ""
    for line in lines:
        if line.endswith(" |||"):  # the last field is empty
            line += " "
        number, *fields = line.split(" ||| ")
        if now is None or not fields or number != written:
            if not fields or not _is_number(number.strip()):
                raise lines.fault(
                    f"expected id ||| text ||| features ||| score, got {line[:_SHOWN]!r}"
                )
            sentence, written = int(number), number
            if sentence < last:
                raise lines.fault(f"the ids go backwards, from {last} to {sentence}")
            if now is None or sentence != last:
                if now is not None:
                    yield now
                last = sentence
                now = Item(sentence, None, [], lines.number)
        score = _number(fields[-1].strip() or None, lines) if len(fields) > 1 else math.nan
        now.translations.append((fields[0], score))
    if now is not None:
        yield now


def _tsv(lines: Lines, subwords: bool) -> Iterator[Item]:
    """With a column of ids, lines of the same one are translations of the same sentence."""
    columns: Dict[str, int] = {}
    width = 0
    now: Optional[Item] = None
    for line in lines:
        cells = line.split("\t")
        if lines.number == 1:
            width, columns = len(cells), _columns(cells)
            if columns:
                continue
            if width not in (2, 3):
                raise lines.fault(
                    f"expected source, translation[, score] with tabs between, or names of columns "
                    f"({_SOURCES[0]}, {_TARGETS[0]}, {_SCORES[0]}, id); got {width} columns"
                )
            columns = dict(zip(("source", "translation", "score"), range(width)))
        if len(cells) != width:
            raise lines.fault(f"expected {width} columns as in the first line, got {len(cells)}")
        score = _number(cells[columns["score"]] or None, lines) if "score" in columns else math.nan
        translation = (cells[columns["translation"]], score)
        source = cells[columns["source"]] if "source" in columns else None
        if "id" not in columns:
            yield Item(None, source, [translation], lines.number)
            continue
        digits = cells[columns["id"]]
        if not _is_number(digits):
            raise lines.fault(f"an id that is no number: {digits[:_SHOWN]!r}")
        if now is None or now.sentence != int(digits):
            if now is not None:
                yield now
            now = Item(int(digits), source, [], lines.number)
        if now.source != source:
            raise lines.fault(f"another source of sentence {digits} than in line {now.line}")
        now.translations.append(translation)
    if now is not None:
        yield now


def _columns(cells: List[str]) -> Dict[str, int]:
    """Which column is what, if a line names them; an empty dictionary if it does not."""
    names = [cell.strip().lower() for cell in cells]
    found: Dict[str, int] = {}
    for name, known in (
        ("id", ("id",)),
        ("source", _SOURCES),
        ("translation", _TARGETS),
        ("score", _SCORES),
    ):
        for i, cell in enumerate(names):
            if cell in known:
                found.setdefault(name, i)
    return found if "translation" in found and len(found) > 1 else {}


def _json_lines(lines: Lines, subwords: bool) -> Iterator[Item]:
    """Objects with or without ``source`` (``src``) and ``id``; and either with a list
    (``translations``, ``hypotheses``, ``nbest``) of strings or of objects, or with one
    ``translation`` (``hypothesis``, ``target``, ``text``, ...). An object has its text under one of
    these names, and may have a ``score``; beside a list of strings may be one of ``scores``.
    """
    for line in lines:
        if not line.strip():
            continue
        if line.lstrip()[:1] == "[":
            raise lines.fault(
                "expected a JSON object in each line, got an array: jq -c '.[]' makes lines of it"
            )
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise lines.fault(f"no JSON ({error})") from None
        if not isinstance(found, dict):
            raise lines.fault(f"expected a JSON object, got {line[:_SHOWN]!r}")
        key = _key(found, _LISTS)
        if key is None:
            several = [found]
        else:
            several = found[key] or [""]  # an empty list: nothing was translated
            if not isinstance(several, list):
                raise lines.fault(f"{key!r}: expected a list")
        scores = found.get("scores")
        if scores is not None:
            if not isinstance(scores, list) or len(scores) != len(several):
                raise lines.fault("'scores': expected a list with as many as there are texts")
        translations: List[Translation] = []
        for i, one in enumerate(several):
            text: Any = one
            score: Any = None
            if isinstance(one, dict):
                name = _key(one, _TARGETS)
                text = "" if name and one[name] is None else one.get(name)
                score = one.get(_key(one, _SCORES))
            if not isinstance(text, str):
                names = ", ".join((*_LISTS[:2], *_TARGETS[:2]))
                raise lines.fault(f"expected a text, as one of {names}; got {text!r}"[:300])
            if scores is not None:
                score = scores[i]
            translations.append((_encodable(text, lines), _number(score, lines)))
        source = found.get(_key(found, _SOURCES))
        if source is not None:
            if not isinstance(source, str):
                raise lines.fault("'source': expected a text")
            source = _encodable(source, lines)
        yield Item(_id(found.get("id"), lines), source, translations, lines.number)


def _key(found: Dict[str, Any], names: Iterable[str]) -> Any:
    for name in names:
        if name in found:
            return name
    return None


def _id(value: Any, lines: Lines) -> Optional[int]:
    if value is None:
        return None
    if isinstance(value, str) and _is_number(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise lines.fault(f"'id': expected the number of a sentence, from 0; got {value!r}"[:300])
    return value


def _encodable(text: str, lines: Lines) -> str:
    """JSON can spell what no text holds."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise lines.fault("half of a surrogate pair, which no text holds") from None
    if "\0" in text:
        raise lines.fault("NUL, which no text holds")
    return text


def _is_number(digits: str) -> bool:
    return digits.isascii() and digits.isdigit() and len(digits) < 19


def _number(value: Any, lines: Lines) -> float:
    """A score; NaN for none."""
    if value is None:
        return math.nan
    try:
        if isinstance(value, bool):
            raise ValueError
        score = float(value)
    except (ValueError, TypeError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise lines.fault(f"a score that is no number: {str(value)[:_SHOWN]!r}")
    return score


Reader = Callable[[Lines, bool], Iterator[Item]]
# By the name of the flag's value; a reader is told whether hypotheses are to be subwords
FORMATS: Dict[str, Reader] = {
    "lines": _one_in_each_line,
    "fairseq": _fairseq,
    "nbest": _nbest,
    "tsv": _tsv,
    "jsonl": _json_lines,
}
_SPREADSHEETS = (".csv", ".xlsx", ".xls", ".ods")
_ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".tsv": "tsv"}


def recognise(lines: Lines) -> str:
    """The format of a file, by the end of its name and its first lines."""
    name = lines.name
    for packed in (".gz", ".zst"):
        if name.endswith(packed):
            name = name[: -len(packed)]
    ending = os.path.splitext(name)[1].lower()
    if ending in _SPREADSHEETS:
        raise FileError(
            f"--import {lines.name}: {ending} is a spreadsheet's format; save it as text with tabs "
            "between the columns (.tsv), without quotes, or as JSON lines"
        )
    if ending in _ENDINGS:
        return _ENDINGS[ending]
    first = []
    for line in lines:
        first.append(line)
        if len(first) == 100:
            break
    full = [line for line in first if line.strip()]
    if any(line[:2] in ("S-", "H-") and "\t" in line and _is_number(line[2:].split("\t")[0])
           for line in full):  # fmt: skip
        return "fairseq"
    if full and all(_is_number(line.split(" |||")[0].strip()) and " |||" in line for line in full):
        return "nbest"
    if full and all(line.startswith("{") for line in full):
        return "jsonl"
    tabs = {line.count("\t") for line in first}
    if len(tabs) == 1 and 0 not in tabs and (tabs <= {1, 2} or _columns(first[0].split("\t"))):
        return "tsv"
    return "lines"
