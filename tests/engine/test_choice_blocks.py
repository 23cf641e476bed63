import pytest
import torch
import torch.nn.functional as F

from fastnas.engine.choice_blocks import ChoiceBlock, ChoiceBlockNetwork, GhostNorm, PathMasks
from fastnas.engine.networks import build_network
from fastnas.errors import UserError
from fastnas.spaces import ArchitectureString, ChoiceBlockSpace

SPACE = ChoiceBlockSpace(2)
SIZE = {"channels": 2, "cells": 3, "classes": 3, "in_channels": 1}


def build(**more):
    torch.manual_seed(0)
    return ChoiceBlockNetwork(SPACE, **SIZE, ghost=4, **more).double()


def images(count=8):
    return torch.randn(count, 1, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def test_ghost_batches_are_normalised_each_for_itself_in_evaluation_too():
    norm, x = GhostNorm(3, ghost=4).eval(), torch.randn(8, 3, 5, 5)
    parts = [F.batch_norm(part, None, None, training=True) for part in (x[:4], x[4:])]
    torch.testing.assert_close(norm(x), torch.cat(parts))
    assert not dict(norm.named_buffers())


def test_all_inputs_are_dropped_with_probability_r_whatever_the_fan_in():
    space, r, groups = ChoiceBlockSpace(4), 0.3, 20000
    masks = PathMasks.sample(space, r, 1.0, groups, seed=0)
    for mask in (*masks.inputs, *masks.operations):
        assert float((~mask.any(1)).float().mean()) == pytest.approx(r, abs=0.015)


@pytest.mark.parametrize("ramp", [0.0, 0.5, 1.0])
def test_the_rate_of_each_path_rises_linearly(ramp):
    r, groups = 0.1, 20000
    masks = PathMasks.sample(ChoiceBlockSpace(2), r, ramp, groups, seed=1)
    for mask in (*masks.inputs, *masks.operations):
        dropped = (~mask).float().mean(0)
        assert dropped.tolist() == pytest.approx([ramp * r ** (1 / mask.shape[1])] * mask.shape[1], abs=0.015)


def test_an_input_that_is_off_is_one_that_the_concatenation_never_had():
    """1x1 convolution of the concatenation against the sum of one convolution an input."""
    torch.manual_seed(0)
    block = ChoiceBlock((2, 3, 2), 2, GhostNorm, None).double()
    states = [torch.randn(4, width, 6, 6, dtype=torch.double) for width in (2, 3, 2)]
    kept = [0, 2]
    maps = [block.inputs[str(s)][:2](states[s]) for s in kept]
    weight = torch.cat([block.inputs[str(s)][2].weight for s in kept], dim=1)
    expected = F.conv2d(torch.cat(maps, dim=1), weight)
    identity = torch.tensor([[True] + [False] * 6])
    torch.testing.assert_close(block(states, torch.tensor([[True, False, True]]), identity), expected)


def test_each_ghost_batch_runs_its_own_architecture():
    network, x = build(), images()
    strings = [(0, 4, 2, 10), (2, 27, 5, 6)]
    each = [PathMasks.of(SPACE, string) for string in strings]
    both = PathMasks(
        *(
            tuple(torch.cat(pair) for pair in zip(getattr(each[0], kind), getattr(each[1], kind), strict=True))
            for kind in ("inputs", "operations")
        )
    )
    alone = [network(part, SPACE.decode(string)) for part, string in zip(x.split(4), strings, strict=True)]
    torch.testing.assert_close(network(x, both), torch.cat(alone))


def test_paths_that_are_off_are_not_computed():
    network = build()
    chosen = SPACE.decode((0, 1, 0, 2))
    for name, parameter in network.named_parameters():
        if ".operations." in name and name.split(".")[4] not in ("1", "2"):
            parameter.data.fill_(torch.nan)
    assert torch.isfinite(network(images(), chosen)).all()


def test_a_network_of_one_architecture_computes_what_the_shared_weights_do():
    string = SPACE.decode((2, 7, 5, 20))
    shared = build()
    alone = build(only=string).train()
    alone.load_state_dict(
        {**alone.state_dict(), **{k: v for k, v in shared.state_dict().items() if k in alone.state_dict()}}
    )
    x = images(4)  # one ghost batch
    torch.testing.assert_close(alone(x), shared(x, string))
    assert sum(p.numel() for p in alone.parameters()) < sum(p.numel() for p in shared.parameters()) / 2


def test_all_on_and_small_networks_are_built():
    parameters = [
        sum(p.numel() for p in build_network(g, **SIZE).parameters())
        for g in (SPACE.decode((0, 0, 0, 0)), SPACE.all_on())
    ]
    assert parameters[0] < parameters[1] / 5
    with pytest.raises(UserError, match="no network is known for the space 'moon'"):
        build_network(ArchitectureString("moon", (0,)), **SIZE)


def test_images_are_halved_before_the_cells_at_the_thirds():
    network = build()
    sizes = []
    for cell in network.cells:
        cell[0].register_forward_hook(lambda _module, _args, out: sizes.append(tuple(out.shape[1:])))
    network(images(), SPACE.decode((0, 0, 0, 0)))
    assert sizes == [(2, 8, 8), (4, 4, 4), (8, 2, 2)]


def test_wrong_calls_are_refused():
    network = build()
    with pytest.raises(UserError, match="needs an architecture"):
        network(images())
    with pytest.raises(ValueError, match="2 ghost batches of 4"):
        network(images(6), PathMasks.sample(SPACE, 0.1, 1.0, 2, seed=0))
