"""Tables as Markdown, and as HTML pages that need no scripts and nothing from outside."""

import html
import re
from typing import Iterable, List, NamedTuple


class Table(NamedTuple):
    """A table of a page, with the sentences below it.

    Attributes:
        notes: sentences; ``failures`` are those that a reader must not miss.
        level: of its heading.
        texts: whether the cells are sentences, which are broken into lines, and no numbers.
    """

    title: str
    header: List[str]
    rows: List[List[str]]
    notes: List[str] = []
    failures: List[str] = []
    level: int = 2
    texts: bool = False


def markdown_table(table: Table) -> str:
    """The table alone."""
    lines = [
        "| " + " | ".join(map(markdown_text, row)) + " |" for row in (table.header, *table.rows)
    ]
    others = "---|" if table.texts else "---:|"
    lines.insert(1, "|---|" + others * (len(table.header) - 1))
    return "\n".join(lines)


def markdown_text(text: str) -> str:
    """Escape text so that it cannot end a table's cell, and is neither HTML nor a link."""
    text = html.escape(text, quote=False)
    return " ".join(re.sub(r"([|\[`])", r"\\\1", text).split())


def markdown_page(title: str, tables: Iterable[Table]) -> str:
    """Tables with headings and their sentences."""
    parts = ["# " + markdown_text(title)]
    for table in tables:
        parts.append("#" * table.level + " " + markdown_text(table.title))
        if table.rows:
            parts.append(markdown_table(table))
        parts += [markdown_text(note) for note in (*table.failures, *table.notes)]
    return "\n\n".join(parts) + "\n"


_STYLE = """
:root { --ink: #1c2430; --pale: #5c6672; --line: #dde2e8; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: .5rem 0 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; color: var(--pale); font-weight: 600; }
p { margin: .3rem 0; } .note { color: var(--pale); font-size: .87rem; overflow-wrap: anywhere; }
.failed { color: #a40000; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: separate; border-spacing: 0;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 600; font-size: .85rem; color: var(--pale); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; }
figcaption { color: var(--pale); font-size: .87rem; }
details { border: 1px solid var(--line); border-radius: .4rem; margin: .6rem 0;
  padding: .5rem .8rem; }
summary { cursor: pointer; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem .8rem; margin: .6rem 0; }
dt { color: var(--pale); } dd { margin: 0; overflow-wrap: anywhere; }
.tokens { display: flex; flex-wrap: wrap; gap: .25rem; margin: .6rem 0; }
.token { border-radius: .25rem; padding: .1rem .35rem; text-align: center; max-width: 100%;
  overflow-wrap: anywhere; border: 1px solid var(--line); }
.token small { display: block; color: #333; font-size: .72rem; line-height: 1.25; }
@media (max-width: 40rem) { body { padding: .7rem; } dl { grid-template-columns: 1fr; } }
"""


_TEXTS_STYLE = """
.texts td { white-space: normal; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.texts th { text-align: left; } .texts td + td { min-width: 12rem; }
"""


def html_page(title: str, tables: Iterable[Table]) -> str:
    """Tables with headings and their sentences, as one page."""
    parts = [part for table in tables for part in html_section(table)]
    return html_document(title, parts, style=_TEXTS_STYLE)


def html_document(title: str, parts: Iterable[str], *, style: str = "") -> str:
    """A page of parts that are HTML already."""
    title = html.escape(title)
    head = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}{style}</style></head><body>",
        f"<h1>{title}</h1>",
    ]
    return "\n".join([*head, *parts, "</body></html>"]) + "\n"


def html_section(table: Table) -> List[str]:
    """A table with its heading and its sentences, in parts."""
    e = html.escape
    return [
        f"<h{table.level}>{e(table.title)}</h{table.level}>",
        *([_html_table(table)] if table.rows or not table.texts else []),
        *(f'<p class="failed">{e(failure)}</p>' for failure in table.failures),
        *(f'<p class="note">{e(note)}</p>' for note in table.notes),
    ]


def _html_table(table: Table) -> str:
    cell = '<td dir="auto">{}</td>' if table.texts else "<td>{}</td>"
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
    rows = "".join(
        f"<tr>{''.join(cell.format(html.escape(content)) for content in row)}</tr>"
        for row in table.rows
    )
    body = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    opened = '<table class="texts">' if table.texts else "<table>"
    return f'<div class="wide">{opened}{body}</table></div>'
