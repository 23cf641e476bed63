"""Ranking on a one-shot model, its shards, and stand-alone training of what was ranked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastnas import correlate, rank
from fastnas.correlate import rank_correlation, small_models, stratified, top_models
from fastnas.errors import UserError
from fastnas.search import resolve, run_search


@pytest.fixture(scope="module")
def run(archive: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one-shot")
    settings = {"method": "one_shot", "space": "choice_blocks", "data": f"npz:{archive(80, 2)}", "epochs": 1}
    settings |= {
        "batch_size": 16,
        "ghost_batch": 8,
        "channels": 2,
        "cells": 3,
        "nodes": 2,
        "candidates": 2,
        "threads": 1,
    }
    return run_search(resolve(settings), folder / "run", quiet=True).run.path


def records(*arguments: str) -> list[dict]:
    assert rank.main([*arguments, "--quiet"]) == 0
    return rank.read_ranking(Path(arguments[0]))


def test_shards_and_a_resumed_run_give_what_one_process_gives(run, capsys):
    whole = records(str(run), "--samples", "20", "--images", "24")
    whole_path = rank.shard_path(run, 0, 1)
    lines = whole_path.read_bytes().splitlines(keepends=True)
    whole_path.write_bytes(b"".join(lines[:17]) + lines[17][:9])  # killed while it wrote
    assert records(str(run), "--samples", "20", "--images", "24") == whole
    whole_path.unlink()
    for shard in ("0/2", "1/2"):
        found = records(str(run), "--samples", "20", "--images", "24", "--shard", shard)
    assert found == whole and len(whole) == 20
    assert [r["accuracy"] for r in whole] == sorted((r["accuracy"] for r in whole), reverse=True)
    assert "20 architectures in" in capsys.readouterr().out
    for path in (run / "rank").iterdir():
        path.unlink()


def test_ranked_sizes_are_those_of_the_networks(run):
    opened = rank.open_run(run)
    genotype = rank.candidate(opened, 3, 0)
    network = correlate.build_network(genotype, channels=2, cells=3, classes=2, in_channels=1)
    assert opened.size_of(genotype) == sum(p.numel() for p in network.parameters())


def test_other_settings_do_not_mix(run):
    records(str(run), "--samples", "2")
    with pytest.raises(UserError, match="give the same settings"):
        rank.main([str(run), "--samples", "2", "--images", "8"])
    for path in (run / "rank").iterdir():
        path.unlink()


@pytest.mark.parametrize("shard", ["2/2", "1", "-1/2", "0/0"])
def test_a_shard_must_be_one_of_n(run, shard):
    with pytest.raises(UserError, match="shard must be I/N"):
        rank.main([str(run), f"--shard={shard}"])


def test_correlation_report(run, capsys):
    records(str(run), "--samples", "6")
    arguments = [str(run), "--buckets", "2", "--per-bucket", "1", "--top", "1", "--epochs", "1", "--quiet"]
    assert correlate.main(arguments) == 0
    report = json.loads((run / "correlation.json").read_text())
    assert report["rows"].keys() == {"One-Shot Top", "One-Shot Small", "Random", "All On"}
    assert report["rows"]["All On"]["parameters_mean"] > report["rows"]["One-Shot Small"]["parameters_mean"]
    assert report["retrained"] == 2 and report["ranked"] == 6
    assert (run / "correlation.svg").read_text().count("<svg") == 1
    trained = (run / "standalone.jsonl").read_bytes()
    correlate.main(arguments)
    assert (run / "standalone.jsonl").read_bytes() == trained  # nothing is trained twice
    assert "rank correlation" in capsys.readouterr().out
    for path in (run / "rank").iterdir():
        path.unlink()


def test_only_one_shot_searches_are_ranked(tmp_path):
    (tmp_path / "config.toml").write_text('method = "darts"\n')
    with pytest.raises(UserError, match="is no One-Shot search"):
        rank.open_run(tmp_path)


RANKING = [{"accuracy": 1 - i / 100, "parameters": (i * 37) % 101, "index": i} for i in range(100)]


def test_the_sample_is_stratified_by_accuracy():
    chosen = stratified(RANKING, buckets=5, per_bucket=3)
    width = 0.99 / 5
    places = [min(4, int((record["accuracy"] - 0.01) / width + 1e-9)) for record in chosen]
    assert sorted(places) == [bucket for bucket in range(5) for _ in range(3)]
    assert stratified(RANKING, 5, 3) == chosen != stratified(RANKING, 5, 3, seed=1)


def test_small_models_are_the_smallest_of_the_good():
    found = small_models(RANKING, 3, 0.9)
    good = [record for record in RANKING if record["accuracy"] >= 0.91 - 1e-9]
    assert found == sorted(good, key=lambda record: record["parameters"])[:3]
    assert [record["index"] for record in top_models(RANKING, 4, of=20)] == [0, 5, 10, 15]


def test_rank_correlation_is_spearmans():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(0.9486833)
