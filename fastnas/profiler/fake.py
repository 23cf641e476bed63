"""Running a network on shapes alone, fast enough for supernets."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

_ITEM = torch.ops.aten._local_scalar_dense.default
_DEVICE = torch.ops.prim.device.default
_DETACH = torch.ops.aten.detach.default


class ShapesOnly(TorchDispatchMode):
    """Within the block an op that meets a fake tensor gives fake tensors: right shapes and dtypes, no memory.

    Ops on real tensors alone run for real. So a search method whose batches are fake (`empty`) samples and weighs
    architectures with real numbers, while no feature map of its network exists. What would be written into a real
    tensor is dropped. A number that is read from a fake tensor (`.item()`) is taken as 1, a truth value as true, an
    index as 0: an importance weight of 1 lets every child run, which is the most that a step can ask for.

    It is FakeTensorMode with a memory: a supernet repeats few kinds of calls many thousand times, and the shapes of
    a call that was seen before are looked up.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: dict[Any, Any] = {}
        self._kinds: dict[Any, str] = {}

    def __enter__(self) -> ShapesOnly:
        self._quiet = warnings.catch_warnings()
        self._quiet.__enter__()
        # PyTorch's own look at a real tensor that an op turns into a fake one.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._quiet.__exit__(*error)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """A fake tensor to start from."""
        with self._fake:
            return torch.empty(shape, dtype=dtype, device=device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if FakeTensor not in types:
            return func(*args, **kwargs)
        if func is _DEVICE:
            return args[0].fake_device
        if func is _ITEM:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0
        if func is _DETACH:
            return self._alias(args[0])
        kind = self._kinds.get(func) or self._kinds.setdefault(func, _kind(func))
        if kind == "in place":
            return args[0] if func._schema.returns else None
        if kind == "fresh":
            key = (func, _signature(args), _signature(kwargs))
            try:
                known = self._known.get(key)
            except TypeError:  # an argument without a hash
                return func(*args, **kwargs)
            if known is not None:
                return self._make(known)
            out = func(*args, **kwargs)
            if not _storages(out) & _storages((args, kwargs)):
                self._known[key] = _shapes(out)
            return out
        return func(*args, **kwargs)

    def _alias(self, tensor: FakeTensor) -> FakeTensor:
        """`tensor.detach()`, which the profiler asks for at each tensor that is saved."""
        meta = torch.empty(0, dtype=tensor.dtype, device="meta")
        meta.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
        return FakeTensor(self._fake, meta, tensor.fake_device)

    def _make(self, known: Any) -> Any:
        if isinstance(known, _Shape):
            meta = torch.empty_strided(known.size, known.stride, dtype=known.dtype, device="meta")
            return FakeTensor(self._fake, meta, known.device)
        if isinstance(known, (list, tuple)):
            return type(known)(self._make(part) for part in known)
        return known


class _Shape:
    """What makes one fresh tensor."""

    __slots__ = ("size", "stride", "dtype", "device")

    def __init__(self, tensor: Tensor) -> None:
        self.size, self.stride, self.dtype, self.device = tensor.shape, tensor.stride(), tensor.dtype, _device(tensor)


def _kind(func: Any) -> str:
    """ "in place": changes and returns its first argument; "fresh": its outputs share no memory with its inputs."""
    schema = func._schema
    infos = [argument.alias_info for argument in schema.arguments]
    if all(info is None for info in infos):
        return "fresh"
    first = infos[0]
    if first is not None and first.is_write and torch.Tag.inplace_view not in func.tags and len(schema.returns) < 2:
        return "in place"
    return "other"


def _signature(value: Any) -> Any:
    """A hashable description of arguments, in which equal ones lead to equal shapes."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, _device(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_signature, value))
    if isinstance(value, dict):
        return tuple((key, _signature(part)) for key, part in value.items())
    return type(value), value  # 1, 1.0 and True are equal keys, but not equal arguments


def _shapes(out: Any) -> Any:
    if isinstance(out, Tensor):
        return _Shape(out)
    return type(out)(map(_shapes, out)) if isinstance(out, (list, tuple)) else out


def _storages(value: Any) -> set[int]:
    if isinstance(value, Tensor):
        return {value.untyped_storage()._cdata}
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return set().union(*map(_storages, parts))


def _device(tensor: Tensor) -> torch.device:
    # The attribute `device` of a fake tensor is an op of its own, and slow.
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
