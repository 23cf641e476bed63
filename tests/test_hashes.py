"""Digests of a run: they change with what decides its result, and with nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fastnas import data, hashes
from fastnas.data.folder import Files
from fastnas.hashes import digest, run_hashes
from fastnas.search import resolve


def write(path: Path, seed: int = 0, changed: int = 0) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    pixels[-1, 0, 0, 0] += changed
    np.savez(path, x=pixels, y=np.arange(60) % 3)
    return f"npz:{path}"


def of(spec: str, **settings: object) -> dict[str, str]:
    plan = resolve({"method": "darts", "data": spec, **settings})
    return run_hashes(plan.as_mapping(), data.load(spec, seed=plan.runtime.seed))


def changes(first: dict[str, str], second: dict[str, str]) -> set[str]:
    return {name for name in first if first[name] != second[name]}


def test_each_digest_follows_its_own_part(tmp_path):
    first = of(write(tmp_path / "a.npz"))
    assert all(re.fullmatch("[0-9a-f]{16}|none", value) for value in first.values())
    assert changes(first, of(write(tmp_path / "b.npz"))) == set()  # another path
    assert changes(first, of(write(tmp_path / "c.npz", changed=1))) == {"data", "run"}  # one pixel
    assert changes(first, of(write(tmp_path / "a.npz"), seed=1)) == {"configuration", "run"}
    assert changes(first, of(write(tmp_path / "a.npz"), arch_lr=0.1)) == {"configuration", "run"}
    assert changes(first, of(write(tmp_path / "a.npz"), threads=1, workers=0, tensorboard=True)) == set()


def test_streamed_files_count_by_name_and_size(tmp_path):
    streamed = pytest.importorskip("fastnas.data.streamed")

    def parts(folder: str, size: int = 3) -> str:
        paths = [tmp_path / folder / label / "1.png" for label in ("a", "b")]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x" * size)
        files = Files("files", [str(path) for path in paths], torch.tensor([0, 1]), [], torch.tensor([]))
        store = streamed.Streamed(files.paths, files.labels, 8, torch.device("cpu"), 0)
        return digest(store.contents())

    assert parts("one") == parts("two") != parts("three", size=4)


def test_the_code_is_every_source_file(tmp_path, monkeypatch):
    package = tmp_path / "fastnas"
    (package / "kernels").mkdir(parents=True)
    for name, text in (("a.py", "1"), ("kernels/b.py", "2"), ("presets.toml", "3"), ("_build.json", "4")):
        (package / name).write_text(text)

    class Spec:
        def __init__(self, name: str) -> None:
            self.submodule_search_locations = [str(tmp_path / name.replace(".", "/"))]

    monkeypatch.setattr(hashes.importlib.util, "find_spec", Spec)
    found = [hashes.code_digest.__wrapped__()]
    for name in ("a.py", "kernels/b.py", "presets.toml"):
        (package / name).write_text("changed")
        found.append(hashes.code_digest.__wrapped__())
    assert len(set(found)) == 4
    (package / "_build.json").write_text("changed")
    assert hashes.code_digest.__wrapped__() == found[-1]


def test_parts_do_not_run_into_each_other():
    assert digest([b"ab", b"c"]) != digest([b"a", b"bc"])
