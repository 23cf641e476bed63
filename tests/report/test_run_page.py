"""The HTML report: well formed, loads nothing, says what is missing, and shows hostile text as text."""

from __future__ import annotations

import importlib
import json
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastnas.errors import UserError
from fastnas.report import __main__ as command
from fastnas.report.charts import Line, line_chart, stacked_bars
from fastnas.report.findings import findings
from fastnas.report.records import read_record
from fastnas.report.run_page import render_run, write_report
from fastnas.runs import RunFolder
from fastnas.search import resolve, run_search
from fastnas.spaces import load_genotype

VOID = {"meta", "br"}
SECTIONS = ["summary", "findings", "cells", "curves", "architecture-over-time", "time-and-memory", "genotype", "next"]
SECTIONS += ["settings"]
SIZE = {"batch_size": 8, "channels": 4, "cells": 3, "nodes": 2, "threads": 1, "device": "cpu", "epochs": 2}
HOSTILE = "</style></script><img src=x onerror=\"alert('1')\">&amp;\x00"


class Reader(HTMLParser):
    """Collects the elements of a page; an element that is not closed in order is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.sections: dict[str, str] = {}
        self.commands: list[str] = []
        self.elements: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "section":
            self.current = dict(attrs)["id"] or ""
            self.sections[self.current] = ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if "section" in self.open:
            self.sections[self.current] += data
        if self.open and self.open[-1] == "pre":
            self.commands.append(data)


def read(path: Path) -> Reader:
    text = path.read_text(encoding="utf-8")
    for loads in ("http:", "https:", "//fonts", "@import", "url(", "src="):
        assert loads not in text.replace("http://www.w3.org/2000/svg", ""), loads
    return Reader(text)


@pytest.fixture(scope="module")
def runs(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    more: dict[str, dict[str, Any]] = {
        "darts": {},
        "snas": {},
        "parsec": {"samples": 2},
        "spos": {"generations": 1, "population": 2, "crossovers": 1, "mutations": 1},
    }
    for method, settings in more.items():
        plan = resolve({"method": method, "data": f"npz:{images}", **SIZE, **settings})
        run_search(plan, folder / method, quiet=True)
    return {method: folder / method for method in more}


@pytest.fixture
def copy(runs, tmp_path):
    """A run of DARTS that may be damaged."""
    return Path(shutil.copytree(runs["darts"], tmp_path / "run"))


def test_a_search_leaves_a_report_with_every_section(runs):
    page = read(runs["darts"] / "report.html")
    assert list(page.sections) == SECTIONS
    assert "Search accuracy" in page.sections["summary"] and "2 of 2" in page.sections["summary"]
    assert "Normal cell" in page.sections["cells"]
    for chart in ("Loss", "Accuracy", "Skip connections"):
        assert chart in page.sections["curves"]
    architecture = page.sections["architecture-over-time"]
    assert "Entropy of the normal cell" in architecture and "node 1 from c_{k-1}, sep_conv_3x3" in architecture
    for part in ("data", "weights", "architecture", "evaluation", "Memory, GB"):
        assert part in page.sections["time-and-memory"]
    assert "changed" in {value for tag, name, value in page.attributes if name == "class"}
    assert json.loads(next(text for text in page.commands if text.startswith("{")))["format"] == "fastnas-genotype"
    assert load_genotype(runs["darts"]).to_darts() in page.commands


def test_figures_of_a_method_have_charts(runs):
    assert "Temperature" in read(runs["snas"] / "report.html").sections["curves"]
    parsec = read(runs["parsec"] / "report.html")
    assert "node 0 from c_{k-2}, sep_conv_3x3" in parsec.sections["architecture-over-time"]
    assert any("fastnas.ensemble" in text for text in parsec.commands)
    assert "node 0" not in read(runs["spos"] / "report.html").sections.get("architecture-over-time", "")


def test_the_next_commands_are_accepted(runs):
    for run in runs.values():
        for line in (text for text in read(run / "report.html").commands if text.startswith("python -m")):
            module, *arguments = shlex.split(line)[2:]
            program = command if module == "fastnas.report" else importlib.import_module(module)
            program.build_parser().parse_args(arguments)


def test_the_next_commands_name_the_run(runs):
    commands = [text for text in read(runs["darts"] / "report.html").commands if text.startswith("python -m")]
    assert [text.split()[2] for text in commands] == [
        "fastnas.retrain",
        "fastnas.info",
        "fastnas.profile",
        "fastnas.report",
    ]
    assert all(str(runs["darts"]) in text for text in commands if "profile" not in text)


def test_an_unfinished_run(copy):
    RunFolder(copy).truncate(0)
    page = read(write_report(copy))
    assert any(text.endswith(f"fastnas.search --resume {copy}") for text in page.commands)
    assert "1 of 2 epochs are done" in page.sections["findings"]


def test_a_run_without_an_epoch_says_what_is_missing(copy):
    for name in ("metrics.jsonl", "timing.jsonl", "genotype.json", "cells.svg", "checkpoint.pt"):
        (copy / name).unlink()
    page = read(write_report(copy))
    assert (
        "no finished epoch yet" in page.sections["summary"] and "genotype.json is not there" in page.sections["summary"]
    )
    assert "curves" not in page.sections and "settings" in page.sections


def test_a_run_of_an_older_fastnas(copy):
    """Without probabilities, parts of the time, memory and hashes."""
    config = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(config[: config.index("[hashes]")] + config[config.index("[versions]") :])
    for name, kept in (
        ("metrics.jsonl", lambda k: "probab" not in k),
        ("timing.jsonl", lambda k: k in ("epoch", "train_s")),
    ):
        rows = [json.loads(line) for line in (copy / name).read_text().splitlines()]
        lines = [json.dumps({k: v for k, v in row.items() if kept(k)}) + "\n" for row in rows]
        (copy / name).write_text("".join(lines))
    page = read(write_report(copy))
    for text in ("no heat map", "has no memory", "no [hashes]"):
        assert text in page.sections["summary"]
    assert "training 100%" in page.sections["time-and-memory"]


def test_hostile_text_is_shown_as_text(copy):
    """In settings, metrics, timing, a broken genotype, the result and the name of the folder."""
    plain = read(write_report(copy)).elements
    hostile = json.dumps(HOSTILE)
    config = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(f'"<b>" = {hostile}\ndata = {hostile}\n' + config.replace("data =", "data_was ="))
    with open(copy / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"epoch": 2, HOSTILE: 1.5, "loss": HOSTILE, "genotype": HOSTILE}) + "\n")
        file.write(json.dumps({"epoch": HOSTILE, "loss": 1.0}) + "\n")
    with open(copy / "timing.jsonl", "a") as file:
        file.write(json.dumps({"epoch": 3, "stopped": HOSTILE}) + "\n")
    (copy / "result.json").write_text(json.dumps({"test_accuracy": HOSTILE, "parameters": HOSTILE}))
    (copy / "genotype.json").write_text(HOSTILE)
    moved = copy.rename(copy.with_name("<img src=x> & 'y'"))
    text = write_report(moved).read_text()
    page = Reader(text)
    assert "img" not in page.elements and set(page.elements) <= set(plain) | {"p"}
    assert not any(name.startswith("on") or name == "src" for _, name, _ in page.attributes)
    assert "onerror" in page.sections["settings"] and "\x00" not in text
    assert any(str(moved) in shlex.split(text) for text in page.commands if text.startswith("python"))


def test_a_comparison_has_a_row_and_a_curve_for_each_run(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        command.run_command(command.main, [str(runs["darts"]), str(runs["snas"])])
    assert caught.value.code == 0 and capsys.readouterr().out == "comparison.html\n"
    page = read(tmp_path / "comparison.html")
    assert list(page.sections) == ["results", "curves", "agreement", "different-settings", "findings", "cells"]
    for name in ("darts", "snas"):
        assert name in page.sections["results"]
    assert "resource" in page.sections["different-settings"] and "seed" not in page.sections["different-settings"]
    lines = [
        value for tag, name, value in page.attributes if tag == "path" and name == "class" and "line" in str(value)
    ]
    assert sum("c1" in str(value) for value in lines) >= 4


def test_the_folder_of_several_seeds_stands_for_its_runs(runs, tmp_path, capsys):
    for seed in (0, 1):
        shutil.copytree(runs["darts"], tmp_path / "all" / f"seed-{seed}")
    with pytest.raises(SystemExit):
        command.run_command(command.main, [str(tmp_path / "all"), "--out", str(tmp_path / "x.html")])
    page = read(tmp_path / "x.html")
    assert "seed-0" in page.sections["results"] and "seed-1" in page.sections["results"]
    assert "100%" in page.sections["agreement"] and "None but the seed" in page.sections["different-settings"]


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path)


def test_a_retraining_has_its_result(tmp_path):
    run = RunFolder.create(tmp_path / "run", {"genotype": "DARTS_V2", "epochs": 2, "data": "digits"})
    for epoch in range(2):
        run.append_metrics({"epoch": epoch, "loss": 1.0 - epoch / 2, "accuracy": 0.5})
        run.append_timing({"epoch": epoch, "train_s": 2.0})
    run.write_genotype(load_genotype("DARTS_V2"))
    (run.path / "result.json").write_text('{"test_accuracy": 0.875, "parameters": 1234567}')
    page = read(write_report(run.path))
    assert "87.50 %" in page.sections["summary"] and "1,234,567" in page.sections["summary"]
    assert "training 100%" in page.sections["time-and-memory"] and "Loss" in page.sections["curves"]
    assert page.sections["findings"].startswith("FindingsNothing to warn of")


def record_of(tmp_path: Path, rows: list[dict[str, Any]], **config: Any):
    run = RunFolder.create(tmp_path / "made", {"method": "darts", "epochs": len(rows), **config})
    for epoch, row in enumerate(rows):
        run.append_metrics({"epoch": epoch, **row})
    run.write_genotype(load_genotype("DARTS_V2"))
    return read_record(run.path)


@pytest.mark.parametrize(
    ("rows", "title"),
    [
        ([{"skips_normal": 2.0}, {"skips_normal": 5.0}], "Collapse to skip connections"),
        ([{"accuracy": 0.99, "search_accuracy": 0.8}], "Overfitting of the weights"),
        ([{"search_loss": 1.0}, {"search_loss": 0.5}, {"search_loss": 0.7}], "The search loss rises"),
        ([{"loss": float("nan")}], "Figures that are no numbers"),
        ([{"search_accuracy": 0.9, "child_accuracy": 0.1}], "Deriving costs accuracy"),
        ([{"entropy": 2.0}, {"entropy": 1.99}], "Hardly decided"),
    ],
)
def test_findings(tmp_path, rows, title):
    record = record_of(tmp_path, rows)
    assert [finding.title for finding in findings(record)] == [title]
    assert title in Reader(render_run(record)).sections["findings"]


def test_edge_weights_have_a_chart_that_names_the_edges(tmp_path):
    sizes = {"space": "darts", "nodes": 2, "cells": 3}
    record = record_of(tmp_path, [{"edge_weights_normal": [0.5, 0.5, 0.2, 0.3, 0.5]}] * 2, **sizes)
    section = Reader(render_run(record)).sections["architecture-over-time"]
    assert "Edge weights of the normal cell" in section and "node 0 to node 1" in section


def test_a_run_that_stopped_says_why(tmp_path):
    record = record_of(tmp_path, [{"loss": 1.0, "entropy": 1.0}])
    RunFolder(record.path).append_timing({"epoch": 1, "stopped": "loss is no longer a number"})
    assert "loss is no longer a number" in findings(read_record(record.path))[0].text


def test_no_findings_for_a_sound_run(tmp_path):
    rows = [
        {"skips_normal": 1.0, "accuracy": 0.9, "search_accuracy": 0.9, "entropy": 2.0 - epoch} for epoch in range(2)
    ]
    assert findings(record_of(tmp_path, rows)) == []


def test_charts_of_one_epoch_and_of_thousands():
    assert "circle" in line_chart([Line("a", [(1, 0.0)])])
    long = [(epoch, 1.0 / epoch) for epoch in range(1, 5001)]
    assert line_chart([Line("a", long), Line("none", [])]).count("<title>") == 100
    assert stacked_bars([("a", long), ("b", long[:10])]).count("<title>") == 100
