"""Presets: each resolves, names its source, and holds the values printed in the papers."""

from __future__ import annotations

from importlib import resources
from typing import Any

import pytest

from fastnas import retrain, search
from fastnas.config import preset_names, read_preset

DARTS = {
    **{"epochs": 50, "batch_size": 64, "channels": 16, "cells": 8, "nodes": 4, "stem": "cifar"},
    **{"lr": 0.025, "lr_min": 0.001, "momentum": 0.9, "weight_decay": 3e-4, "grad_clip": 5.0},
    **{"search_fraction": 0.5, "cutout": 0},
}
ADAM = {"arch_lr": 3e-4, "arch_betas": (0.5, 0.999), "arch_weight_decay": 1e-3}
GATES = {"arch_lr": 1e-3, "arch_betas": (0.0, 0.999), "arch_interval": 5}
FULL_CHANNELS = {"warmup_epochs": 0, "partial": 1, "edge_normalisation": False}
PAPERS: dict[str, dict[str, Any]] = {
    "darts": {"method": "darts", "order": 1, **DARTS, **ADAM, **FULL_CHANNELS},
    "darts-second-order": {"method": "darts", "order": 2, **DARTS, **ADAM, **FULL_CHANNELS},
    "pc_darts": {
        **{"method": "pc_darts", "order": 1, **DARTS, **ADAM, "batch_size": 256, "lr": 0.1, "lr_min": 0.0},
        **{"warmup_epochs": 15, "partial": 4, "edge_normalisation": True, "arch_lr": 6e-4},
    },
    "darts-edge-normalisation": {**DARTS, **ADAM, "method": "darts", "partial": 1, "edge_normalisation": True},
    "pc_darts-imagenet": {
        **{"method": "pc_darts", "order": 1, **DARTS, **ADAM, "batch_size": 1024, "lr": 0.5, "lr_min": 0.0},
        **{"weight_decay": 3e-5, "warmup_epochs": 35, "partial": 2, "edge_normalisation": True, "arch_lr": 6e-3},
        **{"stem": "imagenet", "train_fraction": 0.1, "search_fraction": 0.025, "lr_warmup_epochs": 5},
    },
    "parsec-tuned": {
        **{"method": "parsec", **DARTS, "epochs": 10, "samples": 16, "arch_lr": 0.01, "batch_size": 96},
        **{"channels": 36, "cells": 20, "cutout": 16},
    },
    "parsec": {
        **{"method": "parsec", **DARTS, "epochs": 100, "samples": 16, "arch_lr": 0.02},
        **{"arch_betas": (0.5, 0.999), "likelihood": "sum"},
    },
    **{
        f"snas{level}": {
            **{"method": "snas", **DARTS, **ADAM, "epochs": 150, "lr_min": 0.0, "search_fraction": 0.1},
            **{"temperature": 1.0, "temperature_end": 0.03, "resource": level[1:] or "mild"},
        }
        for level in ("", "-moderate", "-aggressive")
    },
    "spos": {
        **{"method": "spos", **DARTS, "generations": 20, "population": 50, "parents": 10, "crossovers": 25},
        **{"mutations": 25, "mutation_rate": 0.1, "recalibration_batches": 200},
    },
    "proxyless": {**DARTS, "method": "proxyless", "space": "nasnet", **GATES},
    "vaenas_g": {**DARTS, "method": "vaenas_g", "space": "nasnet", "cells": 20, "top_share": 0.5, **GATES},
    **{
        f"vaenas_os{limited}": {
            **{**DARTS, "method": "vaenas_os", "space": "nasnet", "cells": 20, "top_share": 0.5, "generations": 20},
            **{"population": 50, "max_parameters": 3.5e6 if limited else None},
        }
        for limited in ("", "-limited")
    },
    "spos-shufflenet": {
        **{"method": "spos", "space": "shufflenet", "cells": 20, "batch_size": 1024, "lr": 0.5, "weight_decay": 4e-5},
        **{"population": 50, "generations": 20, "max_multiply_adds": 330e6, "channels": 16},
    },
    "vaenas_os-shufflenet": {
        **{"method": "vaenas_os", "space": "shufflenet_se", "cells": 20, "batch_size": 1024, "epochs": 480, "lr": 0.5},
        **{"momentum": 0.9, "weight_decay": 3e-5},
    },
    "one_shot": {
        **{"method": "one_shot", "space": "choice_blocks", "nodes": 4, "cells": 6, "batch_size": 1024, "epochs": 225},
        **{"lr": 0.1, "momentum": 0.9, "dropout_rate": 0.1, "ghost_batch": 32, "search_fraction": 0.1},
    },
    "random": {"method": "random", **DARTS},
    "retrain": {
        **{"epochs": 600, "batch_size": 96, "channels": 36, "cells": 20, "stem": "cifar", "cutout": 16},
        **{"lr": 0.025, "lr_min": 0.0, "momentum": 0.9, "weight_decay": 3e-4, "grad_clip": 5.0},
        **{"auxiliary_weight": 0.4, "drop_path": 0.2, "schedule": "cosine", "label_smoothing": 0.0},
    },
    "retrain-imagenet": {
        **{"epochs": 250, "batch_size": 1024, "channels": 48, "cells": 14, "stem": "imagenet", "image_size": 224},
        **{"lr": 0.5, "lr_min": 0.0, "schedule": "linear", "lr_warmup_epochs": 5, "momentum": 0.9},
        **{"weight_decay": 3e-5, "label_smoothing": 0.1, "auxiliary_weight": 0.4, "max_multiply_adds": 600e6},
    },
}
SOURCES = {
    "darts-edge": "Xu et al. 2020",
    "darts": "Liu et al. 2019",
    "one_shot": "Bender et al. 2018",
    "parsec": "Casale et al. 2019",
    "pc_darts": "Xu et al. 2020",
    "proxyless": "Cai et al. 2019",
    "snas": "Xie et al. 2019",
    "spos": "Guo et al. 2020",
    "vaenas": "VAENAS, Algorithm",
}


def settings(preset: str, /, **flags: Any) -> dict[str, Any]:
    flags = {**flags, "preset": preset}
    if preset.startswith("retrain"):
        return retrain.resolve({"genotype": "DARTS_V2", **flags}).as_mapping()
    return search.resolve(flags).as_mapping()


@pytest.mark.parametrize("preset", preset_names())
def test_each_preset_resolves(preset):
    resolved = settings(preset)
    for name, value in read_preset(preset).items():
        assert resolved[name] == (tuple(value) if isinstance(value, list) else value)
    if not preset.startswith("retrain"):
        assert preset.startswith(resolved["method"])  # so that --method alone finds it


@pytest.mark.parametrize("preset", preset_names())
def test_each_preset_says_what_it_is(preset):
    text = (resources.files("fastnas") / "presets" / f"{preset}.toml").read_text(encoding="utf-8")
    first = text.splitlines()[0]
    assert first.startswith("# ") and first.endswith(".")
    if preset in PAPERS:
        paper = next((paper for name, paper in SOURCES.items() if preset.startswith(name)), "DARTS")
        paper = "Xu et al. 2020" if preset == "retrain-imagenet" else paper
        assert ("on ImageNet" if preset.endswith(("-imagenet", "-shufflenet")) else "on CIFAR-10") in first
        assert ("Liu et al. 2019" if preset == "retrain" else paper) in first
    else:
        assert preset.endswith("-digits") and "on the embedded digits" in first


@pytest.mark.parametrize("preset", PAPERS)
def test_the_values_are_those_of_the_papers(preset):
    resolved = settings(preset)
    assert {name: resolved[name] for name in PAPERS[preset]} == PAPERS[preset]


@pytest.mark.parametrize("preset", ["darts", "pc_darts", "parsec", "random", "retrain"])
def test_the_defaults_are_the_papers_too(preset):
    """For a data set of one's own, and for library calls that name no preset."""
    if preset == "retrain":
        resolved = retrain.resolve({"genotype": "DARTS_V2"}, {}).as_mapping()
        expected = PAPERS[preset] | {"cutout": 0}
    else:
        resolved = search.resolve({"method": preset}, {}).as_mapping()
        expected = PAPERS[preset]
        if preset == "pc_darts":
            expected = expected | {name: DARTS[name] for name in ("batch_size", "lr", "lr_min")}
        if preset == "parsec":
            expected = expected | {"epochs": DARTS["epochs"]}
    assert {name: resolved[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "preset"),
    [
        ({}, "pc_darts-digits"),
        ({"data": "digits", "method": "parsec"}, "parsec-digits"),
        ({"data": "cifar10"}, "pc_darts"),
        ({"data": "npz:images.npz", "method": "pc-darts", "batch_size": 3}, "pc_darts"),
        ({"data": "cifar10", "preset": "parsec-digits"}, "parsec-digits"),
        ({"preset": "darts", "epochs": 3}, "darts"),
    ],
)
def test_a_search_takes_the_preset_of_its_method_and_data(flags, preset):
    resolved = search.resolve(flags).as_mapping()
    default = {} if "preset" in flags else {"data": "digits"}
    assert resolved == settings(preset, **default | flags)
    for name in ("data", "epochs", "batch_size"):
        assert name not in flags or resolved[name] == flags[name]


@pytest.mark.parametrize(
    ("flags", "preset"),
    [
        ({}, "retrain-digits"),
        ({"data": "cifar10"}, "retrain"),
        ({"data": "imagenet"}, "retrain-imagenet"),
        ({"data": "npz:images.npz", "preset": "retrain-digits"}, "retrain-digits"),
    ],
)
def test_retraining_takes_the_preset_of_its_data(flags, preset):
    resolved = retrain.resolve({"genotype": "DARTS_V2", **flags}).as_mapping()
    default = {} if "preset" in flags else {"data": "digits"}
    assert resolved == settings(preset, **default | flags)
