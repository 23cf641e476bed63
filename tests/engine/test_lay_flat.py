"""Weights of a cell's edges as one leaf: the same training, and the modules go on as views of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnas.engine.mixture import Alphas
from fastnas.engine.supernet import Supernet
from fastnas.nn import register_candidate
from fastnas.nn.candidates import _REGISTRY
from fastnas.spaces import DartsSpace


def build(executor="fused", space=None, **settings):
    torch.manual_seed(0)
    space = space or DartsSpace(nodes=2)
    supernet = Supernet(space, channels=4, cells=3, classes=10, executor=executor, **settings)
    return supernet.double(), Alphas(space).double()


def batch(dtype=torch.double):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 8, 8, generator=generator, dtype=dtype), torch.arange(4)


def train(supernet, alphas, parameters, steps=5):
    optimizer = torch.optim.SGD(parameters, 0.05, 0.9, weight_decay=1e-2)
    for _ in range(steps):
        x, y = batch()
        gradients = torch.autograd.grad(F.cross_entropy(supernet(x, alphas().detach()), y), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


@pytest.mark.parametrize("executor", ["fused", "lean"])
@pytest.mark.parametrize("k", [1, 2])
def test_training_of_the_leaves_is_that_of_the_modules_own_weights(executor, k):
    (flat, alphas), (plain, _) = build(executor, k=k), build("plain", k=k)
    leaves, own = flat.lay_flat(), plain.lay_flat()
    assert len(own) == len(list(plain.parameters())) > 5 * len(leaves)
    assert sum(map(torch.numel, leaves)) == sum(map(torch.numel, own))
    train(flat, alphas, leaves)
    train(plain, alphas, own)
    for (name, value), expected in zip(flat.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12, msg=name)


def test_extras_and_frozen_leaves():
    @register_candidate("test_conv_of_nobody")
    def _(channels, stride, searching):
        return nn.Conv2d(channels, channels, 1, stride, bias=False)

    try:
        supernet, alphas = build(space=DartsSpace(nodes=2, candidates=("none", "sep_conv_3x3", "test_conv_of_nobody")))
        plain, _ = build("plain", space=supernet.space)
        train(supernet, alphas, supernet.lay_flat(), 2)
        train(plain, alphas, plain.lay_flat(), 2)
        for value, expected in zip(supernet.state_dict().values(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
        for leaf in supernet.lay_flat():
            leaf.requires_grad_(False)
        x, y = batch()
        loss = F.cross_entropy(supernet(x, alphas()), y)
        assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(loss, list(alphas.parameters())))
    finally:
        del _REGISTRY["test_conv_of_nobody"]


def test_cells_without_weights_have_no_leaf():
    supernet, alphas = build(space=DartsSpace(nodes=2, candidates=("none", "skip_connect", "max_pool_3x3")))
    plain, _ = build("plain", space=supernet.space)
    leaves = supernet.lay_flat()
    assert len(leaves) < len(plain.lay_flat())  # those of the reduction cells, whose identities are convolutions
    train(supernet, alphas, leaves, 2)
    train(plain, alphas, plain.lay_flat(), 2)
    for value, expected in zip(supernet.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


def test_the_modules_weights_stay_views_through_loading_moving_and_copying():
    supernet, alphas = build()
    other, _ = build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    leaves = supernet.lay_flat()
    supernet.load_state_dict(other.state_dict())
    wide = copy.deepcopy(supernet)
    supernet.float().double()
    x, _ = batch()
    supernet.eval(), other.eval(), wide.eval()
    expected = other(x, alphas())
    torch.testing.assert_close(supernet(x, alphas()), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(wide(x, alphas()), expected)
    assert all(a is b for a, b in zip(leaves, supernet.lay_flat(), strict=True))
    with torch.no_grad():
        for leaf in leaves:
            leaf.zero_()
    assert all(not parameter.any() for parameter in supernet.parameters())
    torch.testing.assert_close(wide(x, alphas()), expected)  # the copy has a leaf of its own
    with torch.no_grad():
        for leaf in wide.lay_flat():
            leaf.zero_()
    assert all(not parameter.any() for parameter in wide.parameters())
