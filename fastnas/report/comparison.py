"""Several runs on one page: a table, overlaid curves, and where their settings and genotypes differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fastnas.report.charts import COLOURS, Line, line_chart
from fastnas.report.findings import findings
from fastnas.report.page import figure, grid, more, page, table
from fastnas.report.records import Points, Record
from fastnas.report.run_page import draw_findings, draw_genotype
from fastnas.report.text import clean, duration, percent
from fastnas.spaces import Genotype
from fastnas.spaces.agreement import edge_agreement

# Title, figure, whether it is a percentage, and whether its axis starts at 0.
CURVES = (
    ("Accuracy on the search half", "search_accuracy", True, False),
    ("Accuracy of the derived network, shared weights", "child_accuracy", True, False),
    ("Accuracy on the training half", "accuracy", True, False),
    ("Training loss", "loss", False, False),
    ("Entropy, as a share of that after the first epoch", "entropy", True, True),  # of edges or of cells, by method
    ("Skip connections of the normal cell", "skips_normal", False, True),
    ("Seconds an epoch, training", "train_s", False, True),
    ("Memory, GB", "memory_bytes", False, True),
)
_RUNS_BY_NAME = ("seed", "data_dir")  # settings that say little about a method


def render_comparison(records: Sequence[Record]) -> str:
    """The page as HTML, runs in the order given; colours tell them apart in all charts."""
    names = labels(records)
    return page(
        f"{len(records)} runs compared",
        ", ".join(names),
        [
            ("Results", _results(records, names)),
            ("Curves", _curves(records, names)),
            ("Agreement", _agreement(records)),
            ("Different settings", _differences(records, names)),
            ("Findings", _findings(records, names)),
            (
                "Cells",
                "".join(more(name, draw_genotype(r)) for name, r in zip(names, records, strict=True) if r.genotype),
            ),
        ],
    )


def labels(records: Sequence[Record]) -> list[str]:
    """Names of the runs, with the folder above where two have the same."""
    counts = Counter(record.name for record in records)
    return [r.name if counts[r.name] == 1 else f"{r.path.parent.name}/{r.name}" for r in records]


def _results(records: Sequence[Record], names: Sequence[str]) -> str:
    columns = (
        "Run",
        "Method",
        "Data",
        "Seed",
        "Epochs",
        "Search accuracy",
        "Best",
        "Derived",
        "Test accuracy",
        "Entropy",
    )
    columns += ("Skips", "Time", "Memory", "Warnings", "Run hash")
    rows = []
    for record, name in zip(records, names, strict=True):
        best, skips, test = (
            record.best("search_accuracy"),
            record.last("skips_normal"),
            record.result.get("test_accuracy"),
        )
        entropy = record.last("entropy")
        rows.append(
            (
                name,
                record.method,
                str(record.config.get("data", "")),
                str(record.config.get("seed", "")),
                f"{record.epochs} of {record.planned or '?'}",
                _percent(record.last("search_accuracy")),
                _percent(best[1] if best else None),
                _percent(record.last("child_accuracy")),
                _percent(test),
                "" if entropy is None else f"{entropy:.3f}",
                "" if skips is None else f"{skips:.0f}",
                "" if record.seconds is None else duration(record.seconds),
                "" if record.memory is None else f"{record.memory / 1e9:.2f} GB",
                str(sum(finding.level == "warning" for finding in findings(record))),
                str(record.hashes.get("run", ""))[:8],
            )
        )
    kept = [c for c in range(len(columns)) if any(row[c] for row in rows)]
    numeric = [place for place, c in enumerate(kept) if 4 <= c <= 13]
    return table([columns[c] for c in kept], [[row[c] for c in kept] for row in rows], numeric=numeric)


def _percent(value: object) -> str:
    return percent(value) if isinstance(value, (int, float)) else ""


def _curves(records: Sequence[Record], names: Sequence[str]) -> str:
    blocks = []
    for title, figure_name, as_percent, from_zero in CURVES:
        lines = [
            Line(name, _scaled(figure_name, record.series(figure_name)), index, dashed=index >= COLOURS)
            for index, (name, record) in enumerate(zip(names, records, strict=True))
        ]
        if any(line.points for line in lines):
            chart = line_chart(lines, as_percent=as_percent, from_zero=from_zero)
            blocks.append(figure(title, chart, lines=lines))
    return grid(blocks)


def _scaled(name: str, points: Points) -> Points:
    if name == "memory_bytes":
        return [(epoch, size / 1e9) for epoch, size in points]
    if name == "entropy" and points and points[0][1] > 0:
        return [(epoch, entropy / points[0][1]) for epoch, entropy in points]
    return points


def _agreement(records: Sequence[Record]) -> str:
    """How far the genotypes agree, where all runs have one of the same kind."""
    genotypes = [record.genotype for record in records if record.genotype is not None]
    shapes = {(g.space, len(g.normal)) if isinstance(g, Genotype) else (g.space, len(g.string)) for g in genotypes}
    if len(genotypes) < 2 or len(shapes) != 1:
        return ""
    agreement = edge_agreement(genotypes)
    mean = sum(agreement.values()) / len(agreement)
    full = sum(share == 1 for share in agreement.values())
    head = (
        f"<p>On average {mean:.0%} of the {len(genotypes)} genotypes have the most frequent choice of an edge; "
        f"on {full} of {len(agreement)} edges all agree.</p>"
    )
    rows = [[edge, f"{share:.0%}"] for edge, share in sorted(agreement.items(), key=lambda item: -item[1])]
    return head + more("Edge by edge", table(["Edge", "Share of the most frequent choice"], rows, numeric=[1]))


def _differences(records: Sequence[Record], names: Sequence[str]) -> str:
    keys = {key: None for record in records for key in record.config if key not in _RUNS_BY_NAME}
    rows = []
    for key in keys:
        values = [record.config.get(key) for record in records]
        if any(value != values[0] for value in values):
            rows.append([key, *("" if value is None else str(value) for value in values)])
    if not rows:
        return "<p>None but the seed.</p>"
    return table(["Setting", *names], rows)


def _findings(records: Sequence[Record], names: Sequence[str]) -> str:
    return "".join(
        f"<h3>{clean(name)}</h3>{draw_findings(record)}" for name, record in zip(names, records, strict=True)
    )
