"""All that leaves one state of a cell: its stages, and their terms added to the nodes.

A candidate ends in batch normalisation without affine part, so w BN(z) = w r (z - mean) is folded into the sum of its
node, and its backward pass needs only sum g and sum g (z - mean) per channel, which also are the gradient of w:

    dw = sum_c r S,   dz = w r (g - sum g / n - r^2 (z - mean) S / n),   S = sum g (z - mean)

for n pixels of the batch. No normalised tensor, no ReLU output, no depthwise output and no pool output is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from fastnas import _backends
from fastnas.ops._library import define
from fastnas.ops.stages.conv_stage import PART, conv_stage_bwd, conv_stage_fwd
from fastnas.ops.stages.node_sum import node_dots, node_sum
from fastnas.ops.stages.norms import through_norms, with_deviation
from fastnas.ops.stages.pool_stage import pool_stage_bwd, pool_stage_fwd

STAGES = ("state", "pool", "first", "second")  # what a term is the output of


@dataclass
class Convolutions:
    """The parts of a conv_stage. `kernels`: whether each has a depthwise convolution; `outputs`: how many there are."""

    parts: list[int] = field(default_factory=list)
    kernels: list[bool] = field(default_factory=list)
    outputs: int = 0

    @property
    def weight_count(self) -> int:
        return len(self.kernels) + sum(self.kernels)

    def arranged(self, weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Weights, part by part and depthwise before pointwise, as the depthwise and pointwise arguments of the op."""
        given = iter(weights)
        none = weights[0].new_empty(0)
        pairs = [(next(given) if kernel else none, next(given)) for kernel in self.kernels]
        return [depthwise for depthwise, _ in pairs], [pointwise for _, pointwise in pairs]


@dataclass(frozen=True)
class Term:
    """One weighted candidate of one edge; its map is number `index` of the `stage`, its node number `node` of those
    that the state leads to."""

    edge: int
    candidate: int
    node: int
    stage: str
    index: int


@dataclass
class Layout:
    """What leaves a state.

    `first` reads the state itself: convolutions (of the separable ones the first half) and strided identities;
    `second` are the other halves, which read outputs `second_from` of the first stage. `nodes`: how many the terms go
    to. Norms have one row for no normalisation, one for each pool of each edge, for the outputs of the first stage, for
    those of the second.
    """

    stride: int
    nodes: int
    first: Convolutions
    second: Convolutions
    second_from: list[int]
    terms: list[Term]
    _indices: dict[torch.device, Indices] = field(default_factory=dict, repr=False)

    @cached_property
    def rows(self) -> int:
        """Rows of the norms, the first one included."""
        return 1 + len(self.of_stage("pool")) + self.first.outputs + self.second.outputs

    def of_stage(self, stage: str) -> list[int]:
        """Numbers of the terms whose maps that stage makes."""
        return self._by_stage[stage]

    @cached_property
    def _by_stage(self) -> dict[str, list[int]]:
        return {stage: [n for n, term in enumerate(self.terms) if term.stage == stage] for stage in STAGES}

    @cached_property
    def of_node(self) -> list[list[int]]:
        """Numbers of the terms of each node."""
        return [[n for n, term in enumerate(self.terms) if term.node == node] for node in range(self.nodes)]

    def indices(self, device: torch.device) -> Indices:
        """Index tensors on `device`, made once."""
        if device not in self._indices:
            self._indices[device] = Indices(self, device)
        return self._indices[device]

    @cached_property
    def packed(self) -> list[int]:
        """The layout as the flat op takes it."""
        numbers = [self.stride, self.first.outputs, self.second.outputs, self.nodes]
        for stage in (self.first, self.second):
            numbers.append(len(stage.kernels))
            for part, kernel in enumerate(stage.kernels):
                numbers += [int(kernel), *stage.parts[part * PART : (part + 1) * PART]]
        numbers += [len(self.second_from), *self.second_from, len(self.terms)]
        for term in self.terms:
            numbers += [term.edge, term.candidate, term.node, STAGES.index(term.stage), term.index]
        return numbers

    @classmethod
    def unpack(cls, packed: Sequence[int]) -> Layout:
        numbers = iter(packed)

        def convolutions(outputs: int) -> Convolutions:
            stage = Convolutions(outputs=outputs)
            for _ in range(next(numbers)):
                stage.kernels.append(bool(next(numbers)))
                stage.parts += islice(numbers, PART)
            return stage

        stride, first, second, nodes = islice(numbers, 4)
        stages = convolutions(first), convolutions(second)
        second_from = list(islice(numbers, next(numbers)))
        terms = []
        for _ in range(next(numbers)):
            edge, candidate, node, stage, index = islice(numbers, 5)
            terms.append(Term(edge, candidate, node, STAGES[stage], index))
        return cls(stride, nodes, *stages, second_from, terms)


class Indices:
    """Where things are, as index tensors.

    Of each term: `edges`, `candidates`, `rows` (of the norms). `second_from`: outputs of the first stage that the
    second reads, `second_rows` their rows. `pool_terms`, `pool_columns`: terms that are pools, and which pool.
    `through_terms`, `through_nodes`, `through_columns`: terms that are pools (0, 1) or the state itself (2).
    `direct_terms`, `direct_outputs`: terms that are outputs of the first stage. `second_terms`.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        def index(numbers: Sequence[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.long, device=device)

        terms, pools, direct = layout.terms, layout.of_stage("pool"), layout.of_stage("first")
        first = 1 + len(pools)
        start = {"state": 0, "first": first, "second": first + layout.first.outputs}
        rows = [1 + pools.index(n) if t.stage == "pool" else start[t.stage] + t.index for n, t in enumerate(terms)]
        through = [number for number, term in enumerate(terms) if term.stage in ("pool", "state")]
        self.edges = index([term.edge for term in terms])
        self.candidates = index([term.candidate for term in terms])
        self.rows = index(rows)
        self.second_from = index(layout.second_from)
        self.second_rows = self.second_from + first
        self.pool_terms = index(pools)
        self.pool_columns = index([terms[number].index for number in pools])
        self.through_terms = index(through)
        self.through_nodes = index([terms[number].node for number in through])
        self.through_columns = index([2 if terms[n].stage == "state" else terms[n].index for n in through])
        self.direct_terms = index(direct)
        self.direct_outputs = index([terms[number].index for number in direct])
        self.second_terms = index(layout.of_stage("second"))


class _Source:
    """The stages of a state at work, one call after another: on any backend."""

    def __init__(self, layout: Layout, x: Tensor, weights: Sequence[Tensor], mixture: Tensor) -> None:
        self.layout, self.x, self.mixture = layout, x, mixture
        count = layout.first.weight_count
        self.first_weights, self.second_weights = weights[:count], weights[count:]
        self.indices = layout.indices(x.device)
        height, width = (-(-size // layout.stride) for size in x.shape[1:3])
        self.count = x.shape[0] * height * width  # pixels of the batch in an output
        self.pool: Tensor | None = None
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def scales(self) -> Tensor:
        """The weights of the terms, [terms, 1]."""
        return self.mixture[self.indices.edges, self.indices.candidates][:, None]

    def maps(self) -> list[Tensor]:
        """The map of each term."""
        found = {"pool": self.pool, "first": self.first, "second": self.second}
        unbound = {stage: maps.unbind() for stage, maps in found.items() if maps is not None and maps.numel()}
        unbound["state"] = (self.x,)
        return [unbound[term.stage][term.index] for term in self.layout.terms]

    def measure(self, given: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        """Run all stages: norms, and the statistics behind them where none are given."""
        layout, x, indices = self.layout, self.x, self.indices
        statistics = given is None
        measured = [] if given is None else [given]
        if layout.of_stage("pool"):
            self.pool, stats = pool_stage_fwd(x, layout.stride, statistics)
            if statistics:
                measured.append(stats[indices.pool_columns])
        if layout.first.outputs:
            self.first, stats = self.convolve_first(statistics)
            if statistics:
                measured.append(stats)
        if layout.second.outputs:
            before = stats[indices.second_from] if statistics else given[indices.second_rows - 1]
            self.second, stats = self.convolve_second(with_deviation(before, eps), statistics)
            if statistics:
                measured.append(stats)
        bare = x.new_zeros(1, 2, x.shape[-1])  # no copy from the host, which a CUDA graph could not record
        bare[:, 1] = 1.0
        stats = torch.cat(measured) if measured else x.new_empty(0, 2, x.shape[-1])
        return torch.cat([bare, with_deviation(stats, eps)]), stats

    def convolve_first(self, statistics: bool) -> tuple[Tensor, Tensor]:
        stage = self.layout.first
        weights = stage.arranged(self.first_weights)
        return conv_stage_fwd([self.x], None, stage.parts, *weights, self.layout.stride, statistics)

    def convolve_second(self, before: Tensor, statistics: bool) -> tuple[Tensor, Tensor]:
        stage = self.layout.second
        weights = stage.arranged(self.second_weights)
        return conv_stage_fwd(self.second_inputs(), before, stage.parts, *weights, 1, statistics)

    def second_inputs(self) -> list[Tensor]:
        first = self.first.unbind()
        return [first[output] for output in self.layout.second_from]

    def restore(self, norms: Tensor, first: Tensor, second: Tensor) -> None:
        """Take the outputs of the stages where they were kept, or run the convolutions again."""
        self.first, self.second = first, second
        if self.layout.first.outputs and not first.numel():
            self.first, _ = self.convolve_first(False)
            if self.layout.second.outputs:
                self.second, _ = self.convolve_second(norms[self.indices.second_rows], False)

    def through_pools(self, gs: Sequence[Tensor], coef: Tensor, base: Tensor | None) -> Tensor | None:
        """The gradient of x through pools and identities, on top of `base`."""
        layout, indices = self.layout, self.indices
        if not layout.of_stage("pool"):
            for number in layout.of_stage("state"):
                through = gs[layout.terms[number].node] * coef[number, 0]
                base = through if base is None else base + through
            return base
        scales = coef.new_zeros(layout.nodes, 3, coef.shape[-1])
        where = indices.through_nodes, indices.through_columns
        scales.index_put_(where, coef[indices.through_terms, 0], accumulate=True)
        # Several edges share a pool: what they send to its statistics adds up; its mean is the same for all.
        shared = coef.new_zeros(2, 3, coef.shape[-1])
        shared.index_add_(0, indices.pool_columns, coef[indices.pool_terms, 1:])
        means = coef.new_zeros(2, coef.shape[-1])
        means[indices.pool_columns] = coef[indices.pool_terms, 3]
        shared[:, 2] = means
        return pool_stage_bwd(self.x, list(gs), scales, shared, layout.stride, base)

    def through_convolutions(
        self,
        norms: Tensor,
        term_gs: Sequence[Tensor],
        coef: Tensor,
        base: Tensor | None,
        training: bool,
        need_dx: bool,
        need_dw: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """The gradient of x on top of `base`, and those of the parameters of both stages, flat."""
        layout, indices = self.layout, self.indices
        first_gs: list[Tensor] = [self.x] * layout.first.outputs
        first_coef = coef.new_empty(layout.first.outputs, 4, coef.shape[-1])
        for number in layout.of_stage("first"):
            first_gs[layout.terms[number].index] = term_gs[number]
        first_coef[indices.direct_outputs] = coef[indices.direct_terms]
        second_dw = self.x.new_empty(0)
        if layout.second.outputs:
            before = norms[indices.second_rows]
            between, dots, second_dw = conv_stage_bwd(
                [term_gs[number] for number in layout.of_stage("second")],
                list(self.second.unbind()),
                coef[indices.second_terms],
                self.second_inputs(),
                before,
                layout.second.parts,
                *layout.second.arranged(self.second_weights),
                1,
                None,
                True,
                need_dw,
            )
            self.second = None
            for output, gradient in zip(layout.second_from, between.unbind(), strict=True):
                first_gs[output] = gradient
            first_coef[indices.second_from] = through_norms(before, 1.0, dots, self.count, training)
        if not (need_dx or need_dw):
            return base, second_dw, second_dw
        dx, _, first_dw = conv_stage_bwd(
            first_gs,
            list(self.first.unbind()),
            first_coef,
            [self.x],
            None,
            layout.first.parts,
            *layout.first.arranged(self.first_weights),
            layout.stride,
            base,
            need_dx,
            need_dw,
        )
        return dx[0] if need_dx else base, first_dw, second_dw


def _fwd_composed(
    layout: Layout,
    x: Tensor,
    weights: list[Tensor],
    mixture: Tensor,
    given: Tensor | None,
    nodes: list[Tensor],
    begun: list[int],
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    source = _Source(layout, x, weights, mixture)
    norms, stats = source.measure(given, eps)
    own = norms[source.indices.rows]
    coef = torch.stack([source.scales() * own[:, 1], own[:, 0]], dim=1)
    maps = source.maps()
    for node, numbers, started in zip(nodes, layout.of_node, begun, strict=True):
        first, last = numbers[0], numbers[-1] + 1
        if last - first == len(numbers):
            node_sum(node, maps[first:last], coef[first:last], bool(started))
        else:
            node_sum(node, [maps[n] for n in numbers], coef[numbers], bool(started))
    none = x.new_empty(0)
    first, second = (none if maps is None or not keep else maps for maps in (source.first, source.second))
    return norms, none if given is not None else stats, first, second


def _bwd_composed(
    layout: Layout,
    x: Tensor,
    weights: list[Tensor],
    mixture: Tensor,
    norms: Tensor,
    first: Tensor,
    second: Tensor,
    gs: list[Tensor],
    base: Tensor | None,
    training: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    source = _Source(layout, x, weights, mixture)
    source.restore(norms, first, second)
    if layout.of_stage("pool"):
        source.pool, _ = pool_stage_fwd(x, layout.stride, False)
    own, term_gs = norms[source.indices.rows], [gs[term.node] for term in layout.terms]
    dots = node_dots(term_gs, source.maps(), own[:, 0])
    coef = through_norms(own, source.scales(), dots, source.count, training)
    source.pool = None
    none = x.new_empty(0)
    dx, first_dw, second_dw = base, none, none
    if need_dx:
        dx = source.through_pools(gs, coef, base)
    if layout.first.outputs:
        dx, first_dw, second_dw = source.through_convolutions(norms, term_gs, coef, dx, training, need_dx, need_dw)
    return dx if need_dx else none, (own[:, 1] * dots[:, 1]).sum(-1), first_dw, second_dw


def _fwd_reference(
    x: Tensor,
    weights: list[Tensor],
    layout: list[int],
    mixture: Tensor,
    given: Tensor | None,
    nodes: list[Tensor],
    begun: list[int],
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fwd_composed(Layout.unpack(layout), x, weights, mixture, given, nodes, begun, eps, keep)


def _bwd_reference(
    x: Tensor,
    weights: list[Tensor],
    layout: list[int],
    mixture: Tensor,
    norms: Tensor,
    first: Tensor,
    second: Tensor,
    gs: list[Tensor],
    base: Tensor | None,
    training: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _bwd_composed(
        Layout.unpack(layout), x, weights, mixture, norms, first, second, gs, base, training, need_dx, need_dw
    )


def _maps_of(x: Tensor, stride: int, count: int) -> Tensor:
    batch, height, width, channels = x.shape
    return x.new_empty((count, batch, -(-height // stride), -(-width // stride), channels) if count else 0)


def _fwd_fake(
    x: Tensor,
    weights: list[Tensor],
    layout: list[int],
    mixture: Tensor,
    given: Tensor | None,
    nodes: list[Tensor],
    begun: list[int],
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    known, channels = Layout.unpack(layout), x.shape[-1]
    first, second = (stage.outputs if keep else 0 for stage in (known.first, known.second))
    return (
        x.new_empty(known.rows, 2, channels),
        x.new_empty((known.rows - 1, 2, channels) if given is None else 0),
        _maps_of(x, known.stride, first),
        _maps_of(x, known.stride, second),
    )


def _bwd_fake(
    x: Tensor,
    weights: list[Tensor],
    layout: list[int],
    mixture: Tensor,
    norms: Tensor,
    first: Tensor,
    second: Tensor,
    gs: list[Tensor],
    base: Tensor | None,
    training: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    known, numbers = Layout.unpack(layout), [weight.numel() if need_dw else 0 for weight in weights]
    count = known.first.weight_count
    return (
        x.new_empty(x.shape if need_dx else 0),
        x.new_empty(len(known.terms)),
        x.new_empty(sum(numbers[:count])),
        x.new_empty(sum(numbers[count:])),
    )


_source_stage_fwd = define(
    "source_stage_fwd(Tensor x, Tensor[] weights, int[] layout, Tensor mixture, Tensor? given, Tensor(a!)[] nodes, "
    "int[] begun, float eps, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_fwd_reference,
    fake=_fwd_fake,
)
_source_stage_bwd = define(
    "source_stage_bwd(Tensor x, Tensor[] weights, int[] layout, Tensor mixture, Tensor norms, Tensor first, "
    "Tensor second, Tensor[] gs, Tensor? base, bool training, bool need_dx, bool need_dw) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=_bwd_reference,
    fake=_bwd_fake,
)


def _whole(x: Tensor) -> bool:
    """Whether one compiled call does everything: where compiled kernels serve all stages. Whoever watches ops (a
    profiler, or shapes alone) is shown each stage and what it allocates."""
    chosen = (_backends.choose(stem, x.device.type) for stem in ("conv_stage", "node_sum", "pool_stage"))
    return all(name == "native" for name in chosen) and not torch._C._len_torch_dispatch_stack()


def source_stage_fwd(
    layout: Layout,
    x: Tensor,
    weights: list[Tensor],
    mixture: Tensor,
    given: Tensor | None,
    nodes: list[Tensor],
    begun: list[int],
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the stages on the map x ``[B, H, W, C]`` and write every term, times its weight, to its node.

    weights: those of both stages, part by part, depthwise before pointwise. mixture: ``[E, O]``, the weights of the
    candidates of all edges. given: running mean and variance of all rows of the norms but the first,
    ``[rows - 1, 2, C]``; without them the batch's own are measured. nodes: a map ``[B, H', W', C]`` each; `begun` says
    which of them already hold something to add to.
    Returns norms (mean and 1 / standard deviation, ``[rows, 2, C]``), mean and biased variance where they were
    measured, and the outputs of both stages, ``[outputs, B, H', W', C]``. What was not measured, or not kept, has no
    elements.
    """
    if _whole(x):
        return _source_stage_fwd(x, weights, layout.packed, mixture, given, nodes, begun, eps, keep)
    return _fwd_composed(layout, x, weights, mixture, given, nodes, begun, eps, keep)


def source_stage_bwd(
    layout: Layout,
    x: Tensor,
    weights: list[Tensor],
    mixture: Tensor,
    norms: Tensor,
    first: Tensor,
    second: Tensor,
    gs: list[Tensor],
    base: Tensor | None,
    training: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `source_stage_fwd`, whose arguments and results come first.

    gs: those of the nodes. Returns that of x on top of `base`, those of the weights of the terms ``[terms]``, and those
    of the parameters of the first and of the second stage, flat, in the order of `weights`; what was not asked for has
    no elements. Outputs of the stages that were not kept are computed again.
    """
    if _whole(x):
        return _source_stage_bwd(
            x, weights, layout.packed, mixture, norms, first, second, gs, base, training, need_dx, need_dw
        )
    return _bwd_composed(layout, x, weights, mixture, norms, first, second, gs, base, training, need_dx, need_dw)
