"""Charts of the HTML report: SVG without colours of its own, which the page's style sheet gives in light and dark.

A chart that is too fine to read has tooltips: every epoch's band, every bar and every row of a heat map carries a
``<title>``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastnas.report.records import Points
from fastnas.report.text import clean, percent, short

COLOURS = 8  # classes c0 .. c7 of the style sheet
_WIDTH, _HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 10, 30
_BANDS = 100  # most tooltips and bars a chart
_LEVELS = 24  # shades of a heat map


@dataclass(frozen=True)
class Line:
    """One line of a chart: its points, a colour from 0 to 7, and whether it is dashed or one of many."""

    name: str
    points: Points
    colour: int = 0
    dashed: bool = False
    thin: bool = False


def line_chart(lines: Sequence[Line], *, as_percent: bool = False, from_zero: bool = False) -> str:
    """Lines over epochs with a tooltip for each epoch; lines without points are left out."""
    lines = [line for line in lines if line.points]
    values = [value for line in lines for _, value in line.points]
    axes = _Axes(sorted({epoch for line in lines for epoch, _ in line.points}), _ticks(values, from_zero), as_percent)
    named = [line for line in lines if not line.thin]
    bands = []
    for epoch in axes.sampled():
        texts = [f"{line.name} {axes.text(dict(line.points)[epoch])}" for line in named if epoch in dict(line.points)]
        if texts:
            bands.append(axes.band(epoch, f"epoch {epoch}: " + ", ".join(texts)))
    return axes.draw("".join(bands) + "".join(_path(line, axes) for line in lines))


def stacked_bars(parts: Sequence[tuple[str, Points]]) -> str:
    """One bar an epoch (or a few epochs, the mean) of parts that add up, in seconds; colours in their order."""
    epochs = sorted({epoch for _, points in parts for epoch, _ in points})
    step = max(1, math.ceil(len(epochs) / _BANDS))
    groups = [epochs[start : start + step] for start in range(0, len(epochs), step)]
    tables = [(name, dict(points)) for name, points in parts]
    means = [[sum(table.get(e, 0.0) for e in group) / len(group) for _, table in tables] for group in groups]
    axes = _Axes(epochs, _ticks([0.0, *(sum(bar) for bar in means)], True))
    drawn = []
    for group, bar in zip(groups, means, strict=True):
        left, right = axes.x(group[0] - 0.5), axes.x(group[-1] + 0.5)
        gap = min(2.0, (right - left) / 6)
        floor, rects = 0.0, []
        for index, size in enumerate(bar):
            top, bottom = axes.y(floor + size), axes.y(floor)
            rects.append(
                f'<rect class="c{index % COLOURS} fill" x="{left + gap:.1f}" y="{top:.1f}" '
                f'width="{max(right - left - 2 * gap, 0.5):.1f}" height="{bottom - top:.1f}"/>'
            )
            floor += size
        label = f"epoch {group[0]}" if len(group) == 1 else f"epochs {group[0]} to {group[-1]}, mean"
        texts = [f"{name} {size:.3g} s" for (name, _), size in zip(tables, bar, strict=True)]
        drawn.append(f"<g><title>{clean(label)}: {clean(', '.join(texts))}</title>{''.join(rects)}</g>")
    return axes.draw("".join(drawn))


def heat_scale(matrices: Sequence[Sequence[tuple[int, list[list[float]]]]]) -> tuple[float, float]:
    """The smallest and the largest probability of some heat maps, so that they share one scale."""
    values = [p for course in matrices for _, rows in course for row in rows for p in row]
    return min(values), max(values)


def heat_map(
    course: Sequence[tuple[int, list[list[float]]]],
    nodes: Sequence[Sequence[tuple[int, str]]],
    names: Sequence[str],
    scale: tuple[float, float],
) -> str:
    """Probabilities of the candidates of each edge over the epochs, one small map an edge.

    `course`: epoch and [E, O] probabilities; `nodes`: for each node of the cell its edges, as (index, source);
    `names`: the O candidates. Rows of maps are nodes, columns are sources.
    """
    row, width, gap, label = 12, 158, 18, 96
    columns = max(len(node) for node in nodes)
    height = len(names) * row
    shown = _spread(course, 60)
    cell = width / len(shown)
    low, high = scale
    parts, y = [], 8
    for index, node in enumerate(nodes):
        for place, name in enumerate(names):
            middle = y + 25 + place * row
            parts.append(f'<text class="tick end" x="{label - 8}" y="{middle}">{clean(short(name))}</text>')
        parts.append(f'<text class="strong end" x="{label - 8}" y="{y + 10}">node {index}</text>')
        for column, (edge, source) in enumerate(node):
            x = label + column * (width + gap)
            last = course[-1][1][edge]
            winner = max(range(len(names)), key=last.__getitem__)
            parts.append(
                f'<text class="tick" x="{x}" y="{y + 10}">{clean(source)}: '
                f'<tspan class="strong">{clean(short(names[winner]))} {last[winner]:.2f}</tspan></text>'
            )
            parts.append(f'<rect class="panel" x="{x}" y="{y + 16}" width="{width}" height="{height}"/>')
            for place, name in enumerate(names):
                values = [rows[edge][place] for _, rows in shown]
                levels = [round(_LEVELS * (p - low) / (high - low)) if high > low else 0 for p in values]
                title = f"node {index} from {source}, {name}: {course[0][1][edge][place]:.3f} to {last[place]:.3f}"
                top = y + 16 + place * row
                runs = "".join(
                    f'<rect class="heat" x="{x + start * cell:.1f}" y="{top}" width="{(end - start) * cell:.1f}" '
                    f'height="{row}" fill-opacity="{level / _LEVELS:.2g}"/>'
                    for start, end, level in _runs(levels)
                    if level
                )
                frame = ' class="winner"' if place == winner else ' class="row"'
                hit = f'<rect{frame} x="{x}" y="{top}" width="{width}" height="{row}"/>'
                parts.append(f"<g><title>{clean(title)}</title>{runs}{hit}</g>")
        y += 16 + height + 16
    return _svg("".join(parts), label + columns * (width + gap), y, "heatmap")


def _runs(levels: Sequence[int]) -> list[tuple[int, int, int]]:
    """Stretches of equal numbers: start, end, number."""
    found: list[tuple[int, int, int]] = []
    for index, level in enumerate(levels):
        if found and found[-1][2] == level:
            found[-1] = (found[-1][0], index + 1, level)
        else:
            found.append((index, index + 1, level))
    return found


def _spread(items: Sequence, most: int) -> list:
    """At most so many of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


class _Axes:
    """Epochs and values to pixels, and the frame of a chart."""

    def __init__(self, epochs: Sequence[int], ticks: Sequence[float], as_percent: bool = False) -> None:
        self.epochs, self.ticks, self.as_percent = epochs, ticks, as_percent
        self.first, self.last = epochs[0] - 0.5, epochs[-1] + 0.5
        self.low, self.high = ticks[0], ticks[-1]

    def x(self, epoch: float) -> float:
        share = (epoch - self.first) / (self.last - self.first)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def text(self, value: float) -> str:
        return percent(value) if self.as_percent else f"{value:.4g}"

    def sampled(self) -> list[int]:
        return _spread(self.epochs, _BANDS)

    def band(self, epoch: int, title: str) -> str:
        width = self.x(self.last) - self.x(self.first)
        half = width / 2 / min(len(self.epochs), _BANDS)
        return (
            f'<rect class="band" x="{self.x(epoch) - half:.1f}" y="{_TOP}" width="{2 * half:.1f}" '
            f'height="{_HEIGHT - _TOP - _BOTTOM}"><title>{clean(title)}</title></rect>'
        )

    def draw(self, body: str) -> str:
        parts = []
        for tick in self.ticks:
            parts.append(f'<path class="grid" d="M{_LEFT} {self.y(tick):.1f}H{_WIDTH - _RIGHT}"/>')
            text = f"{tick:.0%}" if self.as_percent else f"{tick:g}"
            parts.append(f'<text class="tick end" x="{_LEFT - 8}" y="{self.y(tick) + 4:.1f}">{text}</text>')
        for epoch in _epoch_ticks(self.epochs):
            parts.append(f'<text class="tick middle" x="{self.x(epoch):.1f}" y="{_HEIGHT - 10}">{epoch}</text>')
        return _svg("".join(parts) + body, _WIDTH, _HEIGHT)


def _epoch_ticks(epochs: Sequence[int]) -> list[int]:
    """Evenly spaced round epochs."""
    steps = (factor * 10**power for power in range(9) for factor in (1, 2, 5))
    step = next(step for step in steps if len(epochs) <= 8 * step)
    return [epoch for epoch in epochs if epoch % step == 0] or [epochs[0]]


def _ticks(values: Sequence[float], from_zero: bool) -> list[float]:
    """Round numbers that enclose the values."""
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0.0)
    if high - low <= 1e-3 * max(abs(high), abs(low)):  # less than a label can show
        margin = abs(high) / 10 or 1.0
        low, high = low - margin, high + margin
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) <= 5)
    if all(value == round(value) for value in values):
        step = max(1, round(step))  # a count has no fractions
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def _path(line: Line, axes: _Axes) -> str:
    points = [f"{axes.x(epoch):.1f} {axes.y(value):.1f}" for epoch, value in line.points]
    kind = "thin" if line.thin else "line"
    dash = " dashed" if line.dashed else ""
    title = f"<title>{clean(line.name)}</title>" if line.thin else ""
    path = f'<path class="{kind}{dash} c{line.colour % COLOURS} stroke" d="M{"L".join(points)}">{title}</path>'
    x, y = points[0].split()
    dot = f'<circle class="c{line.colour % COLOURS} fill" cx="{x}" cy="{y}" r="3"/>' if len(points) == 1 else ""
    return path + dot


def _svg(body: str, width: float, height: float, kind: str = "chart") -> str:
    return f'<svg class="{kind}" role="img" viewBox="0 0 {width:g} {height:g}" width="{width:g}">{body}</svg>'
