"""norm_stage: one compiled call against its steps, and these against BatchNorm2d."""

import pytest
import torch
import torch.nn.functional as F

import fastnas
from fastnas import _backends
from fastnas.ops.stages.norm_stage import (
    backward_step_by_step,
    forward_step_by_step,
    norm_stage_bwd,
    norm_stage_fwd,
)
from fastnas.ops.stages.source_layout import Convolutions, end_to_end

native = pytest.mark.skipif(_backends.choose("conv_stage", "cpu") != "native", reason="no compiled kernels")
EPS = 1e-5


def stage_of(kind: str, channels: int) -> Convolutions:
    """ReLUConvBN, FactorizedReduce, or half a SepConv."""
    if kind == "reduce":
        return Convolutions([0, 0, 0, 1, 0, 0, 0, channels, 1, 1], [0, 0], [channels, channels], 1)
    return Convolutions([0, 0, 0, 1, 0], [3 if kind == "separable" else 0], [2 * channels], 1)


def problem(kind: str, dtype: torch.dtype = torch.double, channels: int = 6):
    torch.manual_seed(0)
    stage = stage_of(kind, channels)
    stride = 2 if kind == "reduce" else 1
    x = torch.randn(3, 7, 6, channels + 2, dtype=dtype)[..., 2:]
    weights = torch.randn(stage.size(channels), dtype=dtype)
    g = torch.randn(3, -(-7 // stride), -(-6 // stride), 2 * channels, dtype=dtype)
    return stage, x, [weights] if kind == "pointwise" else stage.split(weights, channels), stride, g


def everything(forward, backward, stage, x, weights, stride, g, training: bool):
    given = None if training else torch.linspace(0.5, 2, 24, dtype=x.dtype).view(1, 2, 12)
    y, norms, stats = forward(stage, x, weights, stride, given, EPS)
    return [y, norms, stats, *backward(stage, g, y, norms, x, weights, stride, training, True, True)]


@native
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["pointwise", "reduce", "separable"])
def test_one_call_gives_what_the_steps_give(kind: str, training: bool, poisoned: None) -> None:
    given = problem(kind)
    ours = everything(norm_stage_fwd, norm_stage_bwd, *given, training)
    with fastnas.backend("reference"):
        theirs = everything(forward_step_by_step, backward_step_by_step, *given, training)
    for value, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_it_is_relu_convolution_and_batch_normalisation(training: bool) -> None:
    stage, x, weights, stride, g = problem("separable")
    y, norms, stats = norm_stage_fwd(stage, x, weights, stride, None, EPS)
    given = torch.stack([norms[0, 0] + 0.1, torch.rand(12, dtype=torch.double) + 1])[None]
    if not training:
        y, norms, _ = norm_stage_fwd(stage, x, weights, stride, given, EPS)
    image, flat = x.permute(0, 3, 1, 2).clone().requires_grad_(), end_to_end(weights, x).clone().requires_grad_()
    kernel, matrix = stage.split(flat, 6)
    z = F.conv2d(F.conv2d(F.relu(image), kernel, padding=1, groups=6), matrix)
    running = given[0].clone()
    expected = F.batch_norm(z, running[0], running[1], training=training, eps=EPS)
    torch.testing.assert_close(y, expected.permute(0, 2, 3, 1))
    dx, dw = torch.autograd.grad((expected * g.permute(0, 3, 1, 2)).sum(), [image, flat])
    found = norm_stage_bwd(stage, g, y, norms, x, weights, stride, training, True, True)
    torch.testing.assert_close(found[0], dx.permute(0, 2, 3, 1))
    torch.testing.assert_close(found[1], dw)
    if training:
        torch.testing.assert_close(stats[0, 1], z.var((0, 2, 3), correction=0))


@native
@pytest.mark.parametrize("need_dx, need_dw", [(True, False), (False, True)])
def test_only_what_is_asked_for(need_dx: bool, need_dw: bool) -> None:
    stage, x, weights, stride, g = problem("reduce")
    y, norms, _ = norm_stage_fwd(stage, x, weights, stride, None, EPS)
    dx, dw = norm_stage_bwd(stage, g, y, norms, x, weights, stride, True, need_dx, need_dw)
    assert [bool(dx.numel()), bool(dw.numel())] == [need_dx, need_dw]


@native
@pytest.mark.parametrize("count, message", [(-1, "weights are missing"), (1, "more weights than parts")])
def test_weights_that_do_not_fit_are_an_error(count: int, message: str) -> None:
    stage, x, weights, stride, _ = problem("pointwise")
    with pytest.raises(RuntimeError, match=message):
        norm_stage_fwd(stage, x, [torch.ones(len(weights[0]) + count, dtype=x.dtype)], stride, None, EPS)


@native
def test_the_flat_ops_keep_the_rules_of_custom_ops() -> None:
    stage, x, weights, stride, g = problem("reduce", torch.float32)
    tests = ("test_schema", "test_faketensor")
    flat = end_to_end(weights, x)
    forward = (x, flat, stage.flat_shapes, stage.parts, stride, None, EPS)
    torch.library.opcheck(torch.ops.fastnas.norm_stage_fwd.default, forward, test_utils=tests)
    y, norms, _ = torch.ops.fastnas.norm_stage_fwd(*forward)
    backward = (g, y, norms, x, flat, stage.flat_shapes, stage.parts, stride, True, True, True)
    torch.library.opcheck(torch.ops.fastnas.norm_stage_bwd.default, backward, test_utils=tests)
