"""A supernet cell as a few stages: forward, and the whole backward pass written out.

All that leaves one state is done together (fastnas.ops.stages.source_stage), states in order forward and in reverse
order backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnas.engine.fused_plan import CellPlan, Extra, SourcePlan
from fastnas.ops._library import accumulate_dtype
from fastnas.ops.stages.conv_stage import unflatten
from fastnas.ops.stages.maps import images, maps
from fastnas.ops.stages.partial_join import partial_join, partial_join_bwd, partial_join_dx
from fastnas.ops.stages.source_stage import source_stage_bwd, source_stage_fwd


class ExtraRun:
    """A candidate that no stage knows, on its own graph."""

    def __init__(self, extra: Extra, x: Tensor) -> None:
        self.extra = extra
        with torch.enable_grad():
            # A copy: the state lies beside nodes that are still to be written.
            self.x = images(x.detach()).to(accumulate_dtype(x.dtype), copy=True).requires_grad_()
            self.y = extra.module(self.x)

    def backward(self, g: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Gradients of x, of the weight, and of the module's parameters (None where frozen)."""
        parameters = list(self.extra.module.parameters())
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        dx, *found = torch.autograd.grad(
            self.y, [self.x, *wanted], weight * images(g).to(self.y.dtype), allow_unused=True, materialize_grads=True
        )
        by_parameter = dict(zip(map(id, wanted), found, strict=True))
        return maps(dx).to(g.dtype), (self.y.detach() * images(g)).sum(), [by_parameter.get(id(p)) for p in parameters]


@dataclass
class SourceRun:
    """One state at work. `x`: the channels that the candidates see, [B, H, W, C]; `weights`: those of its stages;
    `close`: a copy of x, where it helps; the others as source_stage_fwd returns them, None where nothing but extras
    leaves the state."""

    plan: SourcePlan
    x: Tensor
    weights: Sequence[Tensor]
    close: Tensor | None = None
    norms: Tensor | None = None
    first: Tensor | None = None
    second: Tensor | None = None

    def __post_init__(self) -> None:
        # Few channels out of many are read more easily when they lie close together.
        channels = self.x.shape[3]
        if self.close is None and self.plan.layout.terms and channels < min(16, self.x.stride(2)):
            self.close = self.x.contiguous()
        if self.close is not None:
            self.x = self.close

    def kept(self, lean: bool) -> tuple[Tensor | None, ...]:
        """What the backward pass gets of it."""
        return None if lean else self.close, self.norms, self.first, self.second

    def add_to_nodes(
        self, nodes: Sequence[Tensor], begun: set[int], mixture: Tensor, given: Tensor | None, eps: float, keep: bool
    ) -> Tensor:
        """Add every term to its node; a node that is not in `begun` holds nothing yet. Returns the statistics that
        were measured because none were given."""
        targets, flags = [nodes[node] for node in self.plan.nodes], [int(node in begun) for node in self.plan.nodes]
        self.norms, stats, self.first, self.second = source_stage_fwd(
            self.plan.layout, self.x, self.weights, mixture, given, targets, flags, eps, keep
        )
        begun.update(self.plan.nodes)
        return stats

    def backward(
        self,
        gs: Sequence[Tensor],
        mixture: Tensor,
        base: Tensor | None,
        *,
        training: bool,
        need_dx: bool,
        need_dw: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """gs: gradient of every node -> gradient of x on top of `base`, that of the terms' weights [terms], and that
        of the stages' weights (without elements where not asked for)."""
        own = [gs[node] for node in self.plan.nodes]
        dx, d_terms, dw = source_stage_bwd(
            self.plan.layout,
            self.x,
            self.weights,
            mixture,
            self.norms,
            self.first,
            self.second,
            own,
            base,
            training,
            need_dx,
            need_dw,
        )
        return dx if need_dx else base, d_terms, dw


def run_cell(
    plan: CellPlan,
    training: bool,
    lean: bool,
    s0: Tensor,
    s1: Tensor,
    mixture: Tensor,
    betas: Tensor | None,
    weights: Sequence[Sequence[Tensor]],
) -> tuple[Tensor, list[SourceRun], list[list[ExtraRun]]]:
    """The nodes of a cell next to each other, [B, H', W', nodes * C]; the runs of its sources and of their extras.

    weights: of the stages of each source.
    """
    states = [s0, s1]
    batch, height, width, channels = s0.shape
    stride, selected = plan.strides[0], channels // plan.k
    size = (batch, -(-height // stride), -(-width // stride))
    out = s0.new_empty(*size, plan.nodes * channels)
    nodes = out.split(channels, dim=-1)
    mixed = nodes if plan.k == 1 else s0.new_empty(plan.nodes, *size, selected)
    rows, _, _ = plan.indices(s0.device)
    given: Sequence[Tensor | None] = [None] * len(plan.sources)
    if plan.running.norms and not training:
        given = plan.running.read(rows).split([len(source.norms) for source in plan.sources])
    begun: set[int] = set()
    measured, sources, extras = [], [], []
    for state, (source_plan, own) in enumerate(zip(plan.sources, weights, strict=True)):
        if state >= 2:
            node = state - 2
            if node not in begun:
                mixed[node].zero_()
            if betas is not None:
                edges = plan.edge_slices[node]
                partial_join(nodes[node], mixed[node], states, plan.strides[:state], betas[edges], plan.k)
            states.append(nodes[node])
        source = SourceRun(source_plan, states[state][..., :selected], own)
        if source_plan.layout.terms:
            stats = source.add_to_nodes(mixed, begun, mixture, given[state], plan.running.eps, not lean)
            measured.append(stats)
        runs = [ExtraRun(extra, source.x) for extra in source_plan.extras]
        for run in runs:
            node = run.extra.node
            if node not in begun:
                mixed[node].zero_()
            begun.add(node)
            mixed[node].add_(mixture[run.extra.edge, run.extra.candidate] * maps(run.y.detach()))
        sources.append(source)
        extras.append(runs)
    if plan.running.norms and training and measured:
        plan.running.update(rows, torch.cat(measured), out.numel() // out.shape[-1])
    return out, sources, extras


class CellGradient:
    """The backward pass of a cell; results in `states` (None where not asked for), `mixture`, `betas`, `weights`
    (of the stages of each source) and `extra_weights`."""

    def __init__(
        self,
        plan: CellPlan,
        sources: Sequence[SourceRun],
        extras: Sequence[Sequence[ExtraRun]],
        states: Sequence[Tensor],
        mixture: Tensor,
        betas: Tensor | None,
        grad: Tensor,
        *,
        training: bool,
        needs_states: Sequence[bool],
        needs_weights: bool,
        needs_betas: bool,
    ) -> None:
        """states, grad: maps of all states and the gradient of the cell's output; the others as in `run_cell`."""
        self.plan, self.given, self.given_mixture, self.given_betas = plan, states, mixture, betas
        self.training, self.needs_weights, self.needs_betas = training, needs_weights, needs_betas
        self.mixture = torch.zeros_like(mixture)
        self.betas = torch.zeros_like(betas) if needs_betas else None
        self.weights: list[Tensor] = []
        self.extra_weights: list[Tensor | None] = []
        # By node: the gradient of what the candidates add up to. It is complete once the node's own edges are done.
        self.mixed: list[Tensor] = [grad] * plan.nodes
        self.states: list[Tensor | None] = [None, None, *grad.split(states[0].shape[-1], dim=-1)]
        self._d_terms: list[Tensor] = []
        for state in reversed(range(len(sources))):
            need_dx = state >= 2 or needs_states[state]
            self._through_source(state, sources[state], extras[state], need_dx)
            if state >= 2:
                self._through_node(state - 2)
        if self._d_terms:
            _, edges, candidates = plan.indices(mixture.device)
            self.mixture[edges, candidates] = torch.cat(self._d_terms)

    def _through_source(self, state: int, source: SourceRun, extras: Sequence[ExtraRun], need_dx: bool) -> None:
        base, partial = self.states[state], self.given_betas is not None
        dx = None if partial else base
        if source.plan.layout.terms:
            dx, d_terms, dw = source.backward(
                self.mixed,
                self.given_mixture,
                dx,
                training=self.training,
                need_dx=need_dx,
                need_dw=self.needs_weights,
            )
            self._d_terms.insert(0, d_terms)
            self.weights.insert(0, dw)
        extra_weights: list[Tensor | None] = []
        for run in extras:
            edge, candidate, node = run.extra.edge, run.extra.candidate, run.extra.node
            extra_dx, d_weight, extra_gradients = run.backward(self.mixed[node], self.given_mixture[edge, candidate])
            dx = extra_dx if dx is None else dx + extra_dx
            self.mixture[edge, candidate] = d_weight
            extra_weights += extra_gradients
        self.extra_weights[:0] = extra_weights
        if partial and need_dx:
            dx = self._bypass(state, dx, base)
        self.states[state] = dx if need_dx else None

    def _bypass(self, state: int, mixed: Tensor | None, base: Tensor | None) -> Tensor | None:
        """Add what comes back along the channels that no candidate saw."""
        x, nodes = self.given[state], range(max(0, state - 1), self.plan.nodes)
        if not nodes:
            return base
        if mixed is None:
            mixed = x.new_zeros(*x.shape[:3], x.shape[3] // self.plan.k)
        betas = torch.stack([self.given_betas[self.plan.edge_slices[node]][state] for node in nodes])
        gs = [self.states[2 + node] for node in nodes]
        return partial_join_dx(x, gs, betas, self.plan.strides[state], self.plan.k, mixed, base)

    def _through_node(self, node: int) -> None:
        """The state's gradient is complete: split it into that of the candidates' sum and those of the betas."""
        total = self.states[2 + node]
        if self.given_betas is None:
            self.mixed[node] = total
            return
        edges = self.plan.edge_slices[node]
        inputs = 2 + node if self.needs_betas else 0
        self.mixed[node], d_betas = partial_join_bwd(
            total, self.given[:inputs], self.plan.strides[:inputs], self.plan.k
        )
        if self.needs_betas:
            self.betas[edges] = d_betas


class _FusedCell(torch.autograd.Function):
    """`count`: how many of the tensors at the end are weights of the stages; the others are those of extras."""

    @staticmethod
    def forward(ctx, plan: CellPlan, training: bool, lean: bool, s0, s1, mixture, betas, count: int, *weights):
        dtype = accumulate_dtype(s0.dtype)
        terms, own_betas = mixture.to(dtype).contiguous(), None if betas is None else betas.to(dtype)
        flat = plan.by_source(weights[:count])
        out, sources, extras = run_cell(plan, training, lean, maps(s0), maps(s1), terms, own_betas, flat)
        result = images(out)
        kept = [tensor for source in sources for tensor in source.kept(lean)]
        ctx.save_for_backward(s0, s1, mixture, betas, result, *weights[:count], *kept)
        ctx.plan, ctx.training, ctx.extras, ctx.count = plan, training, extras, count
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        plan = ctx.plan
        s0, s1, mixture, betas, result, *rest = ctx.saved_tensors
        weights, kept = rest[: ctx.count], rest[ctx.count :]
        channels = s0.shape[1]
        states = [maps(s0), maps(s1), *maps(result).split(channels, dim=-1)]
        flat = plan.by_source(weights)
        sources = [
            SourceRun(source_plan, state[..., : channels // plan.k], own, *kept[4 * index : 4 * index + 4])
            for index, (source_plan, state, own) in enumerate(zip(plan.sources, states, flat, strict=True))
        ]
        needs_weights = any(ctx.needs_input_grad[8:])
        gradient = CellGradient(
            plan,
            sources,
            ctx.extras,
            states,
            mixture.to(accumulate_dtype(s0.dtype)).contiguous(),
            None if betas is None else betas.to(accumulate_dtype(s0.dtype)),
            maps(grad),
            training=ctx.training,
            needs_states=ctx.needs_input_grad[3:5],
            needs_weights=needs_weights,
            needs_betas=betas is not None and ctx.needs_input_grad[6],
        )
        d0, d1 = (None if state is None else images(state) for state in gradient.states[:2])
        d_mixture = gradient.mixture.to(mixture.dtype)
        d_betas = None if gradient.betas is None else gradient.betas.to(betas.dtype)
        d_weights: Sequence[Tensor | None] = [None] * ctx.count
        if needs_weights and weights:
            d_weights = unflatten(torch.cat(gradient.weights), weights)
        return None, None, None, d0, d1, d_mixture, d_betas, None, *d_weights, *gradient.extra_weights


def fused_cell(
    plan: CellPlan, s0: Tensor, s1: Tensor, weights: Tensor, betas: Tensor | None, *, training: bool, lean: bool
) -> Tensor:
    """A whole cell: states s0, s1 [B, C, H, W] (preprocessed) -> its nodes, [B, nodes * C, H', W'], channels-last.

    weights: [E, O], of the candidates of all edges; betas: [E], of the edges' bypassed channels where the cell has
    partial channels (PC-DARTS), else None. `lean`: keep nothing but states and statistics between forward and
    backward, and compute the rest again.
    """
    own = plan.weights
    return _FusedCell.apply(plan, training, lean, s0, s1, weights, betas, len(own), *own, *plan.extra_weights)
