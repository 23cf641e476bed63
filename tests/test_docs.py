"""The documentation: its links and result files exist, its figures are those that were measured."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

import fastnas
import fastnas.nn

ROOT = Path(__file__).parents[1]
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_result_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r"^\[\d+\]: (\S+)$", text, re.MULTILINE):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target
    for name in re.findall(r"bench/results/[\w.*-]+\.(?:json|svg)", text):
        assert list(ROOT.glob(name)), name


def test_the_site_lists_pages_that_are_there_and_loads_no_fonts():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = re.findall(r"([\w/]+\.md)$", text[text.index("\nnav:") :], re.MULTILINE)
    assert len(pages) > 20 and len(set(pages)) == len(pages)
    assert [page for page in pages if not (ROOT / "docs" / page).exists()] == []
    assert "font: false" in text
    for name in re.findall(
        r"^::: (\S+)$", "\n".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md")), re.M
    ):
        importable(name)


def test_every_public_name_of_the_package_and_its_modules_is_on_an_api_page():
    text = "\n".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md"))
    pages = re.findall(r"^::: (\S+)(?:\n    options: \{ members: \[(.*)\])?", text, re.MULTILINE)
    shown = {f"{name}.{member}" for name, members in pages for member in members.split(", ")} | {n for n, _ in pages}
    for package in (fastnas, fastnas.nn):
        for name in set(package.__all__) - {"__version__"}:
            home = getattr(package, name)
            assert f"{home.__module__}.{home.__qualname__}" in shown, name


def importable(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_result_files_are_listed_and_say_what_made_them():
    results = ROOT / "bench" / "results"
    listed = re.findall(r"`([\w.*-]+\.json)`", (results / "README.md").read_text(encoding="utf-8"))
    for path in results.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert any(path.match(name) for name in listed), path.name
        assert json.loads(text)["command"] and '"date"' in text and '"commit"' in text, path.name


def test_figures_of_the_front_pages_are_those_of_the_result_files():
    results = ROOT / "bench" / "results"
    (darts,) = (
        row for row in json.loads((results / "footprints.json").read_text())["rows"] if row.get("pass") == "DARTS"
    )
    times = json.loads((results / "search_step_darts.json").read_text())["rows"]
    saved = [darts[f"{executor}_saved"] / 1e9 for executor in ("plain", "fused", "lean")]
    milliseconds = [f"{round(times[row]['ms']):,}" for row in ("plain", "plain_channels_last", "fused", "fused_lean")]
    readme, home, executor = ((ROOT / name).read_text() for name in ("README.md", "docs/index.md", "docs/executor.md"))
    assert f"saves {saved[0]:.2f} GB, fused {saved[1]:.2f}, lean {saved[2]:.2f}" in readme
    assert f"takes {milliseconds[0]} ms, fused {milliseconds[2]} ms" in readme
    assert f"| {saved[0]:.2f} GB | {saved[1]:.2f} GB | {1e3 * saved[2]:.0f} MB |" in home
    for text in milliseconds:
        assert f"{text} ms" in home and f"{text} ms" in executor


@pytest.mark.parametrize("page", TOP[:1], ids=["README.md"])
def test_lines_are_short(page):
    """Rows of tables may be longer: they cannot be wrapped."""
    for line in page.read_text(encoding="utf-8").splitlines():
        assert len(line) <= (130 if line.startswith("|") else 120), line
