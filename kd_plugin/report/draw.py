"""The report's pictures: PNG files of what its JSON says."""

import io
import itertools
import math
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Tuple

import matplotlib

matplotlib.use("Agg")  # no screen is needed

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: E402
from matplotlib.transforms import Bbox  # noqa: E402

from .curves import TRAIN  # noqa: E402
from .tables import pace  # noqa: E402

Styles = Dict[str, Dict[str, Any]]  # of each model, the same in all pictures
# Told apart also by readers who see fewer colours (Okabe & Ito 2008), and by their marks
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_MARKS = "osD^vPX*"
_WIDTH, _DPI = 4.6, 150  # inches
_DASHES = ("-", "--", ":", "-.")
_KINDS = {
    "frequency": "times the token occurs in training",
    "position": "position in the text",
    "length": "length of the reference, tokens",
    "entropy": "the teacher's entropy, bits",
}
_FIELDS = {
    "nll_loss": "student's nll_loss, bits",
    "kd_loss": "kd_loss",
    "agreement": "agreement with the teacher",
}


def draw(report: Dict[str, Any]) -> Dict[str, bytes]:
    """PNG files by name: all pictures for which the report has content.

    None is wider than a phone can show so that its text can be read.
    """
    names = [model["name"] for model in report["models"]]
    styles = {name: _style(i) for i, name in enumerate(dict.fromkeys([*names, *report["curves"]]))}
    drawn = {}
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        for name, plot in _plots(report):
            figure, file = plot(styles), io.BytesIO()
            # without the version, so that the same report is the same file
            figure.savefig(file, dpi=_DPI, metadata={"Software": None})
            plt.close(figure)
            drawn[name] = file.getvalue()
    return drawn


def _plots(report: Dict[str, Any]) -> Iterator[Tuple[str, Callable[[Styles], Any]]]:
    """Each picture's name and what draws it."""
    systems = [system for system in report["systems"] if system["scores"]]
    if systems:
        yield (
            "quality-speed.png",
            partial(_quality_speed, report["metrics"][0], pace(report), systems),
        )
    for field in _FIELDS:
        if any(field in curve for log in report["curves"].values() for curve in log.values()):
            yield f"curves-{field}.png", partial(_curves, report["curves"], field)
    differences = report["differences"]
    for kind in next(iter(differences.values()), {"by": ()})["by"]:
        yield f"differences-{kind}.png", partial(_differences, differences, kind)


def _style(i: int) -> Dict[str, Any]:
    return {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKS[i % len(_MARKS)]}


def _quality_speed(
    metric: Dict[str, Any], pace: str, systems: List[Dict[str, Any]], styles: Styles
) -> Any:
    name, speed = metric["name"], f"{pace}_per_second"
    intervals = all("ci" in system["scores"][name] for system in systems)
    figure, axes = plt.subplots(figsize=(_WIDTH, 3.8), constrained_layout=True)
    for model in dict.fromkeys(system["model"] for system in systems):
        own = [system for system in systems if system["model"] == model]
        x = [system[speed]["median"] for system in own]
        y = [system["scores"][name]["score"] for system in own]
        style = styles[model]
        axes.plot(x, y, linewidth=1, alpha=0.6, color=style["color"])
        for system, at, score in zip(own, x, y):
            axes.plot([at], [score], markersize=7, linestyle="", **style)
            if intervals:
                interval = [system["scores"][name]["ci"]]
                axes.errorbar([at], [score], yerr=interval, color=style["color"], alpha=0.3)
    axes.set_xscale("log")
    axes.margins(x=0.18, y=0.12)
    _plain_numbers(axes.xaxis)
    axes.set_xlabel(f"{pace} per second")
    axes.set_ylabel(f"{name} (bars: 95% intervals)" if intervals else name)
    if metric["lower_is_better"]:
        axes.invert_yaxis()
    axes.grid(alpha=0.25)
    points = [(s[speed]["median"], s["scores"][name]["score"]) for s in systems]
    _label_points(figure, axes, systems, points)
    return figure


def _plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis with 1, 2, 5, 10 ... instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _label_points(
    figure: Any, axes: Any, systems: List[Dict[str, Any]], points: List[Tuple[float, float]]
) -> None:
    """Each name beside its point, where it covers neither another name nor a point."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in axes.transData.transform(points)]
    for system, at in zip(systems, points):
        label = None
        for dy, dx in itertools.product((4, -12, 16, -24, 28, -36), (8, -8)):
            if label is not None:
                label.remove()
            label = axes.annotate(
                system["name"],
                at,
                (dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right",
                fontsize=9,
                bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1},
            )
            box = label.get_window_extent(renderer)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        assert label is not None
        taken.append(label.get_window_extent(renderer))


def _curves(curves: Dict[str, Any], field: str, styles: Styles) -> Any:
    """A colour for each log, a line style for each validation subset."""
    subsets = list(
        dict.fromkeys(
            subset
            for log in curves.values()
            for subset, curve in log.items()
            if curve
            if subset != TRAIN
        )
    )
    figure, axes = plt.subplots(figsize=(_WIDTH, 3.6), constrained_layout=True)
    handles: Dict[str, Any] = {}
    for name, log in curves.items():
        style = {"color": styles[name]["color"], "linewidth": 1.5}
        if log[TRAIN].get(field):
            axes.plot(*zip(*log[TRAIN][field]), alpha=0.3, **style)
        for subset, dashes in zip(subsets, itertools.cycle(_DASHES)):
            points = log.get(subset, {}).get(field)
            if points:
                label = name if len(subsets) == 1 else f"{name}, {subset}"
                (line,) = axes.plot(*zip(*points), linestyle=dashes, **style)
                handles.setdefault(label.replace("$", r"\$"), line)  # no formula
    axes.set_xlabel("updates")
    axes.set_ylabel(_FIELDS[field])
    axes.grid(alpha=0.25)
    if handles:
        title = f"{subsets[0] if len(subsets) == 1 else 'validation'} (pale: train)"
        axes.legend(handles.values(), handles.keys(), frameon=False, title=title)
    return figure


def _differences(differences: Dict[str, Any], kind: str, styles: Styles) -> Any:
    """Divergence and, below it, agreement; the scales are those of all kinds of tokens."""
    measures = (("kl", "KL(teacher || student), bits"), ("agreement", "agreement of argmaxes"))
    labels = list(dict.fromkeys(b["label"] for d in differences.values() for b in d["by"][kind]))
    figure, all_axes = plt.subplots(
        *(2, 1), figsize=(_WIDTH, 4.6), constrained_layout=True, sharex=True
    )
    for (measure, title), axes in zip(measures, all_axes):
        for name, difference in differences.items():
            found = {bucket["label"]: bucket[measure] for bucket in difference["by"][kind]}
            at = [i for i, label in enumerate(labels) if label in found]
            values = [found[labels[i]] for i in at]
            axes.plot(at, values, markersize=5, label=name, **styles[name])
        axes.set_xticks(range(len(labels)))
        axes.grid(alpha=0.25)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(0, 1.05 * _highest(differences, measure))
    all_axes[1].set_xticklabels(labels, rotation=30, ha="right", fontsize=9)
    all_axes[1].set_xlabel(_KINDS[kind])
    all_axes[0].legend(frameon=False)
    return figure


def _highest(differences: Dict[str, Any], measure: str) -> float:
    """Of all students and kinds of tokens; 1 where nothing is above 0."""
    values = (
        bucket[measure]
        for difference in differences.values()
        for buckets in difference["by"].values()
        for bucket in buckets
    )
    return max(filter(math.isfinite, values), default=0) or 1
