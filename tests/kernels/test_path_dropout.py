from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastnas
from fastnas.reference.path_dropout import path_dropout as reference
from fastnas.testing import DTYPES, Case

K = 5


def bool_mask(groups: int, paths: int = K) -> Tensor:
    return torch.rand(groups, paths, generator=torch.Generator().manual_seed(0)) < 0.5


@pytest.mark.parametrize("scaled", [False, True], ids=["bool", "scaled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_every_gradient(check, device, case: Case, dtype: torch.dtype, scaled: bool) -> None:
    mask = (bool_mask(3) * 1.7 if scaled else bool_mask(3)).to(device)
    check(lambda f, *xs: f(xs, mask), fastnas.path_dropout, reference, case.tensors(K, dtype))


@pytest.mark.parametrize("shape", [(7, 1), (33, 3, 2), (2, 9000), (3, 7, 37, 23)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 11])
def test_samples_larger_and_smaller_than_a_tile(check, device, shape: tuple[int, ...], groups: int) -> None:
    mask = bool_mask(groups, 3).to(device)
    check(lambda f, *xs: f(xs, mask), fastnas.path_dropout, reference, [torch.randn(shape) for _ in range(3)])


def test_the_batch_may_lie_inside(check, device) -> None:
    mask = bool_mask(2, 3).to(device)
    xs = [torch.randn(4, 3, 6, 5).transpose(0, 1) for _ in range(3)]
    check(lambda f, *xs: f(xs, mask), fastnas.path_dropout, reference, xs)
    y = fastnas.path_dropout([x.to(device) for x in xs], mask)
    assert y.stride() == torch.empty_like(xs[0]).stride()


def test_dropped_paths_are_not_read(device: torch.device) -> None:
    kept, dropped = torch.randn(4, 3, 5, 5, device=device), torch.full((4, 3, 5, 5), torch.nan, device=device)
    xs = [kept.requires_grad_(), dropped.requires_grad_()]
    y = fastnas.path_dropout(xs, torch.tensor([[True, False]], device=device))
    grads = torch.autograd.grad(y, xs, torch.full_like(y, torch.inf))
    assert torch.equal(y, kept)
    assert torch.equal(grads[1], torch.zeros_like(kept))


def test_drop_path_keeps_or_drops_whole_samples(device: torch.device) -> None:
    x = torch.rand(64, 3, device=device) + 1
    y = fastnas.drop_path(x, 0.5)
    kept = y[:, 0] != 0
    assert 0 < kept.sum() < 64
    torch.testing.assert_close(y[kept], 2 * x[kept])
    assert not y[~kept].any()
