"""Settings and fixtures of all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from fastnas.testing import poisoned_empty


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN during the test."""
    with poisoned_empty():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class Recorder:
    """Stands for CUDA graphs on a CPU: a replay runs the step again on the tensors that it was recorded with."""

    def __init__(self) -> None:
        self.steps: list[str] = []  # that were recorded, by name

    def record(self, step: Callable[..., Any], inputs: Sequence[Any], pool: Any) -> Callable[[], Any]:
        self.steps.append(getattr(step, "__name__", "step"))
        return lambda: step(*inputs)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Everything about recorded steps but the recording itself."""
    from fastnas.engine import graphs

    recorder = Recorder()
    monkeypatch.setattr(graphs, "_has_graphs", lambda device: True)
    monkeypatch.setattr(graphs, "_new_pool", lambda: None)
    monkeypatch.setattr(graphs, "_on_a_side_stream", lambda step, inputs: step(*inputs))
    monkeypatch.setattr(graphs, "_record", recorder.record)
    return recorder
