"""The derived network: a genotype built for training from scratch and for use. Plain PyTorch modules."""

from __future__ import annotations

import operator
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas.engine.stems import build_stem
from fastnas.errors import UserError
from fastnas.nn import DropPath, FactorizedReduce, ReLUConvBN, build_candidate
from fastnas.spaces.darts import reduction_cells
from fastnas.spaces.genotype import Genotype, Node, live_edges


class DerivedCell(nn.Module):
    """A cell with only the genotype's operations; each path but an identity is dropped per sample in training.

    An edge with `none` is not built. A node that is left without inputs goes, with the edges that start from it and
    its part of the output, and so does the preprocessing of an input that nothing reads (SNAS, section 3.1). Raises
    UserError when nothing is left.
    """

    def __init__(
        self,
        nodes: tuple[Node, ...],
        concat: tuple[int, ...],
        c_prev_prev: int,
        c_prev: int,
        channels: int,
        *,
        reduction: bool,
        previous_reduces: bool,
    ) -> None:
        super().__init__()
        nodes = live_edges(nodes)
        self.concat = [state for state in concat if state < 2 or nodes[state - 2]]
        if not self.concat:
            raise UserError(
                f"every path of the {'reduction' if reduction else 'normal'} cell ends in 'none', so there is nothing "
                "to build: search longer, or with a weaker resource constraint"
            )
        self.out_channels = len(self.concat) * channels
        read = {source for node in nodes for _, source in node} | set(self.concat)
        preprocess = FactorizedReduce if previous_reduces else ReLUConvBN
        self.preprocess0 = preprocess(c_prev_prev, channels, affine=True) if 0 in read else None
        self.preprocess1 = ReLUConvBN(c_prev, channels, affine=True) if 1 in read else None
        self.sources = [[source for _, source in node] for node in nodes]
        self.nodes = nn.ModuleList(
            nn.ModuleList(self._path(name, channels, 2 if reduction and source < 2 else 1) for name, source in node)
            for node in nodes
        )

    @staticmethod
    def _path(name: str, channels: int, stride: int) -> nn.Module:
        candidate = build_candidate(name, channels, stride, searching=False)
        return candidate if isinstance(candidate, nn.Identity) else nn.Sequential(candidate, DropPath())

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        states = [
            None if preprocess is None else preprocess(s)
            for preprocess, s in ((self.preprocess0, s0), (self.preprocess1, s1))
        ]
        for paths, sources in zip(self.nodes, self.sources, strict=True):
            outputs = [path(states[source]) for path, source in zip(paths, sources, strict=True)]
            states.append(reduce(operator.add, outputs) if outputs else None)
        return torch.cat([states[state] for state in self.concat], dim=1)


class AuxiliaryHead(nn.Module):
    """A second classifier after the last reduction cell, used in training only (Liu et al. 2019, appendix A.2).

    Any image size: the map is pooled to 2x2, with the papers' 5x5 windows where it is 8x8 (CIFAR) or 7x7 (ImageNet).
    `second_norm`: the CIFAR head normalises after its second convolution, the ImageNet head of the papers does not.
    """

    def __init__(self, channels: int, classes: int, *, second_norm: bool) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(nn.Conv2d(channels, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU())
        self.reduce = nn.Conv2d(128, 768, 2, bias=False)
        self.norm = nn.BatchNorm2d(768) if second_norm else nn.Identity()
        self.classifier = nn.Linear(768, classes)

    def forward(self, x: Tensor) -> Tensor:
        x, size = F.relu(x), x.shape[-1]
        stride = {8: 3, 7: 2}.get(size)
        if stride and x.shape[-2] == size:
            x = F.avg_pool2d(x, 5, stride, count_include_pad=False)
        else:
            x = F.adaptive_avg_pool2d(x, 2)
        return self.classifier(F.relu(self.norm(self.reduce(self.squeeze(x)))).flatten(1))


class DerivedNetwork(nn.Module):
    """Stem, cells of the genotype, global average pool, linear classifier.

    `channels`: C of the first cells, doubled at the reduction cells (at a third and at two thirds of `cells`);
    `stem`: "cifar" or "imagenet"; `auxiliary`: add the auxiliary head.
    """

    def __init__(
        self,
        genotype: Genotype,
        *,
        channels: int,
        cells: int,
        classes: int,
        in_channels: int = 3,
        stem: str = "cifar",
        auxiliary: bool = False,
    ) -> None:
        super().__init__()
        if channels < 2 or channels % 2:
            raise UserError(f"channels must be an even number of at least 2, got {channels}")
        self.genotype = genotype
        self.stem = build_stem(stem, in_channels, channels)
        self.auxiliary_after = 2 * cells // 3
        self.auxiliary: AuxiliaryHead | None = None
        c_prev_prev = c_prev = self.stem.out_channels
        previous_reduces = self.stem.reduces_at_end
        self.cells = nn.ModuleList()
        for index in range(cells):
            reduction = index in reduction_cells(cells)
            channels = 2 * channels if reduction else channels
            nodes, concat = (
                (genotype.reduce, genotype.reduce_concat) if reduction else (genotype.normal, genotype.normal_concat)
            )
            cell = DerivedCell(
                nodes, concat, c_prev_prev, c_prev, channels, reduction=reduction, previous_reduces=previous_reduces
            )
            self.cells.append(cell)
            c_prev_prev, c_prev, previous_reduces = c_prev, cell.out_channels, reduction
            if auxiliary and index == self.auxiliary_after:
                self.auxiliary = AuxiliaryHead(c_prev, classes, second_norm=stem == "cifar")
        self.classifier = nn.Linear(c_prev, classes)

    def set_drop_path(self, rate: float) -> None:
        """Set the probability with which each path of a sample is dropped in training (DARTS: 0.2 epoch / epochs)."""
        for module in self.modules():
            if isinstance(module, DropPath):
                module.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, H, W] -> logits [B, classes]."""
        return self._run(x)[0]

    def forward_with_auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the network and of the auxiliary head, both [B, classes]; None without that head."""
        return self._run(x)

    def features(self, x: Tensor) -> list[Tensor]:
        """The last map of each size, [B, C_i, H_i, W_i]: at strides 1, 2 and 4 with the CIFAR stem, at 8, 16 and 32
        with that of ImageNet."""
        maps = []
        s0, s1 = self.stem(x)
        for index, cell in enumerate(self.cells):
            if index in reduction_cells(len(self.cells)):
                maps.append(s1)
            s0, s1 = s1, cell(s0, s1)
        return [*maps, s1]

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        auxiliary_logits = None
        s0, s1 = self.stem(x)
        for index, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1)
            if self.auxiliary is not None and self.training and index == self.auxiliary_after:
                auxiliary_logits = self.auxiliary(s1)
        return self.classifier(F.adaptive_avg_pool2d(s1, 1).flatten(1)), auxiliary_logits
