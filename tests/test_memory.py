"""The search's use of predictions: the warning, the automatic batch, and the error when memory ran out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from fastnas import memory, search
from fastnas.config import read_toml
from fastnas.engine.training import Batch
from fastnas.errors import UserError
from fastnas.methods import RandomSearch, WeightSettings
from fastnas.profiler.step import Inputs
from fastnas.profiler.subject import Subject
from fastnas.search import resolve, run_search

SETTINGS = {
    "method": "random",
    "samples": 1,
    "epochs": 1,
    "channels": 4,
    "cells": 3,
    "nodes": 2,
    "device": "cpu",
    "threads": 1,
}


@pytest.fixture(scope="module")
def images(archive: Callable[..., Path]) -> str:
    return f"npz:{archive(250, 3, 3)}"


def free(monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: size)


def break_steps(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Steps on real batches raise `error`; those of a prediction go on."""
    original = RandomSearch.step

    def step(self: RandomSearch, index: int, train: Batch, search: Batch) -> dict[str, torch.Tensor]:
        if not isinstance(train[0], FakeTensor):
            raise error
        return original(self, index, train, search)

    monkeypatch.setattr(RandomSearch, "step", step)


def plan(images: str, batch_size: int | str) -> Any:
    return resolve({**SETTINGS, "data": images, "batch_size": batch_size})


@pytest.fixture(scope="module")
def peak(images: str) -> Callable[[int], int]:
    """Predicted peak by batch size; a size is predicted once for all tests."""
    step = search.search_step(plan(images, 20), 3, (3, 8, 8), torch.device("cpu"))
    return lambda batch_size: step.predict(batch_size).peak


def test_it_warns_before_it_starts_and_names_the_batch_that_fits(
    images: str, peak: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = peak(20)
    free(monkeypatch, limit)
    break_steps(monkeypatch, KeyboardInterrupt())
    warns = pytest.warns(UserWarning, match="random needs .* by prediction with a batch of 40, and")
    with pytest.raises(KeyboardInterrupt), warns as caught:
        run_search(plan(images, 40), tmp_path / "run", quiet=True)
    named = int(str(caught[0].message).partition("--batch-size ")[2].partition(" ")[0])
    assert peak(named) <= memory.AUTO_SHARE * limit < peak(named + 1)


def test_nothing_is_said_when_it_fits(
    images: str, peak: Any, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    free(monkeypatch, peak(20))
    step = search.search_step(plan(images, 20), 3, (3, 8, 8), torch.device("cpu"))
    memory.SearchMemory(step, plan(images, 20).weights).warn()
    assert not recwarn.list


def test_an_automatic_batch_fits_and_a_resumed_run_keeps_it(
    images: str, peak: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = peak(8)
    free(monkeypatch, limit)
    run = run_search(plan(images, "auto"), tmp_path / "run", quiet=True).run
    batch = read_toml(run.path / "config.toml")["batch_size"]
    assert peak(batch) <= memory.AUTO_SHARE * limit < peak(batch + 1)
    run_search(search.resolve({}, run.config()), resume=run.path, quiet=True)


def test_an_automatic_batch_leaves_ten_steps_an_epoch(images: str, tmp_path: Path) -> None:
    run = run_search(plan(images, "auto"), tmp_path / "run", quiet=True).run
    data_for_weights = 250 * 8 // 10 // 2
    assert read_toml(run.path / "config.toml")["batch_size"] == data_for_weights // 10


def test_auto_may_come_from_a_preset_and_is_overridden_by_a_flag(images: str, tmp_path: Path) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text('method = "darts"\nbatch_size = "auto"\n')
    assert resolve({"preset": str(preset)}).auto_batch
    overridden = resolve({"preset": str(preset), "batch_size": 12})
    assert (overridden.auto_batch, overridden.weights.batch_size) == (False, 12)


def test_no_batch_fits(images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 1000)
    with pytest.raises(UserError, match="no batch fits into the free memory: give fewer --channels or --cells"):
        run_search(plan(images, "auto"), Path("never"))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["cuda", "cpu"],
)
def test_out_of_memory_names_the_method_the_peak_and_the_batch_that_fits(
    images: str, peak: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    free(monkeypatch, 2 * peak(20))
    break_steps(monkeypatch, error)
    sentence = r"out of memory: random needs [\d.]+ MB by prediction with a batch of 20, .*: --batch-size 19 would fit"
    with pytest.raises(UserError, match=sentence):
        run_search(plan(images, 20), tmp_path / "run", quiet=True)


class Unpredictable:
    def step(self, index: int, train: Batch, search: Batch) -> None:
        train[0].numpy()


def test_what_cannot_be_predicted_may_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 10)
    subject = Subject("strange", lambda device: Unpredictable(), Inputs((3, 8, 8), 4), torch.device("cpu"))
    search_memory = memory.SearchMemory(subject, WeightSettings(batch_size=4))
    with pytest.warns(UserWarning, match="the memory of strange cannot be predicted"):
        search_memory.warn()
    assert search_memory.explain() == "strange had a batch of 4: give a smaller --batch-size"
