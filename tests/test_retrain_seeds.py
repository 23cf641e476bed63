"""Retraining with several seeds: mean and standard deviation, and going on where it was stopped."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from fastnas import retrain_seeds
from fastnas.errors import UserError
from fastnas.retrain import resolve
from fastnas.retrain_seeds import SeedsResult, run_seeds


@pytest.fixture(scope="module")
def plan(images):
    flags = {"genotype": "DARTS_V2", "data": f"npz:{images}", "epochs": 1, "channels": 4, "cells": 3, "batch_size": 16}
    return resolve(flags | {"device": "cpu", "seed": 3}, {})


def test_seeds_are_summed_up_and_not_trained_again(plan, tmp_path, monkeypatch):
    result = run_seeds(plan, 2, tmp_path / "out", quiet=True)
    values = [json.loads((tmp_path / "out" / f"seed-{s}" / "result.json").read_text())["test_accuracy"] for s in (3, 4)]
    assert result.accuracies == {3: values[0], 4: values[1]}
    assert result.mean == statistics.mean(values) and result.deviation == statistics.stdev(values)
    summary = json.loads((tmp_path / "out" / "result.json").read_text())
    assert summary["mean"] == result.mean and summary["standard_deviation"] == result.deviation

    monkeypatch.setattr(retrain_seeds, "run_retrain", lambda *a, resume, **k: seen.append(resume) or result_of[resume])
    seen: list[Path] = []
    result_of = {tmp_path / "out" / f"seed-{s}": type("Result", (), {"test_accuracy": 0.5}) for s in (3, 4)}
    assert run_seeds(plan, 2, tmp_path / "out", quiet=True).mean == 0.5
    assert seen == list(result_of)
    with pytest.raises(UserError, match="holds a run of other settings"):
        run_seeds(resolve({"lr": 0.5}, plan.as_mapping()), 2, tmp_path / "out", quiet=True)


def test_deviation_of_a_sample():
    assert SeedsResult({0: 0.9}, Path()).deviation == 0
    assert SeedsResult({0: 0.8, 1: 0.9}, Path()).deviation == pytest.approx(0.1 / 2**0.5)


def test_the_command_prints_mean_and_deviation(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(retrain_seeds, "run_seeds", lambda *a, **k: SeedsResult({0: 0.8, 1: 0.9}, tmp_path))
    assert retrain_seeds.main(["--genotype", "DARTS_V2", "--seeds", "2", "--out", str(tmp_path)]) == 0
    assert "mean    85.00%, standard deviation 7.07%" in capsys.readouterr().out
    with pytest.raises(UserError, match="seeds must be at least 1"):
        retrain_seeds.main(["--genotype", "DARTS_V2", "--seeds", "0"])
