"""The page's table of sentences, which a script puts in other orders.

Without scripts it is the same table in the first order.
"""

import html
import json
import sys
from typing import Any, Dict, Iterator, List, Optional

from .tables import KL, NONE, decimals, unit_of

_LONGEST = 1500  # characters that are shown of a text
STYLE = """
.sentences { width: 100%; table-layout: auto; }
.sentences td { border: 0; padding: .15rem .6rem; }
.sentences tbody tr:first-child > * { border-top: 2px solid var(--line); padding-top: .5rem; }
.sentences .who { text-align: left; vertical-align: top; font-size: .85rem; line-height: 1.5;
  font-weight: 400; border: 0; padding: .15rem .6rem .15rem 0; width: 8rem; }
.sentences .text { text-align: left; overflow-wrap: anywhere; }
.sentences .of { width: 9rem; }
.order { margin: .6rem 0; } .order label { margin-right: 1rem; }
.order select { font: inherit; max-width: 100%; }
.tokens { display: flex; flex-wrap: wrap; gap: .25rem; margin: .4rem 0; }
.token { border-radius: .25rem; padding: .1rem .35rem; text-align: center; max-width: 100%;
  overflow-wrap: anywhere; border: 1px solid var(--line); }
.token small { display: block; color: #333; font-size: .72rem; line-height: 1.25; }
summary { color: var(--pale); font-size: .85rem; }
@media (max-width: 40rem) {
  .sentences, .sentences tbody, .sentences tr, .sentences .who, .sentences .text {
    display: block; width: auto; }
  .sentences thead { display: none; }
  .sentences .who { padding: .3rem 0 0; color: var(--pale); }
  .sentences tbody tr .text { padding: 0; border: 0; }
  .sentences .of { display: inline-block; width: auto; padding: 0 1rem 0 0; text-align: left; }
  .sentences .of:empty { display: none; }
  .sentences .of::before { content: attr(data-of) " "; color: var(--pale); font-size: .8rem; }
  .sentences .of small { display: inline; padding-left: .5rem; }
}
"""
SCRIPT = """
"use strict";
for (const controls of document.querySelectorAll(".order")) {
  const table = document.querySelector(".sentences"), select = controls.querySelector("select");
  const reversed = controls.querySelector("input");
  const keys = new Map(Array.from(table.tBodies, (body) => [body, JSON.parse(body.dataset.keys)]));
  const sort = () => {
    const key = (body) => keys.get(body)[select.selectedIndex];
    const sign = reversed.checked ? -1 : 1;
    const sorted = Array.from(table.tBodies).sort((a, b) =>
      (key(a) === null) - (key(b) === null) || sign * (key(a) - key(b)));
    table.append(...sorted);
  };
  select.addEventListener("change", sort);
  reversed.addEventListener("change", sort);
  controls.hidden = false;
  sort();
}
"""


def section(report: Dict[str, Any]) -> List[str]:
    """The table with its heading, in parts; nothing where there are no sentences to show."""
    found, unit = report["examples"], unit_of(report)
    if not found["rows"]:
        return []
    columns = [measure["name"] for measure in found["measures"]]
    diverges = any(said["kl"] is not None for row in found["rows"] for said in row["systems"])
    if diverges:
        columns.append(KL)
    tokens = {
        (name, sentence["number"]): sentence["tokens"]
        for name, difference in report["differences"].items()
        for sentence in difference["farthest"]
    }
    head = "".join(f'<th class="of">{html.escape(column)}</th>' for column in columns)
    return [
        f"<h2>{unit.capitalize()}</h2>",
        *(f'<p class="note">{html.escape(note)}</p>' for note in _notes(report, bool(tokens))),
        _controls(found, unit[:-1]),
        f'<table class="sentences"><thead><tr><th></th><th></th>{head}</tr></thead>',
        *(_sentence(row, columns, found, tokens, unit[:-1]) for row in found["rows"]),
        "</table>",
    ]


def _notes(report: Dict[str, Any], tokens: bool) -> Iterator[str]:
    found, unit = report["examples"], unit_of(report)
    yield (
        f"The {unit} in which models differ most from the teacher and from the baseline. In every "
        f"order but that of their numbers, the first and the last {found['each']} are those of the "
        f"whole {report['subset']}. Without scripts, the page keeps one order: "
        f"{_title(found['orders'][0])}."
    )
    lower = [measure["name"] for measure in found["measures"] if measure["lower_is_better"]]
    if lower:
        yield f"Lower is better: {', '.join(lower)}."
    if tokens:
        yield (
            "KL is the divergence from the teacher in bits per token. Token by token, the redder, "
            "the larger; where the two disagree, the predictions of teacher (T) and student (S) "
            "are shown below."
        )


def _controls(found: Dict[str, Any], unit: str) -> str:
    """Hidden as long as no script shows them."""
    options = [*map(_title, found["orders"]), f"number of the {unit}"]
    chosen = "".join(f"<option>{html.escape(option)}</option>" for option in options)
    return (
        f'<p class="order" hidden><label>Order: <select>{chosen}</select></label> '
        '<label><input type="checkbox" autocomplete="off"> reversed</label></p>'
    )


def _title(order: Dict[str, Any]) -> str:
    if order["measure"] is None:
        return f"{order['system']}: largest KL from {order['against']} first"
    return f"{order['system']} against {order['against']}: {order['measure']}, worst first"


def _finite(key: Optional[float]) -> Optional[float]:
    """What JSON can hold: the largest number for infinity."""
    return None if key is None else min(max(key, -sys.float_info.max), sys.float_info.max)


def _sentence(
    row: Dict[str, Any],
    columns: List[str],
    found: Dict[str, Any],
    tokens: Dict[Any, List[Dict[str, Any]]],
    unit: str,
) -> str:
    keys = [*map(_finite, row["keys"]), row["number"]]
    nothing = "".join('<td class="of"></td>' for _ in columns)
    lines = [f"<tbody data-keys='{json.dumps(keys)}'>"]
    who = [f"{unit} {row['number']}"]
    for label in ("source", "reference"):
        if row[label] is not None:
            who.append(label)
            lines.append(_line(", ".join(who), _text(row[label]), nothing))
            who = []
    if who:
        lines.append(_line(who[0], "", nothing))
    for said in row["systems"]:
        text = _text(said["text"]) if row["reference"] is not None else ""
        detail = tokens.get((said["system"], row["number"]))
        if detail:
            shown = "".join(map(_token, detail))
            text += (
                "<details><summary>token by token</summary>"
                f'<div class="tokens">{shown}</div></details>'
            )
        cells = "".join(_cell(column, said, found) for column in columns)
        lines.append(_line(said["system"], text, cells))
    return "".join([*lines, "</tbody>"])


def _line(who: str, text: str, cells: str) -> str:
    label = f'<th class="who" scope="row">{html.escape(who)}</th>'
    return f'<tr>{label}<td class="text" dir="auto">{text}</td>{cells}</tr>'


def _text(text: Optional[str]) -> str:
    if text is None:
        return "<em>longer than the model accepts</em>"
    return html.escape(text if len(text) <= _LONGEST else text[:_LONGEST] + " …")


def _cell(column: str, said: Dict[str, Any], found: Dict[str, Any]) -> str:
    """A system's value, and how much more it is than others'."""
    first, others = "", []
    if column == KL:
        first = "" if said["kl"] is None else f"{said['kl']:.2f}"
    elif column in said["worth"]:
        worth = said["worth"][column]
        first = decimals(found["measures"], column).format(worth["value"])
        signed = decimals(found["measures"], column, "+")
        others = [
            f"{signed.format(difference)} to {html.escape(name)}"
            for name, difference in worth["against"].items()
        ]
    else:
        first = NONE
    more = "".join(f"<small>{line}</small>" for line in others)
    return f'<td class="of" data-of="{html.escape(column)}">{first}{more}</td>'


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
