"""Results too large for the caches, which the native ops write past them: 34 MB and more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import fastnas
from fastnas.reference.mixed_sum import mixed_sum as mixed_sum_reference
from fastnas.reference.norm_mixed_sum import norm_mixed_sum as norm_mixed_sum_reference
from fastnas.reference.partial_shuffle import partial_shuffle as partial_shuffle_reference
from fastnas.reference.path_dropout import path_dropout as path_dropout_reference
from fastnas.testing import assert_as_accurate

Op = Callable[..., Tensor]
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
every_form = pytest.mark.parametrize(
    ("dtype", "layout", "width"),
    [(dtype, layout, width) for dtype in (torch.float32, torch.float64) for layout in LAYOUTS for width in (32, 31)]
    + [(torch.bfloat16, "nchw", 64)],
    ids=str,
)


def maps(count: int, channels: int, width: int, dtype: torch.dtype, layout: str, seed: int = 0) -> list[Tensor]:
    """Of 2 MB each at 16 channels in float32. At a width of 31 most rows begin within a line."""
    drawn = torch.Generator().manual_seed(seed)
    shape = 32, channels, 33, width
    return [
        torch.randn(shape, generator=drawn).to(dtype, memory_format=LAYOUTS[layout]).requires_grad_()
        for _ in range(count)
    ]


def weights(count: int, dtype: torch.dtype) -> Tensor:
    w = torch.softmax(torch.linspace(-1, 1, count, dtype=torch.float64), 0)
    return w.to(torch.promote_types(dtype, torch.float32)).requires_grad_()


def compare(ours: Op, reference: Op, leaves: Sequence[Tensor], *fixed: Tensor) -> None:
    """Output and all gradients, against eager PyTorch and float64."""

    def run(op: Op, *tensors: Tensor) -> tuple[Tensor, ...]:
        y = op(*tensors)
        g = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
        return y, *torch.autograd.grad(y, tensors[: len(leaves)], g.contiguous(memory_format=_format_of(y)))

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = run(reference, *wide, *fixed)
    results = zip(run(ours, *leaves, *fixed), run(reference, *leaves, *fixed), exact, strict=True)
    for value, eager, truth in results:
        if value.dtype == torch.float64:
            torch.testing.assert_close(value, truth, rtol=1e-11, atol=1e-11)
        else:
            assert_as_accurate(value, eager, truth)


def _format_of(y: Tensor) -> torch.memory_format:
    last = y.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not y.is_contiguous() else torch.contiguous_format


@every_form
def test_mixed_sum(dtype: torch.dtype, layout: str, width: int) -> None:
    w = weights(16, dtype)
    xs = maps(16, 16, width, dtype, layout)
    compare(lambda w, *xs: fastnas.mixed_sum(xs, w), lambda w, *xs: mixed_sum_reference(xs, w), [w, *xs])
    frozen = w.detach()
    compare(lambda *xs: fastnas.mixed_sum(xs, frozen), lambda *xs: mixed_sum_reference(xs, frozen), xs)


@every_form
def test_norm_mixed_sum(dtype: torch.dtype, layout: str, width: int) -> None:
    w = weights(16, dtype)
    xs = maps(16, 16, width, dtype, layout)
    compare(
        lambda w, *xs: fastnas.norm_mixed_sum(xs[:15], w, plain=xs[15:]),
        lambda w, *xs: norm_mixed_sum_reference(xs[:15], w, plain=xs[15:]),
        [w, *xs],
    )


@every_form
@pytest.mark.parametrize("stride", [1, 2])
def test_partial_shuffle(dtype: torch.dtype, layout: str, width: int, stride: int) -> None:
    w = weights(12, dtype)
    mixed = maps(12, 16, width, dtype, layout)
    (bypass,) = maps(1, 48, width, dtype, layout, seed=1)
    if stride == 2:
        bypass = torch.nn.functional.interpolate(bypass.detach().float(), scale_factor=2).to(dtype)
        bypass = bypass.contiguous(memory_format=LAYOUTS[layout])
        bypass = (bypass + 0.01 * torch.randn_like(bypass)).requires_grad_()  # no ties
    compare(
        lambda w, bypass, *mixed: fastnas.partial_shuffle(mixed, w, bypass, stride=stride),
        lambda w, bypass, *mixed: partial_shuffle_reference(mixed, w, bypass, stride=stride),
        [w, bypass, *mixed],
    )


@every_form
def test_path_dropout(dtype: torch.dtype, layout: str, width: int) -> None:
    mask = (torch.arange(16) + torch.arange(4).view(-1, 1)) % 3 == 0
    compare(
        lambda *xs: fastnas.path_dropout(xs, mask),
        lambda *xs: path_dropout_reference(xs, mask),
        maps(16, 16, width, dtype, layout),
    )
