"""Microseconds a call of every op, with tensors so small that nothing else counts; plain PyTorch beside it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastnas
from bench.overhead import MODES

Case = tuple[Callable[..., Any], Callable[..., Any], list[Tensor | None]]


def reference(stem: str) -> Any:
    """The module of an op's plain version, imported late: commits that lack an op can still measure the others."""
    return importlib.import_module(f"fastnas.reference.{stem}")


def maps(count: int) -> list[Tensor]:
    return [torch.randn(2, 4, 4, 4, requires_grad=True) for _ in range(count)]


def weights(count: int) -> Tensor:
    return torch.softmax(torch.randn(count), 0).requires_grad_()


def mixed_sum() -> Case:
    plain = reference("mixed_sum").mixed_sum
    return (
        lambda w, *x: fastnas.mixed_sum(x, w),
        lambda w, *x: plain(x, w),
        [weights(8), *maps(8)],
    )


def norm_mixed_sum() -> Case:
    plain = reference("norm_mixed_sum").norm_mixed_sum
    return (
        lambda w, *y: fastnas.norm_mixed_sum(y, w),
        lambda w, *y: plain(y, w),
        [weights(4), *maps(4)],
    )


def partial_shuffle() -> Case:
    plain = reference("partial_shuffle").partial_shuffle
    return (
        lambda w, b, *m: fastnas.partial_shuffle(m, w, b),
        lambda w, b, *m: plain(m, w, b),
        [weights(8), torch.randn(2, 12, 4, 4, requires_grad=True), *maps(8)],
    )


def path_dropout() -> Case:
    plain = reference("path_dropout").path_dropout
    mask = torch.tensor([[True, False] * 4, [False, True] * 4])
    return (
        lambda m, *x: fastnas.path_dropout(x, m),
        lambda m, *x: plain(x, m),
        [mask, *maps(8)],
    )


def gumbel_softmax() -> Case:
    logits = torch.randn(14, 8, requires_grad=True)
    draw = reference("gumbel_softmax")
    noise = draw.gumbel_from_bits(draw.random_bits(logits.numel(), 5), torch.float32).view(14, 8)

    def plain(logits: Tensor, noise: Tensor) -> Tensor:
        torch.empty_like(logits).exponential_().log().neg()  # drawn as F.gumbel_softmax does, for the time it takes
        return ((logits + noise) / 0.7).softmax(-1)

    return lambda logits, _: fastnas.gumbel_softmax(logits, 0.7, seed=5), plain, [logits, noise]


def depthwise_bank() -> Case:
    plain = reference("depthwise_bank").depthwise_bank
    kernels = [torch.randn(4, 1, size, size, requires_grad=True) for size in (3, 5, 3, 5)]
    return (
        lambda x, *w: fastnas.depthwise_bank(x, w, (1, 1, 2, 2)),
        lambda x, *w: plain(x, w, (1, 1, 2, 2)),
        [*maps(1), *kernels],
    )


OPS = (mixed_sum, norm_mixed_sum, partial_shuffle, path_dropout, gumbel_softmax, depthwise_bank)
CASES = {case.__name__: case for case in OPS}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", CASES)
def test_overhead(overhead, op: str, mode: str) -> None:
    function, plain, inputs = CASES[op]()
    overhead(function, plain, inputs, op=op, mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", ["mixed_sum", "gumbel_softmax"])
def test_overhead_of_each_backend_of_a_gpu(overhead, gpu_backend: str, op: str, mode: str) -> None:
    function, plain, inputs = CASES[op]()
    overhead(function, plain, inputs, op=op, mode=mode)
