"""Architecture parameters of a continuous relaxation: alpha, and beta for edge normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from fastnas.spaces.darts import DartsSpace
from fastnas.spaces.nasbench201 import Nasbench201Space

INITIAL_SCALE = 1e-3  # alpha and beta start at 1e-3 N(0, 1), as in the released DARTS and PC-DARTS code

Active = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Mixture:
    """Weights of all candidates of all edges, for one forward pass.

    `normal`, `reduce`: [E, O], float32. `normal_edges`, `reduce_edges`: [E] or None (every edge counts fully).
    `normal_active`, `reduce_active`: for each edge the candidates that take part, or None for all. The weights of the
    others must be 0, and are constants: what they would compute is not run, so memory is that of the active ones.
    `channel_seed`: with partial channels, the seed from which every edge of every cell draws the channels that pass its
    candidates (PC-DARTS, S_ij); None takes the first ones and shuffles.
    """

    normal: Tensor
    reduce: Tensor
    normal_edges: Tensor | None = None
    reduce_edges: Tensor | None = None
    normal_active: Active | None = None
    reduce_active: Active | None = None
    channel_seed: int | None = None

    def of_cell(self, reduction: bool) -> tuple[Tensor, Tensor | None, Active | None]:
        """Weights, edge weights and active candidates of a kind of cell."""
        if reduction:
            return self.reduce, self.reduce_edges, self.reduce_active
        return self.normal, self.normal_edges, self.normal_active

    def detach(self) -> Mixture:
        """The same weights as constants, for a pass that needs no architecture gradient."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: part.detach() for name, part in parts.items() if isinstance(part, Tensor)})


class Alphas(nn.Module):
    """alpha [E, O] for each cell type, shared by all its cells, and beta [E] where edges are normalised.

    Calling it gives the Mixture: softmax over the candidates (DARTS, eq. 2) and, for beta, softmax over the edges
    that end in the same node (PC-DARTS, eq. 2).
    """

    def __init__(
        self,
        space: DartsSpace | Nasbench201Space,
        *,
        edge_normalisation: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.space = space

        def start(*shape: int) -> nn.Parameter:
            return nn.Parameter(INITIAL_SCALE * torch.randn(*shape, generator=generator))

        edges, reduction_edges, candidates = space.num_edges, space.num_reduction_edges, len(space.candidates)
        self.alpha_normal, self.alpha_reduce = start(edges, candidates), start(reduction_edges, candidates)
        self.edge_normalisation = edge_normalisation
        if edge_normalisation:
            self.beta_normal, self.beta_reduce = start(edges), start(reduction_edges)

    def forward(self) -> Mixture:
        normal, reduce = self.alpha_normal.softmax(-1), self.alpha_reduce.softmax(-1)
        if not self.edge_normalisation:
            return Mixture(normal, reduce)
        return Mixture(normal, reduce, self._per_node(self.beta_normal), self._per_node(self.beta_reduce))

    def _per_node(self, beta: Tensor) -> Tensor:
        nodes = range(self.space.nodes)
        return torch.cat([beta[self.space.edge_slice(node)].softmax(0) for node in nodes])
