"""The network of NAS-Bench-101 (Ying et al. 2019), and VAENAS's weight-sliced supernet of its cells (appendix A.5).

The output of a cell is the concatenation of the vertices that lead to it, so a vertex has fewer channels the more of
them there are. The supernet keeps each convolution at full width, and a cell uses the first channels of it, in and out.
"""

from __future__ import annotations

import operator
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas.errors import UserError
from fastnas.spaces.architecture import ArchitectureString
from fastnas.spaces.nasbench101 import NASBENCH101_CANDIDATES, VERTICES, Cell, Nasbench101Space

STACKS = 3
KERNELS = {"conv3x3": 3, "conv1x1": 1}


def vertex_widths(cell: Cell, channels: int) -> list[int]:
    """Channels of the inner vertices of a pruned cell with `channels` outputs, in order.

    Vertices that lead to the output share its channels equally, the first ones taking what is left over; each other one
    has the most of those that it leads to.
    """
    pairs, operations = cell
    last = len(operations) + 1
    ends = sorted(source for source, target in pairs if target == last and source)
    widths = [0] * last
    for rank, vertex in enumerate(ends):
        widths[vertex] = channels // len(ends) + (rank < channels % len(ends))
    for vertex in reversed(range(1, last)):
        if vertex not in ends:
            widths[vertex] = max(widths[target] for source, target in pairs if source == vertex)
    return widths[1:]


class SlicedNorm(nn.BatchNorm2d):
    """Batch normalisation of the first channels, as many as the input has: [B, c, H, W] with c at most the full width.

    The statistics and the affine parameters of the other channels stay as they are.
    """

    def forward(self, x: Tensor) -> Tensor:
        count, rate = x.shape[1], self.momentum
        mean, variance = self.running_mean[:count], self.running_var[:count]
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if rate is None:  # the plain mean of all batches
                rate = 1 / float(self.num_batches_tracked)
        elif self.training:
            mean = variance = None
        weight, bias = (self.weight[:count], self.bias[:count]) if self.affine else (None, None)
        return F.batch_norm(x, mean, variance, weight, bias, self.training, rate or 0.0, self.eps)


class SlicedConv(nn.Module):
    """Convolution, normalisation and ReLU, of which a call uses the first channels (VAENAS, Figure 7)."""

    def __init__(self, c_in: int, channels: int, kernel: int, *, affine: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, channels, kernel, padding=kernel // 2, bias=False)
        self.norm = SlicedNorm(channels, affine=affine)

    def forward(self, x: Tensor, channels: int) -> Tensor:
        """x [B, c, H, W] -> [B, channels, H, W], with the kernels [:channels, :c]."""
        weight = self.conv.weight[:channels, : x.shape[1]]
        return F.relu(self.norm(F.conv2d(x, weight, padding=self.conv.padding)))


class Nasbench101Cell(nn.Module):
    """All operations of five inner vertices at full width, or with `only` those of a pruned cell at its own widths.

    The cell's input goes through a 1x1 projection of its own on each of its edges. A vertex sums the first channels of
    its inputs and runs its operation on the sum.
    """

    def __init__(self, c_in: int, channels: int, only: Cell | None) -> None:
        super().__init__()
        self.channels, affine = channels, only is not None
        inner = VERTICES - 2 if only is None else len(only[1])
        widths = [channels] * inner if only is None else vertex_widths(only, channels)
        of_input = range(1, inner + 2) if only is None else [target for source, target in only[0] if not source]
        self.projections = nn.ModuleDict(
            {self._place(v, inner): SlicedConv(c_in, (*widths, channels)[v - 1], 1, affine=affine) for v in of_input}
        )
        self.operations = nn.ModuleList()
        for vertex, width in enumerate(widths):
            names = NASBENCH101_CANDIDATES if only is None else (NASBENCH101_CANDIDATES[only[1][vertex]],)
            convolutions = {n: SlicedConv(width, width, KERNELS[n], affine=affine) for n in names if n in KERNELS}
            self.operations.append(nn.ModuleDict(convolutions))

    def forward(self, x: Tensor, cell: Cell) -> Tensor:
        """x [B, c_in, H, W] -> [B, channels, H, W]."""
        pairs, operations = cell
        last, widths = len(operations) + 1, vertex_widths(cell, self.channels)
        states = [x]
        for vertex, (operation, width) in enumerate(zip(operations, widths, strict=True), start=1):
            inputs = [states[source][:, :width] for source, target in pairs if target == vertex and source]
            if (0, vertex) in pairs:
                inputs.append(self.projections[self._place(vertex, len(operations))](x, width))
            states.append(self._operate(vertex, operation, reduce(operator.add, inputs), width))
        ends = [states[source] for source in range(1, last) if (source, last) in pairs]
        outputs = [torch.cat(ends, dim=1)] if ends else []
        if (0, last) in pairs:
            outputs.append(self.projections[self._place(last, len(operations))](x, self.channels))
        return reduce(operator.add, outputs)

    @staticmethod
    def _place(vertex: int, inner: int) -> str:
        return str(vertex) if vertex <= inner else "output"

    def _operate(self, vertex: int, operation: int, x: Tensor, width: int) -> Tensor:
        name = NASBENCH101_CANDIDATES[operation]
        if name not in KERNELS:
            return F.max_pool2d(x, 3, 1, padding=1)
        return self.operations[vertex - 1][name](x, width)


class Nasbench101Network(nn.Module):
    """Stem, three stacks of cells / 3 equal cells with 2x2 max-pooling between, pool, classifier.

    Channels double from stack to stack; the benchmark's own network has 128 channels and 9 cells. `only`: build that
    cell alone with affine normalisation, as the benchmark trained it; the supernet's normalisation is not affine.
    Calling it gives logits [B, classes]. Raises UserError when cells is no multiple of three and for fewer than five
    channels.
    """

    def __init__(
        self,
        space: Nasbench101Space,
        *,
        channels: int,
        cells: int,
        classes: int,
        in_channels: int = 3,
        only: ArchitectureString | None = None,
    ) -> None:
        super().__init__()
        if cells % STACKS:
            raise UserError(f"NAS-Bench-101 has three stacks of equal length: cells must be 3, 6, 9, ..., got {cells}")
        if channels < VERTICES - 2:
            raise UserError(f"up to {VERTICES - 2} vertices share a cell's channels: give that many, got {channels}")
        self.space = space
        self.only = None if only is None else space.prune(only.string)
        self.stem = SlicedConv(in_channels, channels, 3, affine=only is not None)
        self.stacks = nn.ModuleList()
        c_in = channels
        for _ in range(STACKS):
            stack = nn.ModuleList()
            for _ in range(cells // STACKS):
                stack.append(Nasbench101Cell(c_in, channels, self.only))
                c_in = channels
            self.stacks.append(stack)
            channels *= 2
        self.classifier = nn.Linear(c_in, classes)

    def forward(self, x: Tensor, architecture: ArchitectureString | None = None) -> Tensor:
        """x [B, in_channels, H, W]; only what the architecture needs runs."""
        cell = self.only if architecture is None else self.space.prune(architecture.string)
        if cell is None:
            raise UserError("a supernet needs an architecture")
        x = self.stem(x, self.stem.conv.out_channels)
        for index, stack in enumerate(self.stacks):
            x = F.max_pool2d(x, 2, ceil_mode=True) if index else x
            for module in stack:
                x = module(x, cell)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))
