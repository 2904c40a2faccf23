"""Training curves, read from fairseq's logs in any of its formats."""

import json
import re
from typing import Any, Dict, Iterable, List, Tuple

from ..files import FileError

# the student alone, its distance from the teacher, and how often the two agree
FIELDS = ("nll_loss", "kd_loss", "agreement")
_LINE = re.compile(r"\| (train_inner|valid) \| (.*)$")
# "nll_loss 6.16 |" of a summary, "nll_loss=6.16," of the lines between
_PAIR = re.compile(r"(?:^|[|, ])([a-z_]+)[= ]([-+.\deE]+|nan|inf)(?= *(?:[|,]|$))")
Curve = List[Tuple[int, float]]


def read_curves(path: str) -> Dict[str, Dict[str, Curve]]:
    """What a log of fairseq-train says over updates.

    Args:
        path: the file; ``--log-format`` json, simple, none or tqdm wrote it.

    Returns:
        by "train" and "valid", and by field of ``FIELDS``, pairs of update and value. Updates that
        a resumed training did again count as it did them last.

    Raises:
        FileError: it cannot be read, or no such log.
    """
    curves: Dict[str, Dict[str, Curve]] = {"train": {}, "valid": {}}
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                match = _LINE.search(line.rstrip())
                if match:
                    _add(curves, *match.groups())
    except OSError as error:
        raise FileError("--logs: {} cannot be read ({})".format(path, error.strerror)) from None
    if not any(curves.values()):
        raise FileError(
            "--logs: {} has no line of fairseq-train's progress in it (what it prints, or its "
            "--log-file)".format(path)
        )
    return curves


def _add(curves: Dict[str, Dict[str, Curve]], tag: str, text: str) -> None:
    values = _values(text)
    # an epoch's average, tagged train, would stand at its end among values of some updates each
    prefix, subset = ("valid_", "valid") if tag == "valid" else ("", "train")
    update = values.get(prefix + "num_updates", values.get("num_updates"))
    for field in FIELDS:
        value = values.get(prefix + field, values.get(field))
        if value is not None and update is not None:
            curve = curves[subset].setdefault(field, [])
            while curve and curve[-1][0] >= update:
                curve.pop()
            curve.append((int(update), value))


def _values(text: str) -> Dict[str, float]:
    pairs: Iterable[Tuple[str, Any]] = _PAIR.findall(text)
    if text.startswith("{"):
        try:
            pairs = dict(json.loads(text)).items()
        except ValueError:
            return {}
    values = {}
    for name, value in pairs:
        try:
            values[name] = float(value)
        except (TypeError, ValueError):
            continue
    return values
