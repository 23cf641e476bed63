"""The weighted, normalised terms of a node, summed; and the sums over pixels that their gradients need."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnas import _backends
from fastnas.ops._library import define


def _sum_reference(out: Tensor, terms: list[Tensor], coef: Tensor, accumulate: bool) -> None:
    total = sum(c[0] * (term - c[1]) for term, c in zip(terms, coef, strict=True))
    if accumulate:
        out += total
    else:
        out.copy_(total)


def _dots_reference(gs: list[Tensor], terms: list[Tensor], means: Tensor) -> Tensor:
    pairs = [
        torch.stack([g.to(mean.dtype).sum((0, 1, 2)), (g * (term - mean)).sum((0, 1, 2))])
        for g, term, mean in zip(gs, terms, means, strict=True)
    ]
    return torch.stack(pairs)


_node_sum = define(
    "node_sum(Tensor(a!) out, Tensor[] terms, Tensor coef, bool accumulate) -> ()",
    reference=_sum_reference,
    fake=lambda out, terms, coef, accumulate: None,
)
node_sum = _backends.served("node_sum", _node_sum, _sum_reference)
"""``out = sum_n coef[n, 0] (terms[n] - coef[n, 1])`` per channel, on top of what `out` holds if `accumulate`.

With coef = (w / standard deviation, mean) these are the terms w BN(z) of a node (DESIGN: the normalisation is folded
in). out, terms: maps ``[B, H, W, C]``; coef: ``[N, 2, C]``.
"""

_node_dots = define(
    "node_dots(Tensor[] gs, Tensor[] terms, Tensor means) -> Tensor",
    reference=_dots_reference,
    fake=lambda gs, terms, means: means.new_empty(len(terms), 2, means.shape[1]),
)
node_dots = _backends.served("node_sum", _node_dots, _dots_reference)
"""Sums over batch and pixels of ``gs[n]`` and of ``gs[n] (terms[n] - means[n])``: ``[N, 2, C]``.

They give both the gradients of the weights and those of the normalisations. Neighbours that share a gradient should
follow each other: its own sum is then made once. gs, terms: maps ``[B, H, W, C]``; means: ``[N, C]``.
"""

_backends.register("node_sum", "node_sum", "node_dots")
