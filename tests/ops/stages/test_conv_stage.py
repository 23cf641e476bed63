import pytest
import torch

from fastnas import _backends
from fastnas.ops.stages import conv_stage

CHANNELS = (1, 3, 4, 8, 16, 20, 32)
SIZES = ((1, 1, 1), (3, 5, 7), (2, 17, 33))


def relative(value, expected):
    return float((value - expected).norm() / expected.norm().clamp_min(1e-30)) if expected.numel() else 0.0


def spaced_map(*shape, dtype, gap=3):
    """A map whose pixels have other channels between them."""
    return torch.randn(*shape[:-1], shape[-1] + gap, dtype=dtype)[..., gap:]


def weights(branches, channels, dtype):
    depthwise = [torch.randn(channels, 1, side, side, dtype=dtype) / side for side, _ in branches]
    pointwise = [torch.randn(channels, channels, 1, 1, dtype=dtype) / channels**0.5 for _ in branches]
    return depthwise, pointwise


def first_stage(channels, size, stride, dtype):
    """All four convolutions and, for even channels, a strided identity, on one input."""
    branches = ((3, 1), (5, 1), (3, 2), (5, 2))
    depthwise, pointwise = weights(branches, channels, dtype)
    parts = [number for output, (_, dilation) in enumerate(branches) for number in (0, output, 0, dilation, 0)]
    if channels % 2 == 0:
        parts += [0, 4, 0, 1, 0, 0, 4, channels // 2, 1, 1]
        depthwise += [torch.empty(0, dtype=dtype)] * 2
        pointwise += [torch.randn(channels // 2, channels, 1, 1, dtype=dtype) for _ in range(2)]
    return [spaced_map(*size, channels, dtype=dtype)], None, parts, depthwise, pointwise, stride


def second_stage(channels, size, stride, dtype):
    """Two normalised inputs, one branch each."""
    branches = ((3, 1), (5, 1))
    xs = [torch.randn(*size, channels, dtype=dtype) for _ in branches]
    norms = torch.rand(2, 2, channels, dtype=dtype) + 0.2
    parts = [number for output in range(2) for number in (output, output, 0, 1, 0)]
    return xs, norms, parts, *weights(branches, channels, dtype), stride


def preprocess(channels, size, stride, dtype):
    """A pointwise convolution to another number of channels."""
    pointwise = [torch.randn(channels + 5, channels, 1, 1, dtype=dtype)]
    return (
        [spaced_map(*size, channels, dtype=dtype)],
        None,
        [0, 0, 0, 1, 0],
        [pointwise[0].new_empty(0)],
        pointwise,
        stride,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("make", [first_stage, second_stage, preprocess])
def test_native_equals_the_reference(make, stride, dtype):
    if _backends.choose("conv_stage", "cpu") != "native":
        pytest.skip("no compiled kernels")
    torch.manual_seed(0)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for channels in CHANNELS:
        for size in SIZES:
            arguments = make(channels, size, stride, dtype)
            xs, norms, parts, depthwise, pointwise, _ = arguments
            z, stats = conv_stage.conv_stage_fwd(*arguments, True)
            expected = conv_stage._fwd_reference(*arguments, True)
            errors = [relative(z, expected[0]), relative(stats, expected[1])]
            gs = [spaced_map(*z.shape[1:], dtype=dtype) for _ in z]
            coef = torch.randn(len(z), 4, z.shape[-1], dtype=dtype)
            base = spaced_map(*xs[0].shape, dtype=dtype) if norms is None else None
            given = (gs, list(z), coef, xs, norms, parts, depthwise, pointwise, stride, base)
            results = conv_stage.conv_stage_bwd(*given, True, True)
            expected = conv_stage._bwd_reference(*given, True, True)
            errors += [relative(value, want) for value, want in zip(results, expected, strict=True)]
            assert max(errors) < tolerance, (channels, size, errors)


def test_reference_is_relu_depthwise_pointwise_and_its_gradient_goes_through_the_normalisation():
    """By plain autograd: mixed sum of normalised outputs, against dz = w r (g - mean g - r^2 (z - mean) S / n)."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 5, dtype=torch.double, requires_grad=True)
    depthwise = torch.randn(6, 1, 3, 3, dtype=torch.double, requires_grad=True)
    pointwise = torch.randn(6, 6, 1, 1, dtype=torch.double, requires_grad=True)
    z = torch.nn.functional.conv2d(x.relu(), depthwise, padding=2, dilation=2, groups=6)
    z = torch.nn.functional.conv2d(z, pointwise)
    y = torch.nn.functional.batch_norm(z, None, None, training=True)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, [x, depthwise, pointwise], g)

    maps = [x.detach().permute(0, 2, 3, 1).contiguous()]
    parts = [0, 0, 0, 2, 0]
    arguments = (maps, None, parts, [depthwise.detach()], [pointwise.detach()], 1)
    z, stats = conv_stage.conv_stage_fwd(*arguments, True)
    mean, rstd = stats[0, 0], torch.rsqrt(stats[0, 1] + 1e-5)
    g = g.permute(0, 2, 3, 1).contiguous()
    count = g[..., 0].numel()
    dots = (g * (z[0] - mean)).sum((0, 1, 2))
    coef = torch.stack([rstd, -(rstd**3) * dots / count, -rstd * g.sum((0, 1, 2)) / count, mean])[None]
    dx, _, flat = conv_stage.conv_stage_bwd([g], [z[0]], coef, *arguments, None, True, True)
    torch.testing.assert_close(dx[0].permute(0, 3, 1, 2), expected[0])
    torch.testing.assert_close(flat, torch.cat([gradient.flatten() for gradient in expected[1:]]))


def test_what_is_not_asked_for_has_no_elements():
    arguments = first_stage(4, (2, 4, 4), 1, torch.float32)
    z, stats = conv_stage.conv_stage_fwd(*arguments, False)
    assert stats.numel() == 0
    given = (list(z), list(z), torch.randn(len(z), 4, 4), *arguments, None)
    assert [part.numel() > 0 for part in conv_stage.conv_stage_bwd(*given, True, False)] == [True, False, False]
    assert [part.numel() > 0 for part in conv_stage.conv_stage_bwd(*given, False, True)] == [False, False, True]


def test_the_number_of_threads_changes_no_result_of_the_forward_pass():
    arguments = first_stage(16, (5, 9, 8), 1, torch.float32)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(conv_stage.conv_stage_fwd(*arguments, True))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bad_arguments_are_refused_by_name():
    if _backends.choose("conv_stage", "cpu") != "native":
        pytest.skip("no compiled kernels")
    xs, norms, parts, depthwise, pointwise, stride = first_stage(4, (1, 4, 4), 1, torch.float32)
    with pytest.raises(RuntimeError, match="conv_stage_fwd: the channels of a map must be neighbours"):
        conv_stage.conv_stage_fwd(
            [xs[0].transpose(1, 3).contiguous().transpose(1, 3)], norms, parts, depthwise, pointwise, stride, True
        )
    with pytest.raises(RuntimeError, match="every part needs five integers"):
        conv_stage.conv_stage_fwd(xs, norms, parts[:-1], depthwise, pointwise, stride, True)
    with pytest.raises(RuntimeError, match="names a source or an output that is not there"):
        conv_stage.conv_stage_fwd(xs, norms, [1, *parts[1:]], depthwise, pointwise, stride, True)
