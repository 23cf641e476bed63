"""The searches of the tabular benchmarks: their settings, and the report that keeps the rows of other methods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import nasbench101_study, nasbench201_searches
from fastnas.search import resolve


@pytest.mark.parametrize("name", nasbench201_searches.SETTINGS)
def test_settings_are_those_of_a_search(name: str) -> None:
    plan = resolve(nasbench201_searches.COMMON | nasbench201_searches.SETTINGS[name])
    assert plan.search.space == "nasbench201" and plan.search.method == name.partition("-")[0]


def test_settings_of_the_101_search() -> None:
    assert resolve(nasbench101_study.SEARCH).search.space == "nasbench101"


def test_a_report_keeps_the_rows_of_other_methods(tmp_path: Path) -> None:
    def rows(*accuracies: float) -> list[dict[str, float]]:
        return [dict.fromkeys((*nasbench201_searches.COLUMNS, "cpu_s"), value) for value in accuracies]

    path = tmp_path / "report.json"
    nasbench201_searches.write(path, "spos", rows(90.0))
    nasbench201_searches.write(path, "darts", rows(50.0, 60.0))
    nasbench201_searches.write(path, "spos", rows(91.0, 93.0, 92.0))
    report = json.loads(path.read_text())
    assert [row["method"] for row in report["rows"]] == ["darts", "spos"]
    assert report["rows"][0]["c10_test"] == {"mean": 55.0, "std": 5.0} and len(report["rows"][1]["seeds"]) == 3
    assert report["command"].endswith("--out FILE darts spos")
