"""``mixed_sum`` in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def mixed_sum(xs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``y = sum_k w[k] * x_k``; see :func:`fastnas.mixed_sum`."""
    w = weights.flatten()
    y = w[0] * xs[0]
    for k in range(1, len(xs)):
        y = y + w[k] * xs[k]
    return y
