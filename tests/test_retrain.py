"""Retraining: the network is trained on all training images, measured once, and goes on bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastnas
from fastnas import retrain
from fastnas.engine.checkpoint import load_checkpoint
from fastnas.engine.derived import DerivedNetwork
from fastnas.engine.training import evaluate
from fastnas.errors import UserError
from fastnas.profiler.counts import count
from fastnas.progress import Progress
from fastnas.retrain import CHECKPOINT_KIND, RetrainResult, build_network, resolve, run_retrain
from fastnas.runs import RunFolder
from fastnas.settings import load_data
from fastnas.spaces import ChoiceBlockSpace, DartsSpace, Nasbench201Space, ShufflenetSpace, load_genotype
from fastnas.trained import load_network

STEPS, EPOCHS, TEST_SIZE = 3, 4, 12  # 60 images: 48 to train on, 12 held out
FILES = {"config.toml", "metrics.jsonl", "timing.jsonl", "genotype.json", "cells.svg", "checkpoint.pt", "result.json"}
SETTINGS = {
    **{"genotype": "DARTS_V2", "epochs": EPOCHS, "batch_size": 16, "channels": 4, "cells": 3, "threads": 1},
    **{"auxiliary_weight": 0.4, "drop_path": 0.4, "cutout": 2, "lr": 0.1, "device": "cpu"},
}


class Stop(Exception):
    """Ends a training in the middle."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that their brightness tells apart."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    labels = np.arange(60) % 3
    noise = np.random.default_rng(0).integers(0, 60, (60, 8, 8), dtype=np.uint8)
    np.savez(path, x=noise + (labels * 90).astype(np.uint8)[:, None, None], y=labels)
    return path


def train(out: Path, images: Path, **more: Any) -> RetrainResult:
    return run_retrain(resolve(SETTINGS | {"data": f"npz:{images}"} | more), out, quiet=True)


def go_on(run: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        retrain.run_command(retrain.main, ["--resume", str(run), "--quiet"])
    assert caught.value.code == 0


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> RetrainResult:
    return train(tmp_path_factory.mktemp("runs") / "whole", images)


def assert_same_run(run: Path, expected: Path) -> None:
    for name in FILES - {"timing.jsonl", "config.toml"}:
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name


def test_a_run_folder_is_left(whole):
    assert {path.name for path in whole.run.path.iterdir()} >= FILES
    records = whole.run.metrics()
    assert [record["epoch"] for record in records] == list(range(EPOCHS))
    assert all(math.isfinite(record["loss"]) and 0 <= record["accuracy"] <= 1 for record in records)
    assert load_genotype(whole.run.path) == load_genotype("DARTS_V2")
    assert json.loads((whole.run.path / "result.json").read_text()) == {
        "test_accuracy": whole.test_accuracy,
        "test_loss": whole.test_loss,
        "parameters": whole.parameters,
        "multiply_adds": whole.multiply_adds,
    }


def test_it_learns(whole, images, tmp_path):
    losses = [record["loss"] for record in whole.run.metrics()]
    assert losses[-1] < losses[0]
    result = train(tmp_path / "run", images, epochs=12, drop_path=0.0, cutout=0)
    assert result.test_accuracy >= 0.75  # chance: 0.33


def test_the_result_is_of_the_last_network_on_the_test_set(whole, images):
    plan = resolve(SETTINGS | {"data": f"npz:{images}"})
    data = load_data(plan.data, plan.runtime, torch.device("cpu"))
    network = build_network(plan, data.num_classes, data.channels)
    network.load_state_dict(load_checkpoint(whole.run.checkpoint_path, method=CHECKPOINT_KIND)["network"])
    figures = evaluate(network.eval(), data.test.batches(TEST_SIZE))
    assert whole.test_accuracy == figures["accuracy"]
    assert whole.test_loss == pytest.approx(figures["loss"], rel=1e-5)


def test_the_size_is_that_of_the_network_without_its_auxiliary_head(whole):
    network = DerivedNetwork(load_genotype("DARTS_V2"), channels=4, cells=3, classes=3, in_channels=1)
    counts = count(network, (1, 8, 8))
    assert (whole.parameters, whole.multiply_adds) == (counts.parameters, counts.multiply_adds)


def test_the_first_weights_are_those_of_the_seed(images, tmp_path, monkeypatch):
    """Whatever else is built or counted before them."""
    monkeypatch.setattr(Progress, "start_epoch", lambda *_: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        train(tmp_path / "run", images, seed=5)
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt", method=CHECKPOINT_KIND)["network"]
    torch.manual_seed(5)
    network = build_network(resolve(SETTINGS | {"data": f"npz:{images}"}), 3, 1)
    assert torch.equal(state["classifier.weight"], network.classifier.weight)


def test_the_test_set_is_read_once_and_last(images, tmp_path, monkeypatch):
    read: list[tuple[str, int]] = []
    fetch = fastnas.data.Split.fetch

    def spy(self, plans):
        for x, y in fetch(self, plans):
            read.append((self.name.split(" of ")[0], len(y)))
            yield x, y

    monkeypatch.setattr(fastnas.data.Split, "fetch", spy)
    train(tmp_path / "run", images, epochs=2)
    assert read == [("the training set", 16)] * (2 * STEPS) + [("the test set", TEST_SIZE)]


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_training_stopped_in_mid_epoch_goes_on_bit_for_bit(epoch, whole, images, tmp_path, monkeypatch):
    calls = iter(range(1000))
    forward = DerivedNetwork.forward_with_auxiliary

    def stop(self, x):
        if next(calls) == epoch * STEPS + 1:
            raise Stop
        return forward(self, x)

    monkeypatch.setattr(DerivedNetwork, "forward_with_auxiliary", stop)
    with pytest.raises(Stop):
        train(tmp_path / "run", images)
    monkeypatch.undo()
    go_on(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole.run.path)


def test_a_training_stopped_in_its_test_goes_on(whole, images, tmp_path, monkeypatch):
    def stop(*_):
        raise Stop

    monkeypatch.setattr(retrain, "evaluate", stop)
    with pytest.raises(Stop):
        train(tmp_path / "run", images)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "result.json").exists()
    go_on(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole.run.path)


def test_a_run_does_not_need_the_genotype_file_again(images, tmp_path):
    genotype = tmp_path / "genotype.json"
    genotype.write_text(load_genotype("DARTS_V1").to_json())
    run = train(tmp_path / "run", images, genotype=str(genotype), epochs=1).run
    genotype.unlink()
    go_on(run.path)


def test_another_seed_gives_another_network(whole, images, tmp_path):
    run = train(tmp_path / "run", images, seed=1).run
    assert run.metrics_path.read_bytes() != whole.run.metrics_path.read_bytes()


def test_drop_path_rises_linearly(images, tmp_path, monkeypatch):
    rates: list[float] = []
    monkeypatch.setattr(DerivedNetwork, "set_drop_path", lambda self, rate: rates.append(rate))
    train(tmp_path / "run", images)
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("setting", ["drop_path", "auxiliary_weight", "cutout"])
def test_each_regularisation_has_an_effect(setting, whole, images, tmp_path):
    run = train(tmp_path / "run", images, **{setting: 0}).run
    assert run.metrics() != whole.run.metrics()
    network = load_checkpoint(run.checkpoint_path, method=CHECKPOINT_KIND)["network"]
    assert any(name.startswith("auxiliary.") for name in network) == (setting != "auxiliary_weight")


AVERAGED = {"ema": 0.9, "label_smoothing": 0.1, "schedule": "linear", "lr_warmup_epochs": 2, "precision": "bfloat16"}


def test_the_averaged_weights_are_tested_loaded_and_resumed(whole, images, tmp_path, monkeypatch):
    run = train(tmp_path / "whole", images, **AVERAGED)
    state = load_checkpoint(run.run.checkpoint_path, method=CHECKPOINT_KIND)
    assert not torch.equal(state["ema"]["classifier.weight"], state["network"]["classifier.weight"])
    network = load_network(run.run.path)
    assert torch.equal(network.classifier.weight, state["ema"]["classifier.weight"])
    plan = resolve(SETTINGS | {"data": f"npz:{images}"})
    data = load_data(plan.data, plan.runtime, torch.device("cpu"))
    assert run.test_loss == pytest.approx(evaluate(network, data.test.batches(TEST_SIZE))["loss"], rel=1e-5)

    end_epoch = Progress.end_epoch

    def stop(self, record):
        end_epoch(self, record)
        if record["epoch"] == 1:
            raise Stop

    monkeypatch.setattr(Progress, "end_epoch", stop)
    with pytest.raises(Stop):
        train(tmp_path / "run", images, **AVERAGED)
    monkeypatch.undo()
    go_on(tmp_path / "run")
    assert_same_run(tmp_path / "run", run.run.path)


def test_each_part_of_the_recipe_has_an_effect(images, tmp_path):
    changes = {"none": {}, "smoothing": {"label_smoothing": 0.2}, "linear": {"schedule": "linear"}}
    changes |= {"warm-up": {"lr_warmup_epochs": 2}, "bf16": {"precision": "bfloat16"}}
    runs = {
        name: train(tmp_path / name, images, epochs=3, drop_path=0.0, **change).run.metrics()
        for name, change in changes.items()
    }
    assert all(metrics != runs["none"] for name, metrics in runs.items() if name != "none")


def test_fused_convolutions_change_rounding_only(whole, images, tmp_path):
    run = train(tmp_path / "run", images, epochs=1, fused=False, channels_last=False).run
    assert run.metrics()[0]["loss"] == pytest.approx(whole.run.metrics()[0]["loss"], rel=1e-3)


@pytest.mark.parametrize(
    "genotype",
    [
        DartsSpace(nodes=2).free_edges([0, 4, 3, 0, 6], [5, 0, 0, 1, 0], rule="all-edges"),
        ChoiceBlockSpace(2).decode([2, 3, 4, 20]),
        ShufflenetSpace(4).decode([0, 1, 2, 3]),
        Nasbench201Space().decode([3, 1, 4, 2, 0, 3]),
    ],
    ids=["free edges", "choice blocks", "chain", "NAS-Bench-201"],
)
def test_networks_of_every_space_are_trained_and_loaded(genotype, images, tmp_path):
    (tmp_path / "genotype.json").write_text(genotype.to_json())
    result = train(tmp_path / "run", images, genotype=str(tmp_path / "genotype.json"), epochs=1)
    network = load_network(result.run.path)
    assert network(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    assert sum(parameter.numel() for parameter in network.parameters()) == result.parameters


def test_a_genotype_is_transferred_to_a_folder_of_images(whole, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="image files are read with Pillow")
    for number in range(24):
        name, shade = [("dark", 40), ("bright", 200)][number % 2]
        path = tmp_path / "images" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(shade - 40, shade + 40, (9 + number, 12, 3), dtype=np.uint8)
        image.fromarray(pixels).save(path)
    settings = SETTINGS | {"genotype": str(whole.run.path), "data": f"folder:{tmp_path / 'images'}", "image_size": 10}
    result = run_retrain(
        resolve(settings | {"epochs": 12, "batch_size": 8, "drop_path": 0.0}), tmp_path / "run", quiet=True
    )
    assert result.test_accuracy >= 0.75  # chance: 0.5
    assert load_network(tmp_path / "run")(torch.randn(2, 3, 10, 10)).shape == (2, 2)


def test_a_network_beyond_the_limit_is_refused(images, tmp_path):
    with pytest.raises(UserError, match=r"has [\d,]+ multiply-adds an image, more than the 1,000 of"):
        train(tmp_path / "run", images, max_multiply_adds=1e3)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number(images, tmp_path):
    with pytest.raises(UserError, match="no longer a number in epoch 1: start again with a smaller --lr"):
        train(tmp_path / "run", images, lr=1e38)
    assert RunFolder.open(tmp_path / "run").metrics() == []


def test_the_largest_seed(images, tmp_path):
    train(tmp_path / "run", images, seed=2**63 - 1, epochs=2)


def test_the_command_prints_the_result(images, tmp_path, capsys):
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as caught:
        retrain.run_command(retrain.main, [*flags, "--epochs=1", f"--data=npz:{images}", "--out", str(out), "--quiet"])
    assert caught.value.code == 0
    result = json.loads((out / "result.json").read_text())
    assert capsys.readouterr().out == (
        f"test accuracy  {result['test_accuracy']:.2%}\nparameters     {result['parameters']:,}\n"
        f"multiply-adds  {result['multiply_adds']:,} an image\nrun            {out}\n"
        f"next           python -m fastnas.export {out}\n"
    )


def test_an_interrupt_says_how_to_go_on(images, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(retrain, "evaluate", interrupt)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]
    with pytest.raises(SystemExit) as caught:
        retrain.run_command(retrain.main, [*flags, f"--data=npz:{images}", "--out", str(tmp_path / "run"), "--quiet"])
    assert caught.value.code == 130
    expected = f"interrupted; go on with: python -m fastnas.retrain --resume {tmp_path / 'run'}\n"
    assert capsys.readouterr().err == expected
