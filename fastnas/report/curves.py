"""`python -m fastnas.report.curves RUN ...`: accuracy and entropy of searches over their epochs, as one SVG.

The figures of the papers: accuracy of the mode and entropy of the distribution (PARSEC, Figure 3), accuracy during the
search (SNAS, Figure 3) and the entropy of every edge (SNAS, Figure 4).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from fastnas._files import replace_file
from fastnas.cli import ArgumentParser, run_command
from fastnas.errors import UserError
from fastnas.runs import RunFolder

Records = Sequence[Mapping[str, Any]]


def draw_curves(runs: Mapping[str, Records]) -> str:
    """SVG with two panels. `runs`: the records of metrics.jsonl by the label of each run.

    Left: search accuracy, and dashed the accuracy of the derived network with shared weights where it was measured.
    Right: entropy in nats, and thin the entropy of each edge where it was measured. Equal records give equal text.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "fastnas", "svg.fonttype": "none", "font.size": 9}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for index, (label, records) in enumerate(runs.items()):
            color = f"C{index % 10}"
            epochs = [record["epoch"] + 1 for record in records]
            left.plot(epochs, [record["search_accuracy"] for record in records], color=color, label=label)
            if all("child_accuracy" in record for record in records):
                left.plot(epochs, [record["child_accuracy"] for record in records], color=color, linestyle="--")
            for kind in ("edge_entropy_normal", "edge_entropy_reduce"):
                if all(kind in record for record in records):
                    right.plot(epochs, [record[kind] for record in records], color=color, linewidth=0.5, alpha=0.5)
            right.plot(epochs, [record["entropy"] for record in records], color=color, label=label)
        left.set(xlabel="epoch", ylabel="accuracy on the search half (dashed: derived child)")
        right.set(xlabel="epoch", ylabel="entropy, nats (thin: each edge)", ylim=(0, None))
        left.legend(frameon=False)
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return text.getvalue()


def main(argv: list[str]) -> int:
    parser = ArgumentParser(
        prog="python -m fastnas.report.curves",
        description="Draw accuracy and entropy of one or more searches over their epochs.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("curves.svg"), help="SVG file to write [curves.svg]")
    arguments = parser.parse_args(argv)
    runs = {}
    for path in arguments.runs:
        records = RunFolder.open(path).metrics()
        if not records or "search_accuracy" not in records[0]:
            raise UserError(f"{path} has no search metrics yet: give the folder of a search with a finished epoch")
        runs[path.name] = records
    replace_file(arguments.out, [draw_curves(runs).encode()])
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
