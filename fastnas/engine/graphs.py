"""A step of a search recorded as a CUDA graph: one launch instead of hundreds, where device and step allow it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Figures = Mapping[str, Tensor]
WARM_UP = 3  # calls before the recording: lazy tables, compiled kernels, the optimiser's own tensors


class CapturedStep:
    """``step(*inputs)``, which is recorded after a few calls and replayed from then on.

    Every call counts as one step: those of the warm-up run as they are, on a stream of their own, and recording does
    not run anything. A step must not read a value back from the device, and must work on the same tensors every time:
    parameters, gradients that it sets, the optimiser's state. Numbers of Python, such as a learning rate, are recorded
    with it: call :meth:`forget` after a change.

    On other devices, and where recording fails, the step runs as it is, and a log line says why. A call whose inputs
    differ in shape or dtype from the recorded ones (the last batch of an epoch) runs as it is too.
    """

    def __init__(self, name: str, step: Callable[..., Figures]) -> None:
        """name: what the log calls it. step: tensors -> figures by name, on the device."""
        self.name, self.step = name, step
        self.problem: str | None = None
        self.forget()

    @property
    def captured(self) -> bool:
        """Whether the next call of the recorded shapes is a replay."""
        return self._graph is not None

    def forget(self) -> None:
        """Record again at the next call; the warm-up is not repeated."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._figures: Figures = {}
        self._calls = min(getattr(self, "_calls", 0), WARM_UP)

    def __call__(self, *inputs: Tensor) -> Figures:
        """One step; the figures of a replay hold until the next one."""
        if self.problem is None and self._graph is None:
            self._refuse(_unsupported(inputs))
        if self.problem is not None:
            return self.step(*inputs)
        if self._calls < WARM_UP:
            self._calls += 1
            return _on_a_side_stream(self.step, inputs)
        if self._graph is None:
            self._inputs = tuple(x.clone() for x in inputs)
            try:
                self._graph, self._figures = _record(self.step, self._inputs)
            except Exception as error:  # whatever the step does that a graph cannot hold
                self.forget()
                self._refuse(f"recording failed: {str(error).strip().splitlines()[0] if str(error) else repr(error)}")
                return self.step(*inputs)
            log.info("%s: runs as a CUDA graph", self.name)
        if not _alike(inputs, self._inputs):
            return self.step(*inputs)
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        self._graph.replay()
        return self._figures

    def _refuse(self, problem: str | None) -> None:
        if problem is not None:
            self.problem = problem
            log.info("%s: no CUDA graph, %s", self.name, problem)


def _unsupported(inputs: tuple[Tensor, ...]) -> str | None:
    """Why a step on these inputs cannot be recorded; None when it may be."""
    kinds = sorted({x.device.type for x in inputs})
    return None if kinds == ["cuda"] else f"the inputs are on {' and '.join(kinds) or 'no device'}"


def _alike(xs: tuple[Tensor, ...], ys: tuple[Tensor, ...]) -> bool:
    return [(x.shape, x.dtype) for x in xs] == [(y.shape, y.dtype) for y in ys]


def _on_a_side_stream(step: Callable[..., Figures], inputs: tuple[Tensor, ...]) -> Figures:
    """As PyTorch asks of the calls before a recording: autograd remembers the stream that it first ran on."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        figures = step(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    return figures


def _record(step: Callable[..., Figures], inputs: tuple[Tensor, ...]) -> tuple[Any, Figures]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        figures = step(*inputs)
    return graph, figures
