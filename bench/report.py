"""The file of results of a run: where it ran, what was run, and its rows."""

from __future__ import annotations

import json
import os
import platform
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastnas.runs import versions


def machine_line() -> str:
    """Processor or GPU, threads and torch's CPU capability, in one line."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def versions_line() -> str:
    """Versions, and the commit when fastnas runs from a checkout."""
    known = versions()
    commit = f", commit {known['commit'][:12]}" if "commit" in known else ""
    dirty = " with changes" if known.get("commit", "").endswith("-dirty") else ""
    return f"fastnas {known['fastnas']}, torch {known['torch']}, Python {known['python']}{commit}{dirty}"


def header(*command: str) -> dict[str, Any]:
    """Everything of the file but the rows; ``command``: the words that were run."""
    return {
        "machine": machine_line(),
        "load": round(os.getloadavg()[0], 2),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": shlex.join(command),
    }


def write(path: Path, head: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """One line a row, so that two files differ line by line; floats with six significant digits."""
    rounded = [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    body = ",\n".join(json.dumps(row) for row in rounded)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + body + "\n]}\n")


def save(target: str, report: dict[str, Any]) -> None:
    """A report whose rows have names, as one line to standard output where ``target`` is ``-``, else to that file."""
    if target == "-":
        print(json.dumps(report))
    else:
        Path(target).write_text(json.dumps(report, indent=1) + "\n")
