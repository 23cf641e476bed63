"""Maps stored in bfloat16: what is stored so, what stays float32, and how far the gradients are from float64."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas import backend
from fastnas.engine.mixture import Alphas
from fastnas.engine.networks import build_supernet
from fastnas.engine.supernet import Supernet
from fastnas.errors import UserError
from fastnas.nn import register_candidate
from fastnas.nn.candidates import _REGISTRY
from fastnas.profiler.step import Inputs, predict
from fastnas.search import build_method, resolve, run_search
from fastnas.spaces import DartsSpace, build_space

CASES = [("fused", 1), ("lean", 1), ("fused", 4)]


def build(k: int = 1, space: DartsSpace | None = None, **settings: Any) -> tuple[Supernet, Alphas]:
    torch.manual_seed(0)
    space = space or DartsSpace(nodes=2)
    supernet = Supernet(space, channels=8, cells=3, classes=10, k=k, **settings)
    return supernet, Alphas(space, edge_normalisation=k > 1)


def loss_of(supernet: Supernet, alphas: Alphas, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, 10, 11, generator=generator, dtype=torch.double).to(dtype)
    y, device = torch.randint(0, 10, (8,), generator=generator), alphas.alpha_normal.device
    return F.cross_entropy(supernet(x.to(device), alphas()).to(dtype), y.to(device))


def distances(found: list[list[Tensor]], exact: list[list[Tensor]]) -> list[float]:
    """Relative distances of lists of tensors, each as one vector."""
    flat = [[torch.cat([part.double().flatten() for part in parts]) for parts in lists] for lists in (found, exact)]
    return [float((a - b).norm() / b.norm()) for a, b in zip(*flat, strict=True)]


def gradients(supernet: Supernet, alphas: Alphas, dtype: torch.dtype, autocast: bool = False) -> list[list[Tensor]]:
    """Of the weights and of the alphas."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(supernet, alphas, dtype)
    weights, arch = list(supernet.parameters()), list(alphas.parameters())
    found = torch.autograd.grad(loss, [*weights, *arch])
    return [list(found[: len(weights)]), list(found[len(weights) :])]


@pytest.mark.parametrize(("executor", "k"), CASES)
def test_gradients_are_within_some_dozens_of_roundings_of_float64(executor: str, k: int) -> None:
    """One rounding is half of `eps`, and a gradient has passed some dozens of them, each with ReLUs that switch. What
    autocast computes, which rounds products as well, is further away."""
    with backend("reference"):
        ours = gradients(*build(k, executor=executor, storage="bfloat16"), torch.float32)
        exact = gradients(*(module.double() for module in build(k)), torch.double)
        autocast = gradients(*build(k), torch.float32, autocast=True) if k > 1 else None
    assert {part.dtype for parts in ours for part in parts} == {torch.float32}
    assert max(distances(ours, exact)) < 32 * torch.finfo(torch.bfloat16).eps
    if autocast is not None:
        assert all(near < usual for near, usual in zip(distances(ours, exact), distances(autocast, exact), strict=True))


@pytest.mark.parametrize(("executor", "k"), CASES)
def test_all_maps_between_stem_and_classifier_are_half_and_nothing_else(executor: str, k: int) -> None:
    supernet, alphas = build(k, executor=executor, storage="bfloat16")
    saved: list[Tensor] = []
    with backend("reference"), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss_of(supernet, alphas)
    parameters = {parameter.data_ptr() for parameter in supernet.parameters()}
    half = [t for t in saved if t.dtype == torch.bfloat16 and t.numel()]
    wide = [t for t in saved if t.dtype == torch.float32 and t.data_ptr() not in parameters]
    assert half and all(t.dim() >= 4 for t in half)
    # The stem's own input and output, the last map before the classifier, and what is no map.
    assert sum(t.dim() >= 4 and t.shape[0] == 8 for t in wide) <= 4
    assert {buffer.dtype for buffer in supernet.buffers()} == {torch.float32, torch.int64}


def test_evaluation_and_sampled_paths_store_half_as_well() -> None:
    supernet, alphas = build(executor="fused", storage="bfloat16")
    plain = copy.deepcopy(supernet)
    plain.executor = "plain"
    genotype = supernet.space.random_genotype(random.Random(0))
    x = torch.randn(8, 3, 10, 11)
    for network in (supernet, plain):
        network.eval()
    with backend("reference"), torch.no_grad():
        for architecture in (alphas(), genotype):
            ours, expected = supernet(x, architecture), plain(x, architecture)
            assert ours.dtype == torch.float32
            assert 0 < float((ours - expected).norm() / expected.norm()) < 16 * torch.finfo(torch.bfloat16).eps


def test_registered_candidates_work_on_float32_beside_the_stages() -> None:
    @register_candidate("conv_1x1_here")
    def conv(channels: int, stride: int, searching: bool) -> nn.Module:
        return nn.Conv2d(channels, channels, 1, stride)

    try:
        space = DartsSpace(nodes=2, candidates=("none", "skip_connect", "conv_1x1_here"))
        with backend("reference"):
            ours = gradients(*build(space=space, executor="fused", storage="bfloat16"), torch.float32)
            exact = gradients(*(module.double() for module in build(space=space)), torch.double)
        assert max(distances(ours, exact)) < 32 * torch.finfo(torch.bfloat16).eps
    finally:
        del _REGISTRY["conv_1x1_here"]


def test_a_prediction_halves_what_is_saved() -> None:
    saved = {}
    for storage, executor in itertools.product(("float32", "bfloat16"), ("fused", "lean")):
        flags = {"method": "darts", "data": "cifar10", "channels": 8, "cells": 3, "nodes": 2, "batch_size": 32}
        plan = resolve({**flags, "storage": storage, "executor": executor})
        method = build_method(plan, 10, 3, torch.device("cpu"))
        method.start_epoch(1)
        saved[storage, executor] = predict(method, Inputs((3, 16, 16), 32), name="darts").saved_bytes
    for executor in ("fused", "lean"):
        assert 0.45 < saved["bfloat16", executor] / saved["float32", executor] < 0.75


def test_what_has_no_storage_says_so(tmp_path) -> None:
    with pytest.raises(UserError, match="the plain executor has no storage bfloat16: give --executor fused or lean"):
        build(executor="plain", storage="bfloat16")
    with pytest.raises(UserError, match="unknown storage 'int8'; there are float32, bfloat16"):
        build(storage="int8")
    with pytest.raises(UserError, match="the space nasbench201 has no storage bfloat16: leave out --storage"):
        space = build_space("nasbench201", nodes=4, cells=3)
        build_supernet(space, channels=4, cells=3, classes=2, executor="fused", storage="bfloat16")
    plan = resolve({"method": "pc_darts", "storage": "bfloat16", "device": "cpu"})
    with pytest.raises(UserError, match="storage bfloat16 is for GPUs, and this search runs on cpu: drop --storage"):
        run_search(plan, tmp_path / "run")
    plan = resolve({"method": "pc_darts", "storage": "bfloat16", "random_channels": True})
    with pytest.raises(UserError, match="random channels run on the plain executor"):
        build_method(plan, 10, 3, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize(("executor", "k"), CASES)
def test_on_a_gpu_too(executor: str, k: int) -> None:
    exact = gradients(*(module.double() for module in build(k)), torch.double)
    supernet, alphas = build(k, executor=executor, storage="bfloat16")
    ours = gradients(supernet.cuda(), alphas.cuda(), torch.float32)
    assert (
        max(distances([[part.cpu() for part in parts] for parts in ours], exact)) < 32 * torch.finfo(torch.bfloat16).eps
    )
