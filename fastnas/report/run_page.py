"""The report of one run."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastnas._files import replace_file
from fastnas.config import WHICH_DATA, as_flags
from fastnas.methods import METHODS, WeightSettings
from fastnas.report.cells import describe_cells, draw_cells
from fastnas.report.charts import Line, heat_map, heat_scale, line_chart, stacked_bars
from fastnas.report.findings import findings
from fastnas.report.page import cards, copyable, figure, grid, legend_of, more, page
from fastnas.report.records import Points, Record, read_record
from fastnas.report.text import clean, duration, percent
from fastnas.settings import DataSettings, RuntimeSettings
from fastnas.spaces import AnySpace, DartsSpace

CELLS = (("normal", "Normal cell"), ("reduce", "Reduction cell"))
TIME_PARTS = (
    ("data_s", "data"),
    ("weights_s", "weights"),
    ("architecture_s", "architecture"),
    ("evaluate_s", "evaluation"),
)
# Figures that have a chart of their own; every other number of metrics.jsonl gets a small one.
_CHARTED = {"loss", "search_loss", "accuracy", "search_accuracy", "child_accuracy", "skips_normal", "skips_reduce"}
_CHARTED |= {"entropy", "entropy_normal", "entropy_reduce"}
_TITLES = {
    "temperature": "Temperature",
    "cost": "Cost C(Z), 1 for a uniform Z",
    "epsilon": "Epsilon: share of learnt samples",
    "effective_samples": "Effective samples",
    "vae_bound": "Lower bound of the autoencoder",
}


def write_report(path: str | Path) -> Path:
    """Make `report.html` in the folder of a run, finished or not; returns its path. Raises UserError for no run."""
    target = Path(path) / "report.html"
    replace_file(target, [render_run(read_record(path)).encode()])
    return target


def render_run(record: Record) -> str:
    """The report as HTML. Equal records give equal text."""
    state = "finished" if record.finished else f"{record.epochs} of {record.planned or '?'} epochs"
    state += f", seed {record.config['seed']}" if "seed" in record.config else ""
    state += f", run {record.hashes['run']}" if "run" in record.hashes else ""
    kind = f"{record.method} on {record.config.get('space', 'a derived network')}" if record.is_search else "retraining"
    return page(
        record.name,
        f"{kind}, data {record.config.get('data', 'unknown')}, {state}",
        [
            ("Summary", _summary(record)),
            ("Findings", draw_findings(record)),
            ("Cells", draw_genotype(record)),
            ("Curves", _curves(record)),
            ("Architecture over time", _architecture(record)),
            ("Time and memory", _time_and_memory(record)),
            ("Genotype", _genotype(record)),
            ("Next", _next(record)),
            ("Settings", _settings(record)),
        ],
    )


def _summary(record: Record) -> str:
    items: list[tuple[str, str, str]] = []
    if "test_accuracy" in record.result:
        items.append(("Test accuracy", percent(record.result["test_accuracy"]), "read once, at the end"))
    if "parameters" in record.result:
        items.append(("Parameters", f"{record.result['parameters']:,.0f}", "of the retrained network"))
    best = record.best("search_accuracy")
    if best is not None:
        last = record.last("search_accuracy")
        items.append(("Search accuracy", percent(last or 0), f"best {percent(best[1])} in epoch {best[0]}"))
    child = record.last("child_accuracy")
    if child is not None:
        items.append(("Derived network", percent(child), "shared weights, no training"))
    loss = record.last("loss")
    if loss is not None:
        items.append(("Training loss", f"{loss:.4g}", f"accuracy {percent(record.last('accuracy') or 0)}"))
    entropy = record.series("entropy")
    if entropy:
        items.append(("Entropy", f"{entropy[-1][1]:.3f} nats", f"{entropy[0][1]:.3f} after the first epoch"))
    changed = _last_change(record)
    if changed is not None:
        items.append(("Genotype unchanged since", f"epoch {changed}", f"of {record.epochs}"))
    items.append(
        ("Epochs", f"{record.epochs} of {record.planned or '?'}", "finished" if record.finished else "not finished")
    )
    if record.seconds is not None:
        each = record.seconds / max(record.epochs, 1)
        items.append(("Wall-clock time", duration(record.seconds), f"{duration(each)} an epoch"))
    if record.memory is not None:
        items.append(("Memory", f"{record.memory / 1e9:.2f} GB", "the most of an epoch"))
    missing = "".join(f'<p class="muted">{clean(line)}</p>' for line in record.missing)
    return cards(items) + missing


def _last_change(record: Record) -> int | None:
    """The epoch whose genotype is the one of the end, without a break."""
    texts = [(row["epoch"] + 1, row["genotype"]) for row in record.metrics if "genotype" in row]
    if not texts:
        return None
    since = texts[-1][0]
    for epoch, text in reversed(texts):
        if text != texts[-1][1]:
            break
        since = epoch
    return since


def draw_findings(record: Record) -> str:
    """Warnings and notes, or that there are none."""
    found = findings(record)
    if not found:
        return "<p>Nothing to warn of: no collapse, no overfitting, no figure that is not a number.</p>"
    return "".join(
        f'<div class="finding {clean(finding.level)}"><b>{clean(finding.title)}</b>{clean(finding.text)}</div>'
        for finding in found
    )


def draw_genotype(record: Record) -> str:
    """The drawing of the genotype; nothing when there is none."""
    if record.genotype is None:
        return ""
    return f'<div class="cells scroll">{draw_cells(record.genotype, stacked=True)}</div>'


def _curves(record: Record) -> str:
    blocks = []
    losses = [Line("training loss", record.series("loss")), Line("search loss", record.series("search_loss"), 1)]
    accuracies = [
        Line("training half", record.series("accuracy")),
        Line("search half", record.series("search_accuracy"), 1),
        Line("derived network", record.series("child_accuracy"), 2, dashed=True),
    ]
    skips = [
        Line("normal cell", record.series("skips_normal")),
        Line("reduction cell", record.series("skips_reduce"), 1),
    ]
    if any(line.points for line in losses):
        blocks.append(figure("Loss", line_chart(losses), lines=losses))
    if any(line.points for line in accuracies):
        blocks.append(figure("Accuracy", line_chart(accuracies, as_percent=True), lines=accuracies))
    if any(line.points for line in skips):
        note = "in the genotype of each epoch"
        blocks.append(figure("Skip connections", line_chart(skips, from_zero=True), note, skips))
    for name in record.scalars:
        if name not in _CHARTED:
            line = Line(name.replace("_", " "), record.series(name))
            title = _TITLES.get(name, line.name.capitalize())
            blocks.append(figure(title, line_chart([line], as_percent="accuracy" in name)))
    return grid(blocks)


def _architecture(record: Record) -> str:
    blocks = []
    if record.series("entropy") and not record.edges("edge_entropy_normal"):
        lines = [
            Line("mean" if name == "entropy" else name.removeprefix("entropy_"), record.series(name), index)
            for index, name in enumerate(("entropy", "entropy_normal", "entropy_reduce"))
        ]
        blocks.append(figure("Entropy, nats", line_chart(lines, from_zero=True), lines=lines))
    space = record.space
    for cell, title in CELLS:
        edges = record.edges(f"edge_entropy_{cell}")
        if edges:
            lines = [*_edge_lines(space, edges), Line("mean of the edges", _mean(edges))]
            note = "bold: mean; thin: each edge"
            blocks.append(figure(f"Entropy of the {title.lower()}, nats", line_chart(lines), note))
    for cell, title in CELLS:
        edges = record.edges(f"edge_weights_{cell}")
        if edges:
            chart = line_chart(_edge_lines(space, edges), from_zero=True)
            blocks.append(figure(f"Edge weights of the {title.lower()}", chart, "softmax of beta over a node's edges"))
    maps = []
    courses = {cell: record.matrices(f"probabilities_{cell}") for cell, _ in CELLS}
    if any(courses.values()):
        scale = heat_scale([course for course in courses.values() if course])
        maps.append(
            f"<p>Probability of each candidate on each edge, from the first epoch (left) to epoch {record.epochs} "
            f"(right): the palest is {scale[0]:.3f}, the darkest {scale[1]:.3f}. A frame marks the likeliest candidate "
            "at the end.</p>"
        )
        for cell, title in CELLS:
            if courses[cell]:
                rows = courses[cell][-1][1]
                drawn = heat_map(courses[cell], _nodes(space, len(rows)), _candidates(space, len(rows[0])), scale)
                maps.append(f'<h3>{title}</h3><div class="scroll">{drawn}</div>')
    return grid(blocks) + "".join(maps)


def _edge_lines(space: AnySpace | None, edges: Sequence[Points]) -> list[Line]:
    names = _edge_names(space, len(edges))
    return [Line(names[edge], points, edge, thin=True) for edge, points in enumerate(edges)]


def _mean(edges: Sequence[Points]) -> Points:
    return [(points[0][0], sum(value for _, value in points) / len(points)) for points in zip(*edges, strict=True)]


def _nodes(space: AnySpace | None, edges: int) -> list[list[tuple[int, str]]]:
    """For each node of a cell its edges, as (index, name of the source); one row where the space is not known."""
    if space is None or getattr(space, "num_edges", None) != edges:
        return [[(edge, f"edge {edge}") for edge in range(edges)]]
    inputs = ("c_{k-2}", "c_{k-1}") if isinstance(space, DartsSpace) else ("input",)

    def source(edge: int) -> str:
        state = space.sources[edge]
        return inputs[state] if state < len(inputs) else f"node {state - len(inputs)}"

    return [
        [(edge, source(edge)) for edge in range(*space.edge_slice(node).indices(edges))] for node in range(space.nodes)
    ]


def _edge_names(space: AnySpace | None, edges: int) -> list[str]:
    nodes = _nodes(space, edges)
    return [f"{source} to node {node}" for node, sources in enumerate(nodes) for _, source in sources]


def _candidates(space: AnySpace | None, count: int) -> Sequence[str]:
    for names in (getattr(space, "candidates", ()), getattr(space, "candidates_without_none", ())):
        if len(names) == count:
            return names
    return [f"candidate {index}" for index in range(count)]


def _time_and_memory(record: Record) -> str:
    blocks = []
    parts = [(name, record.series(key)) for key, name in TIME_PARTS]
    if not parts[1][1]:  # retraining, and older searches
        parts = [("training", record.series("train_s")), parts[3]]
    parts = [(name, points) for name, points in parts if sum(seconds for _, seconds in points) > 0]
    if parts:
        totals = {name: sum(seconds for _, seconds in points) for name, points in parts}
        whole = sum(totals.values())
        keys = [(f"{name} {total / whole:.0%}", index, False) for index, (name, total) in enumerate(totals.items())]
        note = f"time of the host, {duration(whole)} in total"
        blocks.append(figure("Seconds an epoch", stacked_bars(parts), note, legend=legend_of(keys)))
    memory = [(epoch, size / 1e9) for epoch, size in record.series("memory_bytes")]
    if memory:
        line = Line("memory", memory)
        blocks.append(figure("Memory, GB", line_chart([line], from_zero=True), "1 GB = 10^9 bytes"))
    return grid(blocks)


def _genotype(record: Record) -> str:
    if record.genotype is None:
        return ""
    boxes = [copyable(record.genotype.to_json().strip(), "genotype.json")]
    if hasattr(record.genotype, "to_darts"):
        boxes.append(copyable(record.genotype.to_darts(), "The tuple notation of the DARTS repositories"))
    text = f'<pre class="plain">{clean(describe_cells(record.genotype).rstrip())}</pre>'
    return more("In words", text) + "".join(boxes)


def _next(record: Record) -> str:
    run, config = shlex.quote(str(record.path)), record.config
    data = as_flags(config, *WHICH_DATA)
    commands = []
    if not record.finished:
        program = "search" if record.is_search else "retrain"
        commands.append(("Go on from the last epoch", f"python -m fastnas.{program} --resume {run}"))
    if record.genotype is not None and record.is_search:
        commands.append(("Train the network from scratch", f"python -m fastnas.retrain --genotype {run} {data}"))
        commands.append(("Count its parameters", f"python -m fastnas.info --genotype {run} --channels 36 --cells 20"))
    if record.is_search:
        sizes = as_flags(config, "batch_size", "channels", "cells", "nodes", "space")
        profile = f"python -m fastnas.profile --methods {shlex.quote(record.method)} {sizes} --by cell"
        commands.append(("See where the memory of a step goes", profile))
    if record.method == "parsec":
        commands.append(("Train an ensemble of samples", f"python -m fastnas.ensemble {run} {data}"))
    if record.method == "one_shot":
        commands.append(("Rank architectures on it", f"python -m fastnas.rank {run} --samples 1000"))
    commands.append(
        ("Make this report again, or with another run's folder after it compare", f"python -m fastnas.report {run}")
    )
    return "".join(copyable(command, label) for label, command in commands)


def _settings(record: Record) -> str:
    defaults = default_settings(record)
    rows = []
    for name, value in record.config.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        kind = ' class="changed"' if name in defaults and defaults[name] != text else ""
        rows.append(f"<div{kind}><dt>{clean(name)}</dt><dd>{clean(text)}</dd></div>")
    note = '<p class="muted">Bold: not the default of fastnas.</p>' if defaults else ""
    tables = [*record.versions.items(), *((f"hash of {name}", value) for name, value in record.hashes.items())]
    versions = "".join(f"<div><dt>{clean(name)}</dt><dd>{clean(value)}</dd></div>" for name, value in tables)
    return f'{note}<dl class="settings">{"".join(rows)}</dl><h3>Versions</h3><dl class="settings">{versions}</dl>'


def default_settings(record: Record) -> dict[str, str]:
    """Defaults of a search's settings, as text; none for other runs."""
    if record.method not in METHODS:
        return {}
    groups = (DataSettings, WeightSettings, RuntimeSettings, METHODS[record.method].Settings)
    fields = [field for group in groups for field in dataclasses.fields(group)]
    return {field.name: _text(field.default) for field in fields}


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
