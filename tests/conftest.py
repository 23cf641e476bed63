"""Settings and fixtures of all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

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
