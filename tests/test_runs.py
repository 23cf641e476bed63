"""Run folders: nothing is overwritten, and a resumed run has the files of an uninterrupted one."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import fastnas
from fastnas import runs
from fastnas.errors import UserError
from fastnas.runs import RunFolder, default_run_path

CONFIG = {"method": "darts", "batch_size": 8, "data_dir": None, "betas": (0.5, 0.999)}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs" / "one", CONFIG)


def test_settings_and_versions_are_recorded(run):
    again = RunFolder.open(run.path)
    assert again.config() == {"method": "darts", "batch_size": 8, "data_dir": "none", "betas": [0.5, 0.999]}
    text = run.config_path.read_text()
    assert "[versions]" in text
    for name in ("fastnas", "torch", "python", "platform"):
        assert f"\n{name} = " in text


def test_commit_is_recorded_in_a_checkout(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "fastnas" / "__init__.py"
    package.parent.mkdir()
    package.touch()
    monkeypatch.setattr(fastnas, "__file__", str(package))
    assert "commit" not in runs.versions()
    git("init")
    assert "commit" not in runs.versions()
    git("add", ".")
    git("commit", "-m", "x")
    git("tag", "v1")
    assert runs.versions()["commit"] == git("rev-parse", "HEAD")
    package.write_text("changed = 1\n")
    assert runs.versions()["commit"] == git("rev-parse", "HEAD") + "-dirty"


def test_a_run_is_not_overwritten(run):
    with pytest.raises(UserError, match=rf"{run.path} holds a run: go on with --resume {run.path}, or"):
        RunFolder.create(run.path, CONFIG)


def test_a_folder_with_files_is_not_taken(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not empty"):
        RunFolder.create(tmp_path, CONFIG)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(UserError, match="cannot make the run folder .*/x/run: Not a directory; give another"):
        RunFolder.create(tmp_path / "x" / "run", CONFIG)


@pytest.mark.parametrize(("name", "message"), [("absent", "is no folder"), (".", "has no config.toml")])
def test_open_wants_a_run(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        RunFolder.open(tmp_path / name)


def test_default_names(tmp_path, monkeypatch):
    path = default_run_path("pc_darts", "folder:/data/my images", root=tmp_path)
    assert re.fullmatch(r"pc_darts-folder-\d{8}-\d{6}", path.name)
    monkeypatch.setattr(runs.time, "strftime", lambda form: "20260101-000000")
    first = default_run_path("darts", "digits", root=tmp_path)
    first.mkdir()
    second = default_run_path("darts", "digits", root=tmp_path)
    assert [first.name, second.name] == ["darts-digits-20260101-000000", "darts-digits-20260101-000000-2"]
    assert default_run_path("darts", "digits").parent == Path("runs")


def test_metrics_are_one_deterministic_line_an_epoch(run):
    entropy = {"normal": 1.5, "all": (1.0, float("nan"))}
    run.append_metrics({"loss": 0.1 + 0.2, "epoch": 1, "entropy": entropy})
    run.append_timing({"epoch": 1, "seconds": 3.5})
    expected = '{"entropy": {"all": [1.0, null], "normal": 1.5}, "epoch": 1, "loss": 0.30000000000000004}\n'
    assert run.metrics_path.read_text() == expected
    assert run.timing_path.read_text() == '{"epoch": 1, "seconds": 3.5}\n'
    assert run.metrics() == [json.loads(expected)]


def test_a_record_names_its_epoch(run):
    with pytest.raises(TypeError, match=r"a record of metrics\.jsonl needs an integer epoch"):
        run.append_metrics({"loss": 1.0})
    assert run.metrics() == []


@pytest.mark.parametrize("torn", ["", '{"epoch": 4, "lo', '{"epoch": 3}', "\0\0\0"])
def test_truncate_gives_the_file_of_the_checkpoint(run, torn):
    for epoch in range(1, 4):
        run.append_metrics({"epoch": epoch, "loss": 1 / epoch})
        run.append_timing({"epoch": epoch, "seconds": 1 / epoch})
        if epoch == 2:
            expected = run.metrics_path.read_bytes(), run.timing_path.read_bytes()
    with open(run.metrics_path, "a") as file:
        file.write(torn)
    run.truncate(2)
    assert (run.metrics_path.read_bytes(), run.timing_path.read_bytes()) == expected
    run.truncate(0)
    assert run.metrics_path.read_bytes() == b""


def test_truncate_before_the_first_record(run):
    run.truncate(0)
    assert not run.metrics_path.exists()


def test_genotype_and_cells(run):
    run.write_genotype(SimpleNamespace(to_json=lambda: '{"ü": 1}\n'))
    run.write_cells("<svg/>")
    assert run.genotype_path.read_text(encoding="utf-8") == '{"ü": 1}\n'
    assert (run.path / "cells.svg").read_text() == "<svg/>"
    assert sorted(entry.name for entry in run.path.iterdir()) == ["cells.svg", "config.toml", "genotype.json"]
    assert run.checkpoint_path == run.path / "checkpoint.pt"
