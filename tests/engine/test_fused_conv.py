"""Fused convolutions of derived networks: the numbers of the modules, forward, backward and in the statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastnas.engine import fused_conv
from fastnas.engine.derived import DerivedNetwork
from fastnas.engine.fused_conv import fuse_convolutions
from fastnas.nn import DilConv, FactorizedReduce, ReLUConvBN, SepConv
from fastnas.spaces import load_genotype

MODULES = {
    "sep 3x3": lambda: SepConv(6, 3, 1, affine=True),
    "sep 5x5, stride 2": lambda: SepConv(6, 5, 2, affine=True),
    "dil 3x3": lambda: DilConv(6, 3, 1, affine=True),
    "dil 5x5, stride 2": lambda: DilConv(6, 5, 2, affine=True),
    "1x1": lambda: ReLUConvBN(6, 4, affine=True),
    "reduce": lambda: FactorizedReduce(6, 8, affine=True),
}


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y, *torch.autograd.grad((y * direction).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_module_gives_the_same_numbers(name, memory_format):
    plain = MODULES[name]().double()
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    plain.apply(lambda m: nn.init.zeros_(m.weight[:1]) if isinstance(m, nn.BatchNorm2d) else None)
    fused = copy.deepcopy(plain)
    fuse_convolutions(fused)
    x = torch.randn(3, 6, 7, 8, dtype=torch.double).contiguous(memory_format=memory_format)
    for _ in range(2):
        for found, wanted in zip(gradients(fused, x), gradients(plain, x), strict=True):
            torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(dict(fused.named_buffers()), dict(plain.named_buffers()))
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x), rtol=0, atol=1e-10)


def test_a_network_gives_the_same_numbers_and_goes_through_the_stages(monkeypatch):
    plain = DerivedNetwork(load_genotype("PC_DARTS_cifar"), channels=4, cells=3, classes=3).double()
    fused = copy.deepcopy(plain)
    fuse_convolutions(fused)
    calls = []
    stage = fused_conv.conv_stage_fwd
    monkeypatch.setattr(fused_conv, "conv_stage_fwd", lambda *a: (calls.append(1), stage(*a))[1])
    x = torch.randn(4, 3, 12, 12, dtype=torch.double)
    for found, wanted in zip(gradients(fused, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    assert len(calls) > 40
    assert list(fused.state_dict()) == list(plain.state_dict())
    calls.clear()
    fused.eval()(x)
    assert not calls


def test_a_copy_trains_its_own_parameters():
    fused = SepConv(4, 3, 1, affine=True)
    fuse_convolutions(fused)
    other = copy.deepcopy(fused)
    other(torch.randn(2, 4, 5, 5)).sum().backward()
    assert other[1].weight.grad is not None and fused[1].weight.grad is None
    assert int(other[3].num_batches_tracked) == 1 and int(fused[3].num_batches_tracked) == 0


def test_autocast_and_large_kernels_run_the_modules(monkeypatch):
    monkeypatch.setattr(fused_conv, "conv_stage_fwd", None)
    large, small = SepConv(4, 7, 1, affine=True), SepConv(4, 3, 1, affine=True)
    fuse_convolutions(large)
    fuse_convolutions(small)
    assert large(torch.randn(2, 4, 9, 9)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert small(torch.randn(2, 4, 9, 9)).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODULES)
def test_on_a_gpu_float32_is_as_close_as_the_modules(name):
    plain = MODULES[name]().cuda()
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    fuse_convolutions(fused)
    x = torch.randn(3, 6, 7, 8, device="cuda").contiguous(memory_format=torch.channels_last)
    for found, wanted in zip(gradients(fused, x), gradients(exact, x.double()), strict=True):
        torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [4, 16])  # several pixels a vector; one
def test_weight_gradients_of_many_pixels_lose_no_digits(channels: int) -> None:
    """64 images of 32 x 32 on one thread: added up in one chain they were three times farther off than PyTorch's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        module = DilConv(channels, 5, 1, affine=True)
        drawn = torch.Generator().manual_seed(0)
        x, g = (torch.randn(64, channels, 32, 32, generator=drawn, dtype=torch.double) for _ in range(2))
        ours = copy.deepcopy(module)
        fuse_convolutions(ours)

        def weight_gradients(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, ...]:
            weights = [parameter for parameter in module.to(dtype).parameters() if parameter.dim() == 4]
            return torch.autograd.grad(module(x.to(dtype)), weights, g.to(dtype))

        plain, fused = (weight_gradients(one, torch.float) for one in (copy.deepcopy(module), ours))
        exact = weight_gradients(module, torch.double)
    finally:
        torch.set_num_threads(threads)
    for value, baseline, truth in zip(fused, plain, exact, strict=True):
        assert (value - truth).norm() <= 2 * (baseline - truth).norm()
