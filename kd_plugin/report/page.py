"""The report as Markdown and as one HTML page, which can do without scripts and needs nothing from
outside.

Both are functions of the content of ``report.json`` alone.
"""

import base64
import html
from typing import Any, Dict, List

from ..pages import html_document, html_section, markdown_table, markdown_text
from . import browser
from .tables import COST, OVERVIEW, languages, overview, tables

CAPTIONS = {
    "quality-speed.png": "Quality against speed. Up and to the right is better.",
    "curves-nll_loss.png": "Training curves from the logs: the student's loss.",
    "curves-kd_loss.png": "Training curves from the logs: the distillation loss.",
    "curves-agreement.png": "Training curves from the logs: agreement with the teacher.",
    **{
        f"differences-{kind}.png": "Divergence from the teacher (0 is best) and agreement with it "
        f"(1 is best) by {what}."
        for kind, what in (
            ("frequency", "how often the token occurs in training"),
            ("position", "position"),
            ("length", "length of the reference"),
            ("entropy", "the teacher's entropy"),
        )
    },
}
_DIFFERENCES = "differences-"
_STYLE = """
.pictures { display: grid; gap: 1.2rem; margin: 1.2rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; } img { width: 100%; max-width: 34rem; height: auto; }
figcaption { color: var(--pale); font-size: .87rem; }
"""


def markdown(report: Dict[str, Any]) -> str:
    """The report's tables, with links to its pictures."""
    parts = ["# Teacher and students"]
    for table in tables(report):
        parts.append("## " + markdown_text(table.title))
        parts.append(markdown_table(table))
        parts += [markdown_text(note) for note in (*table.failures, *table.notes)]
        if table.title == OVERVIEW:
            parts += [f"![{CAPTIONS[name]}]({name})" for name in report["pictures"]]
    parts += [markdown_text(note) for note in _not_compared(report)]
    return "\n\n".join(parts) + "\n"


def summary(report: Dict[str, Any]) -> str:
    """The first table, to print on a terminal."""
    return markdown_table(overview(report))


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
    title = f"Teacher and students: {report['subset']}"
    title += "".join(f" of {pair}" for pair in languages(report))
    differences = {name: png for name, png in pictures.items() if name.startswith(_DIFFERENCES)}
    others = {name: png for name, png in pictures.items() if name not in differences}
    behind = {
        OVERVIEW: _pictures(others),
        COST: [*browser.section(report), *_pictures(differences)],
    }
    parts = []
    for table in tables(report):
        parts += [*html_section(table), *behind.get(table.title, ())]
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in _not_compared(report)]
    return html_document(title, parts, style=_STYLE + browser.STYLE, script=browser.SCRIPT)


def _pictures(pictures: Dict[str, bytes]) -> List[str]:
    figures = [_picture(*one) for one in pictures.items()]
    return ['<div class="pictures">', *figures, "</div>"] if figures else []


def _picture(name: str, png: bytes) -> str:
    data, caption = base64.b64encode(png).decode("ascii"), html.escape(CAPTIONS[name])
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
