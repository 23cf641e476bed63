"""Exported networks give PyTorch's outputs, and a run folder its trained network in one call."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastnas
from fastnas import export
from fastnas.engine.networks import build_network
from fastnas.engine.training import recalibrate
from fastnas.errors import UserError
from fastnas.export import TOLERANCE, export_network, export_onnx, export_torch
from fastnas.retrain import resolve, run_retrain
from fastnas.settings import load_data
from fastnas.spaces import (
    AnyGenotype,
    ChoiceBlockSpace,
    DartsSpace,
    Nasbench201Space,
    ShufflenetSpace,
    load_genotype,
)
from fastnas.trained import load_network, read_card

IMAGE = (3, 16, 16)


def snas_genotype() -> AnyGenotype:
    """All edges listed, `none` on some, and the first node of the normal cell without inputs."""
    return DartsSpace(nodes=3).free_edges([0, 0, 4, 7, 0, 3, 0, 6, 2], [1, 5, 0, 3, 0, 0, 0, 4, 0], rule="all-edges")


GENOTYPES = {
    "DARTS_V2": lambda: load_genotype("DARTS_V2"),
    "PC_DARTS_cifar": lambda: load_genotype("PC_DARTS_cifar"),
    "snas": snas_genotype,
    "shufflenet_se": lambda: ShufflenetSpace(4, extras=True).decode([0, 1, 2, 3]),
    "choice_blocks": lambda: ChoiceBlockSpace(3).random_genotype(random.Random(1)),
    "nasbench201": lambda: Nasbench201Space().decode([3, 1, 4, 2, 0, 3]),
}
CHECKED_WITH_ONNX = ("DARTS_V2", "PC_DARTS_cifar", "snas", "shufflenet_se")


@pytest.fixture(scope="module", params=GENOTYPES)
def network(request) -> tuple[str, nn.Module]:
    """With random weights, and the running statistics of random images, so that logits are of size 1."""
    torch.manual_seed(0)
    built = build_network(GENOTYPES[request.param](), channels=4, cells=3, classes=5)
    recalibrate(built, built, [(torch.randn(16, *IMAGE), torch.zeros(16)) for _ in range(2)])
    return request.param, built


def test_torch_export_gives_the_same_logits_without_custom_ops(network, tmp_path):
    assert export_torch(network[1], IMAGE, tmp_path / "network.pt2") <= TOLERANCE
    images = torch.randn(5, *IMAGE)
    program = torch.export.load(tmp_path / "network.pt2")
    torch.testing.assert_close(program.module()(images), network[1](images), atol=TOLERANCE, rtol=0)
    calls = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert len(calls) > 4 and all(call.namespace == "aten" for call in calls)


def test_onnx_runtime_gives_the_same_logits(network, tmp_path):
    name, built = network
    if name not in CHECKED_WITH_ONNX:
        pytest.skip("four networks are enough for the exporter")
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "network.onnx"
    assert export_onnx(built, IMAGE, path, "a note") <= TOLERANCE
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].name == "images" and session.get_outputs()[0].name == "logits"
    assert session.get_inputs()[0].shape == ["batch", *IMAGE]
    assert session.get_modelmeta().custom_metadata_map["fastnas"] == "a note"
    images = torch.randn(5, *IMAGE)
    with torch.no_grad():
        wanted = built(images)
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)
    assert wanted.abs().max() > 0.1  # else the tolerance would say nothing


class Doubtful(nn.Module):
    """Differs from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x.mean((2, 3)) + 1e-3 * self.calls


def test_a_difference_is_refused(tmp_path):
    with pytest.raises(UserError, match="differs from PyTorch's by .*, more than 1e-04, and was removed"):
        export_torch(Doubtful(), IMAGE, tmp_path / "network.pt2")
    assert not (tmp_path / "network.pt2").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    labels = np.arange(40) % 2
    x = np.random.default_rng(0).integers(0, 120, (40, 8, 8), dtype=np.uint8)
    np.savez(folder / "images.npz", x=x + (labels * 90).astype(np.uint8)[:, None, None], y=labels)
    flags = {"genotype": "PC_DARTS_cifar", "data": f"npz:{folder / 'images.npz'}", "epochs": 2, "batch_size": 16}
    flags |= {"channels": 4, "cells": 3, "device": "cpu", "auxiliary_weight": 0.4}
    return run_retrain(resolve(flags, {}), folder / "run", quiet=True).run.path


def test_a_run_folder_gives_its_trained_network(run):
    card = read_card(run)
    assert card.image == (1, 8, 8) and card.classes == 2 and card.genotype == load_genotype("PC_DARTS_cifar")
    network = load_network(run)
    assert not network.training and not any(name.startswith("auxiliary") for name, _ in network.named_parameters())
    plan = resolve({}, {**fastnas.runs.RunFolder.open(run).config(), "genotype": str(run)})
    data = load_data(plan.data, plan.runtime, torch.device("cpu"))
    assert card.mean == data.mean and card.std == data.std
    (x, y), *_ = data.test.batches(len(data.test))
    accuracy = (network(x).argmax(-1) == y).float().mean()
    assert accuracy == pytest.approx(json.loads((run / "result.json").read_text())["test_accuracy"])


def test_torch_hub_gives_it_too(run):
    root = Path(__file__).parents[1]
    network = torch.hub.load(str(root), "trained", str(run), source="local", verbose=False)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(network(images), load_network(run)(images))


def test_safetensors_hold_the_network_and_its_genotype(run, tmp_path):
    pytest.importorskip("safetensors")
    export_network(run, tmp_path / "out", ["safetensors"])
    assert read_card(tmp_path / "out") == read_card(run)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(load_network(tmp_path / "out" / "network.safetensors")(images), load_network(run)(images))


def test_the_command_exports_and_says_how_exact(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        export.run_command(export.main, [str(run), "--torch-export", "--safetensors", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert caught.value.code == 0, printed
    assert "multiply-adds of a 1x8x8 image" in printed and "largest difference from PyTorch" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"network.json", "network.pt2", "network.safetensors"}


@pytest.mark.parametrize(("package", "format"), [("onnxruntime", "onnx"), ("safetensors", "safetensors")])
def test_a_missing_package_is_named(package, format, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package} is needed .*: pip install fastnas\[export\]"):
        export_network(run, tmp_path, [format])


def test_a_folder_that_is_no_retraining(tmp_path):
    with pytest.raises(UserError, match="give the folder of python -m fastnas.retrain"):
        load_network(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="give a file of python -m fastnas.export"):
        load_network(tmp_path / "weights.safetensors")
