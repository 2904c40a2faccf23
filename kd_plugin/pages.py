"""Tables as Markdown, and as HTML pages that need nothing from outside."""

import base64
import hashlib
import html
import re
from typing import Callable, Iterable, List, NamedTuple, Sequence, Union

# A cell's text; of several numbers that stand one below the other, the main one is first
Cell = Union[str, Sequence[str]]


class Table(NamedTuple):
    """A table of a page, with the sentences below it.

    Attributes:
        header: a cell of several lines says what each line of the cells below it is.
        notes: sentences; ``failures`` are those that a reader must not miss.
        level: of its heading.
        texts: whether the cells are sentences, which are broken into lines, and no numbers.
    """

    title: str
    header: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    notes: List[str] = []
    failures: List[str] = []
    level: int = 2
    texts: bool = False

    def each_text(self, change: Callable[[str], str]) -> "Table":
        """With another text in place of each."""

        def all_of(cells: Sequence[Cell]) -> List[Cell]:
            return [
                change(cell) if isinstance(cell, str) else [change(line) for line in cell]
                for cell in cells
            ]

        return self._replace(
            title=change(self.title),
            header=all_of(self.header),
            rows=[all_of(row) for row in self.rows],
            notes=[change(note) for note in self.notes],
            failures=[change(failure) for failure in self.failures],
        )


def markdown_table(table: Table) -> str:
    """The table alone."""
    lines = [
        "| " + " | ".join(markdown_text("; ".join(_lines(cell))) for cell in row) + " |"
        for row in (table.header, *table.rows)
    ]
    others = "---|" if table.texts else "---:|"
    lines.insert(1, "|---|" + others * (len(table.header) - 1))
    return "\n".join(lines)


def _lines(cell: Cell) -> Sequence[str]:
    return [cell] if isinstance(cell, str) else cell


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
:root { --ink: #1c2430; --pale: #5c6672; --line: #dde2e8; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1, h2, h3 { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .5rem 0 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; color: var(--pale); font-weight: 600; }
p { margin: .3rem 0; } .note { color: var(--pale); font-size: .87rem; overflow-wrap: anywhere; }
.failed { color: #a40000; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: separate; border-spacing: 0;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; font-size: .85rem; color: var(--pale); vertical-align: bottom;
  line-height: 1.3; }
td small, th small { display: block; color: var(--pale); font-size: .8rem; font-weight: 400;
  line-height: 1.3; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff;
  min-width: 7rem; overflow-wrap: anywhere; }
summary { cursor: pointer; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { padding: .7rem; } }
"""


_TEXTS_STYLE = """
.texts td { white-space: normal; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.texts th { text-align: left; } .texts td + td { min-width: 12rem; }
"""


def html_page(title: str, tables: Iterable[Table]) -> str:
    """Tables with headings and their sentences, as one page."""
    parts = [part for table in tables for part in html_section(table)]
    return html_document(title, parts, style=_TEXTS_STYLE)


def html_document(title: str, parts: Iterable[str], *, style: str = "", script: str = "") -> str:
    """A page of parts that are HTML already.

    Args:
        script: the only one that a browser runs, wherever the texts of the page come from.
    """
    title = html.escape(title)
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    runs = f"'sha256-{checksum}'" if script else "'none'"
    allowed = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {runs}"
    head = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{allowed}">',
        f"<title>{title}</title><style>{_STYLE}{style}</style></head><body>",
        f"<h1>{title}</h1>",
    ]
    end = f"<script>{script}</script></body></html>" if script else "</body></html>"
    return "\n".join([*head, *parts, end]) + "\n"


def html_section(table: Table) -> List[str]:
    """A table with its heading and its sentences, in parts."""
    e = html.escape
    return [
        f"<h{table.level}>{e(table.title)}</h{table.level}>",
        *([_html_table(table)] if table.rows or not table.texts else []),
        *(f'<p class="failed">{e(failure)}</p>' for failure in table.failures),
        *(f'<p class="note">{e(note)}</p>' for note in table.notes),
    ]


def _html_cell(cell: Cell) -> str:
    """What stands in a cell: the first line, and the others below it, smaller."""
    first, *others = map(html.escape, _lines(cell))
    return first + "".join(f"<small>{line}</small>" for line in others)


def _html_table(table: Table) -> str:
    cell = '<td dir="auto">{}</td>' if table.texts else "<td>{}</td>"
    head = "".join(f"<th>{_html_cell(name)}</th>" for name in table.header)
    rows = "".join(
        f"<tr>{''.join(cell.format(_html_cell(content)) for content in row)}</tr>"
        for row in table.rows
    )
    body = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    opened = '<table class="texts">' if table.texts else "<table>"
    return f'<div class="wide">{opened}{body}</table></div>'
