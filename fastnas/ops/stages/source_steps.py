"""The stages of one state, called one after another: on any backend, and where somebody watches what they allocate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas.ops.stages.conv_stage import conv_stage_bwd, conv_stage_fwd
from fastnas.ops.stages.node_sum import node_dots, node_sum
from fastnas.ops.stages.norms import through_norms, with_deviation
from fastnas.ops.stages.pool_stage import pool_stage_bwd, pool_stage_fwd
from fastnas.ops.stages.source_layout import Layout


class _Source:
    """The stages of a state at work, one call after another: on any backend."""

    def __init__(self, layout: Layout, x: Tensor, weights: Sequence[Tensor], mixture: Tensor) -> None:
        self.layout, self.x, self.mixture = layout, x, mixture
        self.first_weights, self.second_weights = layout.by_stage(weights, x.shape[-1])
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
        bare = self.mixture.new_zeros(1, 2, x.shape[-1])  # no copy from the host, which a CUDA graph could not record
        bare[:, 1] = 1.0
        stats = torch.cat(measured) if measured else bare[:0]
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
                base = (through if base is None else base + through).to(self.x.dtype)
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
    ) -> tuple[Tensor | None, Tensor]:
        """The gradient of x on top of `base`, and that of the weights."""
        layout, indices = self.layout, self.indices
        first_gs: list[Tensor] = [self.x] * layout.first.outputs
        first_coef = coef.new_empty(layout.first.outputs, 4, coef.shape[-1])
        for number in layout.of_stage("first"):
            first_gs[layout.terms[number].index] = term_gs[number]
        first_coef[indices.direct_outputs] = coef[indices.direct_terms]
        second_dw = coef.new_empty(0)
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
            return base, second_dw
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
        return dx[0] if need_dx else base, torch.cat([first_dw, second_dw])


def forward_stage_by_stage(
    layout: Layout,
    x: Tensor,
    weights: Sequence[Tensor],
    mixture: Tensor,
    given: Tensor | None,
    nodes: list[Tensor],
    begun: list[int],
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`source_stage_fwd`, one stage after another."""
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
    none, unmeasured = x.new_empty(0), norms.new_empty(0)
    first, second = (none if maps is None or not keep else maps for maps in (source.first, source.second))
    return norms, unmeasured if given is not None else stats, first, second


def backward_stage_by_stage(
    layout: Layout,
    x: Tensor,
    weights: Sequence[Tensor],
    mixture: Tensor,
    norms: Tensor,
    first: Tensor,
    second: Tensor,
    gs: list[Tensor],
    base: Tensor | None,
    training: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`source_stage_bwd`, one stage after another."""
    source = _Source(layout, x, weights, mixture)
    source.restore(norms, first, second)
    if layout.of_stage("pool"):
        source.pool, _ = pool_stage_fwd(x, layout.stride, False)
    own, term_gs = norms[source.indices.rows], [gs[term.node] for term in layout.terms]
    dots = node_dots(term_gs, source.maps(), own[:, 0])
    coef = through_norms(own, source.scales(), dots, source.count, training)
    source.pool = None
    dx, dw = base, norms.new_empty(0)
    if need_dx:
        dx = source.through_pools(gs, coef, base)
    if layout.first.outputs:
        dx, dw = source.through_convolutions(norms, term_gs, coef, dx, training, need_dx, need_dw)
    return dx if need_dx else x.new_empty(0), (own[:, 1] * dots[:, 1]).sum(-1), dw
