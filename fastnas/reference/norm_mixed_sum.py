"""``norm_mixed_sum`` in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import batch_norm


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
    """``y = sum_k w[k] * batch_norm(ys[k]) + sum_j w[K + j] * plain[j]``; see :func:`fastnas.norm_mixed_sum`."""
    w = weights.flatten()
    terms = []
    for k, y in enumerate(ys):
        mean = None if running_means is None else running_means[k]
        var = None if running_vars is None else running_vars[k]
        terms.append(batch_norm(y, mean, var, None, None, training, momentum, eps))
    terms += plain
    total = w[0] * terms[0]
    for k in range(1, len(terms)):
        total = total + w[k] * terms[k]
    return total
