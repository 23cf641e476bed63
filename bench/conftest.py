"""The fixture ``race`` of all op benchmarks, and the table it leaves at the end of the run.

A benchmark names an op, its plain PyTorch reference, inputs and the bytes that a perfect kernel moves; ``race``
checks the answer by the tolerance rule, times the op through pytest-benchmark and both rivals beside it (eager
PyTorch and ``torch.compile`` of the reference), and refuses to time a wrong answer.
"""

from __future__ import annotations

import functools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor

import fastnas
from fastnas.testing import assert_as_accurate

# Inductor's cache does not tell thread counts apart: a hit could be code for another number of threads.
torch._inductor.config.fx_graph_cache = False
torch._functorch.config.enable_autograd_cache = False

_rows: list[dict[str, Any]] = []


def machine_line() -> str:
    """Processor or GPU, threads and versions, in one line."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = f"torch {torch.__version__}, fastnas {fastnas.__version__}, Python {platform.python_version()}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model}{gpu}, {torch.get_num_threads()} threads, {capability}, {versions}"


def seconds(run: Callable[[], Any], budget: float = 0.5) -> float:
    """Median seconds of a call, after a warm-up, within about ``budget`` seconds."""
    for _ in range(3):
        run()
    times: list[float] = []
    while sum(times) < budget and len(times) < 200:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@functools.cache
def copy_bandwidth(nbytes: int) -> float:
    """Bytes a second, read plus written, of ``Tensor.copy_`` when it moves ``nbytes`` in all."""
    source = torch.ones(max(nbytes // 8, 1))
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


@pytest.fixture
def race(benchmark, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``race(function, reference, inputs, backward=..., traffic=..., group=...)``; see the module's text.

    ``function(*inputs)`` and ``reference(*inputs)`` give one tensor. ``inputs`` are tensors or None; those that
    require gradients get them when ``backward`` is set. ``traffic`` is the bytes that a perfect kernel moves, or
    None where memory is not what bounds the op.
    """

    def run_race(
        function: Callable[..., Tensor],
        reference: Callable[..., Tensor],
        inputs: Sequence[Tensor | None],
        *,
        backward: bool,
        traffic: int | None,
        group: str,
    ) -> None:
        wanted = [t for t in inputs if t is not None and t.requires_grad] if backward else []
        with torch.no_grad():
            cotangent = torch.randn_like(reference(*inputs))

        def one_pass(f: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
            def go() -> tuple[Tensor, ...]:
                if not wanted:
                    with torch.no_grad():
                        return (f(*inputs),)
                y = f(*inputs)
                return y, *torch.autograd.grad(y, wanted, cotangent)

            return go

        ours, eager = one_pass(function), one_pass(reference)
        for value, theirs, truth in zip(ours(), eager(), _exact(reference, inputs, wanted, cotangent), strict=True):
            assert_as_accurate(value, theirs, truth)

        torch._dynamo.reset()
        compiled = one_pass(torch.compile(reference, dynamic=False))
        eager_s, compiled_s = seconds(eager), seconds(compiled)
        benchmark.group = group
        benchmark.pedantic(ours, rounds=100, warmup_rounds=5)
        took = benchmark.stats.stats.median
        row: dict[str, Any] = {
            "name": f"{group} {'forward+backward' if backward else 'forward'}",
            "ms": took * 1e3,
            "vs_eager": eager_s / took,
            "vs_compiled": compiled_s / took,
        }
        if traffic:
            row["GB_s"] = traffic / took / 1e9
            row["share_of_copy"] = traffic / took / copy_bandwidth(traffic)
        benchmark.extra_info.update(row)
        _rows.append(row)

    return run_race


def _exact(
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[Tensor],
    cotangent: Tensor,
) -> tuple[Tensor, ...]:
    """The reference in float64 on the same values."""
    doubles = [
        t.detach().double().requires_grad_(t.requires_grad) if t is not None and t.is_floating_point() else t
        for t in inputs
    ]
    y = reference(*doubles)
    leaves = [d for d, t in zip(doubles, inputs, strict=True) if any(t is other for other in wanted)]
    return y, *(torch.autograd.grad(y, leaves, cotangent.double()) if leaves else ())


def pytest_report_header() -> str:
    return f"machine: {machine_line()}"


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["line"] = machine_line()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section("fastnas against PyTorch")
    write(machine_line())
    width = max(len(row["name"]) for row in _rows)
    write(f"{'':{width}}  {'ms':>9} {'GB/s':>7} {'of copy':>8} {'vs eager':>9} {'vs compile':>10}")
    for row in _rows:
        rate = f"{row['GB_s']:7.1f} {row['share_of_copy']:8.0%}" if "GB_s" in row else " " * 16
        ratios = f"{row['vs_eager']:8.2f}x {row['vs_compiled']:9.2f}x"
        write(f"{row['name']:{width}}  {row['ms']:9.4f} {rate} {ratios}")
