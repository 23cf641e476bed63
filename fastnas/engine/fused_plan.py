"""Which stage runs what in a fused cell: the cell's modules, grouped by the state that they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor, nn

from fastnas.engine.running import RunningStatistics
from fastnas.nn import FactorizedReduce, MixedOp
from fastnas.nn.candidates import DilConv, SepConv
from fastnas.spaces.darts import DartsSpace

POOLS = ("max_pool_3x3", "avg_pool_3x3")  # in the order of pool_stage
CONVOLUTIONS = ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")


class Convolutions:
    """What a conv_stage call convolves. `norms`: the batch normalisation behind each of its outputs."""

    def __init__(self) -> None:
        self.parts: list[int] = []  # of the op
        self.norms: list[nn.BatchNorm2d] = []
        self._modules: list[tuple[nn.Conv2d | None, nn.Conv2d]] = []  # depthwise, pointwise of each part

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
        self.parts += [source, len(self.norms) - 1, first, dilation, shift]
        self._modules.append((depthwise, pointwise))

    @property
    def weights(self) -> list[Tensor]:
        """What the modules hold now, in the order of the flat gradient of conv_stage_bwd."""
        return [module.weight for pair in self._modules for module in pair if module is not None]

    def arranged(self, weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """`weights` as the depthwise and pointwise arguments of the op."""
        given = iter(weights)
        none = weights[0].new_empty(0)
        pairs = [(none if depthwise is None else next(given), next(given)) for depthwise, _ in self._modules]
        return [depthwise for depthwise, _ in pairs], [pointwise for _, pointwise in pairs]

    @cached_property
    def weight_count(self) -> int:
        return sum(module is not None for pair in self._modules for module in pair)


@dataclass(frozen=True)
class Term:
    """One weighted candidate of one edge; its map is number `index` of the `stage` (state, pool, first, second)."""

    edge: int
    candidate: int
    node: int
    stage: str
    index: int


@dataclass(frozen=True)
class Extra:
    """A candidate that no stage knows, on one edge: it runs as a module beside them."""

    edge: int
    candidate: int
    node: int
    module: nn.Module


class SourcePlan:
    """All that leaves one state of a cell.

    `first` reads the state itself: convolutions (of the separable ones the first half) and strided identities;
    `second` are the other halves, which read outputs `second_from` of the first stage. `terms` go by edge.
    """

    def __init__(self, stride: int, running: RunningStatistics) -> None:
        self.stride = stride
        self.running = running
        self.first, self.second = Convolutions(), Convolutions()
        self.second_from: list[int] = []
        self.pool_norms: list[nn.BatchNorm2d] = []  # one of each pool of each edge
        self.terms: list[Term] = []
        self.extras: list[Extra] = []
        self._indices: dict[torch.device, Indices] = {}

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
        self.terms.append(Term(edge, candidate, node, *place))

    def _add_convolution(self, module: SepConv | DilConv) -> tuple[str, int]:
        layers = list(module)  # ReLU, depthwise, pointwise, norm, and of a SepConv the same again
        output = self.first.add_separable(0, *layers[1:4])
        if isinstance(module, DilConv):
            return "first", output
        self.second_from.append(output)
        return "second", self.second.add_separable(len(self.second_from) - 1, *layers[5:8])

    @cached_property
    def by_node(self) -> list[tuple[int, slice]]:
        """The nodes that terms go to, with the terms of each."""
        nodes = [term.node for term in self.terms]
        starts = {node: nodes.index(node) for node in nodes}
        return [(node, slice(start, start + nodes.count(node))) for node, start in starts.items()]

    def of_stage(self, stage: str) -> list[int]:
        """Numbers of the terms whose maps that stage makes."""
        return self._by_stage.get(stage, [])

    @cached_property
    def _by_stage(self) -> dict[str, list[int]]:
        stages = {term.stage for term in self.terms}
        return {stage: [n for n, term in enumerate(self.terms) if term.stage == stage] for stage in stages}

    @cached_property
    def weight_count(self) -> int:
        return len(self.weights)

    @property
    def weights(self) -> list[Tensor]:
        """Of the first stage, the second stage and the extras: the order in which their gradients come."""
        extras = [weight for extra in self.extras for weight in extra.module.parameters()]
        return [*self.first.weights, *self.second.weights, *extras]

    def indices(self, device: torch.device) -> Indices:
        """Index tensors of this plan on `device`, made once."""
        if device not in self._indices:
            self._indices[device] = Indices(self, device)
        return self._indices[device]


class Indices:
    """Where things are, as index tensors. Rows of `Source.norms` are: no normalisation, one of each pool of each edge,
    the outputs of the first stage, those of the second.

    Of each term: `edges`, `candidates`, `rows`. `running`: rows of the cell's running statistics for rows 1 ... of
    `Source.norms`. `second_from`: outputs of the first stage that the second reads, `second_rows` their rows.
    `pool_terms`, `pool_columns`: terms that are pools, and which pool. `through_terms`, `through_nodes`,
    `through_columns`: terms that are pools (0, 1) or the state itself (2), and their node among those of `by_node`.
    `direct_terms`, `direct_outputs`: terms that are outputs of the first stage. `second_terms`.
    """

    def __init__(self, plan: SourcePlan, device: torch.device) -> None:
        def index(numbers: Sequence[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.long, device=device)

        terms, pools, direct = plan.terms, plan.of_stage("pool"), plan.of_stage("first")
        first = 1 + len(pools)
        start = {"state": 0, "first": first, "second": first + len(plan.first.norms)}
        rows = [1 + pools.index(n) if t.stage == "pool" else start[t.stage] + t.index for n, t in enumerate(terms)]
        nodes = [node for node, _ in plan.by_node]
        through = [number for number, term in enumerate(terms) if term.stage in ("pool", "state")]
        self.edges = index([term.edge for term in terms])
        self.candidates = index([term.candidate for term in terms])
        self.rows = index(rows)
        norms = [*plan.pool_norms, *plan.first.norms, *plan.second.norms]
        self.running = index([plan.running.row[norm] for norm in norms])
        self.second_from = index(plan.second_from)
        self.second_rows = self.second_from + first
        self.pool_terms = index(pools)
        self.pool_columns = index([terms[number].index for number in pools])
        self.through_terms = index(through)
        self.through_nodes = index([nodes.index(terms[number].node) for number in through])
        self.through_columns = index([2 if terms[n].stage == "state" else terms[n].index for n in through])
        self.direct_terms = index(direct)
        self.direct_outputs = index([terms[number].index for number in direct])
        self.second_terms = index(plan.of_stage("second"))


def edge_norms(space: DartsSpace, edges: Sequence[MixedOp]) -> list[nn.BatchNorm2d]:
    """The batch normalisations of the candidates that the stages know."""
    known = {*POOLS, *CONVOLUTIONS, "skip_connect"}
    modules = [
        edge.candidates[number] for edge in edges for number, name in enumerate(space.candidates) if name in known
    ]
    return [norm for module in modules for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]


class CellPlan:
    """The sources of a cell, state by state, for its active (edge, candidate) pairs."""

    def __init__(
        self,
        space: DartsSpace,
        edges: Sequence[MixedOp],
        active: Sequence[tuple[int, int]],
        running: RunningStatistics,
    ) -> None:
        self.nodes = space.nodes
        self.k = edges[0].k
        self.edge_slices = [space.edge_slice(node) for node in range(space.nodes)]
        self.strides = [edges[min(state, len(edges) - 1)].stride for state in (0, 1)] + [1] * space.nodes
        self.sources = [SourcePlan(stride, running) for stride in self.strides]
        node_of = [node for node in range(space.nodes) for _ in range(2 + node)]
        for edge, candidate in sorted(active):
            state = space.sources[edge]
            name, module = space.candidates[candidate], edges[edge].candidates[candidate]
            self.sources[state].add(edge, candidate, node_of[edge], name, module)

    @property
    def weights(self) -> list[Tensor]:
        """What the modules of all sources hold now, source by source."""
        return [weight for source in self.sources for weight in source.weights]

    def by_source(self, weights: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """`weights` split up again."""
        given = iter(weights)
        return [list(islice(given, source.weight_count)) for source in self.sources]
