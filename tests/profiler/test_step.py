"""Predicted and measured footprints: exact against each other, against the allocator, and against known figures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastnas
from fastnas.engine.mixture import Alphas
from fastnas.engine.supernet import Supernet
from fastnas.methods import METHODS
from fastnas.profile import method_steps, module_step
from fastnas.profiler.footprint import Footprint
from fastnas.profiler.step import Inputs, ModuleTraining, predict
from fastnas.profiler.subject import Subject
from fastnas.spaces import DartsSpace, load_genotype

SMALL = {"batch_size": 4, "channels": 8, "cells": 3, "nodes": 2}
CASES = {name: (name, {}) for name in METHODS} | {
    "darts, second order": ("darts", {"order": 2}),
    "parsec, tempered": ("parsec", {"samples": 2, "likelihood": "mean"}),
}


def subject(case: str, **more: object) -> Subject:
    name, flags = CASES[case]
    few = {"samples": 2} if name in ("parsec", "random") else {}
    torch.manual_seed(0)
    return method_steps({**SMALL, **few, **flags, **more}, methods=[name], image=(3, 8, 8))[0]


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[Footprint, Footprint]:
    step = subject(request.param)
    return step.predict(), step.measure()


def test_predicted_saved_activations_equal_the_measured_ones(pair: tuple[Footprint, Footprint]) -> None:
    predicted, measured = pair
    assert predicted.saved == measured.saved
    assert predicted.saved_bytes > 0


def test_the_predicted_peak_is_that_of_the_allocator_within_3_percent(pair: tuple[Footprint, Footprint]) -> None:
    predicted, measured = pair
    assert predicted.peak == measured.peak
    assert predicted.at_peak == measured.at_peak
    assert predicted.peak == pytest.approx(measured.allocator_peak, rel=0.03)


def test_operations_and_flops_are_the_same(pair: tuple[Footprint, Footprint]) -> None:
    predicted, measured = pair
    assert predicted.flops == measured.flops
    assert predicted.flops["forward"] > 0 and predicted.flops["backward"] > 0
    assert measured.seconds > 0


def test_the_parts_add_up(pair: tuple[Footprint, Footprint]) -> None:
    for footprint in pair:
        assert sum(footprint.at_peak.values()) == footprint.peak
        assert max(sum(sample.bytes) for sample in footprint.timeline) == footprint.peak
        for entry in footprint.saved:
            assert sum(entry.by_cell.values()) <= sum(entry.by_module.values()) <= entry.bytes


def test_measuring_twice_gives_the_same() -> None:
    first, second = (subject("pc_darts").measure() for _ in range(2))
    assert (first.peak, first.allocator_peak, first.timeline) == (second.peak, second.allocator_peak, second.timeline)


@pytest.fixture(scope="module")
def darts() -> Footprint:
    return subject("darts").predict()


def test_phases_carry_the_names_of_the_methods_functions(darts: Footprint) -> None:
    assert [entry.phase for entry in darts.saved] == ["architecture step", "weight step"]
    assert "weight step, update" in {sample.phase for sample in darts.timeline}


def test_a_prediction_leaves_random_states_and_no_trace_on_the_method() -> None:
    step = subject("darts")
    torch.manual_seed(3)
    step.predict()
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(3)))
    method = step.build(torch.device("cpu"))
    predict(method, step.inputs, name="darts")
    assert method.weight_step.__self__ is method


def test_optimiser_state_and_gradients_are_there_from_the_first_step(darts: Footprint) -> None:
    parts = darts.at_peak
    assert parts["optimiser state"] >= parts["parameters"] == parts["gradients"] - parts["architecture parameters"] > 0


def test_a_smaller_type_needs_less_and_rounding_never_less(darts: Footprint) -> None:
    half = method_steps(SMALL, methods=["darts"], image=(3, 8, 8), dtype=torch.bfloat16)[0].predict()
    # Indices of max-pools and statistics do not shrink with the type.
    assert 1.5 < darts.saved_bytes / half.saved_bytes < 2
    on_gpu = method_steps(SMALL, methods=["darts"], image=(3, 8, 8), device=torch.device("cuda"))[0].predict()
    assert on_gpu.peak > darts.peak
    assert on_gpu.peak % 512 == 0


def test_candidates_edges_and_cells_have_their_names(darts: Footprint) -> None:
    architecture, weights = darts.saved
    assert set(architecture.by_candidate) == set(DartsSpace().candidates)
    assert set(weights.by_candidate) == set(DartsSpace().candidates) - {"none"}  # kept for the gradient of alpha alone
    assert set(weights.by_cell) == {"cell 0", "cell 1", "cell 2"}
    assert {f"cell 1, edge {edge}" for edge in range(5)} <= set(weights.by_edge)
    assert weights.by_candidate["sep_conv_5x5"] == weights.by_candidate["sep_conv_3x3"]


def test_any_module_can_be_profiled() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 1000), nn.ReLU(), nn.Linear(1000, 2))

    step = module_step(network, image=(3, 2, 2), batch_size=50)
    predicted, measured = step.predict(), step.measure()
    assert (predicted.saved, predicted.at_peak) == (measured.saved, measured.at_peak)
    assert predicted.parameters == 12 * 1000 + 1000 + 2000 + 2
    assert predicted.at_peak["architecture parameters"] == 0
    assert predicted.flops["forward"] == 2 * 50 * (12 * 1000 + 1000 * 2)


@pytest.mark.parametrize("method", ["darts", "parsec"])
def test_the_batch_that_fits_does_so_when_it_is_run_and_a_tenth_more_does_not(method: str) -> None:
    step = subject(method)
    limit = 3 * step.predict().peak
    batch = step.largest_batch(limit)
    assert step.predict(batch + 1).peak > limit
    assert step.measure(batch).allocator_peak <= 1.001 * limit
    assert step.measure(-(-11 * batch // 10)).allocator_peak > limit


# One pass with gradients of weights and alphas, as performance studies of DARTS count it: figures in bytes.
class _Pass(nn.Module):
    def __init__(self, k: int, architecture: str = "") -> None:
        super().__init__()
        space = DartsSpace()
        self.supernet = Supernet(space, channels=16, cells=8, classes=10, k=k)
        self.alphas = Alphas(space, edge_normalisation=k > 1)
        self.genotype = load_genotype(architecture) if architecture else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.supernet(x, self.genotype or self.alphas())


@pytest.mark.parametrize(
    ("k", "genotype", "batch_size", "gigabytes"),
    [(1, "", 64, 8.034), (4, "", 256, 10.215), (1, "DARTS_V2", 64, 0.793)],
    ids=["DARTS", "PC-DARTS", "child"],
)
def test_known_figures_of_one_pass(k: int, genotype: str, batch_size: int, gigabytes: float) -> None:
    with fastnas.backend("reference"):  # plain PyTorch, which keeps the slices and concatenations of partial channels
        step = ModuleTraining(_Pass(k, genotype))
        footprint = predict(step, Inputs((3, 32, 32), batch_size), name="pass")
    assert round(footprint.saved_bytes / 1e9, 3) == gigabytes


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["darts", "pc_darts", "parsec"])
def test_the_predicted_peak_is_that_of_cuda_within_5_percent(method: str) -> None:
    flags = {"batch_size": 32, "channels": 16, "cells": 8} | ({"likelihood": "mean"} if method == "parsec" else {})
    step = method_steps(flags, methods=[method], device=torch.device("cuda"))[0]
    measured = step.measure()
    assert step.predict().peak == pytest.approx(measured.allocator_peak, rel=0.05)
    assert [entry.bytes for entry in step.predict().saved] == pytest.approx(
        [entry.bytes for entry in measured.saved], rel=0.01
    )
