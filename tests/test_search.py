"""Searches: what they leave behind, that they repeat, and that a stopped one goes on bit for bit."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastnas
from fastnas import retrain, search
from fastnas.engine.checkpoint import load_checkpoint
from fastnas.errors import UserError
from fastnas.methods import METHODS, Darts
from fastnas.report.records import read_record
from fastnas.search import resolve, run_search
from fastnas.spaces import Genotype, load_genotype

STEPS = 3  # of an epoch: 60 images, 12 of them held out for the test, half of the rest for the architecture
EPOCHS = 3
CASES: dict[str, dict[str, Any]] = {
    "darts": {"method": "darts"},
    "darts-second-order": {"method": "darts", "order": 2},
    "pc_darts": {"method": "pc_darts", "partial": 2, "warmup_epochs": 1},
    "pc_darts-random-channels": {"method": "pc_darts", "partial": 2, "warmup_epochs": 0, "random_channels": True},
    "parsec": {"method": "parsec", "samples": 2},
    "snas": {"method": "snas", "arch_lr": 0.1},
    "spos": {"method": "spos", "generations": 2, "population": 4, "crossovers": 2, "mutations": 1},
    "proxyless": {"method": "proxyless", "space": "nasnet", "arch_interval": 2, "arch_lr": 0.1},
    "vaenas_os": {
        **{"method": "vaenas_os", "space": "nasnet", "generations": 2, "population": 4, "crossovers": 2},
        **{"mutations": 1, "epsilon_step": 0.1, "ranked": 4, "vae_iterations": 2, "vae_hidden": 8},
    },
    "vaenas_g": {
        **{"method": "vaenas_g", "space": "nasnet", "arch_interval": 2, "arch_lr": 0.1},
        **{"ranked": 4, "vae_iterations": 2, "vae_hidden": 8},
    },
    "spos-shufflenet": {
        **{"method": "spos", "space": "shufflenet", "cells": 4, "channels": 2, "generations": 1, "population": 2},
        **{"crossovers": 1, "mutations": 1},
    },
    "darts-nasbench201": {"method": "darts", "space": "nasbench201"},
    "spos-nasbench101": {
        **{"method": "spos", "space": "nasbench101", "channels": 5, "generations": 1, "population": 2, "crossovers": 1},
        **{"mutations": 1},
    },
    "one_shot": {"method": "one_shot", "space": "choice_blocks", "ghost_batch": 4, "candidates": 2},
    "random": {"method": "random", "samples": 2},
}
FILES = {"config.toml", "metrics.jsonl", "timing.jsonl", "genotype.json", "cells.svg", "checkpoint.pt", "report.html"}

Runs = dict[str, Path]


class Stop(Exception):
    """Ends a search in the middle."""


def settings(case: str, images: Path, **more: Any) -> dict[str, Any]:
    # One thread: the tensors are too small for two, and two would fight over a busy machine.
    size = {"epochs": EPOCHS, "batch_size": 8, "channels": 4, "cells": 3, "nodes": 2, "threads": 1, "device": "cpu"}
    return {"data": f"npz:{images}", **size, **CASES[case], **more}


def do_search(out: Path, case: str, images: Path, **more: Any) -> Path:
    return run_search(resolve(settings(case, images, **more)), out, quiet=True).run.path


def go_on(run: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        search.run_command(search.main, ["--resume", str(run), "--quiet"])
    assert caught.value.code == 0


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One uninterrupted run of each case."""
    folder = tmp_path_factory.mktemp("runs")
    return {case: do_search(folder / case, case, images) for case in CASES}


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value of a checkpoint with its place."""
    if isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{place}/{key}")
    else:
        yield place, value


def assert_same_run(run: Path, expected: Path) -> None:
    """Metrics, genotype, drawing and every tensor of the last checkpoint are equal bit for bit."""
    for name in ("metrics.jsonl", "genotype.json", "cells.svg"):
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name
    method = resolve({}, search.RunFolder.open(expected).config()).search.method
    states = [dict(leaves(load_checkpoint(path / "checkpoint.pt", method=method))) for path in (run, expected)]
    assert states[0].keys() == states[1].keys()
    tensors = 0
    for place, value in states[1].items():
        if isinstance(value, torch.Tensor):
            same = value.dtype == states[0][place].dtype and torch.equal(value, states[0][place])
            tensors += 1
        else:
            same = value == states[0][place]
        assert same, place
    assert tensors > 10


@pytest.mark.parametrize("case", CASES)
def test_a_search_leaves_a_run_folder(case, whole):
    run = whole[case]
    assert {path.name for path in run.iterdir()} >= FILES
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == list(range(EPOCHS))
    for record in records:
        assert {"loss", "accuracy", "search_accuracy", "entropy", "genotype"} <= record.keys()
        for _, value in leaves(record):
            assert isinstance(value, str) or math.isfinite(value)
        assert 0 <= record["accuracy"] <= 1 and 0 <= record["search_accuracy"] <= 1
    genotype = load_genotype(run)
    if isinstance(genotype, Genotype):
        assert len(genotype.normal) == len(genotype.reduce) == 2
    assert records[-1]["genotype"] == genotype.notation()
    assert (run / "cells.svg").read_text().startswith("<svg")
    for line in (run / "timing.jsonl").read_text().splitlines():
        seconds = json.loads(line)
        assert 0 < seconds["data_s"] + seconds["weights_s"] + seconds["architecture_s"] <= seconds["train_s"]
        assert min(seconds["data_s"], seconds["weights_s"]) > 0 <= seconds["architecture_s"]
        assert seconds["memory_bytes"] > 1e6


def test_the_warm_up_trains_no_alphas(whole):
    records = search.RunFolder.open(whole["pc_darts"]).metrics()
    assert ["search_loss" in record for record in records] == [False, True, True]
    assert records[0]["entropy"] != records[1]["entropy"]
    times = [json.loads(line) for line in (whole["pc_darts"] / "timing.jsonl").read_text().splitlines()]
    assert [epoch["architecture_s"] > 0 for epoch in times] == [False, True, True]


@pytest.mark.parametrize("case", CASES)
def test_equal_settings_give_equal_files(case, whole, images, tmp_path):
    torch.rand(3)  # what the process did before must not matter
    run = do_search(tmp_path / "again", case, images)
    assert_same_run(run, whole[case])
    names = {path.name for path in run.iterdir()}
    assert names == {path.name for path in whole[case].iterdir()}
    for name in names - {"timing.jsonl", "report.html"}:  # both have the clock in them
        assert (run / name).read_bytes() == (whole[case] / name).read_bytes(), name


@pytest.mark.parametrize("case", ["darts", "parsec", "snas"])
def test_deterministic_algorithms_suffice_on_the_cpu_and_change_nothing(case, whole, images, tmp_path):
    try:
        run = do_search(tmp_path / "run", case, images, deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert (run / "metrics.jsonl").read_bytes() == (whole[case] / "metrics.jsonl").read_bytes()
    assert (run / "genotype.json").read_bytes() == (whole[case] / "genotype.json").read_bytes()


@pytest.mark.parametrize("case", ["darts", "pc_darts"])
def test_another_number_of_threads_repeats_itself_and_differs_in_rounding_alone(case, whole, images, tmp_path):
    two = [do_search(tmp_path / name, case, images, threads=2) for name in ("two", "again")]
    assert (two[0] / "metrics.jsonl").read_bytes() == (two[1] / "metrics.jsonl").read_bytes()
    hashes = [read_record(run).hashes for run in (two[0], whole[case])]
    assert hashes[0] == hashes[1]
    first = [search.RunFolder.open(run).metrics()[0] for run in (two[0], whole[case])]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-4)


def test_tensorboard_events_hold_the_figures_of_each_epoch(whole, images, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = do_search(tmp_path / "run", "darts", images, tensorboard=True)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    records = search.RunFolder.open(run).metrics()
    assert (run / "metrics.jsonl").read_bytes() == (whole["darts"] / "metrics.jsonl").read_bytes()
    for name in ("loss", "search_accuracy", "entropy"):
        points = [(event.step, event.value) for event in events.Scalars(name)]
        assert points == [(r["epoch"] + 1, pytest.approx(r[name], rel=1e-6)) for r in records]
    assert {"edge_entropy_normal/4", "time/train_s", "memory/memory_bytes"} <= set(events.Tags()["scalars"])


def test_a_report_that_fails_costs_nothing_else(whole, images, tmp_path, monkeypatch):
    def fail(path: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(search, "write_report", fail)
    with pytest.warns(UserWarning, match="report could not be made .No space.*python -m fastnas.report .*/run"):
        run = do_search(tmp_path / "run", "darts", images)
    assert_same_run(run, whole["darts"])


def test_tensorboard_that_is_missing_is_named(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        UserError, match="--tensorboard needs the package tensorboard .*pip install tensorboard, or drop"
    ):
        do_search(tmp_path / "run", "darts", images, tensorboard=True)


@pytest.mark.parametrize("case", CASES)
def test_another_seed_gives_another_search(case, whole, images, tmp_path):
    run = do_search(tmp_path / "other", case, images, seed=1)
    assert (run / "metrics.jsonl").read_bytes() != (whole[case] / "metrics.jsonl").read_bytes()
    assert load_genotype(run) != load_genotype(whole[case])


@pytest.mark.parametrize("epoch", [0, 2])  # before the first checkpoint of an epoch, and after two of them
@pytest.mark.parametrize("case", CASES)
def test_a_search_stopped_in_mid_epoch_goes_on_bit_for_bit(case, epoch, whole, images, tmp_path, monkeypatch):
    method = METHODS[CASES[case]["method"]]
    step = method.step

    def stop(self, index, *batches):
        if index == epoch * STEPS + 1:
            raise Stop
        return step(self, index, *batches)

    monkeypatch.setattr(method, "step", stop)
    with pytest.raises(Stop):
        do_search(tmp_path / "run", case, images)
    monkeypatch.undo()
    go_on(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole[case])


@pytest.mark.parametrize("case", ["darts-second-order", "snas"])
def test_recorded_steps_are_announced_once_and_go_on_bit_for_bit(
    case, images, tmp_path, as_on_a_gpu, monkeypatch, capsys
):
    run_search(resolve(settings(case, images)), tmp_path / "whole")
    method = METHODS[CASES[case]["method"]]
    said = [line for line in capsys.readouterr().out.splitlines() if "CUDA graph" in line]
    assert said == [f"{name.replace('_', ' ')}: runs as a CUDA graph" for name in as_on_a_gpu.steps]
    assert len(said) == {"darts": 2, "snas": 1}[method.name]

    start_epoch = method.start_epoch

    def stop(self, epoch):
        if epoch == 2:
            raise Stop
        start_epoch(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(method, "start_epoch", stop)
        with pytest.raises(Stop):
            do_search(tmp_path / "run", case, images)
    go_on(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_search_stopped_before_its_checkpoint_repeats_the_epoch(whole, images, tmp_path, monkeypatch):
    save = search.save_checkpoint

    def stop(path, state, *, method):
        if state["epoch"] == 1:
            raise Stop
        save(path, state, method=method)

    monkeypatch.setattr(search, "save_checkpoint", stop)
    with pytest.raises(Stop):
        do_search(tmp_path / "run", "darts", images)
    monkeypatch.undo()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    go_on(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole["darts"])


def test_going_on_with_a_finished_search_changes_nothing(whole, images, tmp_path):
    run = do_search(tmp_path / "run", "parsec", images)
    go_on(run)
    assert_same_run(run, whole["parsec"])


def test_a_damaged_checkpoint_costs_one_epoch(whole, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    run = do_search(tmp_path / "run", "darts", images)
    (run / "cells.svg").unlink()
    path = run / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        go_on(run)
    error = capsys.readouterr().err
    assert error.startswith("warning: checkpoint.pt is damaged") and error.count("\n") == 1
    assert_same_run(run, whole["darts"])


def test_a_loss_that_is_no_number_ends_the_search_and_keeps_the_epochs_before(images, tmp_path, monkeypatch):
    step = METHODS["darts"].step

    def poison(self, index, *batches):
        if index == STEPS + 1:
            with torch.no_grad():
                self.parameters[0].fill_(math.nan)
        return step(self, index, *batches)

    monkeypatch.setattr(METHODS["darts"], "step", poison)
    run = tmp_path / "run"
    with pytest.raises(UserError, match=rf"loss is no longer a number in epoch 2: .* smaller --lr; .* in {run}"):
        do_search(run, "darts", images)
    assert [record["epoch"] for record in search.RunFolder.open(run).metrics()] == [0]
    assert load_checkpoint(run / "checkpoint.pt", method="darts")["epoch"] == 0
    load_genotype(run)


@pytest.mark.parametrize("case", ["darts-second-order", "parsec", "random"])
def test_a_huge_learning_rate_is_said_to_be_one(case, images, tmp_path):
    with pytest.raises(UserError, match="no longer a number in epoch 1: start again with a smaller --lr"):
        do_search(tmp_path / "run", case, images, lr=1e38)
    assert search.RunFolder.open(tmp_path / "run").metrics() == []


def test_alphas_that_are_no_numbers_give_no_genotype(images, tmp_path, monkeypatch):
    step = METHODS["darts"].step

    def poison(self, index, *batches):
        figures = step(self, index, *batches)
        if index == STEPS - 1:
            with torch.no_grad():
                next(self.alphas.parameters()).fill_(math.nan)
        return figures

    monkeypatch.setattr(METHODS["darts"], "step", poison)
    with pytest.raises(UserError, match="no longer a number in epoch 1"):
        do_search(tmp_path / "run", "darts", images, epochs=1)
    assert not (tmp_path / "run" / "genotype.json").exists()


def test_the_search_never_reads_the_test_set(images, tmp_path, monkeypatch):
    read: set[str] = set()
    fetch = fastnas.data.Split.fetch

    def spy(self, plans):
        read.add(self.name.split(" of ")[0])
        return fetch(self, plans)

    monkeypatch.setattr(fastnas.data.Split, "fetch", spy)
    do_search(tmp_path / "run", "pc_darts", images)
    assert read == {"the training part", "the search part"}


def test_grey_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 7, 7), dtype=np.uint8)
    np.savez(tmp_path / "grey.npz", x=pixels, y=np.arange(60) % 3)
    run = do_search(tmp_path / "run", "pc_darts", tmp_path / "grey.npz", epochs=1)
    assert load_checkpoint(run / "checkpoint.pt", method="pc_darts")["method"]["supernet"][
        "stem.layers.0.weight"
    ].shape == (12, 1, 3, 3)


def test_a_folder_of_images_through_the_command_line(tmp_path, monkeypatch, capsys):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 12, 10, 3), dtype=np.uint8)
    for index, array in enumerate(pixels):
        path = tmp_path / "my images" / f"class {index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(array).save(path)
    monkeypatch.chdir(tmp_path)
    size = "--image-size 8 --batch-size 4 --channels 4 --cells 3 --nodes 2 --threads 1 --device cpu --epochs 1"
    with pytest.raises(SystemExit) as caught:
        search.run_command(search.main, ["--data", "folder:my images", "--method", "darts", *size.split()])
    assert caught.value.code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("darts-folder-")
    output = capsys.readouterr().out
    assert "epoch 1/1" in output and "Normal cell" in output and f"run       runs/{run.name}\n" in output
    following = shlex.split(next(line for line in output.splitlines() if line.startswith("next")))
    assert following[1:] == [
        *("python", "-m", "fastnas.retrain"),
        *("--genotype", f"runs/{run.name}/genotype.json", "--data", "folder:my images", "--image-size", "8"),
    ]


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    """`python -m fastnas.search` in another folder, with SIGINT as a terminal gives it."""
    script = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('fastnas.search', run_name='__main__', alter_sys=True)"
    )
    paths = [str(Path(fastnas.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def flags(case: str, images: Path, **more: Any) -> list[str]:
    return [f"--{key.replace('_', '-')}={value}" for key, value in settings(case, images, **more).items()]


def wait_for_epochs(process: subprocess.Popen[str], run: Path, epochs: int) -> None:
    deadline = time.monotonic() + 100
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_bytes().count(b"\n") < epochs:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


def test_a_killed_search_goes_on_bit_for_bit(images, tmp_path):
    arguments = flags("pc_darts", images, epochs=5, batch_size=3)
    whole = start([*arguments, "--out", "whole"], tmp_path)
    killed = start([*arguments, "--out", "killed"], tmp_path)
    wait_for_epochs(killed, tmp_path / "killed", 2)
    time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert len(search.RunFolder.open(tmp_path / "killed").metrics()) < 5
    resumed = start(["--resume", "killed"], tmp_path)
    output, error = resumed.communicate(timeout=100)
    assert (resumed.returncode, error) == (0, "")
    assert "epoch 5/5" in output and "epoch 1/5" not in output
    output, error = whole.communicate(timeout=100)
    assert (whole.returncode, error) == (0, "")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_an_interrupt_says_how_to_go_on(images, tmp_path):
    process = start([*flags("darts", images, epochs=1000), "--out", "my run"], tmp_path)
    wait_for_epochs(process, tmp_path / "my run", 1)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=100)[1]
    assert process.returncode == 130
    assert error == "interrupted; go on with: python -m fastnas.search --resume 'my run'\n"


def test_a_collapse_is_counted_and_warned_of(images, tmp_path, monkeypatch, capsys):
    derive = Darts._derive
    monkeypatch.setattr(
        Darts, "_derive", lambda self, mixture, cap: derive(self, _only_skips(mixture), cap) if cap is None else None
    )
    run = run_search(resolve(settings("darts", images, epochs=1)), tmp_path / "run").run
    assert "4 of 4 edges of the normal cell are skip connections" in capsys.readouterr().out
    assert run.metrics()[0]["skips_normal"] == 4


def _only_skips(mixture):
    weights = torch.zeros_like(mixture.normal)
    weights[:, 3] = 1
    return dataclasses.replace(mixture, normal=weights)


def test_no_warning_without_a_collapse(images, tmp_path, capsys):
    run_search(resolve(settings("darts", images, epochs=1, max_skips=0)), tmp_path / "run")
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("case", ["snas", "spos", "vaenas_g"])  # one of each kind of genotype
def test_what_a_search_derives_can_be_retrained(case, whole, images, tmp_path):
    size = {"epochs": 1, "batch_size": 16, "channels": 4, "cells": 3, "threads": 1, "device": "cpu", "cutout": 0}
    plan = retrain.resolve({"genotype": str(whole[case]), "data": f"npz:{images}", "auxiliary_weight": 0.0, **size})
    assert 0 <= retrain.run_retrain(plan, tmp_path / "retrained", quiet=True).test_accuracy <= 1


def test_the_imagenet_setting_of_pc_darts_runs(images, tmp_path):
    """Its stem, its subsets of the training set, its warm-ups; on small images and fewer epochs."""
    small = {"data": f"npz:{images}", "image_size": 64, "epochs": 2, "batch_size": 4, "channels": 8, "cells": 3}
    flags = small | {"nodes": 2, "warmup_epochs": 1, "train_fraction": 0.25, "search_fraction": 0.1, "threads": 1}
    run = run_search(resolve({"preset": "pc_darts-imagenet", **flags}), tmp_path / "run", quiet=True).run
    records = run.metrics()
    assert ["search_loss" in record for record in records] == [False, True]
    state = load_checkpoint(run.checkpoint_path, method="pc_darts")["method"]
    assert "stem.second.1.weight" in state["supernet"]
    steps = state["weight_optimizer"]["param_groups"][0]["lr"] / 0.5
    assert steps == pytest.approx(2 / 5 * 0.5 * (1 + math.cos(math.pi / 2)))
