"""Predicted and measured footprints: exact against each other, against the allocator, and against known figures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import fastnas
from fastnas.engine.derived import DerivedNetwork
from fastnas.engine.mixture import Alphas
from fastnas.engine.supernet import Supernet
from fastnas.methods import METHODS
from fastnas.profile import method_steps, module_step
from fastnas.profiler.footprint import Footprint
from fastnas.profiler.step import Inputs, ModuleTraining, predict
from fastnas.profiler.subject import Subject
from fastnas.spaces import DartsSpace, load_genotype

SMALL = {"batch_size": 4, "channels": 8, "cells": 3, "nodes": 2}
# oneDNN takes scratch memory for a depthwise 7x7 convolution in channels_last, whatever the batch: 50 kB a channel.
WITH_7X7 = ("proxyless", "vaenas_os", "vaenas_g")
LARGER = {"batch_size": 64, "channels": 4}
CASES = {f"{name}, {executor}": (name, executor, {}) for name in METHODS for executor in ("plain", "fused")} | {
    "darts, lean": ("darts", "lean", {}),
    "pc_darts, lean": ("pc_darts", "lean", {}),
    "darts, fused, second order": ("darts", "fused", {"order": 2}),
    "parsec, fused, tempered": ("parsec", "fused", {"samples": 2, "likelihood": "mean"}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Kernels take scratch memory for each thread, which is much beside networks as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def subject(name: str, executor: str = "fused", **flags: object) -> Subject:
    few = {"parsec": {"samples": 2}, "random": {"samples": 2}, "one_shot": {"ghost_batch": 2}}.get(name, {})
    large = name in WITH_7X7 and executor != "plain"
    sizes = SMALL | (LARGER if large else {})
    torch.manual_seed(0)
    side = 32 if large else 8
    return method_steps({**sizes, **few, **flags, "executor": executor}, methods=[name], image=(3, side, side))[0]


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[Footprint, Footprint]:
    name, executor, flags = CASES[request.param]
    step = subject(name, executor, **flags)
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
    return subject("darts", "plain").predict()


@pytest.fixture(scope="module")
def fused() -> Footprint:
    return subject("darts", "fused").predict()


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
    half = method_steps({**SMALL, "executor": "plain"}, methods=["darts"], image=(3, 8, 8), dtype=torch.bfloat16)[
        0
    ].predict()
    # Indices of max-pools and statistics do not shrink with the type.
    assert 1.5 < darts.saved_bytes / half.saved_bytes < 2
    on_gpu = method_steps(
        {**SMALL, "executor": "plain"}, methods=["darts"], image=(3, 8, 8), device=torch.device("cuda")
    )[0].predict()
    assert on_gpu.peak > darts.peak
    assert on_gpu.peak % 512 == 0


def test_candidates_edges_and_cells_have_their_names(darts: Footprint) -> None:
    architecture, weights = darts.saved
    assert set(architecture.by_candidate) == set(DartsSpace().candidates)
    assert set(weights.by_candidate) == set(DartsSpace().candidates) - {"none"}  # kept for the gradient of alpha alone
    assert set(weights.by_cell) == {"cell 0", "cell 1", "cell 2"}
    assert {f"cell 1, edge {edge}" for edge in range(5)} <= set(weights.by_edge)
    assert weights.by_candidate["sep_conv_5x5"] == weights.by_candidate["sep_conv_3x3"]


def test_maps_of_a_fused_stage_are_parted_among_candidates_and_cells(fused: Footprint) -> None:
    _, weights = fused.saved
    assert set(weights.by_candidate) == {
        "sep_conv_3x3",
        "sep_conv_5x5",
        "dil_conv_3x3",
        "dil_conv_5x5",
        "skip_connect",
    }
    one_map = 4 * 4 * 8 * 8 * 8  # float32 [4, 8, 8, 8]; cell 0 is normal, 1 and 2 reduce
    normal = {key: size for key, size in weights.by_module.items() if key.startswith("cells.0.edges.0.")}
    maps = {}
    for module, size in normal.items():
        candidate = module.split(".")[5]
        maps[candidate] = maps.get(candidate, 0) + size / one_map
    assert maps == {"4": 2, "5": 2, "6": 1, "7": 1}  # two halves of a separable convolution, one dilated one
    assert set(weights.by_cell) == {"cell 0", "cell 1", "cell 2"}
    assert sum(weights.by_cell.values()) > 0.9 * weights.bytes


def test_the_table_of_running_statistics_counts_as_buffers(darts: Footprint, fused: Footprint) -> None:
    assert fused.at_peak["buffers"] == darts.at_peak["buffers"] > 0


def test_a_sampled_path_has_gradients_of_that_path_alone() -> None:
    parts = subject("spos", "plain").predict().at_peak
    assert 0 < parts["gradients"] < 0.5 * parts["parameters"]
    assert parts["optimiser state"] >= parts["parameters"]


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
    def __init__(self, k: int, architecture: str = "", executor: str = "plain") -> None:
        super().__init__()
        space = DartsSpace()
        self.supernet = Supernet(space, channels=16, cells=8, classes=10, k=k, executor=executor)
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


@pytest.mark.parametrize(("executor", "share"), [("plain", 1.05), ("fused", 0.5), ("lean", 0.25)])
def test_a_sampled_path_saves_what_the_child_alone_saves(executor: str, share: float) -> None:
    """At most 5 % more than the child as a network of its own, and far less when it runs fused."""
    image, batch_size = (3, 32, 32), 8
    genotype = load_genotype("DARTS_V2")
    child = module_step(
        lambda: DerivedNetwork(genotype, channels=16, cells=8, classes=10), image=image, batch_size=batch_size
    )
    path = predict(ModuleTraining(_Pass(1, "DARTS_V2", executor)), Inputs(image, batch_size), name="path")
    assert path.saved_bytes <= share * child.predict().saved_bytes


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
