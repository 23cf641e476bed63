"""Fixtures of the op benchmarks, and the tables and the file of results that they leave at the end of the run.

``race`` times an op against its rivals (bench/race.py), ``overhead`` counts the microseconds of a call
(bench/overhead.py). Both refuse to time a wrong answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastnas
from bench.overhead import overhead as _overhead
from bench.race import race as _race
from bench.report import header, machine_line, versions_line, write
from bench.table import overhead_lines, race_lines
from fastnas.errors import UserError

_races = pytest.StashKey[list[dict[str, Any]]]()
_overheads = pytest.StashKey[list[dict[str, Any]]]()
_head = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastnas")
    group.addoption("--results", type=Path, metavar="FILE", help="write machine, versions and rows to FILE (JSON)")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile of the references out")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_races], config.stash[_overheads] = [], []
    config.stash[_head] = header("pytest", *config.invocation_params.args)
    # The tables below say what pytest-benchmark's own would; --benchmark-verbose brings that back.
    config.option.benchmark_quiet = True
    # A wrong answer leaves the fixture unused, and is reported already.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used at all")


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"machine: {machine_line()}", f"versions: {versions_line()}"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """Makes the rows of a test for each of the two backends that an op has on a GPU, with its name behind theirs."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


def _backend_of(request: pytest.FixtureRequest, op: str) -> tuple[str, contextlib.AbstractContextManager[None]]:
    """What goes behind the row's name, and the context to time it in."""
    if "gpu_backend" not in request.fixturenames:
        return "", contextlib.nullcontext()
    name = request.getfixturevalue("gpu_backend")
    try:
        with fastnas.backend(f"{op}={name}"):
            pass
    except UserError as error:
        pytest.skip(str(error))
    return f" on {name}", fastnas.backend(f"{op}={name}")


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``race(function, reference, inputs, backward=..., traffic=..., group=...)`` makes one row of the table.

    ``function(*inputs)`` and ``reference(*inputs)`` give a tensor or a sequence of tensors, the same ones. ``inputs``
    are tensors or None, moved to the GPU if there is one; those that require gradients get them when ``backward`` is
    set. ``traffic`` is the bytes that a perfect kernel moves, or None where memory is not what bounds the op.
    ``group`` is the op's name, a space and the name of the shape.
    """
    with_compiled = not request.config.getoption("--no-compile")

    def run(*args: Any, group: str, **kwargs: Any) -> None:
        suffix, context = _backend_of(request, group.partition(" ")[0])
        benchmark.group = group = group + suffix
        with context:
            row = _race(*args, group=group, pedantic=benchmark.pedantic, with_compiled=with_compiled, **kwargs)
        benchmark.extra_info.update(row)
        request.config.stash[_races].append(row)

    return run


@pytest.fixture
def overhead(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``overhead(function, reference, inputs, op=..., mode=...)`` makes one row of the table of overheads."""

    def run(*args: Any, op: str, **kwargs: Any) -> None:
        benchmark.group = "overhead"
        suffix, context = _backend_of(request, op)
        with context:
            row = _overhead(*args, op=op + suffix, pedantic=benchmark.pedantic, **kwargs)
        benchmark.extra_info.update(row)
        request.config.stash[_overheads].append(row)

    return run


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["line"] = machine_line()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    races, overheads = config.stash[_races], config.stash[_overheads]
    if not races and not overheads:
        return
    load = config.stash[_head]["load"]
    lines = [machine_line(), versions_line()]
    if load > torch.get_num_threads() / 2:
        lines.append(f"the load was {load} at the start: other programs share the machine, trust none of these times")
    lines += race_lines(races) if races else []
    lines += overhead_lines(overheads) if overheads else []
    if path := config.getoption("--results"):
        write(path, config.stash[_head], races + overheads)
        lines.append(f"results: {path}")
    terminalreporter.section("fastnas against PyTorch")
    for line in lines:
        terminalreporter.write_line(line)
