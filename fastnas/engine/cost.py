"""What each candidate on each edge of a network costs: parameters, operations and memory access, linear in Z.

    C(Z) = sum_{i,j} Z_ij^T C(O_ij)                                                    (SNAS, eq. 10)

The size of a map does not depend on the choices, so a cost is a table: one number a candidate and an edge, summed over
all cells of a type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor, nn

from fastnas.engine.derived import DerivedNetwork
from fastnas.engine.nasbench201 import STAGES, candidate_module
from fastnas.nn import build_candidate
from fastnas.profiler.counts import count
from fastnas.spaces.darts import DartsSpace, reduction_cells
from fastnas.spaces.genotype import Genotype, Node
from fastnas.spaces.nasbench201 import Nasbench201Space


@dataclass(frozen=True)
class Cost:
    """Of one image. `parameters`: trainable numbers. `multiply_adds`: of convolutions, HW f k I O / g (eq. 36).
    `flops`: these and those of pools, HW f k C (eq. 38). `memory`: elements read and written by convolutions,
    HW (I + O) + f k I O / g (eq. 37), and by pools and identities, HW (I + O) (eq. 40)."""

    parameters: float = 0.0
    multiply_adds: float = 0.0
    flops: float = 0.0
    memory: float = 0.0


@cache
def candidate_cost(name: str, channels: int, stride: int, size: int) -> Cost:
    """Cost of a candidate, built as in a derived network, on a map of `size` x `size`; `none` costs nothing.

    Of a user's own candidate all parameters count, and the operations of its convolutions, pools and identities.
    """
    if name == "none":
        return Cost()
    with torch.device("meta"):
        return module_cost(build_candidate(name, channels, stride, searching=False), channels, size)


def module_cost(module: nn.Module, channels: int, size: int) -> Cost:
    """Cost of a module on the meta device, on a map of `channels` channels and `size` x `size`."""
    totals = {"multiply_adds": 0.0, "flops": 0.0, "memory": 0.0}

    def visit(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        area, weights, operations = output.shape[2] * output.shape[3], 0, 0
        if isinstance(layer, nn.Conv2d):
            weights = layer.weight.numel()
            operations = area * weights
            totals["multiply_adds"] += operations
        elif not isinstance(layer, nn.Identity):
            kernel = layer.kernel_size if isinstance(layer.kernel_size, tuple) else (layer.kernel_size,) * 2
            operations = area * kernel[0] * kernel[1] * output.shape[1]
        totals["flops"] += operations
        totals["memory"] += area * (inputs[0].shape[1] + output.shape[1]) + weights

    for layer in module.eval().modules():
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d | nn.Identity):
            layer.register_forward_hook(visit)
    with torch.no_grad():
        module(torch.empty(1, channels, size, size, device="meta"))
    return Cost(sum(parameter.numel() for parameter in module.parameters()), **totals)


def nasbench201_costs(space: Nasbench201Space, *, channels: int, cells: int, image_size: int) -> Tensor:
    """Cost table of NAS-Bench-201: float64 [4, E, O], the fields of Cost in order, summed over all cells."""
    table = torch.zeros(len(fields(Cost)), space.num_edges, len(space.candidates), dtype=torch.double)
    for _ in range(STAGES):
        for index, name in enumerate(space.candidates):
            if name != "none":
                with torch.device("meta"):
                    cost = module_cost(candidate_module(name, channels, affine=True), channels, image_size)
                table[:, :, index] += (
                    cells // STAGES * torch.tensor([getattr(cost, f.name) for f in fields(cost)])[:, None]
                )
        channels, image_size = 2 * channels, _half(image_size)
    return table


class NetworkCost:
    """Cost tables of a network of a space.

    `normal`, `reduce`: float64 [4, E, O], the fields of Cost in order, summed over the cells of each type. `fixed`: the
    Cost of everything outside the edges (parameters, multiply-adds). Genotypes that drop a whole node or input
    cost less than their sum says, as less is built around them: the sum is then an upper bound.
    """

    def __init__(
        self,
        space: DartsSpace,
        *,
        channels: int,
        cells: int,
        image_size: int,
        classes: int,
        in_channels: int = 3,
        stem: str = "cifar",
    ) -> None:
        self.space = space
        shape = (len(fields(Cost)), space.num_edges, len(space.candidates))
        self.normal, self.reduce = torch.zeros(shape, dtype=torch.double), torch.zeros(shape, dtype=torch.double)
        size, width = _after_stem(image_size, stem), channels
        for index in range(cells):
            reduction = index in reduction_cells(cells)
            width *= 2 if reduction else 1
            table = self.reduce if reduction else self.normal
            for edge, source in enumerate(space.sources):
                stride = 2 if reduction and source < 2 else 1
                side = size if stride == 2 or not reduction else _half(size)
                for candidate, name in enumerate(space.candidates):
                    cost = candidate_cost(name, width, stride, side)
                    table[:, edge, candidate] += torch.tensor([getattr(cost, f.name) for f in fields(cost)])
            size = _half(size) if reduction else size

        name = space.candidates_without_none[0]
        nodes: tuple[Node, ...] = tuple(tuple((name, source) for source in range(2 + n)) for n in range(space.nodes))
        everything = Genotype(nodes, nodes, space.concat, space.concat)
        with torch.device("meta"):
            network = DerivedNetwork(
                everything, channels=channels, cells=cells, classes=classes, in_channels=in_channels, stem=stem
            )
        counts = count(network, (in_channels, image_size, image_size))
        edges = self._edges(everything)
        self.fixed = Cost(counts.parameters - edges.parameters, counts.multiply_adds - edges.multiply_adds)

    def of(self, genotype: Genotype) -> Cost:
        """Parameters and multiply-adds of the whole network, operations and memory access of its edges."""
        edges = self._edges(genotype)
        return Cost(
            self.fixed.parameters + edges.parameters,
            self.fixed.multiply_adds + edges.multiply_adds,
            edges.flops,
            edges.memory,
        )

    def _edges(self, genotype: Genotype) -> Cost:
        return Cost(*(self._cell(self.normal, genotype.normal) + self._cell(self.reduce, genotype.reduce)).tolist())

    def _cell(self, table: Tensor, nodes: Sequence[Node]) -> Tensor:
        total = torch.zeros(len(table), dtype=torch.double)
        for node, pairs in enumerate(nodes):
            for name, source in pairs:
                total += table[:, self.space.edge_slice(node).start + source, self.space.candidates.index(name)]
        return total


def _half(size: int) -> int:
    return (size + 1) // 2


def _after_stem(size: int, stem: str) -> int:
    return size if stem == "cifar" else _half(_half(_half(size)))
