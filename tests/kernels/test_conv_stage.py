from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastnas
from fastnas.engine.mixture import Alphas
from fastnas.engine.supernet import Supernet
from fastnas.ops._library import accumulate_dtype
from fastnas.ops.stages import conv_stage
from fastnas.spaces import DartsSpace

BRANCHES = ((3, 1), (5, 2))  # sides and dilations
CASES = [(1, (1, 1, 1)), (3, (2, 5, 7)), (20, (1, 6, 5))]


class Draw:
    """Random tensors on one device: maps of one dtype, and of that of its sums what is no map."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.dtype = dtype
        self.like = {"dtype": accumulate_dtype(dtype), "device": device}

    def map(self, *shape: int, gap: int = 3) -> Tensor:
        """Pixels with other channels between them."""
        return torch.randn(*shape[:-1], shape[-1] + gap, **self.like).to(self.dtype)[..., gap:]

    def weights(self, branches, channels: int) -> tuple[list[Tensor], list[Tensor]]:
        depthwise = [torch.randn(channels, 1, side, side, **self.like) / side for side, _ in branches]
        return depthwise, [torch.randn(channels, channels, 1, 1, **self.like) / channels**0.5 for _ in branches]


def first_stage(draw: Draw, channels: int, size: tuple[int, ...], stride: int):
    """Two convolutions and, for even channels, a strided identity, on one input."""
    depthwise, pointwise = draw.weights(BRANCHES, channels)
    parts = [number for output, (_, dilation) in enumerate(BRANCHES) for number in (0, output, 0, dilation, 0)]
    if channels % 2 == 0:
        parts += [0, 2, 0, 1, 0, 0, 2, channels // 2, 1, 1]
        depthwise += [torch.empty(0, **draw.like)] * 2
        pointwise += [torch.randn(channels // 2, channels, 1, 1, **draw.like) for _ in range(2)]
    return [draw.map(*size, channels)], None, parts, depthwise, pointwise, stride


def second_stage(draw: Draw, channels: int, size: tuple[int, ...], stride: int):
    """Two normalised inputs, one branch each."""
    xs = [draw.map(*size, channels, gap=gap) for gap in (0, 2)]
    norms = torch.rand(2, 2, channels, **draw.like) + 0.2
    parts = [number for output in range(2) for number in (output, output, 0, 1, 0)]
    return xs, norms, parts, *draw.weights(((3, 1), (5, 1)), channels), stride


def preprocess(draw: Draw, channels: int, size: tuple[int, ...], stride: int):
    """A pointwise convolution to another number of channels."""
    pointwise = [torch.randn(channels + 5, channels, 1, 1, **draw.like)]
    return [draw.map(*size, channels)], None, [0, 0, 0, 1, 0], [pointwise[0].new_empty(0)], pointwise, stride


def double(value):
    if isinstance(value, list):
        return [double(item) for item in value]
    return value.double() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("make", [first_stage, second_stage, preprocess])
@pytest.mark.parametrize(("channels", "size"), CASES, ids=str)
def test_output_statistics_and_every_gradient(device, near, make, channels, size, stride, dtype) -> None:
    draw = Draw(dtype, device)
    given = make(draw, channels, size, stride)
    exact = [double(value) for value in given]
    ours = conv_stage.conv_stage_fwd(*given, True)
    expected = conv_stage._fwd_reference(*exact, True)
    for value, want in zip(ours, expected, strict=True):
        near(value, want)
    z = ours[0]
    gs = [draw.map(*z.shape[1:]) for _ in z]
    coef = torch.randn(len(z), 4, z.shape[-1], **draw.like)
    base = draw.map(*given[0][0].shape, gap=1) if given[1] is None else None
    given = (gs, list(z), coef, *given, base)
    ours = conv_stage.conv_stage_bwd(*given, True, True)
    for value, want in zip(ours, conv_stage._bwd_reference(*map(double, given), True, True), strict=True):
        assert value.dtype == (dtype if value is ours[0] else accumulate_dtype(dtype))
        # The gradient between the two convolutions is stored too.
        near(value, want, torch.finfo(dtype).eps if dtype == torch.bfloat16 else None)


def test_what_is_not_asked_for_has_no_elements(device: torch.device) -> None:
    given = first_stage(Draw(torch.float32, device), 4, (2, 4, 4), 1)
    z, stats = conv_stage.conv_stage_fwd(*given, False)
    assert stats.numel() == 0
    given = (list(z), list(z), torch.randn(len(z), 4, 4, device=device), *given, None)
    assert [part.numel() > 0 for part in conv_stage.conv_stage_bwd(*given, True, False)] == [True, False, False]
    assert [part.numel() > 0 for part in conv_stage.conv_stage_bwd(*given, False, True)] == [False, False, True]


def test_results_are_the_same_every_time(device: torch.device) -> None:
    given = first_stage(Draw(torch.float32, device), 8, (3, 9, 10), 1)
    first, second = (conv_stage.conv_stage_fwd(*given, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("make", [first_stage, second_stage])
def test_empty_batch(device: torch.device, make) -> None:
    given = make(Draw(torch.float32, device), 4, (0, 5, 5), 2)
    z, stats = conv_stage.conv_stage_fwd(*given, True)
    assert z.numel() == 0
    assert not stats.any()
    given = (list(z), list(z), torch.ones(len(z), 4, 4, device=device), *given, None)
    dx, _, dw = conv_stage.conv_stage_bwd(*given, True, True)
    assert dx.shape == (len(given[3]), *given[3][0].shape)
    assert not dw.any()


def test_a_search_step_with_maps_in_bfloat16_is_near_the_plain_one_in_float64(device: torch.device) -> None:
    """Statistics, sums and all gradients of parameters are float32; tolerances as in tests/engine/test_storage.py."""
    torch.manual_seed(0)
    space = DartsSpace(nodes=1, candidates=("none", "skip_connect", "max_pool_3x3", "sep_conv_3x3", "dil_conv_3x3"))
    supernet = Supernet(space, channels=4, cells=3, classes=5, k=2, executor="fused", storage="bfloat16")
    alphas = Alphas(space, edge_normalisation=True)
    x, y = torch.randn(4, 3, 8, 6), torch.tensor([1, 3, 0, 2])
    results = []
    for kind, where, dtype, backend in (("plain", "cpu", torch.double, "reference"), ("fused", device, None, "triton")):
        net, arch = (copy.deepcopy(module).to(where, dtype) for module in (supernet, alphas))
        net.executor = kind
        with fastnas.backend(backend):
            loss = F.cross_entropy(net(x.to(where, dtype), arch()), y.to(where))
            gradients = torch.autograd.grad(loss, [*net.parameters(), *arch.parameters()])
        assert {gradient.dtype for gradient in gradients} == {dtype or torch.float32}
        results.append(torch.cat([gradient.double().cpu().flatten() for gradient in gradients]))
    assert float((results[1] - results[0]).norm() / results[0].norm()) < 32 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(("nodes", "k", "executor"), [(2, 1, "fused"), (1, 2, "lean")])
def test_a_fused_search_step_equals_the_plain_one_in_float64(
    device: torch.device, nodes: int, k: int, executor: str
) -> None:
    """Loss, gradients of weights and alphas, and running statistics of a tiny supernet."""
    torch.manual_seed(0)
    candidates = ("none", "skip_connect", "max_pool_3x3", "sep_conv_3x3", "dil_conv_3x3")
    space = DartsSpace(nodes=nodes, candidates=candidates)
    supernet = Supernet(space, channels=4, cells=3, classes=5, k=k).double()
    alphas = Alphas(space, edge_normalisation=k > 1).double()
    x, y = torch.randn(2, 3, 8, 6, dtype=torch.double), torch.tensor([1, 3])
    results = []
    for kind, where, backend in (("plain", torch.device("cpu"), "reference"), (executor, device, "triton")):
        net, arch = copy.deepcopy(supernet).to(where), copy.deepcopy(alphas).to(where)
        net.executor = kind
        with fastnas.backend(backend):
            loss = F.cross_entropy(net(x.to(where), arch()), y.to(where))
            gradients = torch.autograd.grad(loss, [*net.parameters(), *arch.parameters()])
        results.append([loss, *gradients, *net.buffers()])
    for value, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(value.detach().cpu(), expected.detach(), rtol=1e-8, atol=1e-10)
