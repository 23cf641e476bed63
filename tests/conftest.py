"""Settings and fixtures of all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastnas.testing import poisoned_empty


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _threads() -> Iterator[None]:
    """Commands set the number of threads for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes random images of 8 x 8 pixels and the labels 0, 1, ..., 0, 1, ... for `--data npz:PATH`."""

    def write(count: int, classes: int, *channels: int) -> Path:
        path = tmp_path_factory.mktemp("data") / "images.npz"
        pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, *channels), dtype=np.uint8)
        np.savez(path, x=pixels, y=np.arange(count) % classes)
        return path

    return write


@pytest.fixture(scope="session")
def images(archive: Callable[..., Path]) -> Path:
    """Sixty coloured images of three classes."""
    return archive(60, 3, 3)


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
