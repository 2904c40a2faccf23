"""The report as Markdown and as one HTML page, which needs no scripts and nothing from outside.

Both are functions of the content of ``report.json`` alone.
"""

import base64
import html
from typing import Any, Dict, Iterator, List, Optional

from ..checkpoints import LANGUAGE_MODEL, TRANSLATION
from ..pages import Table, html_document, html_section, markdown_table, markdown_text

_NONE = "–"
_OVERVIEW, _COST = "At a glance", "Cost"  # the tables that pictures follow
_TITLES = {
    "frequency": "by how often the token occurs in training",
    "position": "by position in the {}",
    "length": "by length of the reference",
    "entropy": "by the teacher's entropy, in bits",
}
_CAPTIONS = {
    "quality-speed.png": "Quality against speed. Up and to the right is better.",
    "curves.png": "Training curves from the logs.",
    "differences.png": "Where students differ from the teacher: divergence (0 is best) and "
    "agreement (1 is best).",
}


def _models_language(report: Dict[str, Any]) -> bool:
    return report["task"] == LANGUAGE_MODEL.task


def _unit(report: Dict[str, Any]) -> str:
    """What the text consists of: sentences or blocks."""
    kind = LANGUAGE_MODEL if _models_language(report) else TRANSLATION
    return kind.samples[0]


def _number(value: Optional[float], form: str) -> str:
    return _NONE if value is None else form.format(value)


def _megabytes(value: Optional[float]) -> str:
    return _NONE if value is None else f"{value / 1e6:,.2f}"


def _tables(report: Dict[str, Any]) -> Iterator[Table]:
    yield _overview(report)
    yield _perplexity(report) if _models_language(report) else _quality(report)
    yield _cost(report)
    for name, difference in report["differences"].items():
        yield from _difference(name, difference, _unit(report)[:-1])


def _overview(report: Dict[str, Any]) -> Table:
    models = {model["name"]: model for model in report["models"]}
    first, *others = [metric["name"] for metric in report["metrics"]]
    shown = [metric["name"] for metric in report["metrics"] if metric["at_a_glance"]]
    others = [name for name in others if name in shown]
    pace = "tokens" if _models_language(report) else "sentences"
    header = ["model", first, "speed-up", "MB", f"of the teacher's {first}", *others, "parameters",
        pace + "/s"]  # fmt: skip
    rows = []
    for system in report["systems"]:
        model = models[system["model"]]
        if system["scores"] is None:
            rows.append([system["name"], "failed", *[_NONE] * (len(header) - 2)])
            continue
        rows.append(
            [
                system["name"],
                f"{system['scores'][first]['score']:.2f}",
                _number(system["speedup"], "{:.1f} x"),
                _megabytes(model["bytes"]),
                f"{system['kept']:.1%}" if system["kept"] is not None else _NONE,
                *(f"{system['scores'][name]['score']:.2f}" for name in others),
                _number(model["parameters"], "{:,}"),
                f"{system[pace + '_per_second']['median']:,.1f}",
            ]
        )
    failures = [
        f"{model['name']} failed: {model['error']}" for model in report["models"] if model["error"]
    ]
    return Table(_OVERVIEW, header, rows, failures=[*failures, *report["doubts"]])


def _quality(report: Dict[str, Any]) -> Table:
    rows = []
    for system in report["systems"]:
        scores = system["scores"]
        if scores is None:
            continue
        cells = []
        for metric in report["signatures"]:
            found = scores[metric]
            cells += [
                f"{found['score']:.2f}",
                f"{found['mean']:.2f} ± {found['ci']:.2f}",
                _p(system, found["p"]),
            ]
        lengths = [system["length_ratio"], system["length_ratio_on_train"]]
        cells += [_number(length, "{:.3f}") for length in lengths]
        rows.append([system["name"], str(system["beam"]), *cells])
    header = ["model", "beam"]
    for metric in report["signatures"]:
        header += [metric, "95% interval", "p"]
    lower = "".join(
        f"A lower {one['name']} is better. " for one in report["metrics"] if one["lower_is_better"]
    )
    notes = [
        f"{report['sentences']:,} sentences of {report['subset']}, "
        f"{'-'.join(report['languages'])}, against {report['references']}.",
        f"p: {report['significance']} against {report['baseline']}. {lower}"
        "Length is that of the translations divided by that of the references; on train: of a "
        "part of the training set, where a teacher's own length is what its students learn.",
        *(f"{one['source']}: {report['signatures'][one['name']]}" for one in report["metrics"]),
    ]  # fmt: skip
    for system in report["systems"]:
        if system["scores"] and system["left_out"]:
            notes.append(
                f"{system['name']}: {system['left_out']} sentences are longer than the model "
                "accepts and count as not translated."
            )
    return Table("Quality", [*header, "length", "on train"], rows, notes)


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


def _p(system: Dict[str, Any], p: Optional[float]) -> str:
    if system["identical"]:
        return "identical"
    return _number(p, "{:.4f}")


def _mapped(model: Dict[str, Any]) -> str:
    return "vocabulary map" if model["vocabulary_map"] else ""


def _cost(report: Dict[str, Any]) -> Table:
    models = {model["name"]: model for model in report["models"]}
    units = ["tokens"] if _models_language(report) else ["sentences", "tokens"]
    rows = []
    for system in report["systems"]:
        if system["scores"] is None:
            continue
        model = models[system["model"]]
        paces = [system[pace + "_per_second"] for pace in units]
        rows.append(
            [
                system["name"],
                model["kind"],
                ", ".join(filter(None, [model["precision"], _mapped(model)])) or _NONE,
                _number(model["parameters"], "{:,}"),
                _number(model["parameters_without_embeddings"], "{:,}"),
                _megabytes(model["bytes"]),
                _megabytes(model["file_bytes"]),
                f"{paces[0]['median']:,.1f}",
                f"{paces[0]['low']:,.1f} to {paces[0]['high']:,.1f}",
                *(f"{pace['median']:,.0f}" for pace in paces[1:]),
                _megabytes(model["peak_memory_bytes"]),
                _number(system["speedup"], "{:.1f} x"),
            ]
        )
    header = [
        "model", "runs in", "precision", "parameters", "without embeddings", "MB", "file MB",
        f"{units[0]}/s", "quartiles", *(f"{unit}/s" for unit in units[1:]), "peak memory MB",
        "speed-up",
    ]  # fmt: skip
    threads = report["threads"]
    if _models_language(report):
        what = ("symbols to the loss of each block", "scoring", "")
    else:
        beam = f" with beam {report['beam']}"
        what = ("source symbols to target symbols", "decoding", beam)
    notes = [
        f"Speed: the median of {report['repeats']} passes, in which the models take turns, on "
        f"{report['device']} with {threads} thread{'' if threads == 1 else 's'}. "
        f"The time runs from batches of {what[0]}.",
        "MB: the model alone, without optimizer state or vocabulary; file MB: everything in its "
        f"files. Peak memory: while {what[1]}, beyond what the process held before it opened the "
        "model.",
        f"Speed-up: {units[0]}/s divided by those of {report['teacher']}{what[2]}.",
        *report["notes"],
    ]
    return Table(_COST, header, rows, notes)


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


def markdown(report: Dict[str, Any]) -> str:
    """The report's tables, with links to its pictures."""
    parts = ["# Teacher and students"]
    for table in _tables(report):
        parts.append("## " + markdown_text(table.title))
        parts.append(markdown_table(table))
        parts += [markdown_text(note) for note in (*table.failures, *table.notes)]
        if table.title == _OVERVIEW:
            parts += [f"![{_CAPTIONS[name]}]({name})" for name in report["pictures"]]
    parts += [markdown_text(note) for note in _not_compared(report)]
    return "\n\n".join(parts) + "\n"


def summary(report: Dict[str, Any]) -> str:
    """The first table, to print on a terminal."""
    return markdown_table(_overview(report))


def _not_compared(report: Dict[str, Any]) -> List[str]:
    return [
        f"{name} is not compared with the teacher token by token: {why}"
        for name, why in report["not_compared"].items()
    ]


def page(report: Dict[str, Any], pictures: Dict[str, bytes]) -> str:
    """One HTML page.

    Args:
        pictures: PNG files by name, which the page embeds.
    """
    e = html.escape
    title, unit = f"Teacher and students: {report['subset']}", _unit(report)
    if not _models_language(report):
        title += f" of {'-'.join(report['languages'])}"
    parts = []
    for table in _tables(report):
        parts += html_section(table)
        # the first two belong to all models, the third to what follows
        if table.title == _OVERVIEW:
            parts += [_picture(*one) for one in pictures.items() if one[0] != "differences.png"]
        elif table.title == _COST and "differences.png" in pictures:
            parts.append(_picture("differences.png", pictures["differences.png"]))
    for name, difference in report["differences"].items():
        parts.append(f"<h2>{unit.capitalize()} where {e(name)} is farthest from its teacher</h2>")
        parts.append(
            '<p class="note">Each token with its KL in bits: the redder, the '
            "larger. Where the two disagree, the predictions of teacher (T) and student (S) are "
            "shown below.</p>"
        )
        parts += [
            _sentence(sentence, unit[:-1], "" if i else " open")
            for i, sentence in enumerate(difference["farthest"])
        ]
    parts += [f'<p class="note">{e(note)}</p>' for note in _not_compared(report)]
    return html_document(title, parts)


def _picture(name: str, png: bytes) -> str:
    data, caption = base64.b64encode(png).decode("ascii"), html.escape(_CAPTIONS[name])
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _sentence(sentence: Dict[str, Any], unit: str, opened: str) -> str:
    e = html.escape
    texts = "".join(
        f"<dt>{label}</dt><dd dir=\"auto\">{e(sentence[key] or '')}</dd>"
        for label, key in (
            ("source", "source"),
            ("reference", "reference"),
            ("teacher", "teacher"),
            ("student", "student"),
        )
        if sentence[key] is not None
    )
    tokens = "".join(map(_token, sentence["tokens"]))
    return (
        f"<details{opened}><summary>{unit} {sentence['number']}, {sentence['kl']:.2f} bits per "
        f"token: <span dir=\"auto\">{e(sentence['reference'] or '')}</span></summary>"
        f'<dl>{texts}</dl><div class="tokens">{tokens}</div></details>'
    )


def _token(token: Dict[str, Any]) -> str:
    e = html.escape
    shade = min(token["kl"] / 8, 1) * 0.75  # a divergence of 8 bits is as red as it gets
    teacher, student = e(token["teacher"]), e(token["student"])
    predictions = ""
    if teacher != student:
        predictions = f"<small>T <bdi>{teacher}</bdi><br>S <bdi>{student}</bdi></small>"
    return (
        f'<span class="token" style="background:rgba(213,94,0,{shade:.2f})">'
        f"<bdi>{e(token['symbol'])}</bdi><small>{token['kl']:.2f}</small>{predictions}</span>"
    )
