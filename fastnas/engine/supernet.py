"""The supernet, and its plain executor: standard modules, one call a candidate. The oracle and the honest baseline.

The fused executor, in `fastnas.engine.fused`, computes the same from the same modules.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas.engine.derived import AuxiliaryHead
from fastnas.engine.fused import fused
from fastnas.engine.mixture import Active, Mixture
from fastnas.engine.stems import build_stem
from fastnas.errors import UserError
from fastnas.nn import FactorizedReduce, MixedOp, ReLUConvBN
from fastnas.ops import mixed_sum
from fastnas.spaces.darts import DartsSpace, reduction_cells
from fastnas.spaces.genotype import Genotype, Node

EXECUTORS = ("plain", "fused", "lean")
FUSED_DTYPES = (torch.float32, torch.float64)
STORAGE = {"float32": None, "bfloat16": torch.bfloat16}  # what the fused executors keep their maps in


class SupernetCell(nn.Module):
    """A cell that holds every candidate of every edge; runs all of them, or one sampled path."""

    def __init__(
        self,
        space: DartsSpace,
        c_prev_prev: int,
        c_prev: int,
        channels: int,
        *,
        reduction: bool,
        previous_reduces: bool,
        k: int,
    ) -> None:
        super().__init__()
        self.space = space
        self.reduction = reduction
        preprocess = FactorizedReduce if previous_reduces else ReLUConvBN
        self.preprocess0 = preprocess(c_prev_prev, channels, affine=False)
        self.preprocess1 = ReLUConvBN(c_prev, channels, affine=False)
        self.edges = nn.ModuleList(
            MixedOp(space.candidates, channels, 2 if reduction and source < 2 else 1, k=k) for source in space.sources
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SupernetCell:
        """A move of the module (`to`, `double`) takes weights that are laid flat along."""
        super()._apply(fn, recurse)
        if "_fused" in self.__dict__:
            fused(self).mixture.bind(fn)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of the module has views of its own leaf."""
        super().__setstate__(state)
        if "_fused" in self.__dict__:
            fused(self).mixture.bind()

    def forward(
        self,
        s0: Tensor,
        s1: Tensor,
        architecture: Mixture | Genotype,
        *,
        executor: str = "plain",
        channels: Tensor | None = None,
    ) -> Tensor:
        """Outputs s0, s1 of the two cells before it -> the concatenation of the nodes, [B, nodes * C, H', W'].

        `channels`: int64 [E, C/K], the random channels of its edges, which only the plain executor has, or None.
        """
        if executor != "plain" and channels is None:
            return fused(self)(s0, s1, architecture, lean=executor == "lean")
        if isinstance(architecture, Genotype):
            return self.forward_path(s0, s1, architecture.reduce if self.reduction else architecture.normal)
        return self.forward_mixture(s0, s1, *architecture.of_cell(self.reduction), channels)

    def forward_mixture(
        self,
        s0: Tensor,
        s1: Tensor,
        weights: Tensor,
        edge_weights: Tensor | None = None,
        active: Active | None = None,
        channels: Tensor | None = None,
    ) -> Tensor:
        """weights [E, O], edge_weights [E] or None -> the concatenation of the nodes, [B, nodes * C, H', W'].

        `active`: for each edge the candidates to run, or None for all. `channels`: int64 [E, C/K], the channels of each
        edge that pass its candidates, or None for the first ones.
        """
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for node in range(self.space.nodes):
            span = self.space.edge_slice(node)
            outputs = [
                self.edges[index](
                    state,
                    weights[index],
                    None if channels is None else channels[index],
                    None if active is None else active[index],
                )
                for index, state in zip(range(span.start, span.stop), states, strict=True)
            ]
            states.append(
                reduce(operator.add, outputs) if edge_weights is None else mixed_sum(outputs, edge_weights[span])
            )
        return torch.cat(states[2:], dim=1)

    def random_channels(self, generator: torch.Generator) -> Tensor:
        """A random subset of C/K of the C channels for each edge: int64 [E, C/K], sorted, on the CPU."""
        edge = self.edges[0]
        draws = torch.rand(len(self.edges), edge.k * edge.selected, generator=generator)
        return draws.argsort(-1)[:, : edge.selected].sort(-1).values

    def forward_path(self, s0: Tensor, s1: Tensor, nodes: Sequence[Node]) -> Tensor:
        """Run only the candidates that the genotype's cell names."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for node, pairs in enumerate(nodes):
            first_edge = self.space.edge_slice(node).start
            outputs = [
                self.edges[first_edge + source].forward_candidate(states[source], self.space.candidates.index(name))
                for name, source in pairs
            ]
            states.append(reduce(operator.add, outputs))
        return torch.cat(states[2:], dim=1)


class Supernet(nn.Module):
    """The over-parameterised network of weight sharing: stem, cells, global average pool, linear classifier.

    `channels`: C of the first cells, doubled at each of the two reduction cells (at a third and at two thirds);
    `k`: partial channels 1/K (PC-DARTS); `stem`: "cifar" or "imagenet". Its parameters are the shared weights only;
    the architecture comes with each call. `executor`: "plain" (one module call a candidate), "fused" or "lean" (both
    fused; lean keeps little more than the states of the cells between forward and backward, and computes more). Random
    channels and half-width images run on the plain executor. `storage`: dtype of all maps between the stem and the
    classifier, forward and backward; sums, statistics and parameters stay float32. `auxiliary`: add the auxiliary head
    of retraining.
    """

    def __init__(
        self,
        space: DartsSpace,
        *,
        channels: int,
        cells: int,
        classes: int,
        in_channels: int = 3,
        k: int = 1,
        stem: str = "cifar",
        executor: str = "plain",
        storage: str = "float32",
        auxiliary: bool = False,
    ) -> None:
        super().__init__()
        if executor not in EXECUTORS:
            raise UserError(f"unknown executor {executor!r}; there are {', '.join(EXECUTORS)}")
        if channels % (2 * k):
            raise UserError(
                f"channels must be a multiple of 2k = {2 * k} so that 1/k of them can be selected, got {channels}: "
                "change --channels or --partial"
            )
        self.space = space
        if storage not in STORAGE:
            raise UserError(f"unknown storage {storage!r}; there are {', '.join(STORAGE)}")
        if storage != "float32" and executor == "plain":
            raise UserError(f"the plain executor has no storage {storage}: give --executor fused or lean with it")
        self.executor, self.storage = executor, STORAGE[storage]
        self.stem = build_stem(stem, in_channels, channels)
        c_prev_prev = c_prev = self.stem.out_channels
        previous_reduces = self.stem.reduces_at_end
        self.auxiliary_after = reduction_cells(cells)[1]
        self.auxiliary: AuxiliaryHead | None = None
        self.cells = nn.ModuleList()
        for index in range(cells):
            reduction = index in reduction_cells(cells)
            channels = 2 * channels if reduction else channels
            self.cells.append(
                SupernetCell(
                    space,
                    c_prev_prev,
                    c_prev,
                    channels,
                    reduction=reduction,
                    previous_reduces=previous_reduces,
                    k=k,
                )
            )
            c_prev_prev, c_prev, previous_reduces = c_prev, space.nodes * channels, reduction
            if auxiliary and index == self.auxiliary_after:
                self.auxiliary = AuxiliaryHead(c_prev, classes, second_norm=stem == "cifar")
        self.classifier = nn.Linear(c_prev, classes)

    def lay_flat(self) -> list[nn.Parameter]:
        """The leaves that passes of a whole Mixture train, for an optimiser.

        With a fused executor the weights of a cell's edges become one leaf, of which those of the modules are views
        that ask for no gradient: a step handles some thirty tensors instead of more than a thousand. Paths and random
        channels train the modules' own parameters, so do not call it for them.
        """
        flat = [] if self.executor == "plain" else [leaf for cell in self.cells for leaf in fused(cell).lay_flat()]
        return [*flat, *(parameter for parameter in self.parameters() if parameter.requires_grad)]

    def forward(self, x: Tensor, architecture: Mixture | Genotype) -> Tensor:
        """x [B, in_channels, H, W] -> logits [B, classes].

        A Mixture runs every candidate (DARTS, eq. 2); a Genotype runs its sampled path alone, at the cost and
        memory of one child network.
        """
        return self._run(x, architecture)[0]

    def forward_with_auxiliary(self, x: Tensor, architecture: Mixture | Genotype) -> tuple[Tensor, Tensor | None]:
        """Logits of the network and of the auxiliary head, both [B, classes]; None without that head."""
        return self._run(x, architecture, with_auxiliary=True)

    def _run(
        self, x: Tensor, architecture: Mixture | Genotype, *, with_auxiliary: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        executor = self.executor if x.dtype in FUSED_DTYPES else "plain"
        if executor != "plain":
            x = x.contiguous(memory_format=torch.channels_last)
        s0, s1 = self.stem(x, exact=executor != "plain")
        if self.storage is not None and executor != "plain":
            s0, s1 = s0.to(self.storage), s1.to(self.storage)
        generator = None
        if isinstance(architecture, Mixture) and architecture.channel_seed is not None:
            generator = torch.Generator().manual_seed(architecture.channel_seed)
        auxiliary_logits = None
        for index, cell in enumerate(self.cells):
            channels = None if generator is None else cell.random_channels(generator).to(x.device)
            s0, s1 = s1, cell(s0, s1, architecture, executor=executor, channels=channels)
            if with_auxiliary and self.auxiliary is not None and index == self.auxiliary_after:
                auxiliary_logits = self.auxiliary(s1 if s1.dtype != self.storage else s1.to(x.dtype))
        last = s1 if s1.dtype != self.storage else s1.to(x.dtype)
        return self.classifier(F.adaptive_avg_pool2d(last, 1).flatten(1)), auxiliary_logits
