"""The figures as tables to read."""

from typing import Any, Dict, Iterable, Sequence


def objective_table(objective: Dict[str, Any]) -> str:
    """What `objective_costs` measured: medians, and the quartiles of the rounds behind them."""
    return _table(
        "objective, both ways, {rows} rows, V = {vocabulary}".format(**objective),
        ("seconds", "to stock", "to dense KL", "extra memory"),
        [
            (
                name,
                _shown(cost["seconds"]),
                _shown(cost["to_stock"]),
                _shown(cost["to_dense"]),
                f"{cost['extra_memory']:.1%}",
            )
            for name, cost in objective["costs"].items()
        ],
    )


def step_tables(steps: Dict[str, Any]) -> str:
    """What `Steps.costs` measured, likewise."""
    costs = [
        (name, _shown(cost["seconds"]), f"{cost['tokens_per_second']:.0f}")
        for name, cost in steps["costs"].items()
    ]
    title = "steps, {batches} batches, {target_tokens} target tokens".format(**steps)
    ratios = [(name, _shown(ratio)) for name, ratio in steps["ratios"].items()]
    return "\n".join(
        [
            _table(title, ("seconds", "tokens/s"), costs),
            _table("", ("seconds to seconds",), ratios),
        ]
    )


def memory_table(peaks: Dict[str, int]) -> str:
    """What `Steps.peak_memory` measured, in bytes."""
    rows = [(name, f"{peak / 1e6:.0f} MB") for name, peak in peaks.items()]
    return _table("peak memory, each in a process of its own", ("",), rows)


def students_table(speeds: Dict[str, Any]) -> str:
    """What `Students.speeds` measured; how much faster than the first one each is."""
    title = "translations in int8, greedy, {length} subwords each, V = {vocabulary}"
    return _table(
        title.format(**speeds),
        ("parameters", "without embeddings", "MB", "sentences/s", "to the first"),
        [
            (
                name,
                f"{one['parameters']:,}",
                f"{one['parameters_without_embeddings']:,}",
                f"{one['bytes'] / 1e6:.1f}",
                "{median:.1f} ({low:.1f}-{high:.1f})".format(**one["sentences_per_second"]),
                _shown(one["to_first"]),
            )
            for name, one in speeds["students"].items()
        ],
    )


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [("", *header), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [title] if title else []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text) + "\n"


def _shown(quartiles: Dict[str, float]) -> str:
    return "{median:.3f} ({low:.3f}-{high:.3f})".format(**quartiles)
