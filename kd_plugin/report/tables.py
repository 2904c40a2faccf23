"""The report's numbers as tables: functions of the content of ``report.json`` alone."""

from typing import Any, Dict, Iterator, List, Optional

from ..checkpoints import LANGUAGE_MODEL, SPEECH, TRANSLATION, Kind, kind_of
from ..pages import Cell, Table

NONE = "–"
KL = "KL"  # the column of divergences beside sentences
OVERVIEW, COST = "At a glance", "Cost"  # the tables that pictures follow
_TITLES = {
    "frequency": "by how often the token occurs in training",
    "position": "by position in the {}",
    "length": "by length of the reference",
    "entropy": "by the teacher's entropy, in bits",
}


def _kind(report: Dict[str, Any]) -> Kind:
    """Of the models."""
    return kind_of(report["task"], None) or TRANSLATION


def unit_of(report: Dict[str, Any]) -> str:
    """What the data consist of: sentences, blocks or utterances."""
    return _kind(report).samples[0]


def pace(report: Dict[str, Any]) -> str:
    """What is counted in a second, for speeds to be compared."""
    return "tokens" if _kind(report) is LANGUAGE_MODEL else unit_of(report)


def languages(report: Dict[str, Any]) -> List[str]:
    """The pair of languages, "de-en", if any; what is said and written in one is no pair."""
    names = list(dict.fromkeys(name for name in report.get("languages", ()) if name))
    return ["-".join(names)] if names else []


def _number(value: Optional[float], form: str) -> str:
    return NONE if value is None else form.format(value)


def _megabytes(value: Optional[float]) -> str:
    return NONE if value is None else f"{value / 1e6:,.2f}"


def tables(report: Dict[str, Any]) -> Iterator[Table]:
    """All of them, in their order."""
    yield overview(report)
    yield _perplexity(report) if _kind(report) is LANGUAGE_MODEL else _quality(report)
    yield _cost(report)
    for name, difference in report["differences"].items():
        yield from _difference(name, difference, unit_of(report)[:-1])


def overview(report: Dict[str, Any]) -> Table:
    """The first one: what there is to choose between."""
    models = {model["name"]: model for model in report["models"]}
    first, *others = [metric["name"] for metric in report["metrics"]]
    shown = [metric["name"] for metric in report["metrics"] if metric["at_a_glance"]]
    others = [name for name in others if name in shown]
    unit = pace(report)
    header = ["model", first, "speed-up", "MB", f"of the teacher's {first}", *others, "parameters",
        unit + "/s"]  # fmt: skip
    rows = []
    for system in report["systems"]:
        model = models[system["model"]]
        if system["scores"] is None:
            rows.append([system["name"], "failed", *[NONE] * (len(header) - 2)])
            continue
        rows.append(
            [
                system["name"],
                _score(system, first, report),
                _number(system["speedup"], "{:.1f} x"),
                _megabytes(model["bytes"]),
                f"{system['kept']:.1%}" if system["kept"] is not None else NONE,
                *(_score(system, name, report) for name in others),
                _number(model["parameters"], "{:,}"),
                f"{system[unit + '_per_second']['median']:,.1f}",
            ]
        )
    failures = [
        f"{model['name']} failed: {model['error']}" for model in report["models"] if model["error"]
    ]
    return Table(OVERVIEW, header, rows, failures=[*failures, *report["doubts"]])


def _quality(report: Dict[str, Any]) -> Table:
    rows, unit, hears = [], unit_of(report), _kind(report) is SPEECH
    for system in report["systems"]:
        scores = system["scores"]
        if scores is None:
            continue
        lengths = [system["length_ratio"], *([] if hears else [system["length_ratio_on_train"]])]
        rows.append(
            [
                system["name"],
                str(system["beam"]),
                *(_with_interval(system, metric["name"], report) for metric in report["metrics"]),
                *(_number(length, "{:.3f}") for length in lengths),
            ]
        )
    metrics = [(metric["name"], "95% interval", "p") for metric in report["metrics"]]
    header = ["model", "beam", *metrics, "length", *([] if hears else ["on train"])]
    train = (
        "; on train: of a part of the training set, where a teacher's own length is what its "
        "students learn"
    )
    lower = "".join(
        f"A lower {one['name']} is better. " for one in report["metrics"] if one["lower_is_better"]
    )
    notes = [
        f"{report[unit]:,} {unit} of {', '.join([report['subset'], *languages(report)])}, "
        f"against {report['references']}.",
        f"p: {report['significance']} against {report['baseline']}. {lower}"
        "Length is that of what is written divided by that of the references"
        f"{'' if hears else train}.",
        *(f"{one['source']}: {report['signatures'][one['name']]}" for one in report["metrics"]),
    ]  # fmt: skip
    for metric in report["metrics"]:
        found = {
            system["name"]: system["scores"][metric["name"]]
            for system in report["systems"]
            if system["scores"]
        }
        if found.get(report["baseline"]) is None and any(found.values()):
            notes.append(f"{metric['name']}: no scores of {report['baseline']}, so no p.")
    for system in report["systems"]:
        if system["scores"] and system["left_out"]:
            notes.append(
                f"{system['name']}: {system['left_out']} {unit} are longer than the model "
                f"accepts and count as not {'written down' if hears else 'translated'}."
            )
    return Table("Quality", header, rows, notes)


def _score(system: Dict[str, Any], metric: str, report: Dict[str, Any]) -> str:
    found = system["scores"][metric]
    return NONE if found is None else decimals(report["metrics"], metric).format(found["score"])


def _with_interval(system: Dict[str, Any], metric: str, report: Dict[str, Any]) -> Cell:
    found = system["scores"][metric]
    if found is None:
        return NONE
    form = decimals(report["metrics"], metric)
    identical = found.get("identical", system["identical"])
    p = "identical" if identical else _number(found["p"], "{:.4f}")
    interval = f"{form.format(found['mean'])} ± {form.format(found['ci'])}"
    return _score(system, metric, report), interval, p


def decimals(metrics: List[Dict[str, Any]], name: str, sign: str = "") -> str:
    """The format of a metric's values."""
    (found,) = [metric["decimals"] for metric in metrics if metric["name"] == name]
    return f"{{:{sign}.{found}f}}"


def _perplexity(report: Dict[str, Any]) -> Table:
    metric = report["metrics"][0]["name"]
    rows = [
        [system["name"], f"{system['scores'][metric]['score']:.2f}", f"{system['loss']:.4f}"]
        for system in report["systems"]
        if system["scores"]
    ]
    cut = report["cut"]
    shown = ["sample_break_mode", "tokens_per_sample", "add_bos_token"]
    if cut["shorten_method"] != "none":
        shown += ["shorten_method", "shorten_data_split_list"]
    given = [(name, cut[name]) for name in shown if cut[name]]
    flags = " ".join(
        "--" + name.replace("_", "-") + ("" if value is True else f" {value}")
        for name, value in given
    )
    tokens = next(system["tokens"] for system in report["systems"] if system["scores"])
    notes = [
        f"{report['blocks']:,} blocks of {report['subset']}, {tokens:,} tokens: {flags}. A lower "
        f"{metric} is better: {report['signatures'][metric]}."
    ]
    return Table("Quality", ["model", metric, "loss, bits per token"], rows, notes)


def _precision(model: Dict[str, Any]) -> str:
    mapped = "vocabulary map" if model["vocabulary_map"] else None
    return ", ".join(filter(None, [model["precision"], mapped]))


def _cost(report: Dict[str, Any]) -> Table:
    models = {model["name"]: model for model in report["models"]}
    units = list(dict.fromkeys([pace(report), "tokens"]))
    rows = []
    for system in report["systems"]:
        if system["scores"] is None:
            continue
        model = models[system["model"]]
        paces = [system[unit + "_per_second"] for unit in units]
        rows.append(
            [
                system["name"],
                (model["kind"], _precision(model) or NONE),
                (
                    _number(model["parameters"], "{:,}"),
                    _number(model["parameters_without_embeddings"], "{:,}"),
                ),
                (_megabytes(model["bytes"]), _megabytes(model["file_bytes"])),
                (
                    f"{paces[0]['median']:,.1f}",
                    f"{paces[0]['low']:,.1f} to {paces[0]['high']:,.1f}",
                ),
                *(f"{one['median']:,.0f}" for one in paces[1:]),
                _megabytes(model["peak_memory_bytes"]),
                _number(system["speedup"], "{:.1f} x"),
            ]
        )
    header: List[Cell] = [
        *("model", ("runs in", "precision"), ("parameters", "without embeddings")),
        *(("MB", "file MB"), (f"{units[0]}/s", "quartiles")),
        *(f"{unit}/s" for unit in units[1:]),
        *("peak memory MB", "speed-up"),
    ]
    threads = report["threads"]
    if _kind(report) is LANGUAGE_MODEL:
        what = ("symbols to the loss of each block", "scoring", "")
    else:
        beam = f" with beam {report['beam']}"
        read = "frames" if _kind(report) is SPEECH else "source symbols"
        what = (f"{read} to target symbols", "decoding", beam)
    median = f"the median of {report['repeats']} passes, in which the models take turns"
    notes = [
        f"Speed: {'of one pass' if report['repeats'] == 1 else median}, on "
        f"{report['device']} with {threads} thread{'' if threads == 1 else 's'}. "
        f"The time runs from batches of {what[0]}.",
        "MB: the model alone, without optimizer state or vocabulary; file MB: everything in its "
        f"files. Peak memory: while {what[1]}, beyond what the process held before it opened the "
        "model.",
        f"Speed-up: {units[0]}/s divided by those of {report['teacher']}{what[2]}.",
        *report["notes"],
    ]
    return Table(COST, header, rows, notes)


def _difference(name: str, difference: Dict[str, Any], unit: str) -> Iterator[Table]:
    def row(label: str, bucket: Dict[str, Any]) -> List[str]:
        return [
            label,
            f"{bucket['tokens']:,}",
            _number(bucket["agreement"], "{:.3f}"),
            *(_number(bucket[key], "{:.3f}") for key in ("kl", "nll", "teacher_nll")),
        ]

    columns = ["tokens", "agreement", "KL(teacher || student)", "nll", "teacher's nll"]
    yield Table(
        f"Where {name} differs from its teacher",
        ["", *columns],
        [row("all", difference["all"])],
        [
            "Both read the reference and predict each of its tokens. Agreement is the share of "
            "tokens for which their likeliest symbols are the same; KL and nll are in bits per "
            "token."
        ],
    )
    yield Table(
        f"{name}: calibration",
        ["", "likeliest symbol", "reference", "ends expected"],
        [
            [who, *(_number(found[key], "{:.3f}") for key in ("likeliest", "reference", "ends"))]
            for who, found in difference["calibration"].items()
        ],
        [
            "Expected calibration error (10 bins, 0 is best) of the likeliest symbol's probability "
            "and of the reference's; and the probability of the end of sentence, summed over all "
            "tokens, for each sentence: above 1, the model ends sentences before references do."
        ],
        level=3,
    )
    for kind, buckets in difference["by"].items():
        rows = [row(bucket["label"], bucket) for bucket in buckets]
        yield Table(f"{name}: {_TITLES[kind].format(unit)}", ["", *columns], rows, level=3)
