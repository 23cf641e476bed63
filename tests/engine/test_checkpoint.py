"""Checkpoints: every kind of state comes back, and no damage goes unnoticed."""

from __future__ import annotations

import errno
import os
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from fastnas import _files
from fastnas.engine import checkpoint
from fastnas.engine.checkpoint import load_checkpoint, save_checkpoint
from fastnas.errors import UserError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pt"


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


def save(path: Path, value: int) -> None:
    save_checkpoint(path, {"value": value}, method="darts")


def load(path: Path) -> int:
    return load_checkpoint(path, method="darts")["value"]


def test_every_kind_of_state_comes_back(path):
    state = {
        "epoch": 3,
        "rate": 0.1,
        "name": "pc",
        "none": None,
        "flag": True,
        "pairs": [("a", 1), [2.5]],
        7: torch.arange(4, dtype=torch.int64),
        "half": torch.full((2, 3), 1.5, dtype=torch.bfloat16),
        "rng": torch.get_rng_state(),
    }
    save_checkpoint(path, state, method="darts")
    loaded = load_checkpoint(path, method="darts")
    assert list(loaded) == list(state)
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            assert loaded[key].dtype == value.dtype and torch.equal(loaded[key], value)
        else:
            assert loaded[key] == value and type(loaded[key]) is type(value)


def test_modules_and_optimisers_resume_bit_for_bit(path):
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
        return module, torch.optim.Adam(module.parameters(), 1e-2)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        module(torch.linspace(-1, 1, 96).reshape(2, 3, 4, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    one, other = build(), build()
    step(*one)
    state = {"module": one[0].state_dict(), "optimizer": one[1].state_dict()}
    assert isinstance(state["module"], OrderedDict)
    save_checkpoint(path, state, method="darts")
    loaded = load_checkpoint(path, method="darts")
    other[0].load_state_dict(loaded["module"])
    other[1].load_state_dict(loaded["optimizer"])
    step(*one)
    step(*other)
    for a, b in zip(one[0].state_dict().values(), other[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_previous_checkpoint_is_kept(path):
    for value in range(3):
        save(path, value)
    assert names(path) == ["checkpoint.prev.pt", "checkpoint.pt"]
    assert load(path) == 2
    assert load(path.with_name("checkpoint.prev.pt")) == 1


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_last_byte, cut, empty, Path.unlink])
def test_damaged_checkpoint_falls_back_to_the_previous_one(path, damage):
    save(path, 1)
    save(path, 2)
    damage(path)
    with pytest.warns(UserWarning, match=r"checkpoint\.pt is .*: going on from .*checkpoint\.prev\.pt"):
        assert load(path) == 1


def test_damaged_checkpoint_does_not_replace_the_good_one(path):
    save(path, 1)
    save(path, 2)
    cut(path)
    save(path, 3)
    assert load(path) == 3
    assert load(path.with_name("checkpoint.prev.pt")) == 1


def test_both_damaged(path):
    save(path, 1)
    save(path, 2)
    cut(path)
    empty(path.with_name("checkpoint.prev.pt"))
    with pytest.raises(UserError) as caught:
        load(path)
    assert "checkpoint.pt is damaged (its checksum is wrong)" in str(caught.value)
    assert "checkpoint.prev.pt is not a fastnas checkpoint" in str(caught.value)


def test_missing(path):
    with pytest.raises(UserError, match=r"no checkpoint at .*checkpoint\.pt"):
        load(path)


def test_a_folder_is_no_checkpoint(path):
    path.mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        load(path)


def test_other_method(path):
    save(path, 1)
    with pytest.raises(UserError, match="by method darts, not pc_darts; put the run's own checkpoint back"):
        load_checkpoint(path, method="pc_darts")


def test_other_format(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save(path, 1)
    monkeypatch.undo()
    with pytest.raises(UserError, match="has format 2, this fastnas reads 1"):
        load(path)


class Payload:
    """Unpickling it creates a file, as a hostile checkpoint might."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_loading_runs_no_code(path, monkeypatch):
    witness = path.with_name("witness")
    monkeypatch.setattr(checkpoint, "_check_plain", lambda *arguments: None)
    save_checkpoint(path, {"x": Payload(witness)}, method="darts")
    with pytest.raises(UserError, match="cannot be unpacked"):
        load(path)
    assert not witness.exists()
    pickle.loads(pickle.dumps(Payload(witness)))
    assert witness.exists()


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"a": {"b": [0, Path("x")]}}, r"state\['a'\]\['b'\]\[1\], a (Posix|Windows)Path"),
        ({"a": {1, 2}}, r"state\['a'\], a set"),
        ({(1, Path("x")): 1}, r"a key of state\[1\]"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(path, state, place):
    with pytest.raises(TypeError, match=place):
        save_checkpoint(path, state, method="darts")
    assert names(path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_save_leaves_everything_as_it_was(path, monkeypatch, call):
    save(path, 1)
    save(path, 2)

    def disk_full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_files.os, call, disk_full)
    with pytest.raises(OSError, match=r"No space left on device: '.*checkpoint\.pt'"):
        save(path, 3)
    monkeypatch.undo()
    assert load(path) == 2
    assert load(path.with_name("checkpoint.prev.pt")) == 1
    assert names(path) == ["checkpoint.prev.pt", "checkpoint.pt"]


@pytest.mark.parametrize("fail_at", range(1, 6))
def test_a_kill_at_any_moment_leaves_a_good_checkpoint(path, monkeypatch, fail_at):
    """Stop before the n-th call to the file system, with no clean-up, then resume and save again."""
    save(path, 1)
    save(path, 2)

    class Kill(BaseException):
        pass

    calls = 0

    def counted(original):
        def call(*arguments):
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise Kill
            return original(*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "link", "replace"):
            patch.setattr(_files.os, name, counted(getattr(os, name)))
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        with pytest.raises(Kill):
            save(path, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(path) == (3 if fail_at == 5 else 2)
    save(path, 4)
    save(path, 5)
    assert (load(path), load(path.with_name("checkpoint.prev.pt"))) == (5, 4)
    assert names(path) == ["checkpoint.prev.pt", "checkpoint.pt"]


def test_without_hard_links(path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(_files.os, "link", unsupported)
    save(path, 1)
    save(path, 2)
    assert (load(path), load(path.with_name("checkpoint.prev.pt"))) == (2, 1)
