"""Which stage runs what in a fused cell: the cell's modules, grouped by the state that they read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from fastnas.engine.running import RunningStatistics
from fastnas.nn import FactorizedReduce, MixedOp
from fastnas.nn.candidates import DilConv, SepConv
from fastnas.ops.stages.source_layout import Convolutions, Layout, Term
from fastnas.spaces.darts import DartsSpace

POOLS = ("max_pool_3x3", "avg_pool_3x3")  # in the order of pool_stage
CONVOLUTIONS = ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")


class Stage:
    """The modules behind a conv_stage call. `norms`: the batch normalisation behind each of its outputs."""

    def __init__(self) -> None:
        self.layout = Convolutions()
        self.norms: list[nn.BatchNorm2d] = []
        self._modules: list[nn.Conv2d] = []  # of each part: depthwise if there is one, pointwise

    def add_separable(self, source: int, depthwise: nn.Conv2d, pointwise: nn.Conv2d, norm: nn.BatchNorm2d) -> int:
        """A new output: a depthwise-separable convolution. Returns its number."""
        self.norms.append(norm)
        self._add_part(source, depthwise, pointwise, dilation=depthwise.dilation[0])
        return len(self.norms) - 1

    def add_pointwise(self, source: int, pointwise: nn.Conv2d, norm: nn.BatchNorm2d) -> int:
        """A new output: a 1x1 convolution. Returns its number."""
        self.norms.append(norm)
        self._add_part(source, None, pointwise)
        return len(self.norms) - 1

    def add_reduce(self, source: int, reduce: FactorizedReduce) -> int:
        """A new output of two parts, the halves of a FactorizedReduce. Returns its number."""
        self.norms.append(reduce.norm)
        self._add_part(source, None, reduce.conv_even)
        self._add_part(source, None, reduce.conv_odd, first=reduce.conv_even.out_channels, shift=1)
        return len(self.norms) - 1

    def _add_part(
        self,
        source: int,
        depthwise: nn.Conv2d | None,
        pointwise: nn.Conv2d,
        *,
        first: int = 0,
        dilation: int = 1,
        shift: int = 0,
    ) -> None:
        self.layout.parts += [source, len(self.norms) - 1, first, dilation, shift]
        self.layout.sides.append(0 if depthwise is None else depthwise.kernel_size[0])
        self.layout.widths.append(pointwise.out_channels)
        self.layout.outputs = len(self.norms)
        self._modules += [pointwise] if depthwise is None else [depthwise, pointwise]

    @property
    def weights(self) -> list[Tensor]:
        """What the modules hold now, in the order of the flat gradient of conv_stage_bwd."""
        return [module.weight for module in self._modules]


@dataclass(frozen=True)
class Extra:
    """A candidate that no stage knows, on one edge: it runs as a module beside them."""

    edge: int
    candidate: int
    node: int
    module: nn.Module


class SourcePlan:
    """All that leaves one state of a cell: its stages, and the candidates that no stage knows.

    `nodes`: the nodes that the terms go to, in the order of the layout; terms go by edge.
    """

    def __init__(self, stride: int) -> None:
        self.pool_norms: list[nn.BatchNorm2d] = []  # one of each pool of each edge
        self.first, self.second = Stage(), Stage()
        self.nodes: list[int] = []
        self.extras: list[Extra] = []
        self.layout = Layout(stride, 0, self.first.layout, self.second.layout, [], [])

    def add(self, edge: int, candidate: int, node: int, name: str, module: nn.Module) -> None:
        """One more candidate; `none` costs nothing."""
        if name in POOLS:
            self.pool_norms.append(module[1])
            place = ("pool", POOLS.index(name))
        elif isinstance(module, nn.Identity):
            place = ("state", 0)
        elif name == "skip_connect":
            place = ("first", self.first.add_reduce(0, module))
        elif name in CONVOLUTIONS:
            place = self._add_convolution(module)
        else:
            if name != "none":
                self.extras.append(Extra(edge, candidate, node, module))
            return
        if node not in self.nodes:
            self.nodes.append(node)
            self.layout.nodes += 1
        self.layout.terms.append(Term(edge, candidate, self.nodes.index(node), *place))

    def _add_convolution(self, module: SepConv | DilConv) -> tuple[str, int]:
        layers = list(module)  # ReLU, depthwise, pointwise, norm, and of a SepConv the same again
        output = self.first.add_separable(0, *layers[1:4])
        if isinstance(module, DilConv):
            return "first", output
        second_from = self.layout.second_from
        second_from.append(output)
        return "second", self.second.add_separable(len(second_from) - 1, *layers[5:8])

    @property
    def norms(self) -> list[nn.BatchNorm2d]:
        """Those behind the rows of the layout's norms but the first."""
        return [*self.pool_norms, *self.first.norms, *self.second.norms]

    @property
    def weights(self) -> list[Tensor]:
        """Of the first and the second stage: the order in which they lie in the op's argument."""
        return [*self.first.weights, *self.second.weights]

    @property
    def extra_weights(self) -> list[Tensor]:
        return [weight for extra in self.extras for weight in extra.module.parameters()]


class CellPlan:
    """The sources of a cell, state by state, for its active (edge, candidate) pairs.

    `running`: of a plan for more of the cell; without it the plan has its own.
    """

    def __init__(
        self,
        space: DartsSpace,
        edges: Sequence[MixedOp],
        active: Sequence[tuple[int, int]],
        running: RunningStatistics | None = None,
    ) -> None:
        self.leaf: nn.Parameter | None = None
        self._laid_flat: list[nn.Parameter] = []
        self.nodes = space.nodes
        self.k = edges[0].k
        self.edge_slices = [space.edge_slice(node) for node in range(space.nodes)]
        self.strides = [edges[min(state, len(edges) - 1)].stride for state in (0, 1)] + [1] * space.nodes
        self.sources = [SourcePlan(stride) for stride in self.strides]
        node_of = [node for node in range(space.nodes) for _ in range(2 + node)]
        for edge, candidate in sorted(active):
            state = space.sources[edge]
            name, module = space.candidates[candidate], edges[edge].candidates[candidate]
            self.sources[state].add(edge, candidate, node_of[edge], name, module)
        self._sizes = [source.layout.size(edges[0].selected) for source in self.sources]
        self._counts = [len(source.weights) for source in self.sources]
        norms = [norm for source in self.sources for norm in source.norms]
        self.running = RunningStatistics(norms) if running is None else running
        self._rows = [self.running.row[norm] for norm in norms]
        self._indices: dict[torch.device, tuple[Tensor | None, Tensor, Tensor]] = {}

    def indices(self, device: torch.device) -> tuple[Tensor | None, Tensor, Tensor]:
        """Index tensors on `device`, made once, source by source: rows of the running statistics that the norms of the
        layouts follow (None: all, in their order), and the edge and the candidate of every term."""
        if device not in self._indices:
            terms = [term for source in self.sources for term in source.layout.terms]
            numbers = self._rows, [term.edge for term in terms], [term.candidate for term in terms]
            rows, edges, candidates = (torch.tensor(some, dtype=torch.long, device=device) for some in numbers)
            whole = self._rows == list(range(len(self.running.norms)))
            self._indices[device] = None if whole else rows, edges, candidates
        return self._indices[device]

    @property
    def weights(self) -> list[Tensor]:
        """What the modules behind the stages hold now, source by source; where they lie end to end, that one leaf."""
        if self.leaf is not None:
            return [self.leaf]
        return [weight for source in self.sources for weight in source.weights]

    def lay_flat(self) -> list[nn.Parameter]:
        """Put the weights, if there are any, end to end into one leaf, which is what gets their gradient from now on:
        a step then pays for one tensor a cell instead of hundreds. The modules' own become views of it that ask for no
        gradient."""
        if self.leaf is None and self.weights:
            self._laid_flat = self.weights
            self.leaf = nn.Parameter(torch.cat([weight.detach().reshape(-1) for weight in self._laid_flat]))
            self.bind()
        return [] if self.leaf is None else [self.leaf]

    def bind(self, moved: Callable[[Tensor], Tensor] | None = None) -> None:
        """Make the modules' weights views of the leaf, after a move of both."""
        if self.leaf is None:
            return
        if moved is not None:
            self.leaf.data = moved(self.leaf.data)
        parts = self.leaf.detach().split([weight.numel() for weight in self._laid_flat])
        for weight, part in zip(self._laid_flat, parts, strict=True):
            weight.requires_grad_(False).data = part.view(weight.shape)

    def by_source(self, weights: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """`weights` as the stages of each source take them."""
        if self.leaf is not None:
            return [[part] for part in weights[0].split(self._sizes)]
        given = iter(weights)
        return [list(islice(given, count)) for count in self._counts]

    @property
    def extra_weights(self) -> list[Tensor]:
        """Of the candidates that no stage knows, source by source."""
        return [weight for source in self.sources for weight in source.extra_weights]
