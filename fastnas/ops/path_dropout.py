"""Masked sums over paths: One-Shot's path dropout with a mask a ghost batch, and drop path for retraining."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas import _backends
from fastnas.ops._checks import check_floating, check_paths
from fastnas.ops._library import define, in_layout_of
from fastnas.reference.path_dropout import path_dropout as _reference


def _fwd_reference(xs: list[Tensor], mask: Tensor) -> Tensor:
    return in_layout_of(_reference(xs, mask), xs[0])


def _bwd_reference(g: Tensor, mask: Tensor) -> list[Tensor]:
    return [in_layout_of(dx, g) for dx in _path_grads(g, mask)]


def _path_grads(g: Tensor, mask: Tensor) -> list[Tensor]:
    return [_reference([g], mask[:, k : k + 1]) for k in range(mask.shape[1])]


_fwd = define(
    "path_dropout_fwd(Tensor[] xs, Tensor mask) -> Tensor",
    reference=_fwd_reference,
    fake=lambda xs, mask: torch.empty_like(xs[0]),
)
_bwd = define(
    "path_dropout_bwd(Tensor g, Tensor mask) -> Tensor[]",
    reference=_bwd_reference,
    fake=lambda g, mask: [torch.empty_like(g) for _ in range(mask.shape[1])],
)
_backends.register("path_dropout", "path_dropout_fwd", "path_dropout_bwd")


def _undropped(mask: Tensor) -> list[bool]:
    """Which paths every sample keeps at weight 1: they get ``g`` itself, as from an addition.

    A residual's identity is such a path. On a GPU nothing is looked at, which would wait for it.
    """
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return [False] * mask.shape[1]
    return (mask == 1).all(0).tolist()


class _PathDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mask: Tensor, *xs: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return _fwd(xs, mask)

    @staticmethod
    def backward(ctx, g: Tensor):
        (mask,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: stay differentiable
            return None, *_path_grads(g, mask)
        whole = _undropped(mask)
        if not any(whole):
            return None, *_bwd(g, mask)
        rest = [k for k, passes in enumerate(whole) if not passes]
        grads = iter(_bwd(g, mask[:, rest]) if rest else ())
        return None, *(g if passes else next(grads) for passes in whole)


def path_dropout(xs: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Sum of the paths that a mask keeps, one row of the mask a ghost batch.

    ``y[b] = sum_k mask[g(b), k] * xs[k][b]``, where sample b of B belongs to ghost batch ``g(b) = b * G // B``
    (Bender et al. 2018, sections 3.2 and 3.3: paths are dropped for a whole ghost batch, with other draws for the
    next one). A path with mask 0 is not read for those samples: whatever it holds, NaN included, does not reach
    ``y``, and its gradient there is 0. Only the mask is kept for backward. Differentiable twice.

    Args:
        xs: K tensors of one shape ``[B, ...]``, dtype (float32, float64, bfloat16, float16) and device.
        mask: ``[G, K]``, bool, or floating point to scale the kept paths. It gets no gradient.

    Returns:
        Tensor of the shape and dtype of ``xs[0]``, in its layout if that is dense; 0 where all paths are dropped.
        Sums are accumulated in float32 (float64 for float64). Autocast leaves the dtypes as they are.

    Raises:
        TypeError: ``xs`` holds something else than floating tensors of one dtype, or ``mask`` is neither bool nor
            floating.
        ValueError: no tensors, shapes or devices differ, or ``mask`` is not ``[G, K]`` with G >= 1.

    Maths and limits: ``docs/ops/path_dropout.md``.
    """
    check_paths("path_dropout", "xs", xs)
    if xs[0].dim() == 0:
        raise ValueError("path_dropout: xs must have a batch dimension, got 0-dimensional tensors")
    if not isinstance(mask, Tensor):
        raise TypeError(f"path_dropout: mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"path_dropout: mask must be bool or floating point, got {mask.dtype}")
    if mask.dim() != 2 or mask.shape[0] == 0 or mask.shape[1] != len(xs):
        raise ValueError(
            f"path_dropout: mask must be [groups, {len(xs)}] for {len(xs)} tensors, got {list(mask.shape)}"
        )
    if mask.device != xs[0].device:
        raise ValueError(f"path_dropout: mask is on {mask.device}, xs on {xs[0].device}")
    if _backends.choose("path_dropout", xs[0].device.type) == "reference":
        return _reference(xs, mask)
    return _PathDropout.apply(mask, *xs)


def sample_path_mask(
    num_paths: int,
    rate: float,
    num_groups: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw a mask for :func:`path_dropout`: True keeps a path.

    Each path is dropped with probability ``rate ** (1 / num_paths)``, independently, so that all of them are
    dropped together with probability ``rate`` whatever the fan-in (Bender et al. 2018, section 3.2).

    Args:
        num_paths: K, at least 1.
        rate: probability that nothing is kept, in [0, 1]; 0 keeps every path.
        num_groups: G, the number of ghost batches, at least 1.
        generator: source of the draws, on ``device``.
        device: where the mask is made; default the CPU.

    Returns:
        bool ``[G, K]``.

    Raises:
        ValueError: an argument is out of range.
    """
    if num_paths < 1 or num_groups < 1:
        raise ValueError(
            f"sample_path_mask: num_paths and num_groups must be at least 1, got {num_paths} and {num_groups}"
        )
    if not 0 <= rate <= 1:
        raise ValueError(f"sample_path_mask: rate must be in [0, 1], got {rate}")
    drop = rate ** (1 / num_paths)
    return torch.rand(num_groups, num_paths, generator=generator, device=device) >= drop


def drop_path(
    x: Tensor, keep_prob: float, *, generator: torch.Generator | None = None, training: bool = True
) -> Tensor:
    """Drop whole samples of one path: ``y[b] = x[b] * m_b / keep_prob`` with ``m_b ~ Bernoulli(keep_prob)``.

    The regulariser of retraining in DARTS (scheduled drop path of Zoph et al. 2018, per sample); the scale keeps the
    expectation. A dropped sample is not read.

    Args:
        x: ``[B, ...]``, float32, float64, bfloat16 or float16.
        keep_prob: in (0, 1].
        generator: source of the draws, on the device of ``x``.
        training: False returns ``x`` itself, as does ``keep_prob`` 1.

    Returns:
        Tensor of the shape, dtype and device of ``x``.

    Raises:
        TypeError: ``x`` is not a floating tensor.
        ValueError: ``x`` has no batch dimension or ``keep_prob`` is out of range.
    """
    check_floating("drop_path", "x", x)
    if not 0 < keep_prob <= 1:
        raise ValueError(f"drop_path: keep_prob must be in (0, 1], got {keep_prob}")
    if x.dim() == 0:
        raise ValueError("drop_path: x must have a batch dimension, got a 0-dimensional tensor")
    if not training or keep_prob == 1 or x.shape[0] == 0:
        return x
    keep = torch.rand(x.shape[0], 1, generator=generator, device=x.device) < keep_prob
    return path_dropout([x], keep / keep_prob)
