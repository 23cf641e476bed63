"""Microseconds a call of every op, with tensors so small that nothing else counts; plain PyTorch beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastnas
import fastnas.reference.gumbel_softmax
import fastnas.reference.mixed_sum
import fastnas.reference.norm_mixed_sum
import fastnas.reference.partial_shuffle
import fastnas.reference.path_dropout
from bench.overhead import MODES
from fastnas import reference

Case = tuple[Callable[..., Any], Callable[..., Any], list[Tensor | None]]


def maps(count: int) -> list[Tensor]:
    return [torch.randn(2, 4, 4, 4, requires_grad=True) for _ in range(count)]


def weights(count: int) -> Tensor:
    return torch.softmax(torch.randn(count), 0).requires_grad_()


def mixed_sum() -> Case:
    return (
        lambda w, *x: fastnas.mixed_sum(x, w),
        lambda w, *x: reference.mixed_sum.mixed_sum(x, w),
        [weights(8), *maps(8)],
    )


def norm_mixed_sum() -> Case:
    return (
        lambda w, *y: fastnas.norm_mixed_sum(y, w),
        lambda w, *y: reference.norm_mixed_sum.norm_mixed_sum(y, w),
        [weights(4), *maps(4)],
    )


def partial_shuffle() -> Case:
    return (
        lambda w, b, *m: fastnas.partial_shuffle(m, w, b),
        lambda w, b, *m: reference.partial_shuffle.partial_shuffle(m, w, b),
        [weights(8), torch.randn(2, 12, 4, 4, requires_grad=True), *maps(8)],
    )


def path_dropout() -> Case:
    mask = torch.tensor([[True, False] * 4, [False, True] * 4])
    return (
        lambda m, *x: fastnas.path_dropout(x, m),
        lambda m, *x: reference.path_dropout.path_dropout(x, m),
        [mask, *maps(8)],
    )


def gumbel_softmax() -> Case:
    logits = torch.randn(14, 8, requires_grad=True)
    bits = reference.gumbel_softmax.random_bits(logits.numel(), 5)
    noise = reference.gumbel_softmax.gumbel_from_bits(bits, torch.float32).view(14, 8)

    def plain(logits: Tensor, noise: Tensor) -> Tensor:
        torch.empty_like(logits).exponential_().log().neg()  # drawn as F.gumbel_softmax does, for the time it takes
        return ((logits + noise) / 0.7).softmax(-1)

    return lambda logits, _: fastnas.gumbel_softmax(logits, 0.7, seed=5), plain, [logits, noise]


CASES = {case.__name__: case for case in (mixed_sum, norm_mixed_sum, partial_shuffle, path_dropout, gumbel_softmax)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", CASES)
def test_overhead(overhead, op: str, mode: str) -> None:
    function, plain, inputs = CASES[op]()
    overhead(function, plain, inputs, op=op, mode=mode)
