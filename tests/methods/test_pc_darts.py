import dataclasses

import pytest
import torch

from fastnas.engine.derived import DerivedNetwork
from fastnas.errors import UserError
from fastnas.methods import PCDarts, Problem, WeightSettings
from fastnas.methods.pc_darts import PCDartsSettings
from fastnas.spaces import DartsSpace


def test_defaults_are_the_papers():
    settings = PCDartsSettings()
    assert (settings.partial, settings.warmup_epochs, settings.edge_normalisation) == (4, 15, True)
    assert (settings.arch_lr, settings.arch_betas, settings.arch_weight_decay) == (6e-4, (0.5, 0.999), 1e-3)
    assert settings.order == 1


def test_beta_is_searched_and_multiplies_alpha_in_the_derivation(problem, batches):
    wider = dataclasses.replace(problem, weights=dataclasses.replace(problem.weights, channels=8))
    method = PCDarts(PCDartsSettings(warmup_epochs=0, partial=4), wider)
    method.start_epoch(0)
    before = [beta.detach().clone() for beta in (method.alphas.beta_normal, method.alphas.beta_reduce)]
    batches = [(x.float(), y) for x, y in batches]
    method.step(0, *batches)
    assert not torch.equal(before[0], method.alphas.beta_normal)
    assert not torch.equal(before[1], method.alphas.beta_reduce)
    with torch.no_grad():
        method.alphas.beta_normal.copy_(torch.tensor([0.0, 0.0, -5.0, 5.0, 5.0]))
    figures = method.end_epoch([batches[1]])
    assert figures["edge_weights_normal"] == pytest.approx([0.5, 0.5, 0.0, 0.5, 0.5], abs=1e-4)
    genotype = method.derive()
    assert genotype.rule == "top2-edge-normalised"
    assert [source for _, source in genotype.normal[1]] == [1, 2]


def test_only_a_share_of_the_channels_has_weights(problem):
    wider = dataclasses.replace(problem, weights=dataclasses.replace(problem.weights, channels=8))
    method = PCDarts(PCDartsSettings(partial=4), wider)
    edge = method.supernet.cells[1].edges[0]
    assert edge.candidates[3][1].weight.shape[0] == method.supernet.cells[1].preprocess1[1].out_channels // 4


def build(problem, **settings):
    wider = dataclasses.replace(problem, weights=dataclasses.replace(problem.weights, channels=8))
    torch.manual_seed(0)
    method = PCDarts(PCDartsSettings(warmup_epochs=0, partial=4, **settings), wider)
    method.start_epoch(0)
    return method


def test_random_channels_are_a_seeded_uniform_subset_of_each_edge(problem):
    cell = build(problem, random_channels=True).supernet.cells[1]
    channels = cell.random_channels(torch.Generator().manual_seed(5))
    assert channels.shape == (5, 4)  # 16 channels in the reduction cell, K = 4
    assert torch.equal(channels, cell.random_channels(torch.Generator().manual_seed(5)))
    assert all(len(set(row)) == 4 and row == sorted(row) for row in channels.tolist())
    assert len({tuple(row) for row in channels.tolist()}) > 1
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([cell.random_channels(generator) for _ in range(1000)])
    shares = torch.bincount(drawn.flatten(), minlength=16) / len(drawn)
    assert (shares - 1 / 4).abs().max() < 0.03


def test_random_channels_replace_the_first_and_the_shuffle_by_equation_1(problem):
    """f(x) = sum_o w_o o(S * x) + (1 - S) * x: the other channels stay what and where they were."""
    edge = build(problem).supernet.cells[0].edges[0]
    x, weights = torch.randn(2, 8, 5, 5), torch.tensor([0.1, 0.2, 0.3, 0.4])
    channels = torch.tensor([1, 6])
    out = edge(x, weights, channels)
    others = [0, 2, 3, 4, 5, 7]
    assert torch.equal(out[:, others], x[:, others])
    mixed = sum(w * candidate(x[:, channels]) for w, candidate in zip(weights, edge.candidates, strict=True))
    torch.testing.assert_close(out[:, channels], mixed)


def test_each_step_and_each_cell_draws_other_channels(problem, batches, monkeypatch):
    method = build(problem, random_channels=True)
    drawn = []
    cell_type = type(method.supernet.cells[0])
    draw = cell_type.random_channels

    def record(cell, generator):
        drawn.append(draw(cell, generator))
        return drawn[-1]

    monkeypatch.setattr(cell_type, "random_channels", record)
    batches = [(x.float(), y) for x, y in batches]
    method.step(0, *batches)
    method.step(1, *batches)
    assert len(drawn) == 2 * 2 * 3  # steps, passes, cells
    last_cells = drawn[2::3]
    assert len({str(channels.tolist()) for channels in last_cells}) == 4
    assert not torch.equal(drawn[1], drawn[2])
    second_step = drawn[6:]
    drawn.clear()
    build(problem, random_channels=True).step(1, *batches)
    assert all(torch.equal(a, b) for a, b in zip(drawn, second_step, strict=True))


def test_random_channels_need_partial_channels():
    with pytest.raises(UserError, match="give --partial 2 or more"):
        PCDartsSettings(random_channels=True, partial=1)


@pytest.mark.parametrize(("nodes", "edges"), [(3, 9), (4, 14), (5, 20)])
def test_the_papers_cells_of_5_6_and_7_nodes_count_the_two_inputs(nodes, edges):
    """Table 4: its N has the two inputs of a cell in it."""
    weights = WeightSettings(channels=8, cells=3, nodes=nodes)
    problem = Problem(DartsSpace(nodes=nodes), 3, 3, weights, torch.device("cpu"), seed=0)
    method = PCDarts(PCDartsSettings(warmup_epochs=0, partial=4), problem)
    method.start_epoch(0)
    assert method.alphas.beta_normal.shape == (edges,)
    batch = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    method.step(0, batch, batch)
    genotype = method.derive()
    assert len(genotype.normal) == nodes
    DerivedNetwork(genotype, channels=4, cells=3, classes=3)(batch[0])
