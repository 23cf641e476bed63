import math

import pytest
import torch
from torch import nn

from fastnas.engine.training import Means, batch_statistics, cosine, evaluate, frozen


def test_cosine_starts_at_the_rate_of_epoch_0():
    rates = [cosine(epoch, 50, 0.025, 0.001) for epoch in range(50)]
    assert rates[0] == 0.025
    assert rates[25] == pytest.approx(0.013)
    assert rates[49] == pytest.approx(0.001 + 0.012 * (1 + math.cos(math.pi * 49 / 50)))
    assert rates == sorted(rates, reverse=True)


def test_frozen_restores_exactly_what_it_froze():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with frozen(module.parameters()):
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert module.weight.requires_grad
    assert not module.bias.requires_grad


def test_batch_statistics_normalises_by_the_batch_and_updates_nothing():
    norm = nn.BatchNorm2d(3, affine=False).eval()
    norm.running_mean.fill_(5)
    x = torch.randn(4, 3, 2, 2)
    with batch_statistics(norm):
        out = norm(x)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    assert norm.running_mean.tolist() == [5, 5, 5]
    assert norm.num_batches_tracked == 0
    assert not norm.training
    assert norm.track_running_stats


def test_evaluate_weighs_batches_by_their_size():
    logits = {1: torch.tensor([[2.0, 0.0]] * 3), 2: torch.tensor([[0.0, 2.0]])}
    batches = [(torch.tensor(1), torch.tensor([0, 0, 1])), (torch.tensor(2), torch.tensor([1]))]
    figures = evaluate(lambda x: logits[int(x)], batches)
    assert figures["accuracy"] == 0.75
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert figures["loss"] == pytest.approx((3 * right + wrong) / 4)
    with pytest.raises(ValueError, match="no batch"):
        evaluate(lambda x: x, [])


def test_means_average_over_steps():
    means = Means()
    for value in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(value)})
    assert means.read() == {"loss": 3.0}
