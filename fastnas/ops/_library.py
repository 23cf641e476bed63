"""The ``fastnas`` operator library: schemas, reference kernels and fake kernels are registered here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fastnas", "DEF")


def define(schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define a flat op and return its overload, ready to call.

    ``reference`` serves every device for which no compiled kernel is registered; ``fake`` gives the outputs'
    shapes, dtypes and strides without data. The C++ library registers its kernels on the same schema, before
    or after this call.

    Args:
        schema: for example ``"mixed_sum_fwd(Tensor[] xs, Tensor w) -> Tensor"``. Outputs must be fresh tensors.
        reference: the same computation in plain PyTorch.
        fake: the same outputs, uninitialised.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastnas::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastnas, name).default


def in_layout_of(value: Tensor, like: Tensor) -> Tensor:
    """``value`` as a fresh tensor in the layout that the compiled kernels give: that of ``empty_like(like)``."""
    out = torch.empty_like(like, dtype=value.dtype)
    return out.copy_(value)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels sum: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
