"""A searched network as a backbone: its maps, and SSD on top of them."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastnas
from fastnas import Backbone
from fastnas.engine.networks import build_network
from fastnas.errors import UserError
from fastnas.spaces import ChoiceBlockSpace, ShufflenetSpace, load_genotype

SIZE = {"channels": 4, "cells": 3, "classes": 2}
EXAMPLE = Path(__file__).parents[2] / "examples" / "ssd_shapes.py"


@pytest.mark.parametrize(("stem", "strides"), [("cifar", [1, 2, 4]), ("imagenet", [8, 16, 32])])
def test_maps_of_a_network_of_cells(stem, strides):
    network = build_network(load_genotype("PC_DARTS_image"), **SIZE, stem=stem, auxiliary=True).eval()
    images = torch.randn(2, 3, 64, 64)
    logits, classifier = network(images), network.classifier
    backbone = Backbone(network, extra=(8,)).eval()
    maps = backbone(images)
    assert list(maps) == ["0", "1", "2", "3"]
    assert [64 // map_.shape[2] for map_ in maps.values()] == [*strides, 2 * strides[-1]]
    assert [map_.shape[1] for map_ in maps.values()] == backbone.out_channels == [*backbone.out_channels[:3], 8]
    torch.testing.assert_close(classifier(maps["2"].mean((2, 3))), logits)
    names = {name.split(".")[1] for name, _ in backbone.network.named_parameters(prefix="n")}
    assert not names & {"classifier", "auxiliary"}


def test_maps_of_a_chain():
    network = build_network(ShufflenetSpace(5).decode([0, 1, 2, 3, 0]), **SIZE).eval()
    images = torch.randn(2, 3, 32, 32)
    last, classifier, logits = network.last, network.classifier, network(images)
    backbone = Backbone(network, maps=4).eval()
    maps = backbone(images)
    assert [map_.shape[2] for map_ in maps.values()] == [16, 8, 4, 2]
    assert backbone.out_channels == [16, 40, 80, 160]
    torch.testing.assert_close(classifier(last(maps["3"]).mean((2, 3))), logits)


def test_every_parameter_of_the_maps_is_trained():
    backbone = Backbone(build_network(load_genotype("DARTS_V2"), **SIZE, auxiliary=True), extra=(8,))
    sum(map_.square().mean() for map_ in backbone(torch.randn(2, 3, 16, 16)).values()).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_what_has_no_maps_says_so():
    with pytest.raises(UserError, match="a ChoiceBlockNetwork gives no maps at several strides"):
        Backbone(build_network(ChoiceBlockSpace(2).random_genotype(random.Random(0)), **SIZE))
    with pytest.raises(UserError, match="maps of 3 sizes: maps must be from 1 to that, got 4"):
        Backbone(build_network(load_genotype("DARTS_V2"), **SIZE), maps=4)
    with pytest.raises(UserError, match="even numbers of channels, got 3"):
        Backbone(build_network(load_genotype("DARTS_V2"), **SIZE), extra=(3,))


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("torchvision", reason="SSD is torchvision's")
    spec = importlib.util.spec_from_file_location("ssd_shapes", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_ssd_learns_to_find_shapes(example, tmp_path, capsys):
    size = ["--size", "64", "--channels", "8", "--cells", "3", "--batch", "8", "--steps", "40"]
    losses, share = example.main([*size, "--out", str(tmp_path / "shapes.png")])
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]) and 0 <= share <= 1
    assert (tmp_path / "shapes.png").read_bytes().startswith(b"\x89PNG")
    assert "of the shapes in new pictures" in capsys.readouterr().out


def test_boxes_lie_around_what_is_drawn(example):
    picture, target = example.draw_picture(96, torch.Generator().manual_seed(1))
    for x0, y0, x1, y1 in target["boxes"].round().int().tolist():
        inside = picture[:, max(y0, 0) : y1, max(x0, 0) : x1]
        assert inside.mean() > picture.median() and 0 <= x0 < x1 <= 96


def test_the_name_is_public():
    assert fastnas.Backbone is Backbone
