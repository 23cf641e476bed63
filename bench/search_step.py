"""Time and memory of a pass or a search step, executor by executor, in turn.

    python bench/search_step.py --method darts --batch 16 --rows plain,plain_channels_last,fused,fused_lean --json -
    python bench/search_step.py --sweep sweep.svg --rows fused

A round runs every row once, each in a process of its own, so that a machine that slows down does so for all; the first
runs are left out and reported as `first_ms`. `ms` is the median of the rounds, `parts_ms` a breakdown of further runs;
`saved_bytes` and `peak_bytes` come from the tracker of the profiler and are the same each time. The row `plain_compile`
runs one normal and one reduction cell under torch.compile, `plain_compile_net` the whole network, which compiles for
45 minutes or so; on a GPU the row `fused_half` keeps its maps in bfloat16, and `fused_graph` replays a search step that
was recorded before.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.compiled_rows import COMPILED_ROWS, check_compiled
from bench.footprints import status
from bench.report import header, save
from bench.row_process import RowProcess
from bench.step_rows import GRAPH, HALF, METHODS, PARTS, ROWS, Problem, Row
from bench.sweep import sweep
from fastnas.errors import UserError

BREAKDOWNS = 3  # runs that parts_ms is the median of


def measure(problem: Problem, names: Sequence[str], *, rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Rows by name, timed in turn."""
    results = {}
    with in_processes(problem, names, device) as rows:
        first, times = time_rows(rows, rounds)
        for name, row in rows.items():
            parts = [row.breakdown() for _ in range(min(rounds, BREAKDOWNS))]
            footprint = row.footprint()
            results[name] = {
                "ms": _ms(times[name]),
                "ms_min": 1000 * min(times[name]),
                "ms_max": 1000 * max(times[name]),
                "first_ms": 1000 * first[name],
                "parts_ms": {part: _ms([run[part] for run in parts]) for part in PARTS if part in parts[0]},
                "saved_bytes": footprint.saved_bytes,
                "peak_bytes": footprint.peak,
            }
    return results


@contextlib.contextmanager
def in_processes(problem: Problem, names: Sequence[str], device: torch.device) -> Iterator[dict[str, RowProcess]]:
    """Rows by name, each in a process of its own."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(RowProcess(name, problem, device)) for name in names}


def time_rows(rows: Mapping[str, RowProcess], rounds: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Seconds of each row's first run, and of those that follow it, one of each row in turn."""
    first = {name: row.seconds() for name, row in rows.items()}
    turns = [{name: row.seconds() for name, row in rows.items()} for _ in range(rounds)]
    return first, {name: [turn[name] for turn in turns] for name in rows}


def _ms(seconds: Sequence[float]) -> float:
    return 1000 * statistics.median(seconds)


def resident_growth(name: str, problem: Problem) -> int:
    """Bytes by which resident memory grows at most over the first two runs of a row; for a process of its own."""
    row = Row(name, problem, torch.device("cpu"))
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    row.run()
    row.run()
    return status("VmHWM") - before


def _resident_elsewhere(name: str, arguments: Sequence[str]) -> int:
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--rows", name, "--resident-here"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(out.splitlines()[-1])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", choices=METHODS, default="darts")
    parser.add_argument("--step", choices=("pass", "search"), default="pass", help="what a run is [pass]")
    parser.add_argument(
        "--rows",
        default=",".join(ROWS),
        help=f"comma-separated; {HALF}, {GRAPH}, {', '.join(COMPILED_ROWS)} [%(default)s]",
    )
    for field in fields(Problem):
        if field.name not in ("method", "step"):
            default = 16 if field.name == "batch" else field.default
            parser.add_argument(f"--{field.name}", type=int, default=default, help=f"[{default}]")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each row [5]")
    parser.add_argument("--threads", type=int, help="threads of PyTorch [its own choice]")
    parser.add_argument("--resident", action="store_true", help="also the growth of resident memory, in processes")
    parser.add_argument("--resident-here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sweep", type=Path, metavar="SVG", help="batches 8 to 128 and 5 to 20 cells, with a plot")
    parser.add_argument("--json", metavar="FILE", default="-", help="- is standard output [-]")
    return parser


def main(arguments: Sequence[str]) -> None:
    given = build_parser().parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    problem = Problem(**{field.name: getattr(given, field.name) for field in fields(Problem)})
    names = [name.strip() for name in given.rows.split(",")]
    check_compiled(names, problem)
    if given.resident_here:
        print(resident_growth(names[0], problem))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = header("python", "bench/search_step.py", *arguments)
    if given.sweep:

        def times(**change: int) -> dict[str, float]:
            with in_processes(replace(problem, **change), names, device) as rows:
                return {name: _ms(seconds) for name, seconds in time_rows(rows, given.rounds)[1].items()}

        report["sweep"], picture = sweep(times)
        given.sweep.write_text(picture)
    else:
        report["rows"] = measure(
            problem, [name for name in names if name not in COMPILED_ROWS], rounds=given.rounds, device=device
        )
        for name in [name for name in names if name in COMPILED_ROWS]:
            report["rows"][name] = COMPILED_ROWS[name](problem, device, given.rounds)
        if given.resident:
            sizes = [f"--{field.name}={getattr(problem, field.name)}" for field in fields(Problem)]
            for name in report["rows"].keys() - COMPILED_ROWS.keys():
                report["rows"][name]["resident_growth_bytes"] = _resident_elsewhere(name, sizes)
    save(given.json, report)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
