from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from fastnas.reference.norm_mixed_sum import norm_mixed_sum as reference
from fastnas.testing import DTYPES, MAPS, Case

op = importlib.import_module("fastnas.ops.norm_mixed_sum").norm_mixed_sum
K, J = 3, 1
SHAPES = [case for case in MAPS if case.name not in ("one-element", "empty-batch", "large")] + [
    Case("tail", (3, 7, 37, 23)),
    Case("one-channel", (2, 1, 9, 9)),
    Case("vectors", (33, 5)),
    Case("sequences", (4, 3, 50)),
]


def weights_for(count: int) -> Tensor:
    return torch.softmax(torch.linspace(-1, 1, count), 0)


def call(f, w: Tensor, *maps: Tensor) -> Tensor:
    return f(maps[:K], w, plain=maps[K:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_every_gradient(check, shape: Case, dtype: torch.dtype) -> None:
    check(call, op, reference, [weights_for(K + J), *shape.tensors(K + J, dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_evaluation(check, device, shape: Case, dtype: torch.dtype) -> None:
    channels = shape.shape[1]
    mean, var = torch.randn(K, channels, device=device), torch.rand(K, channels, device=device) + 0.5

    def evaluate(f, w: Tensor, *maps: Tensor) -> Tensor:
        stats = (mean, var) if maps[0].dtype != torch.float64 else (mean.double(), var.double())
        return f(maps[:K], w, *stats, plain=maps[K:], training=False)

    check(evaluate, op, reference, [weights_for(K + J), *shape.tensors(K + J, dtype)])


@pytest.mark.parametrize("count", [1, 8, 32])
def test_any_number_of_tensors_without_plain_ones(check, count: int) -> None:
    tensors = [weights_for(count), *Case("odd", (3, 5, 7, 9)).tensors(count)]
    check(lambda f, w, *ys: f(ys, w), op, reference, tensors)


def test_a_large_mean_costs_no_precision(check) -> None:
    ys = [y + 1000 for y in Case("tail", (3, 7, 37, 23)).tensors(K)]
    check(lambda f, w, *ys: f(ys, w), op, reference, [weights_for(K), *ys])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("trained", ["weights", "maps"])
def test_frozen_inputs(device: torch.device, trained: str, training: bool) -> None:
    shape = Case("tail", (3, 7, 37, 23), "channels_last")
    tensors = [t.to(device) for t in (weights_for(K + J), *shape.tensors(K + J))]
    leaves = tensors[:1] if trained == "weights" else tensors[1:]
    for t in leaves:
        t.requires_grad_()
    stats = () if training else (torch.zeros(K, 7, device=device), torch.ones(K, 7, device=device))
    results = []
    for f in (op, reference):
        y = f(tensors[1 : 1 + K], tensors[0], *stats, plain=tensors[1 + K :], training=training)
        results.append(torch.autograd.grad(y, leaves, tensors[1].detach()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    if trained == "maps":
        assert all(t.stride() == tensors[1].stride() for t in results[0])


def test_empty_batch(device: torch.device) -> None:
    ys = [torch.empty(0, 3, 4, 4, device=device, requires_grad=True) for _ in range(2)]
    w = torch.rand(2, device=device, requires_grad=True)
    y = op(ys, w)
    grads = torch.autograd.grad(y, [w, *ys], y)
    assert y.shape == (0, 3, 4, 4)
    assert torch.equal(grads[0], torch.zeros_like(w))


def test_running_statistics_are_updated(device: torch.device) -> None:
    ys = [y.to(device) for y in Case("tail", (3, 7, 37, 23)).tensors(K)]
    results = []
    for f in (op, reference):
        mean, var = [torch.zeros(7, device=device) for _ in ys], [torch.ones(7, device=device) for _ in ys]
        f(ys, weights_for(K).to(device), mean, var)
        results.append((*mean, *var))
    torch.testing.assert_close(*results)
