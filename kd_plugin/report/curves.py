"""Training curves, read from fairseq's logs."""

import json
import math
import re
from typing import Any, Dict, Iterable, List, Optional, Tuple

from ..files import FileError

# the student alone, its distance from the teacher, and how often the two agree
FIELDS = ("nll_loss", "kd_loss", "agreement")
# what stdout has before a line of progress, and a --log-file has not
_TAG = re.compile(r"^.*?\| (?:train_inner|train|valid) \| ")
# "nll_loss 6.16 |" of a summary, "nll_loss=6.16," of the lines between
_PAIR = re.compile(r"(?:^|[|, ])([a-z_]+)[= ]([-+.\deE]+|nan|inf)(?= *(?:[|,]|$))")
Curve = List[Tuple[int, float]]


def read_curves(path: str) -> Dict[str, Dict[str, Curve]]:
    """What a log of fairseq-train says over updates.

    Args:
        path: what it printed, or its ``--log-file``; ``--log-format`` json, simple or tqdm.

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
                subset, values = _read(_TAG.sub("", line.strip()))
                if subset is not None:
                    _add(curves[subset], values)
    except OSError as error:
        raise FileError(f"--logs: {path} cannot be read ({error.strerror})") from None
    if not any(curves.values()):
        raise FileError(
            f"--logs: {path} has no line of fairseq-train's progress in it: expected what it "
            "prints, or its --log-file, with --log-format json, simple or tqdm"
        )
    return curves


def _add(curves: Dict[str, Curve], values: Dict[str, float]) -> None:
    for field in FIELDS:
        if field in values and math.isfinite(values.get("num_updates", math.nan)):
            curve, update = curves.setdefault(field, []), int(values["num_updates"])
            while curve and curve[-1][0] >= update:
                curve.pop()
            curve.append((update, values[field]))


def _read(text: str) -> Tuple[Optional[str], Dict[str, float]]:
    """The subset that a line of progress is about, if it is one, and its numbers.

    An epoch's average over train is none: it would stand at its end, among values of some updates
    each.
    """
    if text.startswith("{"):
        try:
            values = _numbers(dict(json.loads(text)).items())
        except (ValueError, RecursionError):
            return None, {}
        if "valid_num_updates" in values:
            return "valid", {k[len("valid_") :]: v for k, v in values.items() if "valid_" in k}
        return "train", values
    if "| valid on 'valid' subset |" in text:
        return "valid", _numbers(_PAIR.findall(text))
    if re.match(r"epoch \d+:", text):
        return "train", _numbers(_PAIR.findall(text))
    return None, {}


def _numbers(pairs: Iterable[Tuple[str, Any]]) -> Dict[str, float]:
    values = {}
    for name, value in pairs:
        try:
            values[name] = float(value)
        except (TypeError, ValueError, OverflowError):
            continue
    return values
