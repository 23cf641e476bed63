"""How the Triton kernels are launched: explicit configurations, one place for layouts and ordered sums.

Configurations come from ``configs/<device>.json``, else from ``configs/default.json``, which is a heuristic: nothing
is tuned while a user waits. A table maps a kernel to rows ``{"dtypes": [...], "up_to": size, ...constants}``; the first
row whose conditions hold is used, and the last one has none. ``size`` is the number of elements of one map. The
interpreter (``TRITON_INTERPRET=1``, on CPU tensors) has a table of its own with few, large programs, because each one
costs it milliseconds.

Lists of tensors are passed as tuples: the K pointers are kernel parameters. A table of addresses in device memory would
need one copy from the host a call, which a CUDA graph cannot record from pageable memory; parameters are recorded
with the launch. K is a compile-time constant, so a new K compiles once.
"""

from __future__ import annotations

import functools
import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnas._layout import is_channels_last, memory_format

_CONFIGS = Path(__file__).with_name("configs")


def interpreted() -> bool:
    """Whether kernels run in the interpreter; Triton reads the variable when a kernel is defined."""
    return bool(triton.knobs.runtime.interpret)


def config(kernel: str, x: Tensor) -> dict[str, Any]:
    """The constants with which ``kernel`` is launched on maps like ``x``."""
    return pick(_table(_device_name(x.device)).get(kernel) or _table("default")[kernel], x.dtype, x.numel())


def pick(rows: Sequence[dict[str, Any]], dtype: torch.dtype, size: int) -> dict[str, Any]:
    """The constants of the first row that holds for ``dtype`` and ``size``."""
    name = str(dtype).removeprefix("torch.")
    for row in rows:
        if size <= row.get("up_to", size) and name in row.get("dtypes", (name,)):
            return {key: value for key, value in row.items() if key not in ("up_to", "dtypes")}
    raise LookupError(f"no row of the launch table holds for {name} and {size} elements")


def _device_name(device: torch.device) -> str:
    if interpreted():
        return "interpreter"
    return _cuda_name(device.index) if device.type == "cuda" else "default"


@functools.cache
def _cuda_name(index: int | None) -> str:
    """``"NVIDIA H200"`` becomes ``h200``."""
    name = torch.cuda.get_device_name(index).lower().removeprefix("nvidia ")
    return re.sub(r"[^a-z0-9]+", "_", name)


@functools.cache
def _table(name: str) -> dict[str, list[dict[str, Any]]]:
    path = _CONFIGS / f"{name}.json"
    return json.loads(path.read_text())["kernels"] if path.exists() else {}


def launch(device: torch.device, kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Start ``programs`` programs of ``kernel`` on ``device``, which need not be the current one."""
    if programs == 0:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **constants)
    else:
        kernel[(programs,)](*args, **constants)


def accumulate_in(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """The dtype of sums for maps of ``dtype``, as torch and Triton name it: float32, or float64 for float64."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def float_bits(value: float) -> int:
    """``value`` as an int64: Triton rounds a float argument to float32, float64 kernels need all of it."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def same_layout(x: Tensor, y: Tensor) -> bool:
    """Whether element i of ``x`` in memory is element i of ``y``; strides over one element do not matter."""
    if x.stride() == y.stride():
        return True
    return all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), y.stride(), strict=True))


def laid_out_as(like: Tensor, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``xs`` in the layout of the dense tensor ``like``: themselves where they have it, copies where not."""
    return tuple(x if same_layout(x, like) else torch.empty_like(like).copy_(x) for x in xs)


def planes(t: Tensor) -> tuple[int, int, int] | None:
    """Strides of ``t`` ``[B, C, ...]`` over images, channels and pixels, where its pixels lie at one stride."""
    step = span = None
    for size, stride in zip(reversed(t.shape[2:]), reversed(t.stride()[2:]), strict=True):
        if size == 1:
            continue
        if step is None:
            step, span = stride, stride
        elif stride != span:
            return None
        span *= size
    return t.stride(0), t.stride(1), 1 if step is None else step


def walkable(tensors: Sequence[Tensor], like: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
    """``tensors`` with the strides that they share; copies in the layout of ``like`` where they share none."""
    strides = planes(tensors[0])
    if strides is None or not all(same_layout(t, tensors[0]) for t in tensors):
        tensors = [t.contiguous(memory_format=memory_format(like)) for t in tensors]
        strides = planes(tensors[0])
    return tuple(tensors), strides


def tile(y: Tensor, block: int) -> tuple[int, int, int]:
    """Programs, and channels and pixels of a tile of ``block`` elements of the maps ``y`` ``[B, C, H, W]``.

    Whole pixels in channels last, else runs of a plane; several where one does not fill the tile.
    """
    batch, channels, height, width = y.shape
    bc, bp = triton.next_power_of_2(channels), triton.next_power_of_2(height * width)
    if is_channels_last(y):
        bc = min(bc, block)
        bp = min(bp, block // bc)
    else:
        bp = min(bp, block)
        bc = min(bc, block // bp)
    return batch * triton.cdiv(channels, bc) * triton.cdiv(height * width, bp), bc, bp


def ordered_sum(parts: Tensor, like: Tensor) -> Tensor:
    """Row sums of ``parts`` ``[K, P]`` in the shape and dtype of ``like``, always added in the same order."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    rows, count = parts.shape
    launch(parts.device, ordered_sum_kernel, rows, parts, out, count, **config("ordered_sum", parts))
    return out


@triton.jit
def ordered_sum_kernel(p_parts, p_out, P, BP: tl.constexpr):
    """``out[k] = sum_p parts[k, p]``, in float64.

    Grid: K programs. Tile: BP parts at a time. Reads K P parts once, writes K numbers. Bound by its launch.
    """
    i_k = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BP)
    b_sum = tl.zeros((BP,), tl.float64)
    start = 0
    while start < P:
        b_sum += tl.load(p_parts + i_k * P + start + o_p, mask=start + o_p < P, other=0.0).to(tl.float64)  # [BP]
        start += BP
    if p_out.dtype.element_ty == tl.float64:
        tl.store(p_out + i_k, tl.sum(b_sum))
    else:  # by way of float32: the interpreter cannot turn float64 into bfloat16
        tl.store(p_out + i_k, tl.sum(b_sum).to(tl.float32).to(p_out.dtype.element_ty))
