"""Gumbel-softmax samples of many categorical choices in one launch, with counter-based noise."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnas import _backends
from fastnas.ops._checks import FLOATING, check_floating
from fastnas.ops._library import accumulate_dtype, define
from fastnas.reference.gumbel_softmax import gumbel_softmax as _reference

_OP = "gumbel_softmax"


def _fwd_reference(
    logits: Tensor, seed: int, tau: float, seed_tensor: Tensor | None, tau_tensor: Tensor | None, hard: bool
) -> Tensor:
    sample = _reference(
        logits,
        tau if tau_tensor is None else tau_tensor,
        seed=seed if seed_tensor is None else seed_tensor,
        hard=hard,
    )
    return _fresh(sample, logits)


def _bwd_reference(
    g: Tensor,
    logits: Tensor,
    seed: int,
    tau: float,
    seed_tensor: Tensor | None,
    tau_tensor: Tensor | None,
    y: Tensor | None,
) -> Tensor:
    if y is None:
        return _fresh(_logits_grad(g, logits, seed, tau, seed_tensor, tau_tensor), logits)
    dtype = accumulate_dtype(logits.dtype)
    return _fresh(_softmax_grad(g.to(dtype), y.to(dtype), tau if tau_tensor is None else tau_tensor), logits)


def _logits_grad(
    g: Tensor, logits: Tensor, seed: int, tau: float, seed_tensor: Tensor | None, tau_tensor: Tensor | None
) -> Tensor:
    """``y (g - sum y g) / tau``, differentiable in ``g`` and ``logits``."""
    dtype = accumulate_dtype(logits.dtype)
    temperature = tau if tau_tensor is None else tau_tensor
    y = _reference(logits.to(dtype), temperature, seed=seed if seed_tensor is None else seed_tensor)
    return _softmax_grad(g.to(dtype), y, temperature).to(logits.dtype)


def _softmax_grad(g: Tensor, y: Tensor, temperature: float | Tensor) -> Tensor:
    return y * (g - (y * g).sum(-1, keepdim=True)) / temperature


def _fresh(value: Tensor, like: Tensor) -> Tensor:
    return _empty(like).copy_(value)


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


# Where a tensor is given it stands for the number: captured graphs change it between replays, while eager code
# spares itself two small tensors a call.
_fwd = define(
    "gumbel_softmax_fwd(Tensor logits, SymInt seed, float tau, Tensor? seed_tensor, Tensor? tau_tensor,"
    " bool hard) -> Tensor",
    reference=_fwd_reference,
    fake=lambda logits, seed, tau, seed_tensor, tau_tensor, hard: _empty(logits),
)
# `y` is the soft sample where it was kept; without it the noise is drawn again.
_bwd = define(
    "gumbel_softmax_bwd(Tensor g, Tensor logits, SymInt seed, float tau, Tensor? seed_tensor,"
    " Tensor? tau_tensor, Tensor? y) -> Tensor",
    reference=_bwd_reference,
    fake=lambda g, logits, seed, tau, seed_tensor, tau_tensor, y: _empty(logits),
)
_backends.register(_OP, "gumbel_softmax_fwd", "gumbel_softmax_bwd")


class _GumbelSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, seed, tau, seed_tensor, tau_tensor, hard):
        ctx.seed = seed
        ctx.tau = tau
        y = _fwd(logits, seed, tau, seed_tensor, tau_tensor, hard)
        # The noise costs arithmetic, which a GPU has to spare; a rounded sample would cost the gradient digits.
        exact = logits.dtype in (torch.float32, torch.float64)
        kept = y if exact and not hard and logits.device.type == "cpu" else None
        ctx.save_for_backward(logits, seed_tensor, tau_tensor, kept)
        return y

    @staticmethod
    def backward(ctx, g):
        logits, seed_tensor, tau_tensor, y = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: stay differentiable
            grad = _logits_grad(g, logits, ctx.seed, ctx.tau, seed_tensor, tau_tensor)
        else:
            grad = _bwd(g, logits, ctx.seed, ctx.tau, seed_tensor, tau_tensor, y)
        return grad, None, None, None, None, None


def gumbel_softmax(logits: Tensor, tau: float | Tensor = 1.0, *, seed: int | Tensor, hard: bool = False) -> Tensor:
    """Sample every row of ``logits`` from its concrete distribution: ``softmax((logits + G) / tau)``.

    ``G = -log(-log u)`` is standard Gumbel noise (SNAS, equation 5; Jang et al. 2017, equation 2). It is a pure
    function of ``seed`` and of the element's position: element ``i`` in row-major order takes word ``i % 4`` of the
    Philox4x32-10 block with counter ``i // 4`` and key ``seed``, on every device and with any number of threads.
    Every ``u`` gives finite noise, which is never saved. Differentiable twice.

    Args:
        logits: ``[..., choices]``, float32, float64, bfloat16 or float16; one row is one categorical choice,
            for example ``[edges, candidates]`` for all edges of a cell. ``-inf`` excludes a choice.
        tau: temperature, positive; a number or a 0-dim floating tensor on the device of ``logits``. A tensor that
            requires grad gets its gradient from the plain PyTorch version.
        seed: an int64 number, or a 0-dim int64 tensor on the device of ``logits``; a new one for each sample.
        hard: return exactly the one-hot of the largest entry, with the gradient of the soft sample
            (straight-through).

    Returns:
        Contiguous tensor of the shape and dtype of ``logits``, computed in float32 (float64 for float64). Autocast
        leaves it as it is.

    Raises:
        TypeError: ``logits`` is not a floating tensor, ``seed`` is neither an int nor an int64 tensor.
        ValueError: ``logits`` has no dimension, ``tau`` is not positive, ``seed`` does not fit into int64, or a
            tensor ``seed`` or ``tau`` is not 0-dim or lies on another device.

    Maths and limits: ``docs/ops/gumbel_softmax.md``.
    """
    if not isinstance(logits, Tensor) or logits.dtype not in FLOATING:
        check_floating(_OP, "logits", logits)
    if logits.ndim == 0:
        raise ValueError(f"{_OP}: logits must have at least one dimension, got shape ()")
    seed_tensor = tau_tensor = None
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"{_OP}: seed must fit into 64 bits with sign, got {seed}")
        seed_value = seed
    else:
        _check_seed(seed, logits)
        seed_tensor, seed_value = seed, 0
    if isinstance(tau, (float, int)):
        if not tau > 0:
            raise ValueError(f"{_OP}: tau must be positive, got {tau}")
        tau_value = tau
    else:
        _check_tau(tau, logits)
        tau_tensor, tau_value = tau, 1.0
    grad = torch.is_grad_enabled()
    if (grad and tau_tensor is not None and tau_tensor.requires_grad) or (
        _backends.choose(_OP, logits.device.type) == "reference"
    ):
        return _reference(logits, tau, seed=seed, hard=hard)
    if grad and logits.requires_grad:
        return _GumbelSoftmax.apply(logits, seed_value, tau_value, seed_tensor, tau_tensor, hard)
    return _fwd(logits, seed_value, tau_value, seed_tensor, tau_tensor, hard)


def _check_seed(seed: object, logits: Tensor) -> None:
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        found = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"{_OP}: seed must be an int or an int64 tensor, got {found}")
    _check_scalar("seed", seed, logits)


def _check_tau(tau: object, logits: Tensor) -> None:
    check_floating(_OP, "tau", tau)
    _check_scalar("tau", tau, logits)


def _check_scalar(name: str, value: Tensor, logits: Tensor) -> None:
    if value.ndim != 0:
        raise ValueError(f"{_OP}: {name} must be a number or a 0-dim tensor, got shape {tuple(value.shape)}")
    if value.device != logits.device:
        raise ValueError(f"{_OP}: {name} is on {value.device}, logits on {logits.device}")
