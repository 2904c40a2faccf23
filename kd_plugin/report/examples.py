"""Which sentences a report shows, and what it says of each."""

import math
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set

from .asked import Results, System, Worth

MOST = 200  # sentences, for a page that opens at once; where students are many, of each fewer


class Order(NamedTuple):
    """Something by which sentences are put in order, as the report has it.

    Attributes:
        system: whose sentences.
        measure: of how good they are; None is the KL from the teacher's distribution.
        against: the system that it is compared with.
    """

    system: str
    measure: Optional[str]
    against: str


def choose(results: Results, divergences: Dict[str, Dict[int, float]]) -> Dict[str, Any]:
    """The sentences where systems are farthest from the teacher and from the baseline.

    In each order (of a system, by divergence and by each measure's difference) the first and the
    last ``each`` ones are among them, so a reader sees the extremes of the whole test set.

    Args:
        divergences: from the teacher, of each student that was compared: by sentence.

    Returns:
        "each", "measures", "orders", and "rows", of which the first is the worst in the first
        order; their "keys" are what each order sorts them by, None where it leaves them out.
    """
    asked = results.asked
    systems = [system for system in results.systems() if system.main]
    measures = results.data.worth(results)
    others = _others(results, systems)
    orders: Dict[Order, Dict[int, float]] = {}  # what is worst has the lowest value
    for system in sorted(systems, key=lambda one: one.model == asked.teacher):  # which is last
        if system.name in divergences:
            order = Order(system.name, None, asked.teacher.name)
            orders[order] = {i: -kl for i, kl in divergences[system.name].items()}
        for measure in measures:
            for other in others:
                found = _differences(measure, system.name, other)
                if found:
                    sign = -1 if measure.lower_is_better else 1
                    order = Order(system.name, measure.name, other)
                    orders[order] = {i: sign * value for i, value in found.items()}
    orders = {
        order: {i: value for i, value in values.items() if not math.isnan(value)}
        for order, values in orders.items()
    }
    ranked = [sorted(values, key=lambda i: (values[i], i)) for values in orders.values()]
    each = asked.examples
    while each > 1 and len(_extremes(ranked, each)) > MOST:
        each -= 1
    shown = _extremes(ranked, each)
    first = ranked[0] if ranked else []
    rest = sorted(shown.difference(first))
    return {
        "each": each,
        "measures": [
            {"name": m.name, "lower_is_better": m.lower_is_better, "decimals": m.decimals}
            for m in measures
        ],
        "orders": [order._asdict() for order in orders],
        "rows": [
            {
                **_row(i, results, systems, measures, others, divergences),
                "keys": [values.get(i) for values in orders.values()],
            }
            for i in (*(i for i in first if i in shown), *rest)
        ],
    }


def _others(results: Results, systems: Sequence[System]) -> List[str]:
    """What systems are compared with: the teacher and the baseline, if they did not fail."""
    names = [results.asked.teacher.name, results.baseline().name]
    known = {system.name for system in systems}
    return [name for name in dict.fromkeys(names) if name in known]


def _differences(measure: Worth, system: str, other: str) -> Dict[int, float]:
    """Of each sentence; none for a system beside itself, or without values."""
    if system == other or not {system, other} <= set(measure.values):
        return {}
    both = zip(measure.values[system], measure.values[other])
    return {i: own - theirs for i, (own, theirs) in enumerate(both)}


def _extremes(ranked: Sequence[Sequence[int]], each: int) -> Set[int]:
    if not each:
        return set()
    return {i for order in ranked for i in (*order[:each], *order[-each:])}


def _row(
    i: int,
    results: Results,
    systems: Sequence[System],
    measures: Sequence[Worth],
    others: Sequence[str],
    divergences: Dict[str, Dict[int, float]],
) -> Dict[str, Any]:
    data = results.data
    said = []
    for system in systems:
        worth = {}
        for measure in measures:
            values = measure.values
            if system.name in values:
                own = values[system.name][i]
                compared = [name for name in others if name != system.name and name in values]
                against = {name: own - values[name][i] for name in compared}
                worth[measure.name] = {"value": own, "against": against}
        said.append(
            {
                "system": system.name,
                "text": data.said(i, results, system),
                "kl": divergences.get(system.name, {}).get(i),
                "worth": worth,
            }
        )
    return {"number": i + 1, **data.texts(i), "systems": said}
