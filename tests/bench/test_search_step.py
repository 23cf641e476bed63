"""`bench/search_step.py` at a tiny size: its rows, its breakdown, its sweep, the compiled cells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from bench import search_step, step_rows
from bench.compiled_rows import compiled_cells, compiled_network
from bench.row_process import RowProcess
from bench.step_rows import PARTS, Problem, Row, Stopwatch
from bench.sweep import draw_sweep, fit_line, sweep
from fastnas.engine.supernet import Supernet
from fastnas.errors import UserError

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
SIZES = ["--batch", "4", "--channels", "8", "--cells", "3", "--nodes", "2", "--image", "8", "--rounds", "1"]
TINY = Problem("darts", 4, channels=8, cells=3, nodes=2, image=8)


def test_the_command_prints_one_json_object_with_a_row_for_each_name() -> None:
    """As in a shell, from elsewhere."""
    command = [sys.executable, str(ROOT / "bench" / "search_step.py"), "--method", "darts", *SIZES, "--threads", "1"]
    command += ["--rows", "plain,plain_channels_last,fused,fused_lean", "--json", "-"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT / "docs").stdout
    report = json.loads(out)
    rows = report["rows"]
    assert report["machine"] and list(rows) == ["plain", "plain_channels_last", "fused", "fused_lean"]
    assert all(row["ms_min"] <= row["ms"] <= row["ms_max"] and row["first_ms"] > 0 for row in rows.values())
    assert rows["plain"]["saved_bytes"] == rows["plain_channels_last"]["saved_bytes"]
    assert rows["fused_lean"]["saved_bytes"] < rows["fused"]["saved_bytes"] < rows["plain"]["saved_bytes"]
    assert rows["fused_lean"]["peak_bytes"] < rows["fused"]["peak_bytes"] < rows["plain"]["peak_bytes"]


@pytest.mark.parametrize("method", ["darts", "pc_darts", "parsec"])
def test_a_search_step_falls_into_all_its_parts(method: str) -> None:
    row = Row("fused", Problem(method, 4, channels=8, cells=3, nodes=2, image=8, step="search"), CPU)
    parts = row.breakdown()
    assert set(parts) == set(PARTS) and min(parts.values()) > 0
    assert row.seconds() > 0


def test_parts_add_up_and_an_architecture_step_keeps_its_own_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(step_rows.time, "perf_counter", lambda: float(next(clock)))
    watch = Stopwatch(CPU)
    with watch.part("forward"):  # from 0 to 7
        with watch.part("backward"):  # from 1 to 2
            pass
        with watch.part("architecture"), watch.part("backward"):  # from 3 to 6
            pass
    assert watch.seconds == {"forward": 3.0, "backward": 1.0, "architecture": 3.0}


def gradients_of(name: str) -> list[torch.Tensor]:
    """What a pass of the row computes, on one and the same batch: by the modules' parameters, however they lie."""
    row, grad, seen = Row(name, TINY, CPU), torch.autograd.grad, []
    batch = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda *args, **options: seen.extend(grad(*args, **options)))
        row.work.step(0, batch, batch)
    with torch.no_grad():
        for parameter, gradient in zip(row.work.parameters, seen, strict=True):
            parameter.copy_(gradient)
    return [*row.work.supernet.parameters(), *row.work.alphas.parameters()]


def test_rows_of_a_pass_give_the_same_gradients() -> None:
    plain = gradients_of("plain")
    for name in ("plain_channels_last", "fused", "fused_lean"):
        for ours, theirs in zip(gradients_of(name), plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_resident_memory_grows_by_what_a_pass_needs() -> None:
    larger = [*SIZES, "--batch", "32", "--image", "16"]
    assert search_step._resident_elsewhere("plain", larger) > 1e7


def test_unknown_rows_are_named() -> None:
    with pytest.raises(UserError, match="unknown row 'fast'; there are plain, plain_channels_last, fused"):
        Row("fast", TINY, CPU)


def test_a_row_runs_in_a_process_of_its_own() -> None:
    """And says there what it says here, errors too."""
    with RowProcess("fused", TINY, CPU) as row:
        assert row._process.pid != os.getpid()
        assert min(row.seconds(), row.seconds()) > 0 and set(row.breakdown()) <= set(PARTS)
        assert row.footprint().saved_bytes == Row("fused", TINY, CPU).footprint().saved_bytes
    assert row._process.exitcode == 0
    with pytest.raises(UserError, match="unknown row 'fast'"):
        RowProcess("fast", TINY, CPU)


def test_rows_for_gpus_are_refused_elsewhere() -> None:
    with pytest.raises(UserError, match="fused_half is for GPUs: leave the row out"):
        Row("fused_half", TINY, CPU)
    with pytest.raises(UserError, match="fused_graph is a search step on a GPU: give --step search there"):
        Row("fused_graph", TINY, CPU)


def test_compiled_cells_and_networks_come_with_their_compile_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    cells = compiled_cells(TINY, CPU, 1)
    assert list(cells) == ["normal", "reduction"] and len(compiled) == 2
    network = compiled_network(TINY, CPU, 1)
    assert len(compiled) == 3 and isinstance(compiled[2], Supernet)
    for row in (*cells.values(), network):
        assert set(row) == {"compiled_ms", "plain_ms", "fused_ms", "compile_s"} and min(row.values()) > 0


@pytest.mark.parametrize(
    "flags",
    [["--step", "search"], ["--method", "parsec"], ["--method", "pc_darts", "--rows", "plain,plain_compile"]],
)
def test_compiled_rows_refuse_what_they_do_not_run_before_anything_runs(flags, monkeypatch) -> None:
    monkeypatch.setattr(search_step, "measure", lambda *args, **options: pytest.fail("a row ran"))
    with pytest.raises(UserError, match="plain_compile.* is a pass of darts"):
        search_step.main([*SIZES, "--rows", "plain,plain_compile_net", *flags])


def test_a_line_is_fitted_by_least_squares() -> None:
    assert fit_line([1, 2, 3], [5, 7, 9]) == pytest.approx({"slope": 2, "intercept": 3, "r2": 1})
    assert fit_line([0, 1, 2], [0, 0, 3]) == pytest.approx({"slope": 1.5, "intercept": -0.5, "r2": 0.75})
    with pytest.raises(ValueError, match="two different places"):
        fit_line([1], [2])


def test_the_sweep_is_a_plot_with_slopes() -> None:
    asked = []

    def times(**change: int) -> dict[str, float]:
        asked.append(change)
        return {"fused": 3.0 * next(iter(change.values())) + 1}

    results, picture = sweep(times, batches=(8, 16), cells=(5, 20))
    assert asked == [{"batch": 8}, {"batch": 16}, {"cells": 5}, {"cells": 20}]
    assert results["batch"]["fused"]["slope"] == pytest.approx(3) == results["cells"]["fused"]["slope"]
    texts = {element.text for element in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")}
    assert {"images a batch", "cells", "milliseconds", "fused: 3 ms an image, R² 1.000"} <= texts
    assert draw_sweep(results) == picture


def test_the_sweep_runs_from_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(search_step, "sweep", lambda times: sweep(times, batches=(2, 4), cells=(3, 4)))
    search_step.main([*SIZES, "--rows", "fused", "--sweep", str(tmp_path / "sweep.svg")])
    report = json.loads(capsys.readouterr().out)
    assert report["sweep"]["cells"]["fused"]["cells"] == [3, 4]
    assert len(report["sweep"]["batch"]["fused"]["ms"]) == 2
    assert (tmp_path / "sweep.svg").read_text().startswith("<?xml")
