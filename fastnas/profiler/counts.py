"""Parameters and multiply-adds of a network, by two conventions that papers use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

CONVENTION = (
    "multiply_adds: one for each weight that an output element of a convolution or linear layer uses; "
    "biases are free. multiply_adds_all: these, 2 for each element of a batch normalisation (1 if not "
    "affine), 1 for each element of a ReLU and 1 for each input element of a pool; sums and concatenations "
    "are free: the rule of flops-counter.pytorch (ptflops), which gives the 597 M of the PC-DARTS paper"
)

aten = torch.ops.aten
_NORMS = {
    aten.native_batch_norm,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_no_training,
    aten._batch_norm_no_update,
}
_POOLS = {aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d}


@dataclass(frozen=True)
class Counts:
    """For one image. ``by_kind`` splits ``multiply_adds_all`` by the kind of layer."""

    parameters: int
    multiply_adds: int
    multiply_adds_all: int
    by_kind: dict[str, int]
    convention: str = CONVENTION


def count(module: nn.Module, input_shape: Sequence[int]) -> Counts:
    """Count ``module`` in evaluation mode on one image of ``input_shape`` [C, H, W].

    It runs on the meta device: nothing is computed and no memory is used, whatever the size and wherever the
    parameters lie. The module is left as it was. All parameters count, also those of parts that only training
    uses, such as an auxiliary head.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    on_meta = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())
    image = torch.empty((1, *input_shape), dtype=dtype, device="meta")
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad(), _Counting() as counting:
            torch.func.functional_call(module, on_meta, (image,))
    finally:
        for part in training:
            part.training = True
    kinds = counting.by_kind
    return Counts(
        parameters=sum(p.numel() for p in module.parameters()),
        multiply_adds=kinds["convolution"] + kinds["linear"],
        multiply_adds_all=sum(kinds.values()),
        by_kind=dict(kinds),
    )


class _Counting(TorchDispatchMode):
    """Adds up the operations below the modules, so that functional calls count like modules."""

    def __init__(self) -> None:
        super().__init__()
        self.by_kind: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        kind, number = _cost(func.overloadpacket, args, out)
        if kind:
            self.by_kind[kind] += number
        return out


def _cost(op: Any, args: Sequence[Any], out: Any) -> tuple[str, int]:
    if op is aten.convolution:
        x, weight, transposed = args[0], args[1], args[6]
        # Weights are [out, in / groups, kh, kw], of a transposed convolution [in, out / groups, kh, kw].
        return "convolution", (x if transposed else out).numel() * prod(weight.shape[1:])
    if op in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
        left, right = args[-2:]
        return "linear", left.numel() * right.shape[-1]
    if op in _NORMS:
        affine = isinstance(args[1], Tensor)
        return "batch normalisation", (2 if affine else 1) * args[0].numel()
    if op in (aten.relu, aten.relu_):
        return "ReLU", out.numel()
    if op in _POOLS or (op is aten.mean and _is_global_pool(*args)):
        return "pooling", args[0].numel()
    return "", 0


def _is_global_pool(x: Tensor, dim: Sequence[int] | None = None, *_: object) -> bool:
    """A global average pool arrives as the mean over height and width."""
    return x.dim() == 4 and dim is not None and sorted(d % 4 for d in dim) == [2, 3]
