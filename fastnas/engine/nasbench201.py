"""The network of NAS-Bench-201: the supernet of its cell space, and the same with one cell built alone."""

from __future__ import annotations

import operator
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas.engine.mixture import Mixture
from fastnas.errors import UserError
from fastnas.ops import mixed_sum, partial_shuffle
from fastnas.spaces.architecture import ArchitectureString
from fastnas.spaces.nasbench201 import Nasbench201Space

STAGES = 3


def _relu_conv_norm(c_in: int, channels: int, kernel: int, stride: int, *, affine: bool) -> nn.Sequential:
    conv = nn.Conv2d(c_in, channels, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(channels, affine=affine))


def candidate_module(name: str, channels: int, *, affine: bool) -> nn.Module:
    """A candidate but `none`, on a map of `channels` channels."""
    if name.startswith("nor_conv"):
        return _relu_conv_norm(channels, channels, int(name[-1]), 1, affine=affine)
    return nn.AvgPool2d(3, 1, padding=1, count_include_pad=False) if name == "avg_pool_3x3" else nn.Identity()


class ResidualReduction(nn.Module):
    """Between stages: a residual block of stride 2 whose shortcut is a 2x2 average pool and a 1x1 convolution."""

    def __init__(self, c_in: int, channels: int, *, affine: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _relu_conv_norm(c_in, channels, 3, 2, affine=affine),
            _relu_conv_norm(channels, channels, 3, 1, affine=affine),
        )
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(c_in, channels, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class Nasbench201Cell(nn.Module):
    """The candidates of six edges that `built` names for each (indices), or all; on the first C/K channels with `k`."""

    def __init__(
        self, space: Nasbench201Space, channels: int, built: list[tuple[int, ...]], *, affine: bool, k: int = 1
    ) -> None:
        super().__init__()
        self.space, self.k = space, k
        self.edges = nn.ModuleList(
            nn.ModuleDict(
                {str(i): candidate_module(space.candidates[i], channels // k, affine=affine) for i in chosen if i}
            )
            for chosen in built
        )

    def forward(self, x: Tensor, architecture: Mixture | tuple[int, ...]) -> Tensor:
        states = [x]
        for node in range(self.space.nodes):
            span = self.space.edge_slice(node)
            sources = zip(range(span.start, span.stop), states, strict=True)
            if not isinstance(architecture, Mixture):
                outputs = [self._candidate(edge, architecture[edge], x) for edge, x in sources]
                states.append(reduce(operator.add, outputs))
                continue
            outputs = [self._mixed(edge, x, architecture) for edge, x in sources]
            weights = architecture.normal_edges
            states.append(reduce(operator.add, outputs) if weights is None else mixed_sum(outputs, weights[span]))
        return states[-1]

    def _candidate(self, edge: int, index: int, x: Tensor) -> Tensor:
        return self.edges[edge][str(index)](x) if index else torch.zeros_like(x)

    def _mixed(self, edge: int, x: Tensor, mixture: Mixture) -> Tensor:
        """`none` adds nothing, but keeps its weight."""
        active = range(len(self.space.candidates)) if mixture.normal_active is None else mixture.normal_active[edge]
        indices = [index for index in active if index]
        if not indices:
            return torch.zeros_like(x)
        weights = mixture.normal[edge, indices]
        if self.k == 1:
            return mixed_sum([self._candidate(edge, index, x) for index in indices], weights)
        selected, bypass = x.tensor_split([x.shape[1] // self.k], dim=1)
        return partial_shuffle([self._candidate(edge, index, selected) for index in indices], weights, bypass)


class Nasbench201Network(nn.Module):
    """Stem, three stages of cells / 3 equal cells with residual reductions between, pool, classifier.

    Channels double and sides halve at a reduction; the benchmark's own has 16 channels and 15 cells. `only`: build that
    cell alone with affine normalisation, as the benchmark trained it; the supernet's normalisation is not affine.
    `k`: partial channels 1/K (PC-DARTS). Calling it gives logits [B, classes]. Raises UserError when cells is no
    multiple of three, or channels none of k.
    """

    def __init__(
        self,
        space: Nasbench201Space,
        *,
        channels: int,
        cells: int,
        classes: int,
        in_channels: int = 3,
        k: int = 1,
        only: ArchitectureString | None = None,
    ) -> None:
        super().__init__()
        if channels % k:
            raise UserError(f"channels must be a multiple of {k} so that 1/{k} of them can be selected, got {channels}")
        if cells % STAGES:
            raise UserError(f"NAS-Bench-201 has three stages of equal length: cells must be 3, 6, 9, ..., got {cells}")
        affine = only is not None
        self.only = None if only is None else only.string
        every = tuple(range(len(space.candidates)))
        built = [every] * space.num_edges if only is None else [(index,) for index in only.string]
        self.stem = nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.layers = nn.ModuleList()
        for stage in range(STAGES):
            if stage:
                self.layers.append(ResidualReduction(channels, 2 * channels, affine=affine))
                channels *= 2
            for _ in range(cells // STAGES):
                self.layers.append(Nasbench201Cell(space, channels, built, affine=affine, k=k))
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor, architecture: Mixture | ArchitectureString | None = None) -> Tensor:
        """x [B, in_channels, H, W]. A Mixture runs every candidate, an architecture its own alone."""
        chosen = architecture.string if isinstance(architecture, ArchitectureString) else architecture or self.only
        if chosen is None:
            raise UserError("a supernet needs an architecture")
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x, chosen) if isinstance(layer, Nasbench201Cell) else layer(x)
        return self.classifier(F.adaptive_avg_pool2d(F.relu(self.norm(x)), 1).flatten(1))
