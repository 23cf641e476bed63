"""What searches and retraining share: the machine's settings take effect, the data's settings reach the loader."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fastnas.errors import UserError
from fastnas.settings import CHANGEABLE_ON_RESUME, MAX_SEED, DataSettings, RuntimeSettings, load_data, prepare


@pytest.fixture(autouse=True)
def restore_torch() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def test_a_seed_repeats_the_random_numbers():
    drawn = []
    for seed in (7, 7, 8, MAX_SEED):
        prepare(RuntimeSettings(seed=seed, device="cpu"))
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_threads(monkeypatch):
    before = torch.get_num_threads()
    prepare(RuntimeSettings(device="cpu"))
    assert torch.get_num_threads() == before
    prepare(RuntimeSettings(device="cpu", threads=before + 1))
    assert torch.get_num_threads() == before + 1


def test_deterministic(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    prepare(RuntimeSettings(device="cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    prepare(RuntimeSettings(device="cpu", deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("available", [True, False])
def test_auto_takes_the_gpu_when_there_is_one(available, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert prepare(RuntimeSettings()).type == ("cuda" if available else "cpu")


@pytest.mark.parametrize("device", ["gpu:0", "meta", "mps", "cpu:x", "cuda:", "cuda:-1", ""])
def test_devices_that_nothing_runs_on(device):
    with pytest.raises(UserError, match=f"device must be auto, cpu, cuda or cuda:N, got '{device}'"):
        prepare(RuntimeSettings(device=device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(UserError, match=r"device 'cuda' cannot be used here \(.+\); try --device cpu"):
        prepare(RuntimeSettings(device="cuda"))


def test_data_settings_reach_the_loader(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, x=np.zeros((40, 8, 8), np.uint8), y=np.arange(40) % 2)
    settings = DataSettings(data=f"npz:{path}", image_size=6, num_classes=5, cutout=3)
    splits = []
    for seed in (0, 0, 1):
        data = load_data(settings, RuntimeSettings(seed=seed), torch.device("cpu"), search_fraction=0.25)
        splits.append(data.search.rows)
    assert (data.image_size, data.num_classes, data.channels, data.train.recipe.cutout) == (6, 5, 1, 3)
    assert (data.train_size, data.search_size, data.test_size) == (24, 8, 8)
    assert torch.equal(splits[0], splits[1]) and not torch.equal(splits[0], splits[2])


def test_a_resume_may_change_only_where_things_are_and_run():
    names = {field.name for cls in (DataSettings, RuntimeSettings) for field in dataclasses.fields(cls)}
    assert names - {"data", "seed", "image_size", "num_classes", "cutout", "download", "deterministic"} == (
        CHANGEABLE_ON_RESUME
    )
