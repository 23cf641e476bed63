"""The fused executor: runs the cells of a supernet through `fused_cell`, from the modules that they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastnas.engine.fused_cell import fused_cell
from fastnas.engine.fused_norm import fused_norm
from fastnas.engine.fused_plan import CellPlan, Stage
from fastnas.engine.mixture import Mixture
from fastnas.engine.running import RunningStatistics
from fastnas.nn import FactorizedReduce, ReLUConvBN
from fastnas.spaces.genotype import Genotype, Node

if TYPE_CHECKING:
    from fastnas.engine.supernet import SupernetCell


class _Preprocess:
    """ReLU, 1x1 convolution (or FactorizedReduce) and normalisation before a state, as one stage."""

    def __init__(self, module: ReLUConvBN | FactorizedReduce) -> None:
        self.stage = Stage()
        if isinstance(module, FactorizedReduce):
            self.stride = 2
            self.stage.add_reduce(0, module)
        else:
            self.stride = 1
            self.stage.add_pointwise(0, module[1], module[2])
        self.running = RunningStatistics(self.stage.norms)

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        return fused_norm(self.stage, self.running, x, stride=self.stride, training=training)


class FusedCell:
    """The plans of a SupernetCell: of its whole mixture, and of any path through it."""

    def __init__(self, cell: SupernetCell) -> None:
        self.cell, self.space, self.k = cell, cell.space, cell.edges[0].k
        self.preprocess0, self.preprocess1 = _Preprocess(cell.preprocess0), _Preprocess(cell.preprocess1)
        candidates = range(len(cell.space.candidates))
        everything = [(edge, candidate) for edge in range(self.space.num_edges) for candidate in candidates]
        self.mixture = CellPlan(self.space, cell.edges, everything)

    def _plan(self, active: list[tuple[int, int]]) -> CellPlan:
        return CellPlan(self.space, self.cell.edges, active, self.mixture.running)

    def lay_flat(self) -> list[nn.Parameter]:
        """The weights of all edges as one leaf, if they have any."""
        return self.mixture.lay_flat()

    def path(self, nodes: tuple[Node, ...]) -> CellPlan:
        """The plan of a genotype's cell."""
        space = self.space
        return self._plan(
            [
                (space.edge_slice(node).start + source, space.candidates.index(name))
                for node, pairs in enumerate(nodes)
                for name, source in pairs
            ]
        )

    def __call__(self, s0: Tensor, s1: Tensor, architecture: Mixture | Genotype, *, lean: bool) -> Tensor:
        """Run the cell on the outputs s0, s1 [B, C, H, W] of the two before it, as the architecture says."""
        # Of the normalisations, which may have been told to take the batch's statistics in evaluation.
        training, reduction = self.preprocess0.running.norms[0].training, self.cell.reduction
        s0, s1 = self.preprocess0(s0, training), self.preprocess1(s1, training)
        if isinstance(architecture, Genotype):
            plan = self.path(architecture.reduce if reduction else architecture.normal)
            weights = torch.ones(self.space.num_edges, len(self.space.candidates), device=s0.device)
            return fused_cell(plan, s0, s1, weights, None, training=training, lean=lean)
        weights, betas, active = architecture.of_cell(reduction)
        plan = self.mixture
        if active is not None:
            plan = self._plan([(edge, candidate) for edge, some in enumerate(active) for candidate in some])
        if betas is not None:
            weights = weights * betas[:, None]
        if self.k == 1:
            betas = None
        elif betas is None:
            betas = weights.new_ones(len(weights))
        return fused_cell(plan, s0, s1, weights, betas, training=training, lean=lean)


def fused(cell: SupernetCell) -> FusedCell:
    """The cell with its plans, which are made at the first call."""
    found = cell.__dict__.get("_fused")
    if found is None:
        found = cell.__dict__["_fused"] = FusedCell(cell)
    return found
