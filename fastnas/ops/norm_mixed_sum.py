"""Weighted sum of batch-normalised tensors, with the normalisation folded into the sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas import _backends
from fastnas.ops._checks import check_like, check_paths
from fastnas.ops._library import accumulate_dtype, define, in_layout_of
from fastnas.reference.norm_mixed_sum import norm_mixed_sum as _reference


def _per_channel(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """``[C]`` as ``[1, C, 1, ...]``."""
    return values.view(-1, *[1] * (like.dim() - 2))


def _statistics(ys: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, ``[K, C]`` each."""
    dtype = accumulate_dtype(ys[0].dtype)
    if ys[0].numel() == 0:
        zeros = torch.zeros(len(ys), ys[0].shape[1], dtype=dtype, device=ys[0].device)
        return zeros, zeros.clone()
    pairs = [torch.var_mean(y.to(dtype), _per_channel(y), correction=0) for y in ys]
    return torch.stack([mean for _, mean in pairs]), torch.stack([var for var, _ in pairs])


def _fold(ys: Sequence[Tensor], plain: Sequence[Tensor], w: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """``sum_k A[k] y_k + B`` with ``A[k, c] = w[k] r[k, c]`` and ``B[c] = -sum_k A[k, c] mean[k, c]``."""
    dtype, count = accumulate_dtype(ys[0].dtype), len(ys)
    w = w.flatten().to(dtype)
    scale = w[:count, None] * (var + eps).rsqrt()
    total = _spread(-(scale * mean).sum(0), ys[0])
    for k, y in enumerate(ys):
        total = total + _spread(scale[k], y) * y
    for k, x in enumerate(plain):
        total = total + w[count + k] * x
    return in_layout_of(total.to(ys[0].dtype), ys[0])


def _fwd_reference(ys: list[Tensor], plain: list[Tensor], w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = _statistics(ys)
    return _fold(ys, plain, w, mean, var, eps), mean, var


def _grads(
    g: Tensor,
    ys: Sequence[Tensor],
    plain: Sequence[Tensor],
    w: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    training: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Gradients of the ys, the plain maps and the weights; what is not given is taken as not asked for."""
    dtype, dims, count = accumulate_dtype(g.dtype), _per_channel(g), mean.shape[0]
    flat, wide = w.flatten().to(dtype), g.to(dtype)
    values = max(g.numel() // max(g.shape[1], 1), 1)
    dys, dws = [], []
    for k in range(count):
        r = (var[k].to(dtype) + eps).rsqrt()
        scale = _spread(flat[k] * r, g)
        dy = wide
        if ys:
            normalised = (ys[k].to(dtype) - _spread(mean[k], g)) * _spread(r, g)
            dot = (wide * normalised).sum(dims)
            dws.append(dot.sum())
            if training:
                total = _spread(wide.sum(dims), g)
                dy = wide - (total + normalised * _spread(dot, g)) / values
        dys.append((scale * dy).to(g.dtype))
    dplain = [(v * wide).to(g.dtype) for v in flat[count:]]
    dws += [(wide * x).sum() for x in plain]
    dw = torch.stack(dws).to(w.dtype).view(w.shape) if len(dws) == w.numel() else w.new_empty(0)
    return dys, dplain, dw


def _bwd_reference(
    g: Tensor,
    ys: list[Tensor],
    plain: list[Tensor],
    w: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    training: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    dys, dplain, dw = _grads(g, ys, plain, w, mean, var, eps, training)
    like = ys[0] if ys else g
    return [in_layout_of(t, like) for t in dys], [in_layout_of(t, like) for t in dplain], dw


def _bwd_maps_reference(
    g: Tensor, ys: list[Tensor], w: Tensor, mean: Tensor, var: Tensor, eps: float, training: bool
) -> tuple[list[Tensor], list[Tensor]]:
    dys, dplain, _ = _bwd_reference(g, ys, [], w, mean, var, eps, training)
    return dys, dplain


def _bwd_w_reference(
    g: Tensor, ys: list[Tensor], plain: list[Tensor], w: Tensor, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    return _grads(g, ys, plain, w, mean, var, eps, False)[2]


def _fake_maps(like: Tensor, w: Tensor, mean: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    count = mean.shape[0]
    return (
        [torch.empty_like(like) for _ in range(count)],
        [torch.empty_like(like) for _ in range(w.numel() - count)],
    )


def _fake_weights(w: Tensor) -> Tensor:
    return torch.empty_like(w, memory_format=torch.contiguous_format)


def _fake_fwd(ys: list[Tensor], plain: list[Tensor], w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    shape, dtype = (len(ys), ys[0].shape[1]), accumulate_dtype(ys[0].dtype)
    return torch.empty_like(ys[0]), ys[0].new_empty(shape, dtype=dtype), ys[0].new_empty(shape, dtype=dtype)


_fwd = define(
    "norm_mixed_sum_fwd(Tensor[] ys, Tensor[] plain, Tensor w, float eps) -> (Tensor, Tensor, Tensor)",
    reference=_fwd_reference,
    fake=_fake_fwd,
)
_eval = define(
    "norm_mixed_sum_eval(Tensor[] ys, Tensor[] plain, Tensor w, Tensor mean, Tensor var, float eps) -> Tensor",
    reference=_fold,
    fake=lambda ys, plain, w, mean, var, eps: torch.empty_like(ys[0]),
)
_bwd = define(
    "norm_mixed_sum_bwd(Tensor g, Tensor[] ys, Tensor[] plain, Tensor w, Tensor mean, Tensor var, float eps, "
    "bool training) -> (Tensor[], Tensor[], Tensor)",
    reference=_bwd_reference,
    fake=lambda g, ys, plain, w, mean, var, eps, training: (*_fake_maps(ys[0], w, mean), _fake_weights(w)),
)
_bwd_maps = define(
    "norm_mixed_sum_bwd_maps(Tensor g, Tensor[] ys, Tensor w, Tensor mean, Tensor var, float eps, bool training) "
    "-> (Tensor[], Tensor[])",
    reference=_bwd_maps_reference,
    fake=lambda g, ys, w, mean, var, eps, training: _fake_maps(ys[0] if ys else g, w, mean),
)
_bwd_w = define(
    "norm_mixed_sum_bwd_w(Tensor g, Tensor[] ys, Tensor[] plain, Tensor w, Tensor mean, Tensor var, float eps) "
    "-> Tensor",
    reference=_bwd_w_reference,
    fake=lambda g, ys, plain, w, mean, var, eps: _fake_weights(w),
)
_backends.register(
    "norm_mixed_sum",
    "norm_mixed_sum_fwd",
    "norm_mixed_sum_eval",
    "norm_mixed_sum_bwd",
    "norm_mixed_sum_bwd_maps",
    "norm_mixed_sum_bwd_w",
)


class _NormMixedSum(torch.autograd.Function):
    """``mean`` and ``var`` are None in training; returns y and the statistics that it was normalised with."""

    @staticmethod
    def forward(ctx, weights: Tensor, mean: Tensor | None, var: Tensor | None, eps: float, count: int, *xs: Tensor):
        ys, plain = xs[:count], xs[count:]
        ctx.training, ctx.eps, ctx.count = mean is None, eps, count
        if mean is None:
            y, mean, var = _fwd(ys, plain, weights, eps)
            ctx.mark_non_differentiable(mean, var)
        else:
            y = _eval(ys, plain, weights, mean, var, eps)
        # The maps are kept for dw, and in training for the statistics' part of dy.
        kept = xs if ctx.needs_input_grad[0] else ys if ctx.training else ()
        ctx.save_for_backward(weights, mean, var, *kept)
        return (y, mean, var) if ctx.training else y

    @staticmethod
    def backward(ctx, g: Tensor, *_: Tensor):
        weights, mean, var, *kept = ctx.saved_tensors
        ys, plain = kept[: ctx.count], kept[ctx.count :]
        dw = None
        if torch.is_grad_enabled():  # create_graph: stay differentiable, through the statistics too
            if ctx.training:
                mean, var = _statistics(ys)
            dys, dplain, grads = _grads(g, ys, plain, weights, mean, var, ctx.eps, ctx.training)
            dw = grads if ctx.needs_input_grad[0] else None
        elif not any(ctx.needs_input_grad[5:]):
            none = [None] * (len(ctx.needs_input_grad) - 5)
            return _bwd_w(g, ys, plain, weights, mean, var, ctx.eps), None, None, None, None, *none
        elif ctx.needs_input_grad[0]:
            dys, dplain, dw = _bwd(g, ys, plain, weights, mean, var, ctx.eps, ctx.training)
        else:
            dys, dplain = _bwd_maps(g, ys, weights, mean, var, ctx.eps, ctx.training)
        return dw, None, None, None, None, *dys, *dplain


def norm_mixed_sum(
    ys: Sequence[Tensor],
    weights: Tensor,
    running_means: Sequence[Tensor] | Tensor | None = None,
    running_vars: Sequence[Tensor] | Tensor | None = None,
    *,
    plain: Sequence[Tensor] = (),
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Weighted sum of batch-normalised tensors: ``y = sum_k w[k] * BN(ys[k]) + sum_j w[K + j] * plain[j]``.

    BN is ``nn.BatchNorm2d(C, affine=False)``, which ends the candidates of a DARTS cell (Liu et al. 2019, section
    3.1): with ``ys`` from before it, this is the mixed operation of its equation 2, or a whole node of the cell. The
    normalised tensors never exist: the sum is ``sum_k (w[k] r[k, c]) (ys[k] - mean[k, c])`` with ``r = 1 / sqrt(var +
    eps)``. Each input is read once for the statistics and once for the sum, and twice again in backward; the inputs
    and ``[K, C]`` statistics are all that is kept. Differentiable twice.

    Args:
        ys: K tensors ``[N, C, ...]`` of one shape, dtype (float32, float64, bfloat16, float16) and device. Layouts
            may differ; the fast path is one common dense layout (NCHW, channels last) or slices of one.
        weights: K + J values in any shape, taken in row-major order, those of ``plain`` last; float32 or the dtype of
            ``ys``.
        running_means: K tensors ``[C]`` or one ``[K, C]``; ``None`` for no running statistics. In training they are
            updated in place as ``nn.BatchNorm2d`` does, in evaluation they take the place of the batch statistics.
        running_vars: the same for the variances; the update is with the unbiased variance of the batch.
        plain: J tensors like ``ys`` that are summed as they are, for example a skip connection.
        training: normalise with the statistics of the batch over all dimensions but C.
        momentum: weight of the batch in the running statistics.
        eps: added to the variances.

    Returns:
        Tensor of the shape and dtype of ``ys[0]``, in its layout if that is dense. Statistics and sums are
        accumulated in at least float32 (float64 for float64). Autocast leaves the dtypes as they are. An empty
        batch gives an empty tensor and leaves the running statistics alone.

    Raises:
        TypeError: ``ys``, ``plain``, ``weights`` or the running statistics hold something else than floating tensors.
        ValueError: no tensors, shapes or devices differ, the number of weights is not K + J, only one of the running
            statistics is given or none in evaluation, ``eps`` is not positive, or a channel has only one value in
            training.

    Results do not depend on the number of threads. Maths and limits: ``docs/ops/norm_mixed_sum.md``.
    """
    _check(ys, weights, plain)
    if (running_means is None) != (running_vars is None):
        raise ValueError("norm_mixed_sum: running_means and running_vars must be given together")
    if running_means is None:
        if not training:
            raise ValueError("norm_mixed_sum: evaluation (training=False) needs running_means and running_vars")
    else:
        _check_running("running_means", running_means, ys)
        _check_running("running_vars", running_vars, ys)
    if eps <= 0:
        raise ValueError(f"norm_mixed_sum: eps must be positive, got {eps}")
    values = ys[0].numel() // max(ys[0].shape[1], 1)
    if training and values == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {ys[0].shape}")

    if _backends.choose("norm_mixed_sum", ys[0].device.type) == "reference":
        return _reference(
            ys, weights, running_means, running_vars, plain=plain, training=training, momentum=momentum, eps=eps
        )
    if not training:
        mean, var = (t if isinstance(t, Tensor) else torch.stack(tuple(t)) for t in (running_means, running_vars))
        return _NormMixedSum.apply(weights, mean, var, eps, len(ys), *ys, *plain)
    y, mean, var = _NormMixedSum.apply(weights, None, None, eps, len(ys), *ys, *plain)
    if running_means is not None and values > 0:
        _update(running_means, running_vars, mean, var * (values / (values - 1)), momentum)
    return y


def _update(
    running_means: Sequence[Tensor] | Tensor,
    running_vars: Sequence[Tensor] | Tensor,
    means: Tensor,
    variances: Tensor,
    momentum: float,
) -> None:
    """``running = (1 - momentum) * running + momentum * batch``, in place."""
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for running, batch in ((running_means, means), (running_vars, variances)):
        whole = isinstance(running, Tensor)
        targets += [running] if whole else running
        sources += [batch] if whole else batch.unbind()
    if targets[0].dtype != means.dtype:
        sources = [t.to(targets[0].dtype) for t in sources]
    with torch.no_grad():
        torch._foreach_lerp_(targets, sources, momentum)


def _check(ys: Sequence[Tensor], weights: Tensor, plain: Sequence[Tensor]) -> None:
    check_paths("norm_mixed_sum", "ys", ys)
    if ys[0].dim() < 2:
        raise ValueError(f"norm_mixed_sum: ys must be [N, C, ...], got ys[0] of shape {tuple(ys[0].shape)}")
    check_like("norm_mixed_sum", "plain", plain, "ys[0]", ys[0])
    if not isinstance(weights, Tensor):
        raise TypeError(f"norm_mixed_sum: weights must be a tensor, got {type(weights).__name__}")
    if not weights.is_floating_point():
        raise TypeError(f"norm_mixed_sum: weights must be floating point, got {weights.dtype}")
    if weights.numel() != len(ys) + len(plain):
        raise ValueError(
            f"norm_mixed_sum: weights of shape {tuple(weights.shape)} hold {weights.numel()} values for "
            f"{len(ys)} normalised and {len(plain)} plain tensors"
        )
    if weights.device != ys[0].device:
        raise ValueError(f"norm_mixed_sum: weights are on {weights.device}, ys on {ys[0].device}")


def _check_running(name: str, running: Sequence[Tensor] | Tensor, ys: Sequence[Tensor]) -> None:
    channels, device = ys[0].shape[1], ys[0].device
    if not isinstance(running, Tensor) and len(running) != len(ys):
        raise ValueError(f"norm_mixed_sum: {name} has {len(running)} tensors for {len(ys)} in ys")
    whole = isinstance(running, Tensor)
    for k, t in enumerate([running] if whole else running):
        where, shape = (name, (len(ys), channels)) if whole else (f"{name}[{k}]", (channels,))
        if not isinstance(t, Tensor) or not t.is_floating_point():
            found = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"norm_mixed_sum: {where} must be a floating tensor, got {found}")
        if t.shape != shape:
            raise ValueError(f"norm_mixed_sum: {where} has shape {tuple(t.shape)}, expected {shape}")
        if t.device != device:
            raise ValueError(f"norm_mixed_sum: {where} is on {t.device}, ys on {device}")
