"""What the tests and the benchmarks of the ops share: named inputs, the tolerance rule, poisoned memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """A named shape and memory layout of an op's inputs.

    Layouts: ``contiguous``; ``channels_last``; ``sliced``, half of the channels of a larger tensor;
    ``cropped``, the inside of a larger map; ``expanded``, stride 0 over the batch; ``mixed``, all of these in turn.
    """

    name: str
    shape: tuple[int, ...]
    layout: str = "contiguous"

    def __str__(self) -> str:
        return self.name

    def tensors(self, count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        """``count`` leaf tensors of this case, the same values for the same seed whatever the dtype."""
        generator = torch.Generator().manual_seed(seed)
        kinds = ["contiguous", "channels_last", "sliced", "cropped", "expanded"]
        layouts = [kinds[k % len(kinds)] if self.layout == "mixed" else self.layout for k in range(count)]
        return [_laid_out(self.shape, layout, dtype, generator) for layout in layouts]


def _laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    if layout == "contiguous":
        return draw(*shape)
    if layout == "channels_last":
        return draw(*shape).to(memory_format=torch.channels_last)
    batch, channels, height, width = shape
    if layout == "sliced":
        return draw(batch, 2 * channels, height, width)[:, channels:]
    if layout == "cropped":
        return draw(batch, channels, height + 1, width + 1)[:, :, 1:, 1:]
    return draw(1, channels, height, width).expand(shape)


CASES = (
    Case("one-element", (1, 1, 1, 1)),
    Case("odd", (3, 5, 7, 9)),
    Case("empty-batch", (0, 4, 5, 5)),
    Case("vector", (17,)),
    Case("large", (8, 16, 32, 32)),
    Case("channels-last", (4, 6, 9, 5), "channels_last"),
    Case("sliced", (3, 4, 9, 9), "sliced"),
    Case("cropped", (2, 4, 9, 7), "cropped"),
    Case("expanded", (4, 3, 8, 8), "expanded"),
    Case("mixed-strides", (3, 4, 12, 9), "mixed"),
)
MAPS = tuple(case for case in CASES if len(case.shape) == 4)


def error(value: Tensor, exact: Tensor) -> float:
    """Largest absolute difference to ``exact``; NaN where either has one."""
    if value.numel() == 0:
        return 0.0
    return (value.detach().double() - exact.detach().double()).abs().max().item()


def assert_as_accurate(value: Tensor, eager: Tensor, exact: Tensor) -> None:
    """The tolerance rule: the error of ``value`` is at most twice that of PyTorch in the same dtype.

    Args:
        value: what the op gave, in the dtype under test.
        eager: what plain PyTorch gave in the same dtype.
        exact: the float64 result on the same (already rounded) inputs.

    One rounding of the largest exact value is allowed besides, because PyTorch's own error can be 0 by luck.
    """
    assert value.shape == exact.shape, f"shape {tuple(value.shape)}, expected {tuple(exact.shape)}"
    assert value.dtype == eager.dtype, f"dtype {value.dtype}, expected {eager.dtype}"
    if exact.numel() == 0:
        return
    ours, theirs = error(value, exact), error(eager, exact)
    rounding = torch.finfo(value.dtype).eps * exact.detach().abs().max().item()
    limit = 2 * theirs + rounding
    assert ours <= limit, f"error {ours:.3g} against float64, PyTorch's is {theirs:.3g}, limit {limit:.3g}"


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Uninitialised memory is filled with NaN inside, in C++ too, so that an unwritten output shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def saved_bytes(run) -> int:
    """Bytes of the tensors that autograd keeps for backward while ``run()`` executes, each storage once."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = run()
    del kept
    return sum(storages.values())
