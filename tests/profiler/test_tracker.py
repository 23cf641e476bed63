"""Births and deaths of memory, counted by hand on small graphs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from fastnas.profiler.allocator import peak_bytes
from fastnas.profiler.tracker import Tracker


def peak(tracker: Tracker) -> int:
    return max(itertools.accumulate((event.size for event in tracker.events), initial=0))


def level(tracker: Tracker) -> int:
    return sum(event.size for event in tracker.events)


def test_a_storage_counts_once_until_its_last_view_is_gone() -> None:
    with Tracker() as tracker:
        x = torch.zeros(256)
        y = x.view(2, 128)[0]
        x.add_(1)
        assert level(tracker) == 1024
        del x
        assert level(tracker) == 1024
        del y
        assert level(tracker) == 0
        kept = [torch.zeros(64), torch.zeros(64)]
        assert level(tracker) == 512
    assert len(kept) == 2
    assert peak(tracker) == 1024


def test_granularity_rounds_each_allocation_up() -> None:
    with Tracker(granularity=512) as tracker:
        kept = [torch.zeros(1), torch.zeros(129), torch.zeros(0)]
    assert (level(tracker), len(kept)) == (512 + 1024, 3)


def test_saved_is_what_the_hooks_see_once_a_storage_and_without_the_weights() -> None:
    weight = torch.ones(100, requires_grad=True)
    batch = torch.ones(100)
    with Tracker() as tracker:
        tracker.own([weight], "parameters")
        tracker.own([batch], "input batch")
        x = batch * weight  # keeps batch
        y = x * x.view(100)  # keeps x once
        y.exp().sum().backward()  # keeps its result
    (only,) = tracker.passes
    assert only.bytes == 3 * 400
    assert [block.category for block in only.saved] == ["input batch", "saved activations", "saved activations"]


def test_each_forward_pass_has_its_own_saved_tensors() -> None:
    weight = torch.ones(100, requires_grad=True)
    with Tracker() as tracker:
        tracker.own([weight], "parameters")
        for _ in range(2):
            weight.exp().sum().backward()
        with torch.no_grad():
            weight.exp().sum()
    assert [entry.bytes for entry in tracker.passes] == [400, 400]


def test_an_unreached_branch_is_freed_with_its_tensors() -> None:
    """A ReLU keeps its own result: a naive hook makes that a cycle, and the memory lives on."""
    x = torch.ones(100, requires_grad=True)
    with Tracker() as tracker:
        (x * 1).relu()
        assert level(tracker) == 0


def test_blocks_know_the_module_that_made_them() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU()))
    with Tracker({part: name for name, part in net.named_modules()}) as tracker:
        net(torch.ones(2, 4, requires_grad=True)).sum().backward()
    assert {"0", "1.0"} <= {block.module for block in tracker.passes[0].saved}


def test_phases_name_backward_passes_and_updates() -> None:
    weight = nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9)
    with Tracker() as tracker:
        tracker.own([weight], "parameters")
        with tracker.label("weight step"):
            (weight * torch.ones(10)).sum().backward()
            optimizer.step()
    phases = dict.fromkeys(event.phase for event in tracker.events)
    assert list(phases) == ["step", "weight step", "weight step, backward", "weight step, update"]
    categories = {event.block.category for event in tracker.events}
    assert {"gradients", "optimiser state"} <= categories


def test_flops_of_a_linear_layer() -> None:
    layer = nn.Linear(30, 20, bias=False)
    with Tracker() as tracker:
        layer(torch.ones(5, 30)).sum().backward()
    assert tracker.flops == {"forward": 2 * 5 * 30 * 20, "backward": 2 * 5 * 30 * 20}


def test_it_agrees_with_the_allocator_of_the_cpu() -> None:
    # No convolution: those of a few images take scratch memory inside the kernel, which no dispatch mode sees.
    net = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.randn(100, 32)

    def step() -> list[Tensor]:
        return list(torch.autograd.grad(net(x).square().mean(), list(net.parameters())))

    step()
    with Tracker() as tracker:
        tracker.own([*net.parameters(), *net.buffers(), x], "parameters")
        owned = level(tracker)
        step()
    assert peak(tracker) - owned == pytest.approx(peak_bytes(step, torch.device("cpu")), rel=0.01)


def test_it_agrees_with_pytorchs_own_tracker() -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    x = torch.randn(128, 64)

    def step() -> None:
        net(x).sum().backward()
        net.zero_grad()

    theirs = MemTracker()
    theirs.track_external(net, x)
    with theirs:
        step()
    ours = Tracker()
    with ours:
        ours.own([*net.parameters(), x], "parameters")
        step()
    assert peak(ours) == theirs.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
