"""`bench/retrain_step.py` at a tiny size."""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from bench import retrain_step


def test_every_row_is_measured_and_ours_is_fused(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(retrain_step, "SETTINGS", replace(retrain_step.SETTINGS, channels=4, cells=3))
    rows = [row for row in retrain_step.ROWS if row != "compiled"]
    path = tmp_path / "result.json"
    arguments = ["--genotypes", "DARTS_V1", "--batch", "2", "--rounds", "2", "--rows", ",".join(rows)]
    retrain_step.main([*arguments, "--json", str(path)])
    report = json.loads(path.read_text())
    found = report["rows"]["DARTS_V1"]
    assert list(found) == rows and report["machine"] and report["batch"] == 2
    assert all(row["ms_min"] <= row["ms"] <= row["ms_max"] and row["first_ms"] > 0 for row in found.values())
    assert found["fused"]["over_fused"] == found["fused"]["cpu_over_fused"] == 1.0


def test_the_baseline_runs_no_op_of_ours(monkeypatch) -> None:
    monkeypatch.setattr(retrain_step, "SETTINGS", replace(retrain_step.SETTINGS, channels=4, cells=3))
    counts = {}
    for row in ("modules", "fused"):
        step = retrain_step.build_step(row, "DARTS_V2", 2, torch.device("cpu"))
        with torch.profiler.profile(acc_events=True) as profile:
            step()
        counts[row] = sum(event.count for event in profile.key_averages() if event.key.startswith("fastnas::"))
    assert counts["modules"] == 0 < counts["fused"]
