"""Progress of a run: a bar on a terminal, one plain line an epoch elsewhere, nothing when quiet."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from fastnas.timing import resident_bytes

if TYPE_CHECKING:
    import rich.progress

_SECONDS_BETWEEN_READS = 0.5


class Progress:
    """A context manager that shows epoch, step, metrics, memory and the time left.

    Epochs count from 0, as in ``for epoch in range(start_epoch, total_epochs)``, and are shown from 1.
    Metrics are tensors of one element or numbers, accuracies as fractions of 1. Tensors are read, which waits
    for the device, only when the display changes: at most twice a second, and never off a terminal.
    """

    def __init__(self, total_epochs: int, steps_per_epoch: int, start_epoch: int = 0, quiet: bool = False) -> None:
        self._total_epochs = total_epochs
        self._steps_per_epoch = steps_per_epoch
        self._first_epoch = self._epoch = start_epoch
        self._step = 0
        self._quiet = quiet
        self._bar: rich.progress.Progress | None = None
        self._started = self._epoch_started = self._last_read = 0.0

    def __enter__(self) -> Progress:
        self._started = self._epoch_started = time.monotonic()
        if not self._quiet and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = _make_bar()
            total = self._total_epochs * self._steps_per_epoch
            self._bar.add_task("", total=total, text="", epoch=f"{self._epoch + 1}/{self._total_epochs}")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start_epoch(self, epoch: int) -> None:
        self._epoch, self._step = epoch, 0
        self._epoch_started = time.monotonic()

    def step(self, metrics: Mapping[str, torch.Tensor | float]) -> None:
        """Count one step; show its metrics if the display is due."""
        self._step += 1
        now = time.monotonic()
        if self._bar is not None and now - self._last_read >= _SECONDS_BETWEEN_READS:
            self._last_read = now
            self._show(metrics)

    def end_epoch(self, record: Mapping[str, Any]) -> None:
        """Show the epoch's record: its numbers, but for ``epoch``, which the display has anyway."""
        self._step = self._steps_per_epoch
        if self._bar is not None:
            self._show(record)
        elif not self._quiet:
            seconds = time.monotonic() - self._epoch_started
            parts = [f"epoch {self._epoch + 1}/{self._total_epochs}", *_metric_texts(record), *_memory_text()]
            print("  ".join([*parts, f"{seconds:.1f} s", f"{self._time_left()} left"]), flush=True)

    def message(self, text: str) -> None:
        """Print a line above the bar, or by itself where there is none."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif not self._quiet:
            print(text, flush=True)

    def _show(self, metrics: Mapping[str, Any]) -> None:
        assert self._bar is not None
        # A narrow terminal cuts the end off, so what matters most comes first.
        step = f"step {self._step}/{self._steps_per_epoch}"
        parts = [step, f"{self._time_left()} left", *_metric_texts(metrics), *_memory_text()]
        self._bar.update(
            self._bar.task_ids[0],
            completed=self._epoch * self._steps_per_epoch + self._step,
            text="  ".join(parts),
            epoch=f"{self._epoch + 1}/{self._total_epochs}",
            refresh=True,
        )

    def _time_left(self) -> str:
        done = (self._epoch - self._first_epoch) * self._steps_per_epoch + self._step
        left = (self._total_epochs - self._epoch) * self._steps_per_epoch - self._step
        if done == 0:
            return "?"
        seconds = round((time.monotonic() - self._started) / done * left)
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _make_bar() -> rich.progress.Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    rest_of_line = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    return Progress(
        TextColumn("epoch {task.fields[epoch]}", style="bold"),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[text]}", markup=False, table_column=rest_of_line),
        console=Console(file=sys.stdout),
        auto_refresh=False,
        expand=True,
    )


def _metric_texts(metrics: Mapping[str, Any]) -> list[str]:
    texts = []
    for name, value in metrics.items():
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if name == "epoch" or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        shown = f"{value:.1%}" if "accuracy" in name else f"{value:.4g}"
        texts.append(f"{name.replace('_', ' ')} {shown}")
    return texts


def _memory_text() -> list[str]:
    """The bytes of tensors on the current GPU, if one is in use, or else of the process in main memory."""
    if torch.cuda.is_initialized():
        return [f"{torch.cuda.memory_allocated() / 2**20:,.0f} MiB on GPU"]
    size = resident_bytes()
    return [] if size is None else [f"{size / 2**20:,.0f} MiB"]
