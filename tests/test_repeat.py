"""Several seeds, of which the best is kept; and ensembles of sampled architectures."""

from __future__ import annotations

import json

import pytest
import torch

from fastnas import ensemble, repeat, search
from fastnas.engine.checkpoint import load_checkpoint
from fastnas.engine.derived import DerivedNetwork
from fastnas.errors import UserError
from fastnas.methods.parsec import SlotDistribution
from fastnas.retrain import resolve as resolve_retraining
from fastnas.search import _resumed_plan, build_method, resolve, run_search
from fastnas.settings import load_data
from fastnas.spaces import DartsSpace, load_genotype
from fastnas.spaces.agreement import edge_agreement

SIZE = {"batch_size": 8, "channels": 4, "cells": 3, "threads": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def plan(images):
    settings = {"method": "parsec", "samples": 2, "epochs": 2, "nodes": 2, "data": f"npz:{images}"}
    return resolve(SIZE | settings)


@pytest.fixture(scope="module")
def repeated(plan, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "repeated"
    done = repeat.run_repeated(plan, 2, out, quiet=True)
    return out, done.best, done.accuracies


def test_the_best_of_the_seeds_is_kept(repeated):
    out, best, accuracies = repeated
    assert set(accuracies) == {0, 1}
    assert best.run.path == out / f"seed-{max(accuracies, key=lambda seed: accuracies[seed])}"
    assert load_genotype(out) == best.genotype == load_genotype(best.run.path)
    assert load_genotype(out / "seed-0") != load_genotype(out / "seed-1")


def test_each_run_is_that_of_the_search_with_its_seed(repeated, plan, tmp_path):
    out, _, _ = repeated
    alone = run_search(plan, tmp_path / "alone", quiet=True)
    assert (out / "seed-0" / "metrics.jsonl").read_bytes() == alone.run.metrics_path.read_bytes()


def test_mean_deviation_and_agreement_are_kept(repeated):
    out, _, accuracies = repeated
    table = json.loads((out / "seeds.json").read_text())
    first, second = accuracies.values()
    assert table["mean"] == pytest.approx((first + second) / 2)
    assert table["standard_deviation"] == pytest.approx(abs(first - second) / 2**0.5)
    genotypes = [load_genotype(out / f"seed-{seed}") for seed in (0, 1)]
    assert table["agreement"] == edge_agreement(genotypes)
    assert set(table["agreement"].values()) <= {0.5, 1.0}
    assert table["mean_agreement"] == pytest.approx(sum(table["agreement"].values()) / len(table["agreement"]))
    assert "seed-1" in (out / "report.html").read_text()


def test_the_search_forwards_its_seeds(repeated, images, tmp_path, capsys):
    flags = {"method": "parsec", "samples": 2, "epochs": 2, "nodes": 2, "data": f"npz:{images}", "seeds": 2, **SIZE}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    with pytest.raises(SystemExit) as caught:
        search.run_command(search.main, [*arguments, "--out", str(repeated[0]), "--quiet"])
    output = capsys.readouterr().out
    assert caught.value.code == 0
    assert "seed 1  search accuracy" in output and "standard deviation" in output and "all agree on" in output


def test_it_goes_on_where_it_stopped_and_only_with_the_same_settings(repeated, plan, images):
    out, best, accuracies = repeated
    before = (out / "seed-1" / "checkpoint.pt").stat().st_mtime_ns
    again = repeat.run_repeated(plan, 2, out, quiet=True)
    assert again.accuracies == accuracies and again.best.genotype == best.genotype
    assert (out / "seed-1" / "checkpoint.pt").stat().st_mtime_ns == before
    other = resolve({**SIZE, "method": "darts", "epochs": 2, "nodes": 2, "data": f"npz:{images}"})
    with pytest.raises(UserError, match="holds a run of other settings"):
        repeat.run_repeated(other, 1, out, quiet=True)


def test_warm_start_takes_over_the_distribution(repeated, plan, images, tmp_path):
    """On a larger network; a resumed run no longer needs the folder that it started from."""
    out, _, _ = repeated
    settings = {"method": "parsec", "samples": 2, "epochs": 1, "nodes": 2, "cells": 4, "data": f"npz:{images}"}
    tuned = resolve(SIZE | settings | {"warm_start": str(out / "seed-0")})
    source = SlotDistribution(DartsSpace(nodes=2))
    source.load_run(out / "seed-0")
    assert any(logits.abs().sum() > 0 for logits in source.logits)
    method = build_method(tuned, 3, 3, torch.device("cpu"))
    for ours, theirs in zip(method.distribution.logits, source.logits, strict=True):
        assert torch.equal(ours, theirs)
    run_search(tuned, tmp_path / "tuned", quiet=True)
    resumed = _resumed_plan(tmp_path / "tuned", {})
    assert resumed.method.warm_start is None
    run_search(resumed, resume=tmp_path / "tuned", quiet=True)


def test_warm_start_needs_the_same_cells(repeated, images):
    settings = {"method": "parsec", "samples": 2, "nodes": 3, "data": f"npz:{images}"}
    wrong = resolve(SIZE | settings | {"warm_start": str(repeated[0] / "seed-0")})
    with pytest.raises(UserError, match="is over other cells"):
        build_method(wrong, 3, 3, torch.device("cpu"))


def test_an_ensemble_averages_the_probabilities_of_sampled_architectures(repeated, images, tmp_path):
    flags = SIZE | {"data": f"npz:{images}", "epochs": 2, "auxiliary_weight": 0.0, "cutout": 0}
    result = ensemble.run_ensemble(repeated[0] / "seed-0", 2, flags, tmp_path / "e", quiet=True)
    assert len(result.members) == 2
    genotypes = [load_genotype(tmp_path / "e" / f"member-{member}") for member in range(2)]
    assert genotypes[0] != genotypes[1]
    assert json.loads((tmp_path / "e" / "ensemble.json").read_text())["test_accuracy"] == result.accuracy

    plan = resolve_retraining(flags | {"genotype": "DARTS_V2"})
    data = load_data(plan.data, plan.runtime, torch.device("cpu"))
    x, y = next(data.test.batches(12))
    probabilities = 0
    for member, genotype in enumerate(genotypes):
        network = DerivedNetwork(genotype, channels=4, cells=3, classes=3).eval()
        state = load_checkpoint(tmp_path / "e" / f"member-{member}" / "checkpoint.pt", method="retrain")
        network.load_state_dict(state["network"])
        with torch.no_grad():
            probabilities = probabilities + network(x).softmax(-1) / 2
    assert result.accuracy == pytest.approx(float((probabilities.argmax(-1) == y).float().mean()))


def test_an_ensemble_needs_a_distribution(images, tmp_path):
    plan = resolve(SIZE | {"method": "random", "samples": 1, "epochs": 1, "nodes": 2, "data": f"npz:{images}"})
    run_search(plan, tmp_path / "random", quiet=True)
    with pytest.raises(UserError, match="is no PARSEC search"):
        ensemble.run_ensemble(tmp_path / "random", 1, {}, tmp_path / "e", quiet=True)
