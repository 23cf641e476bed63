"""One pass of an op, forward or forward plus backward, and the check that comes before its timing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastnas.testing import assert_as_accurate

Function = Callable[..., "Tensor | Sequence[Tensor]"]
Inputs = Sequence["Tensor | None"]
Pass = Callable[[], "tuple[Tensor, ...]"]


class Passes:
    """Makes passes that differ only in their function: same inputs, same gradient of the result.

    Args:
        reference: plain PyTorch; its result gives the shapes of the incoming gradients.
        inputs: tensors or None; those that require gradients get them when ``backward`` is set.
        backward: forward plus backward, or forward alone without gradients.
    """

    def __init__(self, reference: Function, inputs: Inputs, *, backward: bool) -> None:
        self.reference, self.inputs = reference, inputs
        self.wanted = [t for t in inputs if t is not None and t.requires_grad] if backward else []
        with torch.no_grad():
            self.cotangents = [torch.randn_like(y) for y in _tuple(reference(*inputs))]

    def of(self, function: Function) -> Pass:
        """The pass of ``function``: its results, then the gradients of the inputs that want one."""
        inputs, wanted = self.inputs, self.wanted

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return _tuple(function(*inputs))

        # Gradients come in the layout of the result, as from a next layer that keeps it.
        with torch.no_grad():
            ys = _tuple(function(*inputs))
            cotangents = [torch.empty_like(y).copy_(c) for y, c in zip(ys, self.cotangents, strict=True)]

        def forward_and_backward() -> tuple[Tensor, ...]:
            ys = _tuple(function(*inputs))
            return *ys, *torch.autograd.grad(ys, wanted, cotangents)

        return forward_and_backward if wanted else forward

    def exact(self) -> tuple[Tensor, ...]:
        """What the reference gives in float64 on the same values."""
        doubles = [
            t.detach().double().requires_grad_(t.requires_grad) if t is not None and t.is_floating_point() else t
            for t in self.inputs
        ]
        ys = _tuple(self.reference(*doubles))
        if not self.wanted:
            return ys
        leaves = [d for d, t in zip(doubles, self.inputs, strict=True) if any(t is other for other in self.wanted)]
        return *ys, *torch.autograd.grad(ys, leaves, [c.double() for c in self.cotangents])

    def check(self, function: Function) -> None:
        """Refuse a wrong answer: results and gradients must keep the tolerance rule of the tests.

        Raises:
            AssertionError: the error against float64 is more than twice that of plain PyTorch.
        """
        answers = zip(self.of(function)(), self.of(self.reference)(), self.exact(), strict=True)
        for value, eager, exact in answers:
            assert_as_accurate(value, eager, exact)


def to_device(t: Tensor | None, device: torch.device) -> Tensor | None:
    """A leaf of the same values, strides and offset on ``device``: a slice stays a slice."""
    if t is None or t.device == device:
        return t
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    moved = whole.to(device).as_strided(t.shape, t.stride(), t.storage_offset())
    return moved.detach().requires_grad_(t.requires_grad)


def _tuple(result: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)
