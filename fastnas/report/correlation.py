"""One-shot accuracy against stand-alone accuracy and divergence: Figures 5 and 6 of Bender et al. 2018 as one SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any


def draw_correlation(ranking: Sequence[Mapping[str, Any]], points: Sequence[Mapping[str, Any]]) -> str:
    """Three panels. `ranking`: records with `accuracy` and `divergence`; `points`: records with `standalone` too.

    Left: stand-alone accuracy over one-shot accuracy (Figure 5, top). Middle: how one-shot accuracies are distributed
    (Figure 5, bottom). Right: one-shot accuracy over divergence from nearly complete architectures (Figure 6). Equal
    records give equal text.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    accuracies = [record["accuracy"] for record in ranking]
    with matplotlib.rc_context({"svg.hashsalt": "fastnas", "svg.fonttype": "none", "font.size": 9}):
        figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
        left.scatter([p["accuracy"] for p in points], [p["standalone"] for p in points], s=14)
        left.set(xlabel="one-shot accuracy", ylabel="stand-alone accuracy")
        middle.hist(accuracies, bins=30)
        middle.set(xlabel="one-shot accuracy", ylabel="architectures")
        right.scatter([record["divergence"] for record in ranking], accuracies, s=4)
        right.set(xlabel="symmetrised KL divergence, nats", ylabel="one-shot accuracy", xscale="log")
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return text.getvalue()
