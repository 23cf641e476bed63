"""The folder of a run: settings, metrics, genotype, drawing and checkpoint, under fixed names."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fastnas import processes
from fastnas._files import replace_file
from fastnas.config import dump_toml, read_toml
from fastnas.errors import UserError


class _HasJson(Protocol):
    def to_json(self) -> str: ...


def default_run_path(method: str, data: str, *, root: str | Path = "runs") -> Path:
    """``runs/<method>-<data>-<YYYYMMDD-HHMMSS>``, with a number after it when that name is taken.

    Of ``folder:PATH`` and ``npz:PATH`` only the kind goes into the name. Several processes get one path.
    """
    from fastnas import distributed

    stem = f"{method}-{data.partition(':')[0]}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = Path(root) / stem
    number = 2
    while path.exists():
        path = Path(root) / f"{stem}-{number}"
        number += 1
    return distributed.of_main(path)


class RunFolder:
    """One run on disk; make it with `create` for a new run or `open` for one to resume or report.

    ``metrics.jsonl`` holds only what the settings determine, so that two runs of equal settings on a machine
    have equal files; wall-clock values go to ``timing.jsonl``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any]) -> RunFolder:
        """Make the folder and write config.toml: the resolved settings and a ``[versions]`` table.

        Raises UserError when the folder holds something already or cannot be made.
        """
        run = cls(path)
        if not processes.is_main():
            return run
        if run.config_path.exists():
            raise UserError(f"{run.path} holds a run: go on with --resume {run.path}, or give another --out")
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            if any(run.path.iterdir()):
                raise UserError(f"the folder {run.path} is not empty: give another --out for the run")
            run._write(run.config_path, dump_toml({**config, "versions": versions()}))
        except OSError as error:
            reason = f"cannot make the run folder {run.path}: {error.strerror}"
            raise UserError(f"{reason}; give another --out") from error
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of an earlier run. Raises UserError when ``path`` is none."""
        run = cls(path)
        if not run.config_path.is_file():
            problem = "has no config.toml, so it is no run folder" if run.path.is_dir() else "is no folder"
            raise UserError(f"{run.path} {problem}: give the folder of a run, runs/<method>-<data>-<time>")
        return run

    @property
    def config_path(self) -> Path:
        return self.path / "config.toml"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def timing_path(self) -> Path:
        return self.path / "timing.jsonl"

    @property
    def checkpoint_path(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def genotype_path(self) -> Path:
        return self.path / "genotype.json"

    @property
    def cells_path(self) -> Path:
        return self.path / "cells.svg"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    def config(self) -> dict[str, Any]:
        """The settings that the run was started with: a layer for `fastnas.config.merge`."""
        return read_toml(self.config_path)

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl: ``epoch`` and what was measured in it, no wall-clock values."""
        _append(self.metrics_path, record)

    def append_timing(self, record: Mapping[str, Any]) -> None:
        """Add one line to timing.jsonl: ``epoch`` and wall-clock values."""
        _append(self.timing_path, record)

    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; a line that a kill tore apart is left out."""
        return _read_records(self.metrics_path)

    def timing(self) -> list[dict[str, Any]]:
        """The records of timing.jsonl, likewise."""
        return _read_records(self.timing_path)

    def truncate(self, epoch: int) -> None:
        """Drop the records of both files whose epoch is greater than ``epoch``, and any torn line."""
        for path in (self.metrics_path, self.timing_path):
            if path.exists():
                kept = [record for record in _read_records(path) if record["epoch"] <= epoch]
                self._write(path, "".join(map(_line, kept)))

    def write_genotype(self, genotype: _HasJson) -> None:
        self._write(self.genotype_path, genotype.to_json())

    def write_cells(self, svg: str) -> None:
        self._write(self.cells_path, svg)

    @staticmethod
    def _write(path: Path, text: str) -> None:
        replace_file(path, [text.encode()])


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), sort_keys=True, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(element) for key, element in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(element) for element in value]
    return value


def _append(path: Path, record: Mapping[str, Any]) -> None:
    if not isinstance(record.get("epoch"), int):
        raise TypeError(f"a record of {path.name} needs an integer epoch, got {record.get('epoch')!r}")
    if not processes.is_main():
        return
    line = _line(record)
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(line)
    except OSError as error:
        error.filename = str(path)
        raise


def _read_records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a torn one, without its newline or with half its JSON, ends the list."""
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not line.endswith(b"\n") or not isinstance(record, dict) or not isinstance(record.get("epoch"), int):
            break
        records.append(record)
    return records


def versions() -> dict[str, str]:
    """fastnas, torch, Python and platform, and the commit when fastnas runs from a checkout."""
    import torch

    import fastnas

    found = {
        "fastnas": fastnas.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    source = Path(fastnas.__file__).resolve().parents[1]
    if (source / ".git").exists():
        command = ["git", "-C", str(source), "describe", "--match=", "--always", "--abbrev=40", "--dirty"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return found
        found["commit"] = answer.stdout.strip()
    return found
