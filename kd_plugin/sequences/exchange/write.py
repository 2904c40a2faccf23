"""n-best lists for others: to be scored, or translated, elsewhere; ``--import`` reads them, too."""

import contextlib
import filecmp
import gzip
import json
import math
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

from ...files import FileError, all_or_nothing
from ..student import AnyHypothesis

ENDINGS = (".tsv", ".jsonl", ".tsv.gz", ".jsonl.gz")  # of names; they say the format


def write_nbest(
    path: str,
    nbest: Iterable[Tuple[int, Sequence[AnyHypothesis]]],
    source: Callable[[int], str],
    text: Callable[[AnyHypothesis], str],
    same_as: Optional[str] = None,
) -> None:
    """A file of TSV with a line for each hypothesis, or of JSON lines with one for each sentence.

    Args:
        path: ends with one of ``ENDINGS``.
        source: the text of a sentence, by its number.
        text: of a hypothesis.
        same_as: a file that must have the same bytes, and may be ``path``.

    Raises:
        FileError: it has not; ``path`` stays as it was.
    """
    line = _rows if path.endswith((".tsv", ".tsv.gz")) else _object
    with all_or_nothing(Path(path)) as file:
        with _packed(path, file) as out:
            if line is _rows:
                out.write(b"id\tsource\ttranslation\tscore\n")
            for i, hypotheses in nbest:
                found = [(text(one), one.score) for one in hypotheses]
                out.write(line(i, source(i), found).encode("utf-8"))
        file.flush()
        if same_as and not filecmp.cmp(file.name, same_as, shallow=False):
            raise FileError(
                f"--write-nbest {path}: there is such a file with something else in it; choose "
                "another name, or --overwrite"
            )


def _packed(path: str, file: Any) -> Any:
    if not path.endswith(".gz"):
        return contextlib.nullcontext(file)
    # without a name and a time in it, so that the same lists are the same bytes
    return gzip.GzipFile("", "wb", 6, file, 0)


def _rows(sentence: int, source: str, found: List[Tuple[str, float]]) -> str:
    return "".join(
        f"{sentence}\t{_cell(source)}\t{_cell(text)}\t{'' if math.isnan(score) else score}\n"
        for text, score in found
    )


def _cell(text: str) -> str:
    return text.replace("\t", " ")


def _object(sentence: int, source: str, found: List[Tuple[str, float]]) -> str:
    translations: List[Dict[str, Any]] = []
    for text, score in found:
        one: Dict[str, Any] = {"text": text}
        if not math.isnan(score):
            one["score"] = score
        translations.append(one)
    content = {"id": sentence, "source": source, "translations": translations}
    return json.dumps(content, ensure_ascii=False) + "\n"
