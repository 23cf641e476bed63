"""`python -m fastnas.info`: what is in use, and the sizes of the papers' networks."""

from __future__ import annotations

import json

import pytest
import torch

import fastnas
from fastnas import _backends, _ext, info
from fastnas.info import describe_installation, describe_network
from fastnas.spaces import load_genotype


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        info.run_command(info.main, arguments)
    output = capsys.readouterr()
    assert (caught.value.code, output.err) == (0, "")
    return output.out


# The papers: 3.3 M, 3.6 M, and 5.3 M with 597 M multiply-adds, the latter by a counter that takes all layers.
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("DARTS_V2", {"parameters": 3_349_342, "stem": "cifar", "channels": 36, "cells": 20, "image_size": 32}),
        ("PC_DARTS_cifar", {"parameters": 3_634_678, "classes": 10}),
        (
            "PC_DARTS_image --channels 48 --cells 14 --image-size 224 --classes 1000",
            {
                **{"stem": "imagenet", "image_size": 224, "classes": 1000, "parameters": 5_342_464},
                **{"multiply_adds": 581_627_328, "multiply_adds_all": 597_206_976},
            },
        ),
    ],
)
def test_published_networks_have_the_size_in_their_papers(capsys, arguments, expected):
    output = run(capsys, "--genotype", *arguments.split())
    assert output.count("\n") == 1
    facts = json.loads(output)
    assert facts["genotype"] == arguments.split()[0]
    assert {key: facts[key] for key in expected} == expected
    assert "multiply_adds_all" in facts["convention"]


def test_a_genotype_of_a_run_folder(capsys, tmp_path):
    (tmp_path / "genotype.json").write_text(load_genotype("DARTS_V2").to_json())
    facts = json.loads(run(capsys, "--genotype", str(tmp_path)))
    assert facts["parameters"] == 3_349_342


def test_the_stem_can_be_chosen():
    size = {"channels": 8, "cells": 3, "image_size": 64, "classes": 5, "in_channels": 1}
    assert describe_network("DARTS_V2", **size)["stem"] == "cifar"
    assert describe_network("DARTS_V2", **size | {"image_size": 128})["stem"] == "imagenet"
    chosen = describe_network("DARTS_V2", **size, stem="imagenet")
    assert chosen["multiply_adds"] < describe_network("DARTS_V2", **size)["multiply_adds"]


def test_latency_is_measured_for_each_batch_size(capsys):
    size = "--channels 4 --cells 3 --image-size 8 --classes 3"
    facts = json.loads(run(capsys, "--genotype", "DARTS_V2", *size.split(), "--latency", "1,4"))
    assert [row["batch"] for row in facts["latency"]] == [1, 4] and facts["device"] and facts["threads"] >= 1
    for row in facts["latency"]:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"] and row["runs"] >= 5
    with pytest.raises(SystemExit):
        info.run_command(info.main, ["--genotype", "DARTS_V2", "--latency", "1,x"])
    assert "such as 1,32, got '1,x'" in capsys.readouterr().err


def test_a_huge_network_takes_no_memory():
    facts = describe_network("DARTS_V2", channels=4096, cells=20, image_size=1024, classes=10)
    assert facts["parameters"] > 10**10


def test_versions_devices_and_built_parts_are_listed(capsys):
    lines = run(capsys).splitlines()
    facts = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if len(line.split()) > 1}
    assert facts["fastnas"] == fastnas.__version__
    assert facts["torch"] == torch.__version__
    assert f"{torch.get_num_threads()} threads" in facts["cpu"]
    assert {"python", "platform", "torchvision", "triton", "numpy", "fastnas._C"} <= facts.keys()
    assert facts["fastnas._C"] == (_ext.load("cpu") or "loaded: " + _ext.modules()["cpu"])
    if not torch.cuda.is_available():
        assert facts["cuda"].startswith("none visible")


@pytest.mark.parametrize("choice", ["", "reference"])
def test_each_op_is_listed_with_its_backend(choice):
    with _backends.backend(choice):
        rows = _backends.table()
        listed = [line.split(maxsplit=3)[:3] for line in describe_installation().splitlines()]
        assert {row.op for row in rows} >= {"mixed_sum", "partial_shuffle", "path_dropout", "gumbel_softmax"}
        for row in rows:
            assert [row.op, row.device, row.backend] in listed
            assert not choice or row.backend == choice
