"""The tables that a run of the benchmarks ends with, 120 columns wide."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.overhead import MODES

Row = dict[str, Any]
NAME = 45
HEADINGS = f"{'us':>9} {'20% - 80%':>15} {'GB/s':>6} {'copy':>5} {'eager':>7} {'compile':>7} {'memory':>17}"
LEGEND = (
    "us: median of a call, and its 20th and 80th percentile. copy: share of the bandwidth of copying as many bytes.",
    "eager, compile: how many times longer plain PyTorch takes, as it is and compiled. memory: peak extra bytes, and",
    "eager's in brackets.",
)


def race_lines(rows: Iterable[Row]) -> list[str]:
    """One line a row, under a heading for each op."""
    lines = list(LEGEND)
    op = None
    for row in rows:
        if row["op"] != op:
            op = row["op"]
            lines.append(f"{op:{NAME}} {HEADINGS}")
        lines.append(f"{_short(row):{NAME}} {_figures(row)}")
    return lines


def overhead_lines(rows: Iterable[Row]) -> list[str]:
    """One line an op: microseconds a call in each mode, ours and eager."""
    by_op: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_op.setdefault(row["op"], {})[row["mode"]] = row
    lines = [f"{'us a call with tiny tensors':{NAME}} " + " ".join(f"{mode + ', eager':>23}" for mode in MODES)]
    for op, modes in by_op.items():
        pairs = [f"{modes[m]['us']:14.1f} {modes[m]['eager_us']:8.1f}" if m in modes else " " * 23 for m in MODES]
        lines.append(f"{'  ' + op:{NAME}} " + " ".join(pairs))
    return lines


def _short(row: Row) -> str:
    name = row["name"].removeprefix(row["op"]).strip()
    return "  " + name.replace("forward", "fwd").replace("backward", "bwd")


def _figures(row: Row) -> str:
    spread = f"{_us(row['us_20'])} - {_us(row['us_80'])}"
    rate = f"{row['GB_s']:6.1f} {row['share_of_copy']:5.0%}" if "GB_s" in row else f"{'-':>6} {'-':>5}"
    compiled = _times(row["vs_compiled"]) if "vs_compiled" in row else "-"
    memory = f"{size(row['peak_bytes'])} ({size(row['eager_peak_bytes'])})"
    return f"{_us(row['us']):>9} {spread:>15} {rate} {_times(row['vs_eager']):>7} {compiled:>7} {memory:>17}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 100 else f"{ratio:.0f}x"


def _us(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def size(nbytes: int) -> str:
    """Bytes in decimal units: ``"840 B"``, ``"1.6 kB"``, ``"268 MB"``."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"
