"""The cells of a genotype as a picture and as text.

The picture is a staircase. Each state, an input or a node, has a row of its own and sends a rail to the
right; each node has a column. The operation from state s to node t is a label at row s and column t: below
the rail of s and left of the lines that lead down to t. So no label can meet another label or a line,
whatever the genotype.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from fastnas.report.svg import BORDER, CHARACTER, INK, MUTED, PANEL, document, draw_text

_RAIL = "#475569"
_LABEL_HEIGHT, _NODE_HEIGHT = 24, 36
_BELOW_RAIL = 34  # from a rail to the middle of the first label below it
_ROW, _STACKED = 78, 30  # height of a row, and of each further label of one row and column
_PAD, _HEADER, _LEGEND, _GAP = 28, 76, 52, 24
_INPUT_WIDTH, _OUTPUT_WIDTH = 56, 58
_BRANCH, _LANE = 26, 9  # width of the curve from a rail to a label, and of one line that leads down

_Nodes = Sequence[Sequence[tuple[str, int]]]


@dataclass(frozen=True)
class _Kind:
    title: str
    prefixes: tuple[str, ...]
    line: str
    fill: str


_OTHER = _Kind("other operation", (), "#db2777", "#fce7f3")
_KINDS = (
    _Kind("separable convolution", ("sep_conv",), "#2563eb", "#dbeafe"),
    _Kind("dilated convolution", ("dil_conv",), "#7c3aed", "#ede9fe"),
    _Kind("pooling", ("max_pool", "avg_pool"), "#d97706", "#fef3c7"),
    _Kind("skip connection", ("skip", "identity"), "#059669", "#d1fae5"),
    _Kind("none", ("none",), "#94a3b8", "#f1f5f9"),
    _OTHER,
)


def _kind(name: str) -> _Kind:
    return next((kind for kind in _KINDS if kind.prefixes and name.startswith(kind.prefixes)), _OTHER)


def _label(name: str) -> str:
    """``sep_conv_3x3`` -> ``sep 3×3``."""
    name = "skip" if name == "skip_connect" else re.sub("_(conv|pool)_", " ", name)
    text = re.sub(r"(\d)x(\d)", r"\1×\2", name.replace("_", " "))
    return text if len(text) <= 22 else text[:21] + "…"


def describe_cells(genotype: Any) -> str:
    """Both cells as aligned text, one node a line; an architecture without such cells one choice a line."""
    if not hasattr(genotype, "normal"):
        return genotype.describe()
    lines = []
    for title, nodes, concat in _cells(genotype):
        lines.append(title)
        terms = [[f"{name}({_state(source)})" for name, source in node] for node in nodes]
        width = max((len(term) for node in terms for term in node), default=0)
        for index, node in enumerate(terms):
            lines.append(f"  node {index} = " + " + ".join(term.ljust(width) for term in node).rstrip())
        lines.append(f"  output = concat({', '.join(map(_state, concat))})")
    return "\n".join(lines) + "\n"


def draw_cells(genotype: Any, *, stacked: bool = False) -> str:
    """One self-contained SVG of the normal and the reduction cell, side by side or `stacked`, or of the lines of
    another architecture.

    ``genotype`` has the attributes of `fastnas.spaces.genotype.Genotype`: ``normal`` and ``reduce``, for each
    node its (candidate name, input state) pairs, with ``normal_concat`` and ``reduce_concat``.
    """
    if not hasattr(genotype, "normal"):
        return _draw_lines(genotype.describe().splitlines(), genotype.space)
    cells = _cells(genotype)
    panels = [_Panel(title, nodes, concat) for title, nodes, concat in cells]
    used = {_kind(name) for _, nodes, _ in cells for node in nodes for name, _ in node}
    legend, legend_width = _legend([kind for kind in _KINDS if kind in used])
    widest, highest = max(panel.width for panel in panels), max(panel.height for panel in panels)
    body, x, y = [], float(_GAP), float(_GAP)
    for panel in panels:
        body.append(f'<g transform="translate({x:g} {y:g})">{panel.draw(panel.height if stacked else highest)}</g>')
        x, y = (x, y + panel.height + _GAP) if stacked else (x + panel.width + _GAP, y)
    width = max(widest + 2 * _GAP if stacked else x, legend_width + 2 * _GAP)
    bottom = y - _GAP if stacked else y + highest
    body.append(f'<g transform="translate({_GAP} {bottom + _LEGEND / 2:g})">{legend}</g>')
    return document("Normal and reduction cell", describe_cells(genotype), width, bottom + _LEGEND, "".join(body))


def _draw_lines(lines: Sequence[str], title: str) -> str:
    width = 2 * _PAD + CHARACTER * max(map(len, lines))
    rows = [draw_text(_PAD, _PAD + 20 * row, line, anchor="start") for row, line in enumerate(lines)]
    return document(title, "\n".join(lines), width, 2 * _PAD + 20 * len(lines), "".join(rows))


def _cells(genotype: Any) -> list[tuple[str, _Nodes, Sequence[int]]]:
    return [
        ("Normal cell", genotype.normal, genotype.normal_concat),
        ("Reduction cell", genotype.reduce, genotype.reduce_concat),
    ]


def _state(state: int) -> str:
    return ("c_{k-2}", "c_{k-1}")[state] if state < 2 else f"node {state - 2}"


@dataclass(frozen=True)
class _Edge:
    name: str
    source: int
    target: int  # a node's index, whose state is target + 2
    level: int  # how many labels lie above this one at its row and column
    lane: int  # which of the lines into the target is its own, from the left


class _Panel:
    """One cell, laid out and ready to draw."""

    def __init__(self, title: str, nodes: _Nodes, concat: Sequence[int]) -> None:
        self.title, self.nodes, self.concat = title, nodes, sorted(set(concat))
        self.note = "a node is the sum of what enters it"
        if title == "Reduction cell":
            self.note += "; operations on the two inputs have stride 2"
        self.edges = [edge for target, node in enumerate(nodes) for edge in _edges_into(target, node)]
        self._place_rows()
        self._place_columns()

    def _place_rows(self) -> None:
        self.rail_y = [float(_HEADER + _NODE_HEIGHT / 2)]
        for state in range(len(self.nodes) + 2):
            levels = max((edge.level for edge in self.edges if edge.source == state), default=0)
            self.rail_y.append(self.rail_y[-1] + _ROW + levels * _STACKED)
        self.height = self.rail_y[-2] + _NODE_HEIGHT / 2 + _PAD

    def _place_columns(self) -> None:
        self.label_x, self.label_width, self.node_x, self.node_width = [], [], [], []
        x = float(_PAD + _INPUT_WIDTH)
        for node in self.nodes:
            text = max((len(_label(name)) for name, _ in node), default=0)
            lanes = max(len(node), 1) * _LANE
            self.label_width.append(text * CHARACTER + 20)
            self.label_x.append(x + 8 + _BRANCH)
            self.node_width.append(max(lanes + 12, _NODE_HEIGHT))
            right = self.label_x[-1] + self.label_width[-1]
            self.node_x.append(right + 14 + self.node_width[-1] / 2)
            x = self.node_x[-1] + self.node_width[-1] / 2
        self.output_x = x + 40
        self.width = max(self.output_x + _OUTPUT_WIDTH, _PAD + len(self.note) * 6.5) + _PAD

    def draw(self, height: float) -> str:
        """SVG of the panel, ``height`` high. Rails come first: the lines that cross them lie above."""
        states = range(len(self.nodes) + 2)
        size = f'width="{self.width:g}" height="{height:g}"'
        parts = [f'<rect {size} rx="14" fill="{PANEL}" stroke="{BORDER}"/>']
        parts.append(draw_text(_PAD, 34, self.title, size=17, weight="bold", anchor="start"))
        parts.append(draw_text(_PAD, 53, self.note, size=11, fill=MUTED, anchor="start"))
        parts += [self._draw_rail(state) for state in states]
        parts += [self._draw_edge(edge) for edge in self.edges]
        parts += [self._draw_branch_points(state) for state in states]
        parts += [self._draw_state(state) for state in states]
        parts.append(self._draw_output())
        return "".join(parts)

    def _branches(self, state: int) -> list[float]:
        """Where labels branch off the rail of a state, from the left."""
        targets = {edge.target for edge in self.edges if edge.source == state}
        return [self.label_x[target] - _BRANCH for target in sorted(targets)]

    def _draw_rail(self, state: int) -> str:
        y = self.rail_y[state]
        start = float(_PAD + _INPUT_WIDTH)
        if state >= 2:
            start = self.node_x[state - 2] + self.node_width[state - 2] / 2
        if state in self.concat:
            end, arrow = self.output_x - 6, _arrow(self.output_x, y, _RAIL, down=False)
        else:
            end, arrow = max(self._branches(state), default=start), ""
        return f'<path d="M{start:g} {y:g}H{end:g}" stroke="{_RAIL}" stroke-width="2"/>{arrow}'

    def _draw_branch_points(self, state: int) -> str:
        """Dots where a rail goes on beyond a branch."""
        branches = self._branches(state) if state in self.concat else self._branches(state)[:-1]
        y = self.rail_y[state]
        return "".join(f'<circle cx="{x:g}" cy="{y:g}" r="3.5" fill="{_RAIL}"/>' for x in branches)

    def _draw_edge(self, edge: _Edge) -> str:
        kind, text = _kind(edge.name), _label(edge.name)
        rail, left = self.rail_y[edge.source], self.label_x[edge.target]
        y = rail + _BELOW_RAIL + edge.level * _STACKED
        width = self.label_width[edge.target]
        lanes = len(self.nodes[edge.target])
        x = self.node_x[edge.target] + (edge.lane - (lanes - 1) / 2) * _LANE
        end = self.rail_y[edge.target + 2] - _NODE_HEIGHT / 2
        branch = f"M{left - _BRANCH:g} {rail:g}c{_BRANCH / 2:g} 0 0 {y - rail:g} {_BRANCH} {y - rail:g}"
        way_down = f"M{left + width:g} {y:g}H{x - 9:g}q9 0 9 9V{end - 6:g}"
        dash = ' stroke-dasharray="5 4"' if kind.title == "none" else ""
        lines = f'<path d="{branch}{way_down}" stroke="{kind.line}" stroke-width="2.2" fill="none"{dash}/>'
        return (
            f"<g><title>{_state(edge.target + 2)}: {escape(edge.name)} of {_state(edge.source)}</title>"
            f'<path d="{way_down}" stroke="{PANEL}" stroke-width="10" fill="none"/>{lines}'
            f"{_arrow(x, end, kind.line, down=True)}"
            f"{_box(left, y - _LABEL_HEIGHT / 2, width, _LABEL_HEIGHT, 12, kind.fill, kind.line, dash)}"
            f"{draw_text(left + width / 2, y, text)}</g>"
        )

    def _draw_state(self, state: int) -> str:
        y = self.rail_y[state]
        if state < 2:
            box = _box(_PAD, y - _NODE_HEIGHT / 2, _INPUT_WIDTH, _NODE_HEIGHT, 8, "#e2e8f0", _RAIL)
            return box + _subscript(_PAD + _INPUT_WIDTH / 2, y, f"k−{2 - state}")
        x, width = self.node_x[state - 2], self.node_width[state - 2]
        box = _box(x - width / 2, y - _NODE_HEIGHT / 2, width, _NODE_HEIGHT, 8, "#ffffff", INK)
        return box + draw_text(x, y, str(state - 2), size=14, weight="bold")

    def _draw_output(self) -> str:
        top = self.rail_y[self.concat[0]] - _NODE_HEIGHT / 2
        bottom = self.rail_y[self.concat[-1]] + _NODE_HEIGHT / 2
        middle, x = (top + bottom) / 2, self.output_x + _OUTPUT_WIDTH / 2
        box = _box(self.output_x, top, _OUTPUT_WIDTH, bottom - top, 8, "#e2e8f0", _RAIL)
        if len(self.concat) == 1:
            return box + _subscript(x, middle, "k")
        return box + _subscript(x, middle - 8, "k") + draw_text(x, middle + 12, "concat", size=11, fill=MUTED)


def _edges_into(target: int, node: Sequence[tuple[str, int]]) -> list[_Edge]:
    """The edges from the top label to the lowest. The lowest gets the leftmost lane, so that no two cross."""
    ordered = sorted(node, key=lambda pair: pair[1])
    edges = []
    for index, (name, source) in enumerate(ordered):
        level = sum(earlier == source for _, earlier in ordered[:index])
        edges.append(_Edge(name, source, target, level, lane=len(ordered) - 1 - index))
    return edges


def _legend(kinds: Sequence[_Kind]) -> tuple[str, float]:
    """The legend and its width."""
    parts, x = [], 4.0
    for kind in kinds:
        dash = ' stroke-dasharray="5 4"' if kind.title == "none" else ""
        parts.append(_box(x, -8, 30, 16, 8, kind.fill, kind.line, dash))
        parts.append(draw_text(x + 38, 0, kind.title, anchor="start"))
        x += 38 + len(kind.title) * CHARACTER + 26
    return "".join(parts), x


def _box(x: float, y: float, width: float, height: float, radius: float, fill: str, stroke: str, dash: str = "") -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{fill}" '
        f'stroke="{stroke}" stroke-width="1.6"{dash}/>'
    )


def _subscript(x: float, y: float, below: str) -> str:
    return (
        f'<text x="{x:g}" y="{y + 3:g}" font-size="15" text-anchor="middle">c'
        f'<tspan dy="4" font-size="10">{below}</tspan></text>'
    )


def _arrow(x: float, y: float, fill: str, *, down: bool) -> str:
    """An arrow head whose tip is at (x, y)."""
    corners = "l-4.2 -8h8.4z" if down else "l-8 -4.2v8.4z"
    return f'<path d="M{x:g} {y:g}{corners}" fill="{fill}"/>'
