"""The same run with several seeds: the folders, and the figures over them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastnas.errors import UserError
from fastnas.runs import RunFolder


def seed_runs(
    plan: Any, seeds: int, out: Path, resolve: Callable[[Mapping[str, Any], Mapping[str, Any]], Any], *, quiet: bool
) -> Iterator[tuple[int, Any, Path, Path | None]]:
    """The plan's seed and the `seeds` - 1 after it: seed, plan, folder `out`/seed-S, and what to resume, if anything.

    `plan`: of a search or of a retraining, `resolve` what makes one from flags and a run's configuration. Raises
    UserError when `out` has runs of other settings.
    """
    for seed in range(plan.runtime.seed, plan.runtime.seed + seeds):
        one = replace(plan, runtime=replace(plan.runtime, seed=seed))
        folder = out / f"seed-{seed}"
        started = (folder / "checkpoint.pt").exists()
        if started and resolve({}, RunFolder.open(folder).config()) != one:
            raise UserError(f"{folder} holds a run of other settings: give another --out")
        if not quiet:
            print(f"seed {seed}")
        yield seed, one, folder, folder if started else None


def deviation(figures: Collection[float]) -> float:
    """Standard deviation with n - 1; 0 for one figure."""
    return statistics.stdev(figures) if len(figures) > 1 else 0.0
