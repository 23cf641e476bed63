"""Batch normalisation with exact statistics against BatchNorm2d."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastnas.engine import stems
from fastnas.engine.exact_norm import exact_norm
from fastnas.engine.fused_conv import fuse_convolutions
from fastnas.engine.mixture import Alphas
from fastnas.engine.stems import build_stem
from fastnas.engine.supernet import Supernet
from fastnas.engine.training import batch_statistics
from fastnas.spaces import DartsSpace

LAYOUTS = {"nchw": torch.contiguous_format, "channels-last": torch.channels_last}


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.double, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double).to(dtype)


def module(channels: int, **settings) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, **settings).double()
    norm.load_state_dict(norm.state_dict() | {"weight": drawn((channels,), seed=1), "bias": drawn((channels,), seed=2)})
    return norm


def outcome(run, norm: nn.BatchNorm2d, x: Tensor) -> list[Tensor]:
    """Result, gradients of x, gamma and beta, and what is left in the buffers."""
    norm, x = copy.deepcopy(norm), x.detach().requires_grad_()
    y = run(norm, x)
    return [y, *torch.autograd.grad(y, [x, norm.weight, norm.bias], drawn(y.shape, y.dtype, 3)), *norm.buffers()]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", [{}, {"momentum": None}, {"eps": 0.1, "momentum": 0.5}], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7, 4), (2, 16, 8, 8), (2, 1, 1, 1)], ids=str)
def test_numbers_and_buffers_are_those_of_the_module(shape: tuple[int, ...], settings: dict, layout: str) -> None:
    norm, x = module(shape[1], **settings), (2 + 3 * drawn(shape)).contiguous(memory_format=LAYOUTS[layout])
    for ours, theirs in zip(outcome(exact_norm, norm, x), outcome(nn.BatchNorm2d.forward, norm, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_evaluation_is_the_modules_own_and_batch_statistics_leave_no_trace() -> None:
    norm, x = module(4).eval(), 1 + drawn((3, 4, 5, 5))
    assert torch.equal(exact_norm(norm, x), norm(x))
    with batch_statistics(norm):
        torch.testing.assert_close(exact_norm(norm, x), norm(x), rtol=1e-11, atol=1e-11)
    assert norm.num_batches_tracked == 0 and not norm.running_mean.any()


@pytest.mark.parametrize("kind", ["cifar", "imagenet"])
def test_a_stem_in_channels_last_is_as_near_to_float64_as_one_in_nchw(kind: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # PyTorch adds up all pixels of a thread
    try:
        torch.manual_seed(0)
        stem = build_stem(kind, 3, 8)
        x = drawn((64, 3, 32, 32) if kind == "cifar" else (16, 3, 128, 128))
        truth = copy.deepcopy(stem).double()(x)
        last = x.float().contiguous(memory_format=torch.channels_last)
        nchw, exact = copy.deepcopy(stem)(x.float()), copy.deepcopy(stem)(last, exact=True)
    finally:
        torch.set_num_threads(threads)
    for expected, *values in zip(truth, nchw, exact, strict=True):
        off_nchw, off = (((value - expected).norm() / expected.norm()).item() for value in values)
        assert off <= 2 * off_nchw


def test_fused_networks_have_exact_stems_and_plain_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[nn.BatchNorm2d] = []
    monkeypatch.setattr(stems, "exact_norm", lambda norm, x: (calls.append(norm), norm(x))[1])
    space = DartsSpace(nodes=1)
    supernet, alphas = Supernet(space, channels=4, cells=3, classes=2), Alphas(space)
    for executor in ("plain", "fused", "lean"):
        supernet.executor = executor
        supernet(torch.randn(2, 3, 8, 8), alphas())
    assert len(calls) == 2
    derived = build_stem("imagenet", 3, 8)
    derived(torch.randn(2, 3, 32, 32))
    fuse_convolutions(derived)
    derived(torch.randn(2, 3, 32, 32))
    assert len(calls) == 5


def test_a_fake_batch_stays_fake() -> None:
    """Predictions of memory run real weights on fake batches, and what is real there would be computed."""
    batch = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    fake = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(batch)
    assert isinstance(exact_norm(nn.BatchNorm2d(4), fake), FakeTensor)
