"""Search steps as CUDA graphs: what methods hand over, that no step waits for the device, what a replay computes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastnas import processes
from fastnas.engine.graphs import CapturedStep, capture_steps, keep_on_device
from fastnas.engine.training import Batch
from fastnas.methods import METHODS, Problem
from fastnas.spaces import build_space

CAPTURED: dict[str, dict[str, Any]] = {
    "darts": {},
    "darts second order": {"order": 2},
    "pc_darts": {"partial": 2, "warmup_epochs": 0},
    "snas": {},
}


def build(case: str, problem: Problem, **changes: Any) -> Any:
    torch.manual_seed(0)
    name = case.split()[0]
    method = METHODS[name](METHODS[name].Settings(**CAPTURED.get(case, {}) | changes), problem)
    method.start_epoch(0)
    return method


def batches(device: str = "cpu") -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(5)
    while True:
        x, y = torch.randn(4, 2, 6, 6, generator=generator), torch.randint(3, (4,), generator=generator)
        yield x.to(device), y.to(device)


def search(method: Any, epochs: int = 2, steps: int = 2, device: str = "cpu") -> list[float]:
    """Losses of some epochs; the learning rate is another one in each."""
    stream, losses = batches(device), []
    for epoch in range(epochs):
        method.start_epoch(epoch)
        for index in range(epoch * steps, (epoch + 1) * steps):
            losses.append(float(method.step(index, next(stream), next(stream))["loss"]))
    return losses


def vector(method: Any) -> Tensor:
    """Everything that a search learns and keeps, optimisers included."""
    leaves = tree_leaves(method.state_dict())
    return torch.cat([leaf.double().cpu().flatten() for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()])


@pytest.mark.parametrize("case", CAPTURED)
def test_recorded_steps_search_as_the_steps_themselves(case, problem, as_on_a_gpu):
    eager, recorded, said = build(case, problem), build(case, problem), []
    capture_steps(recorded, said.append)
    assert search(recorded) == pytest.approx(search(eager), rel=1e-4)
    assert float((vector(recorded) - vector(eager)).norm() / vector(eager).norm()) < 1e-4
    assert all(getattr(recorded, name).captured for name in recorded.graph_steps)
    assert sorted(as_on_a_gpu.steps) == sorted(recorded.graph_steps)  # each once in the whole search
    assert len(said) == len(recorded.graph_steps)


@pytest.mark.parametrize("case", ["darts", "snas"])
def test_what_is_saved_of_recorded_steps_goes_on_without_and_with_them(case, problem, as_on_a_gpu):
    whole, first = build(case, problem), build(case, problem)
    search(whole, epochs=3)
    capture_steps(first)
    search(first, epochs=2)
    assert all(getattr(first, name).captured for name in first.graph_steps)
    for capture in (False, True):
        second = build(case, problem)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert isinstance(second.weight_optimizer.param_groups[0]["lr"], float)
        assert second.arch_optimizer.param_groups[0]["capturable"] is False
        if capture:
            capture_steps(second)
        stream = batches()
        for _ in range(2 * 2 * 2):
            next(stream)
        second.start_epoch(2)
        for index in (4, 5):
            second.step(index, next(stream), next(stream))
        assert float((vector(second) - vector(whole)).norm() / vector(whole).norm()) < 1e-4


def test_without_a_gpu_nothing_is_wrapped(problem):
    method, said = build("darts", problem), []
    capture_steps(method, said.append)
    assert not said and "weight_step" not in vars(method)
    assert isinstance(method.weight_optimizer.param_groups[0]["lr"], float)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in CAPTURED])
def test_methods_whose_step_is_another_one_each_time_say_so_once(name, problem, as_on_a_gpu):
    said = []
    if name == "one_shot":
        space, weights = build_space("choice_blocks", nodes=2, cells=3), replace(problem.weights, batch_size=32)
        problem = replace(problem, space=space, weights=weights)
    changes = {"samples": 1} if name == "random" else {}
    method = build(name, problem, **changes)
    capture_steps(method, said.append)
    assert len(said) == 1 and said[0].startswith("no CUDA graphs: ") and said[0].endswith((" step", " its own"))
    assert not any(isinstance(part, CapturedStep) for part in vars(method).values())


def test_random_channels_and_several_processes_say_so_too(problem, as_on_a_gpu, monkeypatch):
    said = []
    capture_steps(build("pc_darts", problem, partial=2, random_channels=True), said.append)
    monkeypatch.setattr(processes, "group", processes.Group(0, 2, 0, "gloo", None, None))
    capture_steps(build("darts", problem), said.append)
    assert said == [
        "no CUDA graphs: random channels are drawn by the host at each pass",
        "no CUDA graphs: 2 processes average their gradients in each step",
    ]


class OnDevice(TorchDispatchMode):
    """Fails when a value is read from the device, when its shape depends on one, or when anything is on the host.

    With tensors of shape alone ("meta") for those of the GPU: whatever else there is was made by the host.
    """

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        assert all(tensor.device.type == "meta" for tensor in tensors), f"{op} meets a tensor of the host"
        return result


@pytest.fixture
def shapes_alone(problem, monkeypatch) -> Problem:
    """The problem on a device without values; updates by the fused kernels, which have none for it, are left out."""

    def update(*args: Any, **options: Any) -> None:
        assert {leaf.device.type for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)} == {"meta"}

    for module in ("sgd", "adam"):
        monkeypatch.setattr(sys.modules[f"torch.optim.{module}"], "_device_dtype_check_for_fused", lambda _: None)
        monkeypatch.setattr(torch, f"_fused_{module}_", update)
    return replace(problem, device=torch.device("meta"))


@pytest.mark.parametrize(
    ("case", "executor"),
    [(case, "fused") for case in CAPTURED if "order" not in case]
    + [("darts second order", "lean"), ("darts", "plain")],
)
def test_no_step_waits_for_the_device_or_copies_from_the_host(case, executor, shapes_alone, as_on_a_gpu):
    """As a recording has to be: what the first call made is there."""
    shapes_alone = replace(shapes_alone, weights=replace(shapes_alone.weights, executor=executor))
    method = build(case, shapes_alone)
    capture_steps(method)
    batch = next(batches("meta"))
    method.step(0, batch, batch)
    steps = [getattr(method, name) for name in method.graph_steps]
    with OnDevice():
        for step in steps:
            step.step(*inputs_of(method, step.name, batch))


def inputs_of(method: Any, name: str, batch: Batch) -> tuple[Any, ...]:
    if name == "joint step":
        seed, temperature = (torch.empty((), dtype=dtype, device="meta") for dtype in (torch.int64, torch.float64))
        return batch, (seed, seed), temperature
    return (batch,) if name == "weight step" else (batch, batch)


@pytest.mark.parametrize(
    "wrong",
    [lambda x: x.sum().item(), lambda x: x + torch.ones(4).to(x.device), lambda x: x[x > 0]],
    ids=["item", "copy from the host", "shape by value"],
)
def test_the_watch_sees_what_a_graph_cannot_hold(wrong: Callable[[Tensor], Any]):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), OnDevice():
        wrong(torch.empty(4, device="meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("space", ["darts", "nasbench201"])
@pytest.mark.parametrize("case", CAPTURED)
def test_on_a_gpu_replays_search_as_eager_steps(case, space, problem):
    problem = replace(problem, device=torch.device("cuda"))
    if space == "nasbench201":
        problem = replace(problem, space=build_space(space, nodes=4, cells=3))
    eager, recorded, said = build(case, problem), build(case, problem), []
    for optimizer in (eager.weight_optimizer, eager.arch_optimizer):
        keep_on_device(optimizer)
    capture_steps(recorded, said.append)
    losses = [search(method, epochs=4, steps=3, device="cuda") for method in (recorded, eager)]
    assert all(text.endswith("runs as a CUDA graph") for text in said), said
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert float((vector(recorded) - vector(eager)).norm() / vector(eager).norm()) < 1e-3
