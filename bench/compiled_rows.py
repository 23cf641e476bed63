"""torch.compile's rows of `bench/search_step.py`: the plain executor's cells, and its whole network, compiled."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastnas
from bench.step_rows import Pass, Problem, Row, timed
from fastnas.engine.supernet import Supernet
from fastnas.errors import UserError


def check_compiled(names: Sequence[str], problem: Problem) -> None:
    """Raises UserError where a compiled row is asked for what it does not run."""
    for name in COMPILED_ROWS.keys() & set(names):
        methods = _METHODS[name]
        if problem.step != "pass" or problem.method not in methods:
            raise UserError(f"{name} is a pass of {' or '.join(methods)}: measure what else you want without this row")


def compiled_cells(problem: Problem, device: torch.device, rounds: int) -> dict[str, Any]:
    """One normal and one reduction cell under torch.compile, beside the same cells in eager mode and fused.

    ms of a forward and backward pass with all gradients, medians of rounds in turn, and seconds of compilation.
    """
    row = Row("plain", problem, device)
    assert isinstance(row.work, Pass)
    supernet, alphas = row.work.supernet, row.work.alphas
    cells = {"normal": supernet.cells[0], "reduction": _first_reduction(supernet)}
    return {kind: _compiled_cell(cell, alphas, problem, device, rounds) for kind, cell in cells.items()}


def compiled_network(problem: Problem, device: torch.device, rounds: int) -> dict[str, float]:
    """The whole network under torch.compile, beside the plain and the fused one; as `compiled_cells`.

    Its first compiled pass takes some 45 minutes on two CPU cores.
    """
    names = {"compiled": "plain", "plain": "plain", "fused": "fused"}
    rows = {kind: Row(name, problem, device) for kind, name in names.items()}
    compiled = rows["compiled"].work
    assert isinstance(compiled, Pass)
    compiled.supernet = torch.compile(compiled.supernet, dynamic=False, fullgraph=True)  # type: ignore[assignment]
    return _in_turn({kind: row.seconds for kind, row in rows.items()}, rounds)


def _compiled_cell(cell: Any, alphas: Any, problem: Problem, device: torch.device, rounds: int) -> dict[str, float]:
    inputs = [_cell_input(module, problem, device) for module in (cell.preprocess0, cell.preprocess1)]
    leaves = [*inputs, *cell.parameters(), *alphas.parameters()]
    compiled = torch.compile(cell.forward_mixture, dynamic=False)

    def through(function: Callable[[], Tensor], backend: str) -> float:
        def run() -> None:
            torch.autograd.grad(function().sum(), leaves, allow_unused=True)

        with fastnas.backend(backend):
            return timed(run, device)

    runs: Mapping[str, Callable[[], float]] = {
        "compiled": lambda: through(lambda: compiled(*inputs, *alphas().of_cell(cell.reduction)), "reference"),
        "plain": lambda: through(lambda: cell(*inputs, alphas()), "reference"),
        "fused": lambda: through(lambda: cell(*inputs, alphas(), executor="fused"), "native"),
    }
    return _in_turn(runs, rounds)


def _in_turn(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    first = {name: run() for name, run in runs.items()}
    times = [{name: run() for name, run in runs.items()} for _ in range(rounds)]
    medians = {f"{name}_ms": 1000 * statistics.median(turn[name] for turn in times) for name in runs}
    return medians | {"compile_s": first["compiled"]}


def _first_reduction(supernet: Supernet) -> nn.Module:
    return next(cell for cell in supernet.cells if cell.reduction)


def _cell_input(preprocess: nn.Module, problem: Problem, device: torch.device) -> Tensor:
    """A state as the cell gets it; the first cells run at full image size."""
    channels = next(p for p in preprocess.parameters() if p.dim() == 4).shape[1]
    return torch.randn(problem.batch, channels, problem.image, problem.image, device=device, requires_grad=True)


COMPILED_ROWS: Mapping[str, Callable[[Problem, torch.device, int], dict[str, Any]]] = {
    "plain_compile": compiled_cells,
    "plain_compile_net": compiled_network,
}
_METHODS = {"plain_compile": ("darts",), "plain_compile_net": ("darts", "pc_darts")}
