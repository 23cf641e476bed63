"""A search's figures as TensorBoard events, for people who watch many runs in one place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from fastnas.errors import UserError
from fastnas.report.records import is_number

FOLDER = "tensorboard"


class Events:
    """A context manager that writes every number of a record to `RUN/tensorboard`, by epoch, counted from 1.

    `epoch` is the first one that this process runs: what an earlier process wrote from there on is hidden. Numbers of
    edges are `name/edge`, seconds and bytes are `time/...` and `memory/...`. Switched off it writes nothing.

    Raises UserError when it is switched on and tensorboard is not installed.
    """

    def __init__(self, run: Path, *, on: bool, epoch: int = 0) -> None:
        self._writer: Any = None
        if not on:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"--tensorboard needs the package tensorboard ({error}): pip install tensorboard, or drop the flag"
            ) from error
        self._writer = SummaryWriter(str(run / FOLDER), purge_step=epoch + 1)

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, epoch: int, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Write an epoch, counted from 0: its records of metrics.jsonl and timing.jsonl."""
        if self._writer is None:
            return
        numbers = {name: value for name, value in metrics.items() if is_number(value)}
        for name, values in metrics.items():
            if isinstance(values, list) and all(map(is_number, values)):
                numbers |= {f"{name}/{edge}": value for edge, value in enumerate(values)}
        for name, value in timing.items():
            if is_number(value):
                numbers[f"memory/{name}" if name.endswith("_bytes") else f"time/{name}"] = value
        for name in numbers.keys() - {"epoch", "time/epoch"}:
            self._writer.add_scalar(name, numbers[name], epoch + 1)
        self._writer.flush()
