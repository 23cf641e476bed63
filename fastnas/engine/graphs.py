"""A step of a search recorded as a CUDA graph: one launch instead of hundreds, where device and step allow it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fastnas import processes

log = logging.getLogger(__name__)

WARM_UP = 3  # calls before the recording: lazy tables, compiled kernels, the optimiser's own tensors


class CapturedStep:
    """``step(*inputs)``, which is recorded after a few calls and replayed from then on.

    Every call counts as one step: those of the warm-up run as they are, on a stream of their own, and recording does
    not run anything. Inputs are tensors on the GPU, numbers, and tuples of both; the step always gets the same tensors,
    into which each call copies its own, and for a number a 0-dim tensor (int64 or float64). A step must not read a
    value back from the device, and must work on the same tensors every time: parameters, gradients that it sets, the
    optimiser's state. Other numbers of Python are recorded with it: call :meth:`forget` after a change.

    Where recording fails the step runs as it is, and a line says why. A call whose inputs differ in shape or dtype from
    the first ones (the last batch of an epoch) runs as it is too.
    """

    def __init__(
        self, name: str, step: Callable[..., Any], *, pool: Any = None, say: Callable[[str], None] = log.info
    ) -> None:
        """name: what the lines call it. step: returns tensors on the device. pool: memory that it shares with other
        steps (``torch.cuda.graph_pool_handle()``), so that what it returns holds until one of them runs."""
        self.name, self.step, self.pool, self.say = name, step, pool, say
        self.problem: str | None = None
        self._calls = 0
        self.forget()

    @property
    def captured(self) -> bool:
        """Whether the next call of the recorded shapes is a replay."""
        return self._replay is not None

    def forget(self) -> None:
        """Record again at the next call; the warm-up is not repeated."""
        self._replay: Callable[[], Any] | None = None
        self._inputs: list[Tensor] = []

    def __call__(self, *inputs: Any) -> Any:
        """One step; what a replay returns holds until the next one."""
        if self.problem is not None:
            return self.step(*inputs)
        given, form = tree_flatten(inputs)
        if not self._inputs:
            self._inputs = _room_for(given)
        if not _fits(given, self._inputs):
            return self.step(*inputs)
        for kept, value in zip(self._inputs, given, strict=True):
            kept.copy_(value) if isinstance(value, Tensor) else kept.fill_(value)
        if self._replay is None:
            own = tree_unflatten(self._inputs, form)
            if self._calls < WARM_UP:
                self._calls += 1
                return _on_a_side_stream(self.step, own)
            try:
                self._replay = _record(self.step, own, self.pool)
            except Exception as error:  # whatever the step does that a graph cannot hold
                self.forget()
                self.problem = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
                self.say(f"{self.name}: no CUDA graph, recording failed: {self.problem}")
                return self.step(*inputs)
            self.say(f"{self.name}: runs as a CUDA graph")
        return self._replay()


def capture_steps(method: Any, say: Callable[[str], None] = log.info) -> None:
    """From now on the steps of a search method run as CUDA graphs, where they can; else one line says why not.

    method: a `fastnas.methods.Method` in the state that it starts from; its ``graph_steps`` name the functions to
    record, or say why none can be. Its optimisers are set to keep what they need on the device, so that a rate that is
    set later reaches the recorded steps.
    """
    if not _has_graphs(method.problem.device):
        return
    steps = getattr(method, "graph_steps", "the method names no steps that could be recorded")
    if processes.world_size() > 1:
        steps = f"{processes.world_size()} processes average their gradients in each step"
    if isinstance(steps, str):
        say(f"no CUDA graphs: {steps}")
        return
    for part in vars(method).values():
        if isinstance(part, torch.optim.Optimizer):
            keep_on_device(part)
    pool = _new_pool()
    for name in steps:
        step = CapturedStep(name.replace("_", " "), getattr(method, name), pool=pool, say=say)
        setattr(method, name, step)


def keep_on_device(optimizer: torch.optim.Optimizer) -> None:
    """Let SGD or Adam update with PyTorch's fused kernel, its rate and its count of steps on the parameters' device.

    Every parameter of a group has to take part in every step, or in none.
    """
    # It would warn of every step that is not recorded, and the first ones are not.
    optimizer._warned_capturable_if_run_uncaptured = True
    for group in optimizer.param_groups:
        device = group["params"][0].device
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
        group["fused"], group["foreach"] = True, False
        if "capturable" in group:
            group["capturable"] = True
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                state[key] = value.to(device, torch.float32) if key == "step" else _laid_out_as(parameter, value)
    optimizer.register_step_pre_hook(_lay_out_gradients)


def _lay_out_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """The fused kernels go through memory, whatever the strides are."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = _laid_out_as(parameter, parameter.grad)


def _laid_out_as(like: Tensor, value: Tensor | None) -> Tensor | None:
    if value is None or value.stride() == like.stride():
        return value
    return torch.empty_like(like).copy_(value)


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def _new_pool() -> Any:
    return torch.cuda.graph_pool_handle()


def _room_for(values: Sequence[Any]) -> list[Tensor]:
    """A tensor for each value; those of numbers lie with the first tensor."""
    device = _device_of(values)
    return [
        torch.empty_like(value)
        if isinstance(value, Tensor)
        else torch.empty((), dtype=torch.float64 if isinstance(value, float) else torch.int64, device=device)
        for value in values
    ]


def _fits(given: Sequence[Any], kept: Sequence[Tensor]) -> bool:
    return len(given) == len(kept) and all(
        not isinstance(value, Tensor) or (value.shape, value.dtype) == (room.shape, room.dtype)
        for value, room in zip(given, kept, strict=True)
    )


def _on_a_side_stream(step: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """As PyTorch asks of the calls before a recording: autograd remembers the stream that it first ran on."""
    with torch.cuda.device(_device_of(inputs)):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = step(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
    return result


def _record(step: Callable[..., Any], inputs: Sequence[Any], pool: Any) -> Callable[[], Any]:
    """Record without running; what is returned replays, and returns what the step did."""
    device = _device_of(inputs)
    graph = torch.cuda.CUDAGraph()
    problem: Exception | None = None
    try:
        with (
            torch.cuda.device(device),  # which need not be the current one: elsewhere nothing would be recorded
            torch.cuda.stream(torch.cuda.current_stream(device)),  # to go back to when a recording cannot be ended
            # Only this thread is watched: one that pins images may go on allocating.
            torch.cuda.graph(graph, pool=pool, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"),
        ):
            try:
                result = step(*inputs)
            except Exception as error:
                problem = error
                raise
    except Exception as error:  # a recording that fails cannot be ended either, and says so on top
        raise problem or error from None

    def replay() -> Any:
        with torch.cuda.device(device):
            graph.replay()
        return result

    return replay


def _device_of(values: Any) -> torch.device:
    return next(value.device for value in tree_leaves(values) if isinstance(value, Tensor))
