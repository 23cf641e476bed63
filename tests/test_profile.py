"""`python -m fastnas.profile`: its table, its JSON, its pictures and its errors."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from fastnas import profile
from fastnas.profile import method_steps

SMALL = ["--channels", "8", "--cells", "3", "--nodes", "2", "--image-size", "8", "--batch-size", "4", "--device", "cpu"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as caught:
        profile.run_command(profile.main, arguments)
    output = capsys.readouterr()
    assert caught.value.code == code, output.err
    return output.err if code else output.out


def rows(table: str) -> dict[str, list[str]]:
    return {line[:20].strip(): line[20:].split("  ") for line in table.splitlines()}


def test_it_compares_methods_in_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("all.json", "bars.svg", "time.svg")}
    output = run(
        capsys,
        *SMALL,
        *("--methods", "parsec,random", "--samples", "2", "--fit", "4MB", "--by", "candidate", "--measure"),
        *("--json", str(files["all.json"]), "--bars", str(files["bars.svg"]), "--timeline", str(files["time.svg"])),
    )
    head = output.splitlines()[0].split()
    assert head == ["parsec", "random"]
    for line in ("predicted peak", "saved activations", "measured peak", "GFLOP of a step", "batch within 4MB"):
        assert line in output
    assert "+0.00%" in output and "sep_conv_3x3" in output

    report = json.loads(files["all.json"].read_text())
    assert report["limit"] == 4 * 10**6 and "torch" in report["versions"]
    for row in report["rows"]:
        assert row["error"] == 0.0
        assert row["predicted"]["saved"] == row["measured"]["saved"]
        assert sum(row["predicted"]["at_peak"].values()) == row["predicted"]["peak"]
        assert row["fits"] >= 2

    texts = {name: _texts(files[name]) for name in ("bars.svg", "time.svg")}
    assert {"parsec", "random", "limit 4.00 MB", "batch 4, measured"} <= texts["bars.svg"]
    assert {"parsec", "random", "weight step"} <= texts["time.svg"]
    assert any(text.startswith("peak ") and text.endswith("B") for text in texts["time.svg"])


def test_it_compares_executors(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(run(capsys, *SMALL, "--methods", "darts", "--executors", "plain,fused,lean", "--json", "-"))
    steps = {row["predicted"]["name"]: row["predicted"] for row in report["rows"]}
    assert list(steps) == ["darts, plain", "darts, fused", "darts, lean"]
    plain, fused, lean = (step["saved_bytes"] for step in steps.values())
    assert lean < fused < plain
    alone = json.loads(run(capsys, *SMALL, "--methods", "darts", "--executor", "lean", "--json", "-"))
    assert alone["rows"][0]["predicted"]["saved_bytes"] == lean


@pytest.mark.parametrize(
    ("method", "space", "more"),
    [
        ("darts", "nasbench201", []),
        ("spos", "nasbench101", ["--channels", "12"]),
        ("spos", "shufflenet", ["--cells", "4"]),
        ("random", "choice_blocks", ["--samples", "1"]),
    ],
)
def test_predictions_hold_in_every_space(method: str, space: str, more: list[str], capsys) -> None:
    arguments = [*SMALL, "--methods", method, "--space", space, *more, "--measure", "--json", "-"]
    (row,) = json.loads(run(capsys, *arguments))["rows"]
    assert row["error"] == 0.0 and row["predicted"]["saved"] == row["measured"]["saved"]


def _texts(path: Path) -> set[str]:
    return {element.text for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")}


def test_json_alone_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(run(capsys, *SMALL, "--methods", "random", "--samples", "1", "--json", "-"))
    (row,) = report["rows"]
    assert (row["predicted"]["name"], row["measured"], row["fits"]) == ("random", None, None)


def test_a_module_of_the_user(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "networks_of_a_user.py").write_text(
        "from torch import nn\n"
        "def tiny():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["--module", "networks_of_a_user:tiny", "--image-size", "8", "--batch-size", "5", "--device", "cpu"]
    output = run(capsys, *arguments)
    assert output.splitlines()[0].split() == ["tiny"]
    assert rows(output)["parameters"][-1].strip() == f"{4 * 27 + 4 + 1440 + 10:,}"
    for flag in (["--channels", "8"], ["--space", "darts"]):
        assert f"{flag[0]} is no setting of a module" in run(capsys, *arguments, *flag, code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--methods dats", "unknown method 'dats'; did you mean 'darts'?"),
        ("--methods parsec --order 2", "order is a setting of none of the methods parsec"),
        ("--methods darts --space shufflenet", "darts does not search the space shufflenet: give --space darts or"),
        ("--space nowhere", "argument --space: invalid choice: 'nowhere'"),
        ("--executors plain,fast", "unknown executor 'fast'"),
        ("--executors plain --executor lean", "drop it, or --executor and --module"),
        ("--fit much", "a size must be a number with a unit such as 12GiB"),
        ("--device tpu", "device must be auto, cpu or cuda"),
        ("--device cpu --snapshot x", "--snapshot needs --measure on a CUDA device"),
        ("--module nowhere:net", "--module must be package.module:function"),
        ("--batch-size 1", "batch-size must be at least 2"),
        ("--batch-size auto", "give --fit"),
        ("--image-size 0", "image-size must be at least 1"),
    ],
)
def test_errors_are_one_sentence(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    assert message in run(capsys, *arguments.split(), code=2)


def test_measuring_needs_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "there is no cuda here" in run(capsys, "--device", "cuda", "--measure", code=2)


def test_large_images_get_the_stem_of_imagenet() -> None:
    (large,) = method_steps({"batch_size": 2, "cells": 3, "nodes": 2}, methods=["darts"], image=(3, 224, 224))
    (forced,) = method_steps(
        {"batch_size": 2, "cells": 3, "nodes": 2, "stem": "cifar"}, methods=["darts"], image=(3, 224, 224)
    )
    assert 20 * large.predict().peak < forced.predict().peak
