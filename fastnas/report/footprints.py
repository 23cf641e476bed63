"""Footprints as pictures: bars that compare the peaks of several steps, and the course of memory over each step.

Both take `fastnas.profiler.footprint.Footprint`s and give one self-contained SVG; all in one picture have one scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from fastnas.profiler.footprint import Footprint, Sample
from fastnas.profiler.sizes import format_size
from fastnas.profiler.tracker import CATEGORIES
from fastnas.report.svg import BORDER, CHARACTER, INK, MUTED, PANEL, document, draw_text

_COLOURS = dict(
    zip(
        CATEGORIES,
        ("#1e293b", "#64748b", "#a78bfa", "#db2777", "#a16207", "#059669", "#3b82f6", "#fbbf24"),
        strict=True,
    )
)
_PAD, _LEFT, _RIGHT, _WIDTH = 28, 190, 110, 620  # of the picture, of the names, of the totals, of the plot
_ROW, _BAR = 58, 30
_HEIGHT, _BAND, _PANEL_GAP = 170, 22, 74  # of a timeline, of its phases, and between two timelines
_LEGEND_ROW, _TITLE = 24, 62
_VISIBLE = 0.3  # px: thinner layers are left out


def draw_bars(footprints: Sequence[Footprint], *, title: str = "Peak memory of a search step", limit: int = 0) -> str:
    """One stacked bar a footprint; `limit` draws a line at so many bytes."""
    scale = _Scale(max([limit, *(footprint.peak for footprint in footprints)]))
    legend, legend_height = _legend(footprints)
    top = _TITLE + legend_height
    bottom = top + len(footprints) * _ROW
    body = [_heading(title, "at the fullest moment; 1 GB = 10⁹ bytes"), legend, scale.draw_grid_across(top, bottom)]
    for index, footprint in enumerate(footprints):
        body.append(_bar(footprint, top + index * _ROW + (_ROW - _BAR) / 2, scale))
    if limit:
        x = scale.x(limit)
        body.append(
            f'<path d="M{x:g} {top - 4:g}V{bottom:g}" stroke="#dc2626" stroke-width="2" stroke-dasharray="5 4"/>'
        )
        body.append(draw_text(x, top - 12, f"limit {format_size(limit)}", size=11, fill="#dc2626"))
    described = "\n".join(_describe(footprint) for footprint in footprints)
    return document(title, described, _full_width(), bottom + 46, "".join(body))


def draw_timelines(footprints: Sequence[Footprint], *, title: str = "Memory over a search step") -> str:
    """One panel a footprint: memory over the operations of the step, stacked by category, with the step's phases."""
    scale = _Scale(max(footprint.peak for footprint in footprints))
    legend, legend_height = _legend(footprints)
    top = _TITLE + legend_height + 12
    body = [_heading(title, "from the first operation to the last; 1 GB = 10⁹ bytes"), legend]
    for index, footprint in enumerate(footprints):
        body.append(_timeline(footprint, top + index * (_HEIGHT + _PANEL_GAP), scale))
    height = top + len(footprints) * (_HEIGHT + _PANEL_GAP)
    return document(title, "\n".join(map(_describe, footprints)), _full_width(), height, "".join(body))


class _Scale:
    """Bytes to pixels, with ticks at round numbers."""

    def __init__(self, largest: int) -> None:
        step = 10 ** math.floor(math.log10(max(largest, 1)))
        self.step = next(step * factor for factor in (0.2, 0.5, 1, 2) if largest <= 6 * step * factor)
        self.top = math.ceil(largest / self.step) * self.step

    def ticks(self) -> list[tuple[float, str]]:
        """Sizes and their labels."""
        power, unit = next((p, u) for p, u in ((9, "GB"), (6, "MB"), (3, "kB"), (0, "B")) if self.top >= 10**p)
        sizes = [self.step * index for index in range(round(self.top / self.step) + 1)]
        return [(size, f"{size / 10**power:g} {unit}" if size else "0") for size in sizes]

    def x(self, size: float) -> float:
        return _PAD + _LEFT + size / self.top * _WIDTH

    def height(self, size: float) -> float:
        return size / self.top * _HEIGHT

    def draw_grid_across(self, top: float, bottom: float) -> str:
        parts = []
        for tick, label in self.ticks():
            parts.append(f'<path d="M{self.x(tick):g} {top:g}V{bottom:g}" stroke="{BORDER}"/>')
            parts.append(draw_text(self.x(tick), bottom + 16, label, size=11, fill=MUTED))
        return "".join(parts)

    def draw_grid_up(self, top: float) -> str:
        parts = []
        for tick, label in self.ticks():
            y = top + _HEIGHT - self.height(tick)
            parts.append(f'<path d="M{self.x(0):g} {y:g}h{_WIDTH}" stroke="{BORDER}"/>')
            parts.append(draw_text(self.x(0) - 8, y, label, size=11, fill=MUTED, anchor="end"))
        return "".join(parts)


def _full_width() -> int:
    return 2 * _PAD + _LEFT + _WIDTH + _RIGHT


def _heading(title: str, note: str) -> str:
    return draw_text(_PAD, 30, title, size=17, weight="bold", anchor="start") + draw_text(
        _PAD, 50, note, size=11, fill=MUTED, anchor="start"
    )


def _legend(footprints: Sequence[Footprint]) -> tuple[str, float]:
    """Boxes for the categories that can be seen, wrapped, and the height that they take."""
    largest = max(footprint.peak for footprint in footprints)
    seen = [
        category
        for category in CATEGORIES
        if any(footprint.at_peak[category] > largest / _WIDTH * _VISIBLE for footprint in footprints)
    ]
    parts, x, y = [], float(_PAD), float(_TITLE + 12)
    for category in seen:
        width = 22 + len(category) * CHARACTER + 20
        if x + width > _full_width() - _PAD:
            x, y = float(_PAD), y + _LEGEND_ROW
        parts.append(f'<rect x="{x:g}" y="{y - 7:g}" width="14" height="14" rx="3" fill="{_COLOURS[category]}"/>')
        parts.append(draw_text(x + 22, y, category, anchor="start"))
        x += width
    return "".join(parts), y - _TITLE + _LEGEND_ROW + 6


def _bar(footprint: Footprint, y: float, scale: _Scale) -> str:
    parts = [
        draw_text(_PAD, y + 9, footprint.name, size=13, weight="bold", anchor="start"),
        draw_text(_PAD, y + 25, f"batch {footprint.batch_size}, {footprint.kind}", size=11, fill=MUTED, anchor="start"),
    ]
    start = 0
    for category, size in footprint.at_peak.items():
        x, end = scale.x(start), scale.x(start + size)
        if size:
            parts.append(
                f'<rect x="{x:g}" y="{y:g}" width="{end - x:g}" height="{_BAR}" fill="{_COLOURS[category]}">'
                f"<title>{category}: {format_size(size)}</title></rect>"
            )
        start += size
    parts.append(
        draw_text(scale.x(start) + 8, y + _BAR / 2, format_size(footprint.peak), weight="bold", anchor="start")
    )
    return "".join(parts)


def _timeline(footprint: Footprint, top: float, scale: _Scale) -> str:
    left, base = scale.x(0), top + _HEIGHT
    samples = footprint.timeline
    end = max(footprint.operations, 1)
    parts = [
        f'<rect x="{left:g}" y="{top:g}" width="{_WIDTH}" height="{_HEIGHT}" fill="{PANEL}"/>',
        scale.draw_grid_up(top),
        draw_text(_PAD, top + 10, footprint.name, size=13, weight="bold", anchor="start"),
        draw_text(_PAD, top + 28, f"batch {footprint.batch_size}", size=11, fill=MUTED, anchor="start"),
        draw_text(_PAD, top + 44, footprint.kind, size=11, fill=MUTED, anchor="start"),
        draw_text(
            left + _WIDTH + 8,
            base - scale.height(footprint.peak),
            f"peak {format_size(footprint.peak)}",
            anchor="start",
        ),
    ]
    places = [left + sample.operation / end * _WIDTH for sample in samples]
    floor = [0] * len(samples)
    for index, category in enumerate(CATEGORIES):
        ceiling = [low + sample.bytes[index] for low, sample in zip(floor, samples, strict=True)]
        if any(scale.height(high - low) > _VISIBLE for high, low in zip(ceiling, floor, strict=True)):
            upper = [f"{x:.1f} {base - scale.height(size):.1f}" for x, size in zip(places, ceiling, strict=True)]
            lower = [f"{x:.1f} {base - scale.height(size):.1f}" for x, size in zip(places, floor, strict=True)]
            path = "L".join(upper + lower[::-1])
            parts.append(f'<path d="M{path}z" fill="{_COLOURS[category]}"><title>{category}</title></path>')
        floor = ceiling
    return "".join(parts) + _bands(samples, places, base + 6)


def _bands(samples: Sequence[Sample], places: Sequence[float], y: float) -> str:
    """The phases of the step below its timeline, by the method's own names for them."""
    parts = []
    phases = [sample.phase.partition(",")[0] for sample in samples]
    for phase, group in groupby(range(len(samples)), key=phases.__getitem__):
        indices = list(group)
        start = places[max(indices[0] - 1, 0)]
        width = places[indices[-1]] - start
        if width < 2:
            continue
        fits = len(phase) * CHARACTER + 8 < width
        parts.append(
            f'<rect x="{start + 1:g}" y="{y:g}" width="{width - 2:g}" height="{_BAND}" rx="4" fill="{BORDER}">'
            f"<title>{phase}</title></rect>"
        )
        if fits:
            parts.append(draw_text(start + width / 2, y + _BAND / 2, phase, size=11, fill=INK))
    return "".join(parts)


def _describe(footprint: Footprint) -> str:
    parts = ", ".join(f"{category} {format_size(size)}" for category, size in footprint.at_peak.items() if size)
    head = f"{footprint.name}, batch {footprint.batch_size}, {footprint.kind}"
    return f"{head}: peak {format_size(footprint.peak)} ({parts})"
