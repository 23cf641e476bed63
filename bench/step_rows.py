"""What `bench/search_step.py` times: passes and search steps of one method on the supernet, by name of the row."""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fastnas
from fastnas.engine.graphs import WARM_UP, capture_steps
from fastnas.engine.supernet import Supernet
from fastnas.engine.training import Batch
from fastnas.errors import UserError
from fastnas.profiler.footprint import Footprint
from fastnas.profiler.step import Inputs, Trains, predict
from fastnas.search import build_method, resolve
from fastnas.timing import ARCHITECTURE_STEPS

ROWS = ("plain", "plain_channels_last", "fused", "fused_lean")
HALF = "fused_half"  # maps in bfloat16, on a GPU
GRAPH = "fused_graph"  # a search step that is recorded before it is timed, on a GPU
EXECUTOR_OF = dict(zip((*ROWS, HALF, GRAPH), ("plain", "plain", "fused", "lean", "fused", "fused"), strict=True))
METHODS = ("darts", "pc_darts", "parsec")
PARTS = ("data", "forward", "backward", "architecture", "optimiser")


@dataclass(frozen=True)
class Problem:
    """What all rows share. `step`: "pass" (forward and backward pass, all gradients) or "search" (`method.step`)."""

    method: str
    batch: int
    channels: int = 16
    cells: int = 8
    nodes: int = 4
    image: int = 32
    classes: int = 10
    step: str = "pass"

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, self.image, self.image


class Pass:
    """Forward and backward pass with all gradients: of the weights, and of alphas and betas where there are any.

    A method that samples runs one path, another one for each `index`.
    """

    def __init__(self, method: Any) -> None:
        self.supernet: Supernet = method.supernet
        self.alphas: nn.Module | None = getattr(method, "alphas", None)
        self.parameters = [*method.parameters, *(self.alphas.parameters() if self.alphas is not None else ())]

    def step(self, index: int, train: Batch, search: Batch) -> None:
        path = self.supernet.space.random_genotype(random.Random(index)) if self.alphas is None else None
        logits: Tensor = self.supernet(train[0], path or self.alphas())
        torch.autograd.grad(F.cross_entropy(logits, train[1]), self.parameters, allow_unused=True)


class Row:
    """One way to run the problem, with data of its own, built on `device`."""

    def __init__(self, name: str, problem: Problem, device: torch.device) -> None:
        if name not in EXECUTOR_OF:
            raise UserError(
                f"unknown row {name!r}; there are {', '.join(EXECUTOR_OF)}, plain_compile, plain_compile_net"
            )
        if name == HALF and device.type != "cuda":
            raise UserError(f"{HALF} is for GPUs: leave the row out")
        if name == GRAPH and (device.type != "cuda" or problem.step != "search"):
            raise UserError(f"{GRAPH} is a search step on a GPU: give --step search there, or leave the row out")
        self.name, self.problem, self.device, self.index = name, problem, device, 0
        self.work = self._build(device)
        images = torch.randint(256, (4 * problem.batch, *problem.shape), dtype=torch.uint8, device=device)
        labels = torch.randint(problem.classes, (4 * problem.batch,), device=device)
        self._data = images, labels
        if name == GRAPH:
            lines: list[str] = []
            capture_steps(self.work, lines.append)
            for _ in range(WARM_UP + 1):
                self.run()
            if refused := [line for line in lines if "no CUDA graph" in line]:
                raise UserError(f"{GRAPH}: {refused[0]}")

    def _build(self, device: torch.device) -> Trains:
        torch.manual_seed(0)
        problem = self.problem
        flags = {"method": problem.method, "data": "cifar10", "batch_size": problem.batch, "channels": problem.channels}
        flags |= {"cells": problem.cells, "nodes": problem.nodes, "executor": EXECUTOR_OF[self.name]}
        flags["storage"] = "bfloat16" if self.name == HALF else "float32"
        if problem.method == "parsec":
            flags["likelihood"] = "mean"  # no weight vanishes, so every child runs backward
        plan = resolve(flags)
        method = build_method(plan, problem.classes, 3, device, problem.image)
        method.start_epoch(plan.weights.epochs - 1)  # no phase of warming up
        if self.name == "plain_channels_last":
            method.supernet.to(memory_format=torch.channels_last).register_forward_pre_hook(_in_channels_last)
        return method if problem.step == "search" else Pass(method)

    def _batch(self) -> Batch:
        """A new batch, as a loader that lies on the device makes it."""
        images, labels = self._data
        rows = torch.randint(len(images), (self.problem.batch,), device=self.device)
        return images[rows].float().div_(127.5).sub_(1.0), labels[rows]

    def run(self) -> None:
        """One pass or step, its data included."""
        with self._backend():
            self.work.step(self.index, self._batch(), self._batch())
        self.index += 1

    def seconds(self) -> float:
        """Wall time of one run."""
        return timed(self.run, self.device)

    def breakdown(self) -> dict[str, float]:
        """Seconds of one run by part; the parts add up to it.

        Architecture: a method's whole architecture step, and its optimiser alone where it has no such function (what
        leads to it is then forward).
        """
        watch = Stopwatch(self.device)
        with self._backend(), watch.listening(self.work):
            with watch.part("data"):
                batches = self._batch(), self._batch()
            with watch.part("forward"):
                self.work.step(self.index, *batches)
        self.index += 1
        return {part: watch.seconds[part] for part in PARTS if part in watch.seconds}

    def footprint(self) -> Footprint:
        """Saved bytes and peak by the tracker of the profiler, on shapes alone: the same in every run."""
        work, inputs = self._build(torch.device("cpu")), Inputs(self.problem.shape, self.problem.batch)
        with self._backend():
            return predict(work, inputs, name=self.name, device=self.device)

    def _backend(self) -> AbstractContextManager[Any]:
        """The plain rows are plain PyTorch."""
        plain = EXECUTOR_OF[self.name] == "plain"
        return fastnas.backend("reference") if plain else contextlib.nullcontext()


def _in_channels_last(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[0].contiguous(memory_format=torch.channels_last), *args[1:]


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a run, and of what it leaves to do on the device."""
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Seconds of the parts of a step. Time counts for the innermost part; what an architecture step does is its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: Counter[str] = Counter()
        self._stack: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._enter(name)
        try:
            yield
        finally:
            self._leave()

    def _enter(self, name: str) -> None:
        self._count()
        self._stack.append("architecture" if "architecture" in self._stack else name)

    def _leave(self) -> None:
        self._count()
        self._stack.pop()

    def _count(self) -> None:
        _wait(self.device)
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def listening(self, work: Trains) -> Iterator[None]:
        """Within the block backward passes, optimisers and the architecture step of `work` are parts."""
        architecture = getattr(work, "arch_optimizer", None)

        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            self._enter("architecture" if optimizer is architecture else "optimiser")

        def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                with self.part(name):
                    return function(*args, **kwargs)

            return run

        hooks = [
            register_optimizer_step_pre_hook(before),
            register_optimizer_step_post_hook(lambda *_: self._leave()),
        ]
        grad, backward = torch.autograd.grad, torch.Tensor.backward
        torch.autograd.grad = wrapped("backward", grad)
        torch.Tensor.backward = wrapped("backward", backward)
        functions = {name: getattr(work, name) for name in ARCHITECTURE_STEPS if hasattr(work, name)}
        for name, function in functions.items():
            setattr(work, name, wrapped("architecture", function))
        try:
            yield
        finally:
            torch.autograd.grad, torch.Tensor.backward = grad, backward
            for name in functions:
                setattr(work, name, functions[name])
            for hook in hooks:
                hook.remove()
