"""The frame of a report: one HTML file that loads nothing, and the blocks that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from fastnas.report.charts import COLOURS, Line
from fastnas.report.text import clean


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole file; sections are (title, HTML) pairs, and those without HTML are left out."""
    shown = [(name, body) for name, body in sections if body]
    links = "".join(f'<a href="#{_anchor(name)}">{clean(name)}</a>' for name, _ in shown)
    blocks = "".join(f'<section id="{_anchor(name)}"><h2>{clean(name)}</h2>{body}</section>' for name, body in shown)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{clean(title)} - fastnas</title><style>{_asset('page.css')}</style></head>"
        f"<body><main><header><h1>{clean(title)}</h1><p>{clean(subtitle)}</p><nav>{links}</nav></header>"
        f"{blocks}</main><script>{_asset('page.js')}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return (resources.files("fastnas.report") / name).read_text(encoding="utf-8")


def _anchor(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def cards(items: Sequence[tuple[str, str, str]]) -> str:
    """Figures at a glance: (label, value, note) each."""
    return (
        '<dl class="cards">'
        + "".join(
            f"<div><dt>{clean(label)}</dt><dd>{clean(value)}<small>{clean(note)}</small></dd></div>"
            for label, value, note in items
        )
        + "</dl>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Sequence[int] = ()) -> str:
    """`head` and `rows` as text; columns in `numeric` are set to the right."""

    def cell(kind: str, column: int, text: str) -> str:
        marked = ' class="number"' if column in numeric else ""
        return f"<{kind}{marked}>{clean(text)}</{kind}>"

    lines = ["".join(cell("th", column, text) for column, text in enumerate(head))]
    lines += ["".join(cell("td", column, text) for column, text in enumerate(row)) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines[1:])
    return f'<div class="scroll"><table><thead><tr>{lines[0]}</tr></thead><tbody>{body}</tbody></table></div>'


def copyable(text: str, label: str = "") -> str:
    """Text in a box with a button that copies it."""
    caption = f"<p>{clean(label)}</p>" if label else ""
    return (
        f'{caption}<div class="copy"><pre tabindex="0">{clean(text)}</pre>'
        '<button type="button" title="Copy to the clipboard">Copy</button></div>'
    )


def figure(title: str, chart: str, note: str = "", lines: Sequence[Line] = (), *, legend: str = "") -> str:
    """A chart with its title, a note and a legend: the given one, or that of the lines that are not one of many."""
    named = [(line.name, line.colour, line.dashed) for line in lines if line.points and not line.thin]
    if len(named) > 1:
        legend = legend_of(named)
    text = f" <span>{clean(note)}</span>" if note else ""
    return f'<figure><figcaption>{clean(title)}{text}</figcaption>{legend}<div class="scroll">{chart}</div></figure>'


def legend_of(items: Sequence[tuple[str, int, bool]]) -> str:
    """Names with the colour of their line: (name, colour, whether it is dashed) each."""
    keys = []
    for name, colour, dashed in items:
        kind = f"c{colour % COLOURS}" + (" dashed" if dashed else "")
        keys.append(f'<li><i class="{kind}"></i>{clean(name)}</li>')
    return f'<ul class="legend">{"".join(keys)}</ul>'


def grid(blocks: Sequence[str]) -> str:
    """Blocks side by side where there is room."""
    return f'<div class="grid">{"".join(blocks)}</div>' if blocks else ""


def more(title: str, body: str) -> str:
    """A block that opens at a click."""
    return f"<details><summary>{clean(title)}</summary>{body}</details>"
