"""The memory of one training step, predicted on shapes alone or measured: of a search method, or of any module."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas.engine.training import Batch
from fastnas.profiler.allocator import peak_bytes
from fastnas.profiler.fake import ShapesOnly
from fastnas.profiler.footprint import Footprint, summarise
from fastnas.profiler.tracker import BATCH, Tracker, parameters_of, state_of

CUDA_GRANULARITY = 512  # bytes: what PyTorch's caching allocator rounds each allocation up to


class Trains(Protocol):
    """What can be profiled: a search method (`fastnas.methods.Method`), or a `ModuleTraining`."""

    def step(self, index: int, train: Batch, search: Batch) -> Any: ...


@dataclass(frozen=True)
class Inputs:
    """What a step gets: two batches, one of the training half and one of the search half.

    `image`: shape of one input, [C, H, W] for an image; `steps`: how many steps to follow, more than one for methods
    whose samples differ from step to step.
    """

    image: tuple[int, ...]
    batch_size: int
    dtype: torch.dtype = torch.float32
    steps: int = 1


class ModuleTraining:
    """A module with its optimiser (SGD with momentum), one update a step on the training batch.

    Its output is taken as logits when it is [B, classes], else its mean is the loss; of a tuple the first counts.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)

    def step(self, index: int, train: Batch, search: Batch) -> None:
        x, y = train
        out = self.module(x)
        out = out[0] if isinstance(out, (list, tuple)) else out
        self.optimizer.zero_grad(set_to_none=True)
        (F.cross_entropy(out, y) if out.dim() == 2 else out.mean()).backward()
        self.optimizer.step()


def predict(method: Trains, inputs: Inputs, *, name: str, device: torch.device | str = "cpu") -> Footprint:
    """The footprint of a step that is not run: every tensor that depends on the batch is fake.

    `method`: built on the CPU, and spoilt by the call: its optimisers are stepped. `device`: where the step shall run;
    its allocator's rounding is applied, and it need not be here.
    Optimiser state and gradients are taken as present, as in every step but the first.
    """
    shapes = ShapesOnly()
    batches = [
        (
            shapes.empty((inputs.batch_size, *inputs.image), inputs.dtype),
            shapes.empty((inputs.batch_size,), torch.int64),
        )
        for _ in range(2)
    ]
    tracker = _tracker(method, device)
    with shapes, tracker:
        _run(method, tracker, batches, inputs.steps)
    return _summary(tracker, method, inputs, name, "predicted")


def measure(method: Trains, inputs: Inputs, *, name: str, device: torch.device | str = "cpu") -> Footprint:
    """The footprint of a step that runs, with the count of the device's allocator and the time of a step beside it.

    `method`: built on `device`; the steps train it. On the CPU all of it is deterministic but the time.
    """
    device = torch.device(device)
    batches = [
        (
            torch.randn(inputs.batch_size, *inputs.image, dtype=inputs.dtype, device=device),
            torch.zeros(inputs.batch_size, dtype=torch.int64, device=device),
        )
        for _ in range(2)
    ]
    tracker = _tracker(method, device)
    with tracker:
        _run(method, tracker, batches, inputs.steps)
    footprint = _summary(tracker, method, inputs, name, "measured")

    def steps() -> None:
        for index in range(inputs.steps):
            method.step(index, *batches)

    started = time.perf_counter()
    steps()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / inputs.steps
    return replace(footprint, allocator_peak=_allocator_peak(method, batches, steps, device), seconds=seconds)


def _allocator_peak(method: Trains, batches: Sequence[Batch], steps: Callable[[], None], device: torch.device) -> int:
    """Bytes at the peak of `steps`, done twice: the gradients of the first are there in the second."""
    for optimizer in _parts(method, torch.optim.Optimizer):
        optimizer.zero_grad(set_to_none=True)  # the CPU's profiler knows only releases of what it saw allocated
    tensors = [tensor for tensor, _ in _owned(method)] + [tensor for batch in batches for tensor in batch]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    rounding = _granularity(device)
    held = sum(-(-size // rounding) * rounding for size in storages.values())

    def twice() -> None:
        steps()
        steps()

    return held + peak_bytes(twice, device)


def _tracker(method: Trains, device: torch.device | str) -> Tracker:
    _prime(method)
    modules = {part: name for module in _modules(method) for name, part in module.named_modules()}
    return Tracker(modules, _granularity(device))


def _granularity(device: torch.device | str) -> int:
    """Bytes that an allocation is a multiple of."""
    return CUDA_GRANULARITY if torch.device(device).type == "cuda" else 1


def _run(method: Trains, tracker: Tracker, batches: Sequence[Batch], steps: int) -> None:
    for tensor, category in _owned(method):
        tracker.own([tensor], category)
    tracker.own((tensor for batch in batches for tensor in batch), BATCH)
    primed = {
        parameter: tracker.block_of(parameter.grad) for parameter in _parameters(method) if parameter.grad is not None
    }
    with _labelled(method, tracker):
        for index in range(steps):
            method.step(index, *batches)
    for tensor, category in _owned(method):  # again: a step may have put its own tensors in the place of buffers
        tracker.own([tensor], category)
    # A step that leaves a parameter without gradient, as that of a sampled path does, has none at its start either.
    tracker.withdraw(block for parameter, block in primed.items() if parameter.grad is None and block)


def _summary(tracker: Tracker, method: Trains, inputs: Inputs, name: str, kind: str) -> Footprint:
    weights = {id(p): p.numel() for m in _modules(method) if _is_network(m, method) for p in m.parameters()}
    return summarise(
        tracker,
        name=name,
        kind=kind,
        batch_size=inputs.batch_size,
        parameters=sum(weights.values()),
        candidates=_candidates(method),
    )


def _prime(method: Trains) -> None:
    """Give every optimiser its state, and every parameter a gradient: an update with gradients of zero."""
    for optimizer in _parts(method, torch.optim.Optimizer):
        for parameter in parameters_of(optimizer):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


def _owned(method: Trains) -> Iterator[tuple[Tensor, str]]:
    """What stays in memory between steps, with its category."""
    for tensor in _parts(method, Tensor):
        yield tensor, "buffers"
    for module in _modules(method):
        category = "parameters" if _is_network(module, method) else "architecture parameters"
        for parameter in module.parameters():
            yield parameter, category
        for buffer in module.buffers():
            yield buffer, "buffers"
    for parameter in _parameters(method):
        if parameter.grad is not None:
            yield parameter.grad, "gradients"
    for optimizer in _parts(method, torch.optim.Optimizer):
        for state in state_of(optimizer):
            yield state, "optimiser state"


def _parameters(method: Trains) -> list[nn.Parameter]:
    """Those of the modules, and those that an optimiser holds in their place, such as weights laid flat."""
    modules = (parameter for module in _modules(method) for parameter in module.parameters())
    optimizers = (p for optimizer in _parts(method, torch.optim.Optimizer) for p in parameters_of(optimizer))
    return list(dict.fromkeys([*modules, *optimizers]))


def _candidates(method: Trains) -> Sequence[str]:
    """Names of an edge's candidates, in order: those of the search space that a module of the method names."""
    spaces = (getattr(part, "space", None) for module in _modules(method) for part in module.modules())
    return next((space.candidates for space in spaces if hasattr(space, "candidates")), ())


def _modules(method: Trains) -> list[nn.Module]:
    return _parts(method, nn.Module)


def _is_network(module: nn.Module, method: Trains) -> bool:
    """A module with a convolution, or the only one; other modules, such as alphas, are the architecture."""
    return any(parameter.dim() == 4 for parameter in module.parameters()) or _modules(method) == [module]


def _parts(method: Any, kind: type) -> list[Any]:
    """Attributes of `method` that are of a kind, also in lists, tuples and dicts; parameters are left to modules."""
    found: dict[int, Any] = {}
    waiting = list(vars(method).values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, kind) and not isinstance(value, nn.Parameter):
            found[id(value)] = value
        elif isinstance(value, (list, tuple)):
            waiting.extend(value)
        elif isinstance(value, dict):
            waiting.extend(value.values())
    return list(found.values())


@contextlib.contextmanager
def _labelled(method: Trains, tracker: Tracker) -> Iterator[None]:
    """Within the block a function of the method that `step` calls gives its name to the phase: "weight step"."""
    depth = 0

    def labelled(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                with tracker.label(name) if depth == 1 else contextlib.nullcontext():
                    return function(*args, **kwargs)
            finally:
                depth -= 1

        return run

    names = [
        name
        for name, _ in inspect.getmembers(type(method), inspect.isfunction)
        if name != "step" and not name.startswith("__")
    ]
    for name in names:
        setattr(method, name, labelled(name.strip("_").replace("_", " "), getattr(method, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(method, name)
