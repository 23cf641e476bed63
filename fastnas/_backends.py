"""Which implementation serves each op on each device.

========= ======================================== ============
backend   what runs                                device types
========= ======================================== ============
native    the compiled kernels behind the flat ops cpu
triton    ``fastnas.kernels`` behind the flat ops  cuda
cuda      CUDA C++ behind some of the flat ops     cuda
reference plain PyTorch from ``fastnas.reference`` all
========= ======================================== ============

The automatic choice is the first row that can serve, with ``cuda`` before ``triton`` for the ops of
``_CUDA_FIRST``. ``FASTNAS_BACKEND`` (read once) and :func:`backend` override
it. Choices are bound ahead of the calls, so that a call costs one dictionary look-up. Binding does not import
Triton: its kernels load when the first of them is called. In Triton's interpreter (``TRITON_INTERPRET=1``) the
kernels serve the cpu too, for tests, when ``triton`` is asked for by name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastnas import _ext
from fastnas.errors import UserError

# In order of preference, with the device types that each has kernels for.
_SERVES: dict[str, tuple[str, ...]] = {"native": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}
NAMES = (*_SERVES, "reference")
# Ops for which a row of bench/results says that CUDA C++ is faster than Triton; none has been measured on a GPU yet.
_CUDA_FIRST: frozenset[str] = frozenset()
_DEVICE_TYPES = ("cpu", "cuda", "meta", "mps", "xpu")

_flat_ops: dict[str, tuple[str, ...]] = {}
_bound: dict[tuple[str, str], str] = {}
_problems: dict[tuple[str, str], str] = {}
_triton: dict[tuple[str, str], torch.library.Library] = {}
_spec = ""


@dataclass(frozen=True)
class Row:
    """What serves ``op`` on ``device``, and why; one line of ``python -m fastnas.info``."""

    op: str
    device: str
    backend: str
    reason: str


def register(stem: str, *flat_ops: str) -> None:
    """Make an op known, with the flat ops that a compiled backend has to supply."""
    _flat_ops[stem] = flat_ops


def choose(stem: str, device_type: str) -> str:
    """The backend that serves op ``stem`` on tensors of ``device_type``.

    Raises:
        UserError: the backend asked for cannot serve the op there.
    """
    name = _bound.get((stem, device_type), "reference")
    if name == "none":
        raise UserError(_problems[(stem, device_type)])
    return name


def served(stem: str, op: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """`op`, or `reference` where that is the backend of `stem`.

    For ops whose first argument says the device: a tensor, or a list of them.
    """

    def call(*arguments: Any) -> Any:
        first = arguments[0]
        device = (first if isinstance(first, torch.Tensor) else first[0]).device
        return (reference if choose(stem, device.type) == "reference" else op)(*arguments)

    return call


def bind_by_environment() -> None:
    """Bind by ``FASTNAS_BACKEND``; what is wrong with it is said when an op is first called, not on import."""
    try:
        bind()
    except UserError as error:
        for stem in _flat_ops:
            for device in _DEVICE_TYPES:
                _bound[(stem, device)] = "none"
                _problems.setdefault((stem, device), f"FASTNAS_BACKEND: {error}")


def bind(spec: str | None = None) -> None:
    """Bind every op on every device type, by ``spec`` (default: ``FASTNAS_BACKEND``).

    Raises:
        UserError: ``spec`` names an unknown op or backend, or a backend that can serve an op nowhere.
    """
    global _spec
    _spec = os.environ.get("FASTNAS_BACKEND", "") if spec is None else spec
    wishes = _parse(_spec)
    _bound.clear()
    _problems.clear()
    for stem in _flat_ops:
        asked = wishes.get(stem, wishes.get("*"))
        for device in _DEVICE_TYPES:
            if asked is None:
                name = next(n for n in _preferred(stem) if _problem(n, stem, device) is None)
            elif problem := _problem(asked, stem, device, by_name=True):
                name = "none"
                _problems[(stem, device)] = f"backend {asked!r} asked for {stem} cannot serve it: {problem}"
            else:
                name = asked
            _bound[(stem, device)] = name
            _connect_triton(stem, device, name == "triton")
        if all(_bound[(stem, device)] == "none" for device in _DEVICE_TYPES):
            raise UserError(_problems[(stem, _SERVES[asked][0])])


@contextlib.contextmanager
def backend(spec: str) -> Iterator[None]:
    """Override the backends inside a ``with`` block, for the whole process.

    Args:
        spec: ``"reference"`` or ``"native"`` for every op, or a list such as
            ``"mixed_sum=reference,path_dropout=native"``; ops not named keep the automatic choice.

    Raises:
        UserError: ``spec`` names an unknown op or backend, or a backend that can serve an op nowhere; an op
            called on a device type that the backend does not serve raises then.
    """
    import fastnas.ops  # noqa: F401  registers the ops

    before = _spec
    try:
        bind(spec)
        yield
    finally:
        bind(before)


def table() -> list[Row]:
    """One row per op and per device type of this machine."""
    import fastnas.ops  # noqa: F401  registers the ops

    wishes = _parse(_spec)
    rows = []
    for stem in _flat_ops:
        for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
            name = _bound[(stem, device)]
            if name == "none":
                reason = _problems[(stem, device)]
            elif stem in wishes or "*" in wishes:
                reason = f"asked for by {_spec!r}"
            elif name == "reference":
                reason = "; ".join(f"no {n}: {_problem(n, stem, device)}" for n in _SERVES)
            else:
                reason = "automatic"
            rows.append(Row(stem, device, name, reason))
    return rows


def _preferred(stem: str) -> tuple[str, ...]:
    return tuple(sorted(NAMES, key=lambda name: name != "cuda")) if stem in _CUDA_FIRST else NAMES


def _problem(name: str, stem: str, device_type: str, by_name: bool = False) -> str | None:
    """Why backend ``name`` cannot serve the op there; ``None`` when it can. ``by_name``: somebody asked for it."""
    if name == "reference":
        return None
    if name == "triton":
        return _triton_problem(stem, device_type, by_name)
    if device_type not in _SERVES[name]:
        return f"it has no kernels for device type {device_type!r}"
    missing = _ext.load(device_type)
    if missing is not None:
        return missing
    for flat in _flat_ops[stem]:
        if not _compiled(flat, device_type.upper()):
            missing = f"the compiled library has no {device_type.upper()} kernel for {flat}: rebuild it"
            return missing if name == "native" else "it has no kernels for this op"
    return None


@functools.cache
def _compiled(flat: str, key: str) -> bool:
    """Whether the library has the kernel; true for what stands in its place too, so it is asked before that comes."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnas::{flat}", key)


def _triton_problem(stem: str, device_type: str, by_name: bool) -> str | None:
    if device_type not in _SERVES["triton"]:
        if device_type != "cpu":
            return f"it has no kernels for device type {device_type!r}"
        if not (by_name and os.environ.get("TRITON_INTERPRET") == "1"):
            return "it runs on the cpu only in Triton's interpreter, when asked for by name with TRITON_INTERPRET=1"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec(f"fastnas.kernels.{stem}") is None:
        return "it has no kernels for this op"
    return None


def _connect_triton(stem: str, device_type: str, wanted: bool) -> None:
    """Register the Triton launchers of ``stem`` behind its flat ops on ``device_type``, or take them away again."""
    key = (stem, device_type)
    if wanted and key not in _triton:
        _ext.load(device_type)  # a library that loads later would take the kernels' place
        _triton[key] = torch.library.Library("fastnas", "IMPL")
        with warnings.catch_warnings():  # taking the place of a compiled kernel is what was asked for
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel", UserWarning)
            for flat in _flat_ops[stem]:
                _compiled(flat, device_type.upper())
                _triton[key].impl(flat, _launcher(stem, flat), device_type.upper(), allow_override=True)
    elif not wanted and key in _triton:
        _triton.pop(key)._destroy()


def _launcher(stem: str, flat: str) -> Callable[..., Any]:
    load = functools.cache(lambda: getattr(importlib.import_module(f"fastnas.kernels.{stem}"), flat))
    return lambda *args: load()(*args)


def _parse(spec: str) -> dict[str, str]:
    """``"reference"`` to ``{"*": "reference"}``, ``"a=native,b=reference"`` to one entry an op."""
    wishes = {}
    for part in filter(None, spec.split(",")):
        stem, eq, name = part.rpartition("=")
        stem = stem.strip() if eq else "*"
        name = name.strip()
        if stem != "*" and stem not in _flat_ops:
            raise UserError(f"no op is called {stem!r} in backend choice {spec!r}; ops: {', '.join(_flat_ops)}")
        if name not in NAMES:
            raise UserError(f"no backend is called {name!r} in backend choice {spec!r}; backends: {', '.join(NAMES)}")
        wishes[stem] = name
    return wishes
