import xml.etree.ElementTree as ElementTree

import pytest

from fastnas.report import curves
from fastnas.runs import RunFolder

RECORDS = [
    {"epoch": epoch, "search_accuracy": 0.1 * epoch, "child_accuracy": 0.1, "entropy": 2.0 - epoch}
    | {"edge_entropy_normal": [1.0, 2.0], "edge_entropy_reduce": [0.5, 0.2]}
    for epoch in range(2)
]
BARE = [{"epoch": 0, "search_accuracy": 0.3, "entropy": 1.0}]


def lines(svg):
    return svg.count('<g id="line2d')


def test_each_figure_that_was_measured_is_a_line():
    both = curves.draw_curves({"snas": RECORDS, "parsec": BARE})
    ElementTree.fromstring(both)
    assert "snas" in both and "parsec" in both
    full, bare = curves.draw_curves({"run": RECORDS}), curves.draw_curves({"run": BARE * 2})
    assert both == curves.draw_curves({"snas": RECORDS, "parsec": BARE})
    dashed = [{k: v for k, v in record.items() if "edge" not in k} for record in RECORDS]
    plain = [{k: v for k, v in record.items() if k != "child_accuracy"} for record in dashed]
    assert lines(full) - lines(curves.draw_curves({"run": dashed})) == 4  # edges
    assert lines(curves.draw_curves({"run": dashed})) - lines(curves.draw_curves({"run": plain})) == 1
    assert "run" in bare


def test_the_command_draws_run_folders(tmp_path, capsys):
    run = RunFolder.create(tmp_path / "run", {"method": "snas"})
    with pytest.raises(SystemExit):
        curves.run_command(curves.main, [str(run.path)])
    assert "has no search metrics yet" in capsys.readouterr().err
    for record in RECORDS:
        run.append_metrics(record)
    with pytest.raises(SystemExit) as caught:
        curves.run_command(curves.main, [str(run.path), "--out", str(tmp_path / "curves.svg")])
    assert caught.value.code == 0
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")
