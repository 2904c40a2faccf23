"""Training curves, read from fairseq's logs."""

import json
import math
import re
from typing import Any, Dict, Iterable, List, Optional, Tuple

from ..files import FileError

# the student alone, its distance from the teacher, and how often the two agree
FIELDS = ("nll_loss", "kd_loss", "agreement")
TRAIN = "train"
# what stdout has before a line of progress, and a --log-file has not: time, level and logger, of
# fairseq-train or, perhaps in colours, of fairseq-hydra-train
_PREFIX = re.compile(r"^.*?(\| [A-Z]+ \| [^|]+ \| |\[[-\d]+ [:\d,]+\]\[[^\]]+\]\[[A-Z]+\] - )")
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_VALIDATION = re.compile(r"\| valid on '([^']+)' subset \|")
_UPDATES = "_num_updates"
# "nll_loss 6.16 |" of a summary, "nll_loss=6.16," of the lines between, "]" at the end of a bar
_PAIR = re.compile(r"(?:^|[|, ])([a-z_]+)[= ]([-+.\deE]+|nan|inf)(?= *(?:[|,\]]|$))")
Curve = List[Tuple[int, float]]


def read_curves(path: str) -> Dict[str, Dict[str, Curve]]:
    """The training and validation curves in a log of fairseq-train or fairseq-hydra-train.

    Args:
        path: what it printed, its ``--log-file``, or Hydra's ``hydra_train.log``; ``--log-format``
            json, simple or tqdm.

    Returns:
        pairs of update and value, by subset and by field of ``FIELDS``. The subsets are "train",
        "valid", and whatever else ``--valid-subset`` named; the first two are always there. Of
        updates that were done twice, before and after a training was resumed, the later value.

    Raises:
        FileError: it cannot be read, or is no such log.
    """
    curves: Dict[str, Dict[str, Curve]] = {TRAIN: {}, "valid": {}}
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                subset, values = _read(_PREFIX.sub("", _COLOUR.sub("", line.strip())))
                if subset is not None:
                    _add(curves.setdefault(subset, {}), values)
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
    """The subset of a line of progress, None for any other line, and its numbers.

    An epoch's average over train is left out: it would stand at the epoch's end, among values
    that are each of a few updates.
    """
    if text.startswith("{"):
        try:
            values = _numbers(dict(json.loads(text)).items())
        except (ValueError, RecursionError):
            return None, {}
        for name in values:
            if name.endswith(_UPDATES):  # fairseq puts the subset before each name
                subset = name[: -len(_UPDATES)]
                prefix = subset + "_"
                own = {k[len(prefix) :]: v for k, v in values.items() if k.startswith(prefix)}
                return (None, {}) if subset == TRAIN else (subset, own)
        return TRAIN, values
    validation = _VALIDATION.search(text)
    if validation:
        return validation.group(1), _numbers(_PAIR.findall(text))
    if re.match(r"epoch \d+:", text):
        return TRAIN, _numbers(_PAIR.findall(text))
    return None, {}


def _numbers(pairs: Iterable[Tuple[str, Any]]) -> Dict[str, float]:
    values = {}
    for name, value in pairs:
        try:
            values[name] = float(value)
        except (TypeError, ValueError, OverflowError):
            continue
    return values
