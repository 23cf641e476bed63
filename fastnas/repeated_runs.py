"""Runs that go on when they are called again; the same run with several seeds, and the figures over them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastnas.errors import UserError
from fastnas.runs import RunFolder

Resolve = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]  # a plan from flags and a run's configuration


def seed_runs(
    plan: Any, seeds: int, out: Path, resolve: Resolve, *, quiet: bool
) -> Iterator[tuple[int, Any, Path, Path | None]]:
    """The plan's seed and the `seeds` - 1 after it: seed, plan, folder `out`/seed-S, and what to resume, if anything.

    `plan`: of a search or of a retraining, `resolve` what makes one from flags and a run's configuration. Raises
    UserError when `out` has runs of other settings.
    """
    for seed in range(plan.runtime.seed, plan.runtime.seed + seeds):
        one = replace(plan, runtime=replace(plan.runtime, seed=seed))
        folder = out / f"seed-{seed}"
        one, resume = started(one, folder, resolve)
        if not quiet:
            print(f"seed {seed}")
        yield seed, one, folder, resume


def started(plan: Any, folder: Path, resolve: Resolve) -> tuple[Any, Path | None]:
    """The plan of the run in `folder`, if there is one, and the folder as what to resume; else `plan` and None.

    Raises UserError when that run has other settings; where `plan` leaves the batch size open, the run has chosen it.
    """
    if not (folder / "checkpoint.pt").exists():
        return plan, None
    found = resolve({}, RunFolder.open(folder).config())
    if getattr(plan, "auto_batch", False):
        plan = replace(plan, weights=replace(plan.weights, batch_size=found.weights.batch_size), auto_batch=False)
    if found != plan:
        raise UserError(f"{folder} holds a run of other settings: give another folder, or the settings of that run")
    return plan, folder


def deviation(figures: Collection[float]) -> float:
    """Standard deviation with n - 1; 0 for one figure."""
    return statistics.stdev(figures) if len(figures) > 1 else 0.0
