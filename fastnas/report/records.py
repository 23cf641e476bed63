"""A run folder as the report reads it: whatever is there, and a line for each thing that is not."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastnas.config import RECORDS
from fastnas.errors import UserError
from fastnas.runs import RunFolder
from fastnas.spaces import AnyGenotype, AnySpace, build_space, load_genotype

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST = 1000  # nodes or cells of a space that is drawn
Points = list[tuple[int, float]]  # epoch, counted from 1, and value


@dataclass(frozen=True)
class Record:
    """One run, finished or not, of this or an earlier version of fastnas."""

    path: Path
    config: Mapping[str, Any]
    versions: Mapping[str, Any]
    hashes: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    timing: Sequence[Mapping[str, Any]]
    genotype: AnyGenotype | None
    result: Mapping[str, float]
    missing: Sequence[str] = field(default_factory=tuple)  # sentences
    stopped: str = ""  # why the last epoch was not finished, if the run knew

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def is_search(self) -> bool:
        return "method" in self.config

    @property
    def method(self) -> str:
        return str(self.config.get("method", "retrain" if "genotype" in self.config else "unknown"))

    @property
    def epochs(self) -> int:
        """Epochs that are finished."""
        return len(self.metrics)

    @property
    def planned(self) -> int | None:
        epochs = self.config.get("epochs")
        return epochs if isinstance(epochs, int) else None

    @property
    def finished(self) -> bool:
        return self.planned is not None and self.epochs >= self.planned

    @property
    def space(self) -> AnySpace | None:
        """The search space; None when this fastnas does not know it."""
        try:
            sizes = {name: int(self.config[name]) for name in ("nodes", "cells")}
            if max(sizes.values()) > MOST:
                return None
            return build_space(str(self.config["space"]), **sizes)
        except (KeyError, TypeError, ValueError):
            return None

    def series(self, name: str) -> Points:
        """A figure of metrics.jsonl or timing.jsonl over the epochs; epochs without it are left out."""
        return [
            (int(record["epoch"]) + 1, float(record[name]))
            for record in (*self.metrics, *self.timing)
            if is_number(record.get(name))
        ]

    def last(self, name: str) -> float | None:
        points = self.series(name)
        return points[-1][1] if points else None

    def best(self, name: str) -> tuple[int, float] | None:
        """Epoch and value of the maximum."""
        points = self.series(name)
        return max(points, key=lambda point: point[1]) if points else None

    def edges(self, name: str) -> list[Points]:
        """A figure that has one number for each edge: a series for each."""
        rows = [(r["epoch"] + 1, r[name]) for r in self.metrics if _is_vector(r.get(name))]
        width = min((len(values) for _, values in rows), default=0)
        return [[(epoch, float(values[edge])) for epoch, values in rows] for edge in range(width)]

    def matrices(self, name: str) -> list[tuple[int, list[list[float]]]]:
        """A figure that has a row for each edge: epoch and rows, all of the first one's shape."""
        found: list[tuple[int, list[list[float]]]] = []
        for record in self.metrics:
            rows = record.get(name)
            if not isinstance(rows, list) or not rows or not all(map(_is_vector, rows)):
                continue
            if not found or [len(row) for row in rows] == [len(row) for row in found[0][1]]:
                found.append((record["epoch"] + 1, rows))
        return found

    @property
    def scalars(self) -> list[str]:
        """Names of all figures that are one number, in the order of their first appearance."""
        names = {name: None for record in self.metrics for name, value in record.items() if is_number(value)}
        return [name for name in names if name != "epoch"]

    @property
    def seconds(self) -> float | None:
        """Wall-clock time of the finished epochs."""
        total = [value for name in ("train_s", "evaluate_s") for _, value in self.series(name)]
        return sum(total) if total else None

    @property
    def memory(self) -> float | None:
        """The most bytes that an epoch had."""
        best = self.best("memory_bytes")
        return best[1] if best else None


def read_record(path: str | Path) -> Record:
    """Read the folder of a search or a retraining.

    Raises UserError when it is neither, or when its settings cannot be read.
    """
    run = RunFolder.open(path)
    config = run.config()
    tables = tomllib.loads(run.config_path.read_text(encoding="utf-8"))
    versions, hashes = (tables.get(name, {}) for name in RECORDS)
    metrics, timing = _whole(run.metrics()), _whole(run.timing())
    stopped = [str(record["stopped"]) for record in timing if "stopped" in record]
    timing = [record for record in timing if "stopped" not in record]
    genotype, missing = None, []
    if not metrics:
        missing.append("metrics.jsonl has no finished epoch yet: there are no curves.")
    elif "probabilities_normal" not in metrics[-1] and "edge_entropy_normal" in metrics[-1]:
        missing.append("metrics.jsonl has no probabilities of the candidates (an older fastnas): no heat map.")
    if metrics and not timing:
        missing.append("timing.jsonl is not there: no times and no memory.")
    elif timing and "memory_bytes" not in timing[-1]:
        missing.append("timing.jsonl has no memory (an older fastnas, or a retraining).")
    if not hashes:
        missing.append("config.toml has no [hashes] (an older fastnas): the run cannot be told apart by its digest.")
    if run.genotype_path.exists():
        try:
            genotype = load_genotype(run.genotype_path)
        except UserError as error:
            missing.append(f"genotype.json cannot be read: {error}")
    else:
        missing.append("genotype.json is not there: no epoch is finished.")
    return Record(
        path=Path(path).resolve(),
        config=config,
        versions=versions,
        hashes=hashes,
        metrics=metrics,
        timing=timing,
        genotype=genotype,
        result=_result(run.path / "result.json"),
        missing=missing,
        stopped=stopped[-1] if stopped else "",
    )


def is_number(value: Any) -> bool:
    """Whether a value of a record is one finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_vector(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_number, value))


def _whole(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [record for record in records if type(record["epoch"]) is int]


def _result(path: Path) -> Mapping[str, float]:
    """The numbers of a retraining's result; none where there is no such file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in result.items() if is_number(value)} if isinstance(result, dict) else {}
