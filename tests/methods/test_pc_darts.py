import dataclasses

import torch

from fastnas.methods import PCDarts
from fastnas.methods.pc_darts import PCDartsSettings


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
    genotype = method.derive()
    assert genotype.rule == "top2-edge-normalised"
    assert [source for _, source in genotype.normal[1]] == [1, 2]


def test_only_a_share_of_the_channels_has_weights(problem):
    wider = dataclasses.replace(problem, weights=dataclasses.replace(problem.weights, channels=8))
    method = PCDarts(PCDartsSettings(partial=4), wider)
    edge = method.supernet.cells[1].edges[0]
    assert edge.candidates[3][1].weight.shape[0] == method.supernet.cells[1].preprocess1[1].out_channels // 4
