"""A supernet cell as a few stages: forward, and the whole backward pass written out.

A candidate ends in batch normalisation without affine part, so w BN(z) = w r (z - mean) is folded into the sum of its
node, and its backward pass needs only sum g and sum g (z - mean) per channel, which also are the gradient of w:

    dw = sum_c r S,   dz = w r (g - sum g / n - r^2 (z - mean) S / n),   S = sum g (z - mean)

for n pixels of the batch. No normalised tensor, no ReLU output, no depthwise output and no pool output is kept.
All that leaves one state is done together, states in order forward and in reverse order backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas.engine.fused_plan import CellPlan, Convolutions, Extra, SourcePlan
from fastnas.engine.running import RunningStatistics
from fastnas.ops.stages.conv_stage import conv_stage_bwd, conv_stage_fwd
from fastnas.ops.stages.node_sum import node_dots, node_sum
from fastnas.ops.stages.partial_join import partial_join, partial_join_bwd, partial_join_dx
from fastnas.ops.stages.pool_stage import pool_stage_bwd, pool_stage_fwd


def maps(x: Tensor) -> Tensor:
    """[B, C, H, W] as [B, H, W, C] with neighbouring channels; a copy only of what is not laid out like that."""
    x = x.permute(0, 2, 3, 1)
    _, height, width, channels = x.shape
    pixel = x.stride(2) if width > 1 else x.stride(1) if height > 1 else channels
    wanted = (height * width * pixel, width * pixel, pixel, 1)
    regular = all(size == 1 or have == want for size, have, want in zip(x.shape, x.stride(), wanted, strict=True))
    return x if regular and pixel >= channels else x.contiguous()


def images(x: Tensor) -> Tensor:
    """[B, H, W, C] as [B, C, H, W]."""
    return x.permute(0, 3, 1, 2)


def with_deviation(stats: Tensor, eps: float) -> Tensor:
    """Mean and variance [n, 2, C] -> mean and 1 / standard deviation."""
    return torch.stack([stats[:, 0], torch.rsqrt(stats[:, 1] + eps)], dim=1)


def through_norms(norms: Tensor, weights: Tensor | float, dots: Tensor, count: int, training: bool) -> Tensor:
    """Coefficients [n, 4, C] of conv_stage_bwd that turn the gradient of w BN(z) into that of z.

    norms, dots: [n, 2, C]; weights: w, [n, 1] or one number. Running statistics do not depend on z.
    """
    mean, rstd = norms.unbind(1)
    scale = weights * rstd
    if training:
        centre, offset = -scale * rstd**2 * dots[:, 1] / count, -scale * dots[:, 0] / count
    else:
        centre = offset = torch.zeros_like(scale)
    return torch.stack([scale, centre, offset, mean], dim=1)


class Source:
    """One state at work: the maps that its stages make, and how they are normalised.

    `x` [B, H, W, C]: the channels that the candidates see. `norms` [n, 2, C]: mean and 1 / standard deviation of no
    normalisation, of each edge's pools, of the outputs of the first and of the second stage.
    """

    def __init__(
        self,
        plan: SourcePlan,
        x: Tensor,
        weights: Sequence[Tensor],
        norms: Tensor | None = None,
        first: Tensor | None = None,
        second: Tensor | None = None,
    ) -> None:
        self.plan = plan
        # Few channels out of many are read more easily when they lie close together.
        self.x = x.contiguous() if x.stride(2) != x.shape[3] and x.shape[3] < 16 else x
        first_count, second_count = plan.first.weight_count, plan.second.weight_count
        self.first_weights = weights[:first_count]
        self.second_weights = weights[first_count : first_count + second_count]
        self.indices = plan.indices(x.device)
        self.norms, self.first, self.second = norms, first, second
        self.pool: Tensor | None = None
        self._maps: dict[str, tuple[Tensor, ...]] = {}
        height, width = (-(-size // plan.stride) for size in x.shape[1:3])
        self.count = x.shape[0] * height * width  # pixels of the batch in an output

    def measure(self, training: bool) -> None:
        """Run all stages; in training their statistics are measured and the running ones follow."""
        plan, x, indices = self.plan, self.x, self.indices
        eps = plan.running.eps
        measured = []
        if not training:
            running = plan.running.read(indices.running)
        if plan.pool_norms:
            self.pool, stats = pool_stage_fwd(x, plan.stride, training)
            measured.append(stats[indices.pool_columns] if training else stats)
        if plan.first.norms:
            self.first, stats = self._convolve_first(training)
            measured.append(stats)
        if plan.second.norms:
            before = stats[indices.second_from] if training else running[indices.second_rows - 1]
            self.second, stats = self._convolve_second(with_deviation(before, eps), training)
            measured.append(stats)
        bare = x.new_zeros(1, 2, x.shape[-1])  # no copy from the host, which a CUDA graph could not record
        bare[:, 1] = 1.0
        if not measured:
            self.norms = bare
        elif training:
            stats = torch.cat(measured)
            plan.running.update(indices.running, stats, self.count)
            self.norms = torch.cat([bare, with_deviation(stats, eps)])
        else:
            self.norms = torch.cat([bare, with_deviation(running, eps)])

    def recompute(self) -> None:
        """Run the convolutions again, their normalisation being known."""
        if self.plan.first.norms:
            self.first, _ = self._convolve_first(False)
        if self.plan.second.norms:
            self.second, _ = self._convolve_second(self.norms[self.indices.second_rows], False)

    def kept(self) -> tuple[Tensor | None, ...]:
        """What the backward pass needs of it."""
        return self.norms, self.first, self.second

    def forget(self, *, all_maps: bool) -> None:
        """Let go of the pools, which are always computed again, or of all maps."""
        self._maps.clear()
        self.pool = None
        if all_maps:
            self.first = self.second = None

    def _convolve_first(self, statistics: bool) -> tuple[Tensor, Tensor]:
        stage = self.plan.first
        weights = stage.arranged(self.first_weights)
        return conv_stage_fwd([self.x], None, stage.parts, *weights, self.plan.stride, statistics)

    def _convolve_second(self, before: Tensor, statistics: bool) -> tuple[Tensor, Tensor]:
        stage = self.plan.second
        weights = stage.arranged(self.second_weights)
        return conv_stage_fwd(self.second_inputs(), before, stage.parts, *weights, 1, statistics)

    def _unbound(self, stage: str) -> tuple[Tensor, ...]:
        """The maps of a stage one by one; taken apart once, which costs more than it looks."""
        if stage not in self._maps:
            self._maps[stage] = (self.x,) if stage == "state" else getattr(self, stage).unbind()
        return self._maps[stage]

    def second_inputs(self) -> list[Tensor]:
        first = self._unbound("first")
        return [first[output] for output in self.plan.second_from]

    def term_maps(self) -> list[Tensor]:
        """The map of each term."""
        return [self._unbound(term.stage)[term.index] for term in self.plan.terms]

    def term_norms(self) -> Tensor:
        """[terms, 2, C]."""
        return self.norms[self.indices.rows]

    def of_terms(self, weights: Tensor) -> Tensor:
        """Weights [E, O] -> those of the terms, [terms, 1]."""
        return weights[self.indices.edges, self.indices.candidates].to(self.x.dtype)[:, None]

    def add_to_nodes(self, nodes: Sequence[Tensor], started: set[int], weights: Tensor) -> None:
        """Add every term to its node; a node that has none yet is not in `started` and begins with this one."""
        norms, terms = self.term_norms(), self.term_maps()
        coef = torch.stack([self.of_terms(weights) * norms[:, 1], norms[:, 0]], dim=1)
        for node, rows in self.plan.by_node:
            node_sum(nodes[node], terms[rows], coef[rows], node in started)
            started.add(node)

    def backward(
        self,
        gs: Sequence[Tensor],
        weights: Tensor,
        base: Tensor | None,
        *,
        training: bool,
        need_dx: bool,
        need_dw: bool,
    ) -> tuple[Tensor | None, Tensor, list[Tensor]]:
        """gs: gradient of every node -> gradient of x on top of `base`, that of the terms' weights [terms], and those
        of the stages' parameters (none if not asked for)."""
        plan, terms = self.plan, self.plan.terms
        if not terms:
            return base, weights.new_empty(0), []
        if plan.pool_norms:
            self.pool, _ = pool_stage_fwd(self.x, plan.stride, False)
        norms, scale, term_gs = self.term_norms(), self.of_terms(weights), [gs[term.node] for term in terms]
        dots = node_dots(term_gs, self.term_maps(), norms[:, 0])
        coef = through_norms(norms, scale, dots, self.count, training)
        dx, gradients = base, []
        if need_dx:
            dx = self._pools_backward(gs, coef, base)
        if plan.first.norms:
            dx, gradients = self._convolutions_backward(term_gs, coef, dx, training, need_dx, need_dw)
        return dx, (norms[:, 1] * dots[:, 1]).sum(-1), gradients

    def _pools_backward(self, gs: Sequence[Tensor], coef: Tensor, base: Tensor | None) -> Tensor | None:
        """The gradient of x through pools and identities."""
        plan = self.plan
        if not plan.pool_norms:
            for number in plan.of_stage("state"):
                through = gs[plan.terms[number].node] * coef[number, 0]
                base = through if base is None else base + through
            return base
        indices = self.indices
        nodes = [gs[node] for node, _ in plan.by_node]
        scales = coef.new_zeros(len(nodes), 3, coef.shape[-1])
        scales[indices.through_nodes, indices.through_columns] = coef[indices.through_terms, 0]
        # Several edges share a pool: what they send to its statistics adds up; its mean is the same for all.
        shared = coef.new_zeros(2, 3, coef.shape[-1])
        shared.index_add_(0, indices.pool_columns, coef[indices.pool_terms, 1:])
        means = coef.new_zeros(2, coef.shape[-1])
        means[indices.pool_columns] = coef[indices.pool_terms, 3]
        shared[:, 2] = means
        return pool_stage_bwd(self.x, nodes, scales, shared, plan.stride, base)

    def _convolutions_backward(
        self,
        term_gs: Sequence[Tensor],
        coef: Tensor,
        base: Tensor | None,
        training: bool,
        need_dx: bool,
        need_dw: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        plan = self.plan
        indices = self.indices
        first_gs: list[Tensor] = [self.x] * len(plan.first.norms)
        first_coef = coef.new_empty(len(plan.first.norms), 4, coef.shape[-1])
        for number in plan.of_stage("first"):
            first_gs[plan.terms[number].index] = term_gs[number]
        first_coef[indices.direct_outputs] = coef[indices.direct_terms]
        second_dw: list[Tensor] = []
        if plan.second.norms:
            numbers = plan.of_stage("second")
            before = self.norms[self.indices.second_rows]
            q, dots, flat = conv_stage_bwd(
                [term_gs[number] for number in numbers],
                list(self._unbound("second")),
                coef[indices.second_terms],
                self.second_inputs(),
                before,
                plan.second.parts,
                *plan.second.arranged(self.second_weights),
                1,
                None,
                True,
                need_dw,
            )
            second_dw = unflatten(flat, self.second_weights) if need_dw else []
            for output, gradient in zip(plan.second_from, q.unbind(), strict=True):
                first_gs[output] = gradient
            first_coef[indices.second_from] = through_norms(before, 1.0, dots, self.count, training)
        if not (need_dx or need_dw):
            return base, []
        dx, _, flat = conv_stage_bwd(
            first_gs,
            list(self._unbound("first")),
            first_coef,
            [self.x],
            None,
            plan.first.parts,
            *plan.first.arranged(self.first_weights),
            plan.stride,
            base,
            need_dx,
            need_dw,
        )
        first_dw = unflatten(flat, self.first_weights) if need_dw else []
        return dx[0] if need_dx else base, first_dw + second_dw


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A flat gradient as views of the parameters' shapes."""
    return list(torch._C._nn.unflatten_dense_tensors(flat, like))


class ExtraRun:
    """A candidate that no stage knows, on its own graph."""

    def __init__(self, extra: Extra, x: Tensor) -> None:
        self.extra = extra
        with torch.enable_grad():
            # A copy: the state lies beside nodes that are still to be written.
            self.x = images(x.detach()).clone().requires_grad_()
            self.y = extra.module(self.x)

    def backward(self, g: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Gradients of x, of the weight, and of the module's parameters (None where frozen)."""
        parameters = list(self.extra.module.parameters())
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        dx, *found = torch.autograd.grad(
            self.y, [self.x, *wanted], weight * images(g), allow_unused=True, materialize_grads=True
        )
        by_parameter = dict(zip(map(id, wanted), found, strict=True))
        return maps(dx), (self.y.detach() * images(g)).sum(), [by_parameter.get(id(p)) for p in parameters]


def run_cell(
    plan: CellPlan,
    training: bool,
    lean: bool,
    s0: Tensor,
    s1: Tensor,
    weights: Tensor,
    betas: Tensor | None,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, list[Source], list[list[ExtraRun]]]:
    """The nodes of a cell next to each other, [B, H', W', nodes * C]; what its sources hold; the runs of its extras."""
    states = [s0, s1]
    batch, height, width, channels = s0.shape
    stride, selected = plan.strides[0], channels // plan.k
    size = (batch, -(-height // stride), -(-width // stride))
    out = s0.new_empty(*size, plan.nodes * channels)
    nodes = out.split(channels, dim=-1)
    mixed = nodes if plan.k == 1 else s0.new_empty(plan.nodes, *size, selected)
    started: set[int] = set()
    sources, extras = [], []
    for state, (source_plan, own) in enumerate(zip(plan.sources, plan.by_source(parameters), strict=True)):
        if state >= 2:
            node = state - 2
            if node not in started:
                mixed[node].zero_()
            if betas is not None:
                edges = plan.edge_slices[node]
                partial_join(nodes[node], mixed[node], states, plan.strides[:state], betas[edges], plan.k)
            states.append(nodes[node])
        source = Source(source_plan, states[state][..., :selected], own)
        if source_plan.terms:
            source.measure(training)
            source.add_to_nodes(mixed, started, weights)
            source.forget(all_maps=lean)
        runs = [ExtraRun(extra, source.x) for extra in source_plan.extras]
        for run in runs:
            node = run.extra.node
            if node not in started:
                mixed[node].zero_()
            started.add(node)
            mixed[node].add_(weights[run.extra.edge, run.extra.candidate] * maps(run.y.detach()))
        sources.append(source)
        extras.append(runs)
    return out, sources, extras


class CellGradient:
    """The backward pass of a cell; results in `states` (None where not asked for), `weights`, `betas`, `parameters`."""

    def __init__(
        self,
        plan: CellPlan,
        sources: Sequence[Source],
        extras: Sequence[Sequence[ExtraRun]],
        states: Sequence[Tensor],
        weights: Tensor,
        betas: Tensor | None,
        grad: Tensor,
        *,
        training: bool,
        lean: bool,
        needs_states: Sequence[bool],
        needs_parameters: bool,
    ) -> None:
        """states, grad: maps of all states and the gradient of the cell's output; the others as in `run_cell`."""
        self.plan, self.given, self.given_weights, self.given_betas = plan, states, weights, betas
        self.training, self.lean, self.needs_parameters = training, lean, needs_parameters
        self.weights = torch.zeros_like(weights)
        self.betas = None if betas is None else torch.zeros_like(betas)
        self.parameters: list[Tensor | None] = []
        # By node: the gradient of what the candidates add up to. It is complete once the node's own edges are done.
        self.mixed: list[Tensor] = [grad] * plan.nodes
        self.states: list[Tensor | None] = [None, None, *grad.split(states[0].shape[-1], dim=-1)]
        for state in reversed(range(len(sources))):
            need_dx = state >= 2 or needs_states[state]
            self._through_source(state, sources[state], extras[state], need_dx)
            if state >= 2:
                self._through_node(state - 2)

    def _through_source(self, state: int, source: Source, extras: Sequence[ExtraRun], need_dx: bool) -> None:
        base, partial = self.states[state], self.given_betas is not None
        if self.lean:
            source.recompute()
        dx, d_terms, gradients = source.backward(
            self.mixed,
            self.given_weights,
            None if partial else base,
            training=self.training,
            need_dx=need_dx,
            need_dw=self.needs_parameters,
        )
        if self.lean:
            source.forget(all_maps=True)
        if source.plan.terms:
            self.weights[source.indices.edges, source.indices.candidates] = d_terms.to(self.weights.dtype)
        if not gradients:
            gradients = [None] * (len(source.first_weights) + len(source.second_weights))
        for run in extras:
            edge, candidate, node = run.extra.edge, run.extra.candidate, run.extra.node
            extra_dx, d_weight, extra_gradients = run.backward(self.mixed[node], self.given_weights[edge, candidate])
            dx = extra_dx if dx is None else dx + extra_dx
            self.weights[edge, candidate] = d_weight
            gradients += extra_gradients
        self.parameters[:0] = gradients
        if partial and need_dx:
            dx = self._bypass(state, dx, base)
        self.states[state] = dx if need_dx else None

    def _bypass(self, state: int, mixed: Tensor | None, base: Tensor | None) -> Tensor:
        """Add what comes back along the channels that no candidate saw."""
        x, nodes = self.given[state], range(max(0, state - 1), self.plan.nodes)
        if mixed is None:
            mixed = x.new_zeros(*x.shape[:3], x.shape[3] // self.plan.k)
        if not nodes:
            return base
        betas = torch.stack([self.given_betas[self.plan.edge_slices[node]][state] for node in nodes]).to(x.dtype)
        gs = [self.states[2 + node] for node in nodes]
        return partial_join_dx(x, gs, betas, self.plan.strides[state], self.plan.k, mixed, base)

    def _through_node(self, node: int) -> None:
        """The state's gradient is complete: split it into that of the candidates' sum and those of the betas."""
        total = self.states[2 + node]
        if self.given_betas is None:
            self.mixed[node] = total
            return
        edges = self.plan.edge_slices[node]
        self.mixed[node], d_betas = partial_join_bwd(
            total, self.given[: 2 + node], self.plan.strides[: 2 + node], self.plan.k
        )
        self.betas[edges] = d_betas.to(self.betas.dtype)


class _FusedCell(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: CellPlan, training: bool, lean: bool, s0, s1, weights, betas, *parameters):
        dtype = s0.dtype
        out, sources, extras = run_cell(
            plan,
            training,
            lean,
            maps(s0),
            maps(s1),
            weights.to(dtype),
            None if betas is None else betas.to(dtype),
            parameters,
        )
        result = images(out)
        kept = [tensor for source in sources for tensor in source.kept()]
        ctx.save_for_backward(s0, s1, weights, betas, result, *parameters, *kept)
        ctx.plan, ctx.training, ctx.lean, ctx.extras = plan, training, lean, extras
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        plan = ctx.plan
        s0, s1, weights, betas, result, *rest = ctx.saved_tensors
        kept = rest[-3 * len(plan.sources) :]
        parameters = plan.by_source(rest[: -3 * len(plan.sources)])
        channels = s0.shape[1]
        states = [maps(s0), maps(s1), *maps(result).split(channels, dim=-1)]
        sources = [
            Source(source_plan, state[..., : channels // plan.k], own, *kept[3 * index : 3 * index + 3])
            for index, (source_plan, state, own) in enumerate(zip(plan.sources, states, parameters, strict=True))
        ]
        gradient = CellGradient(
            plan,
            sources,
            ctx.extras,
            states,
            weights.to(s0.dtype),
            None if betas is None else betas.to(s0.dtype),
            maps(grad),
            training=ctx.training,
            lean=ctx.lean,
            needs_states=ctx.needs_input_grad[3:5],
            needs_parameters=any(ctx.needs_input_grad[7:]),
        )
        d0, d1 = (None if state is None else images(state) for state in gradient.states[:2])
        d_weights = gradient.weights.to(weights.dtype)
        d_betas = None if betas is None else gradient.betas.to(betas.dtype)
        return None, None, None, d0, d1, d_weights, d_betas, *gradient.parameters


def fused_cell(
    plan: CellPlan, s0: Tensor, s1: Tensor, weights: Tensor, betas: Tensor | None, *, training: bool, lean: bool
) -> Tensor:
    """A whole cell: states s0, s1 [B, C, H, W] (preprocessed) -> its nodes, [B, nodes * C, H', W'], channels-last.

    weights: [E, O], of the candidates of all edges; betas: [E], of the edges' bypassed channels where the cell has
    partial channels (PC-DARTS), else None. `lean`: keep nothing but states and statistics between forward and
    backward, and compute the rest again.
    """
    return _FusedCell.apply(plan, training, lean, s0, s1, weights, betas, *plan.weights)


class _FusedNorm(torch.autograd.Function):
    """A convolution stage of one output, normalised: what comes before the states of a cell."""

    @staticmethod
    def forward(ctx, stage: Convolutions, running: RunningStatistics, stride: int, training: bool, x, *parameters):
        z, stats = conv_stage_fwd([maps(x)], None, stage.parts, *stage.arranged(parameters), stride, training)
        row = torch.zeros(1, dtype=torch.long, device=x.device)
        if training:
            running.update(row, stats, z[0, ..., 0].numel())
        norms = with_deviation(stats if training else running.read(row), running.eps)
        node_sum(z[0], [z[0]], norms.flip(1), False)
        result = images(z[0])
        ctx.save_for_backward(x, norms, result, *parameters)
        ctx.stage, ctx.stride, ctx.training = stage, stride, training
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, norms, result, *parameters = ctx.saved_tensors
        stage, g, y = ctx.stage, maps(grad), maps(result)
        count = y[..., 0].numel()
        dots = node_dots([g], [y], torch.zeros_like(norms[:, 0]))
        # By y = (z - mean) r instead of z, which is not kept: mean 0, deviation 1, and r once more at the end.
        unit = torch.stack([torch.zeros_like(norms[:, 0]), torch.ones_like(norms[:, 0])], dim=1)
        coef = through_norms(unit, 1.0, dots, count, ctx.training)
        coef[:, :3] *= norms[:, 1:2]
        need_dx, need_dw = ctx.needs_input_grad[4], any(ctx.needs_input_grad[5:])
        dx, _, flat = conv_stage_bwd(
            [g],
            [y],
            coef,
            [maps(x)],
            None,
            stage.parts,
            *stage.arranged(parameters),
            ctx.stride,
            None,
            need_dx,
            need_dw,
        )
        gradients = unflatten(flat, parameters) if need_dw else [None] * len(parameters)
        return None, None, None, None, images(dx[0]) if need_dx else None, *gradients


def fused_norm(stage: Convolutions, running: RunningStatistics, x: Tensor, *, stride: int, training: bool) -> Tensor:
    """BN(stage(x)): x [B, C, H, W] -> [B, O, ceil(H / stride), ceil(W / stride)]; keeps x and the result alone."""
    return _FusedNorm.apply(stage, running, stride, training, x, *stage.weights)
