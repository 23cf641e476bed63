"""Argument checks that several ops share; each message names the op, the argument and what was found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_floating(op: str, name: str, x: object) -> None:
    """Raise TypeError unless ``x`` is a tensor of one of the four dtypes that the kernels know."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def check_paths(op: str, name: str, xs: Sequence[Tensor]) -> None:
    """Raise unless the argument ``name`` is a non-empty sequence of tensors that agree in shape, dtype and device."""
    check_list(op, name, xs)
    if len(xs) == 0:
        raise ValueError(f"{op}: {name} is empty, at least one tensor is needed")
    check_floating(op, f"{name}[0]", xs[0])
    check_like(op, name, xs, f"{name}[0]", xs[0])


def check_like(op: str, name: str, xs: Sequence[Tensor], first_name: str, first: Tensor) -> None:
    """Raise unless the argument ``name`` is a sequence of tensors with the shape, dtype and device of ``first``."""
    check_list(op, name, xs)
    shape, dtype, device = first.shape, first.dtype, first.device
    for k, x in enumerate(xs):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name}[{k}] must be a tensor, got {type(x).__name__}")
        if x.shape != shape:
            raise ValueError(f"{op}: {name}[{k}] has shape {tuple(x.shape)}, {first_name} has {tuple(shape)}")
        if x.dtype != dtype:
            raise TypeError(f"{op}: {name}[{k}] is {x.dtype}, {first_name} is {dtype}")
        if x.device != device:
            raise ValueError(f"{op}: {name}[{k}] is on {x.device}, {first_name} on {device}")


def check_list(op: str, name: str, xs: object) -> None:
    """Raise TypeError for one tensor where the argument ``name`` is a sequence of them."""
    if isinstance(xs, Tensor):
        raise TypeError(f"{op}: {name} must be a list of tensors, got one tensor")
