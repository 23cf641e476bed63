"""A user's own search: the examples as written, the library calls, own candidates and spaces."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastnas
from fastnas import spaces
from fastnas.engine.checkpoint import load_checkpoint
from fastnas.errors import UserError
from fastnas.methods import METHODS, spaces_of
from fastnas.search import resolve
from fastnas.spaces import DartsSpace, build_space, load_genotype, register_space

ROOT = Path(__file__).parents[1]
TINY = {"epochs": 1, "channels": 4, "cells": 3, "nodes": 2, "batch_size": 64, "partial": 2, "device": "cpu"}


def test_from_a_folder_of_images_to_onnx(tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="the example ends with it")
    pytest.importorskip("PIL", reason="image files are read with Pillow")
    spec = importlib.util.spec_from_file_location("own_images", ROOT / "examples" / "own_images.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    accuracy = example.main(["--out", str(tmp_path)])
    assert accuracy > 0.6  # chance: 0.33
    assert (tmp_path / "network" / "network.onnx").exists()
    assert (tmp_path / "network" / "network.onnx").stat().st_size < 10**6
    printed = capsys.readouterr().out
    assert "largest difference" in printed and "classified" in printed


def test_an_own_operation_in_an_own_space_takes_less_than_40_lines(tmp_path):
    path = ROOT / "examples" / "own_space.py"
    assert len(path.read_text().splitlines()) < 40
    command = [sys.executable, str(path), str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    used = {name for node in json.loads((tmp_path / "run" / "genotype.json").read_text())["normal"] for name, _ in node}
    assert used <= {"skip_connect", "max_pool_3x3", "conv_3x3", "sep_conv_3x3"}
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt", method="darts")["method"]
    assert tuple(state["alphas"]["alpha_normal"].shape) == (5, 5)


def test_the_guide_shows_the_examples_as_they_are():
    guide = (ROOT / "docs" / "own_search.md").read_text()
    example = (ROOT / "examples" / "own_space.py").read_text()
    assert example in guide


@pytest.fixture
def own_space() -> Iterator[str]:
    @register_space("test_two_choices")
    def two_choices(nodes: int) -> DartsSpace:
        return DartsSpace(nodes, ("skip_connect", "sep_conv_3x3"))

    yield "test_two_choices"
    del spaces.SPACES["test_two_choices"]
    spaces.CELL_SPACES.remove("test_two_choices")


def test_a_registered_space_is_known_to_methods_and_settings(own_space):
    assert build_space(own_space, nodes=3, cells=3) == DartsSpace(3, ("skip_connect", "sep_conv_3x3"))
    assert {method for method in METHODS if own_space in spaces_of(method)} == set(METHODS) - {"one_shot"}
    assert resolve({"space": own_space}).search.space == own_space
    with pytest.raises(ValueError, match="already registered; choose another name"):
        register_space("darts")(lambda nodes: DartsSpace(nodes))


def test_an_unregistered_space_is_refused():
    with pytest.raises(UserError, match="space must be one of darts, nasnet"):
        resolve({"space": "test_two_choices"})


def test_search_and_retraining_as_library_calls(own_space, tmp_path):
    found = fastnas.search_network(tmp_path / "search", method="pc_darts", space=own_space, **TINY)
    assert found.genotype == load_genotype(tmp_path / "search")
    again = fastnas.search_network(tmp_path / "search", method="pc_darts", space=own_space, **TINY)
    assert again.genotype == found.genotype and len(again.run.metrics()) == 1
    with pytest.raises(UserError, match="holds a run of other settings"):
        fastnas.search_network(tmp_path / "search", method="pc_darts", space=own_space, **TINY | {"seed": 1})

    automatic = TINY | {"batch_size": "auto", "train_fraction": 0.1}
    sizes = [fastnas.search_network(tmp_path / "auto", **automatic).run.config()["batch_size"] for _ in range(2)]
    assert sizes == [14, 14]

    size = {"epochs": 1, "channels": 4, "cells": 3, "batch_size": 256, "device": "cpu"}
    trained = fastnas.retrain_network(tmp_path / "search", tmp_path / "network", **size)
    assert (
        trained.test_accuracy
        == fastnas.retrain_network(tmp_path / "search", tmp_path / "network", **size).test_accuracy
    )
    assert fastnas.load_network(tmp_path / "network").genotype == found.genotype
    with pytest.raises(UserError, match="unknown setting 'epoch'; did you mean 'epochs'"):
        fastnas.retrain_network("DARTS_V2", tmp_path / "other", epoch=3)
