"""Does the cost grow linearly? Times over the batch size and over the number of cells, with fitted lines and a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import Any

BATCHES, CELLS = (8, 16, 32, 64, 128), (5, 8, 11, 14, 17, 20)

Lines = dict[str, dict[str, Any]]


def fit_line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least squares: `slope`, `intercept` and `r2`, the share of the variance that the line explains."""
    count, mean_x, mean_y = len(x), sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    if count < 2 or not spread:
        raise ValueError("fit_line needs two different places")
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    intercept = mean_y - slope * mean_x
    left = sum((b - slope * a - intercept) ** 2 for a, b in zip(x, y, strict=True))
    total = sum((b - mean_y) ** 2 for b in y)
    return {"slope": slope, "intercept": intercept, "r2": 1 - left / total if total else 1.0}


def sweep(
    times: Callable[..., Mapping[str, float]], batches: Sequence[int] = BATCHES, cells: Sequence[int] = CELLS
) -> tuple[dict[str, Lines], str]:
    """Results by axis and row, and the plot as SVG. `times`: (batch=...) or (cells=...) -> ms of each row."""
    results: dict[str, Lines] = {}
    for axis, places in (("batch", batches), ("cells", cells)):
        measured = [times(**{axis: place}) for place in places]
        results[axis] = {}
        for name in measured[0]:
            ms = [row[name] for row in measured]
            results[axis][name] = {axis: list(places), "ms": ms, **fit_line(places, ms)}
    return results, draw_sweep(results)


def draw_sweep(results: Mapping[str, Lines]) -> str:
    """SVG with one panel an axis: medians as points, fitted lines, their slopes in the legend. Equal results give equal
    text."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    labels = {"batch": ("images a batch", "ms an image"), "cells": ("cells", "ms a cell")}
    with matplotlib.rc_context({"svg.hashsalt": "fastnas", "svg.fonttype": "none", "font.size": 9}):
        figure, panels = pyplot.subplots(1, len(results), figsize=(9, 3.4), layout="constrained", squeeze=False)
        for panel, (axis, lines) in zip(panels[0], results.items(), strict=True):
            name_x, unit = labels[axis]
            for index, (name, line) in enumerate(lines.items()):
                x = line[axis]
                ends = [0, max(x)]
                label = f"{name}: {line['slope']:.3g} {unit}, R² {line['r2']:.3f}"
                panel.plot(x, line["ms"], "o", color=f"C{index}", markersize=4)
                panel.plot(ends, [line["intercept"] + line["slope"] * a for a in ends], color=f"C{index}", label=label)
            panel.set(xlabel=name_x, ylabel="milliseconds", xlim=(0, None), ylim=(0, None))
            panel.legend(frameon=False)
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return text.getvalue()
