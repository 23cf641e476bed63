import itertools
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastnas.methods.vae import ArchitectureVae, train_vae

CHOICES = (2, 3, 2)


def build(choices=CHOICES, latent=2):
    return ArchitectureVae(choices, hidden=16, latent=latent, generator=torch.Generator().manual_seed(0)).double()


def every_string(choices=CHOICES):
    return torch.tensor(list(itertools.product(*map(range, choices))))


def test_the_bound_is_equation_2():
    vae, strings = build(), every_string()
    noise = torch.randn(len(strings), 2, dtype=torch.double)
    mean, log_variance = vae.encode(strings)
    posterior = Normal(mean, (log_variance / 2).exp())
    divergence = kl_divergence(posterior, Normal(torch.zeros(2).double(), torch.ones(2).double())).sum(-1)
    z = posterior.mean + posterior.stddev * noise
    tables = vae.log_probabilities(strings, z)
    reconstruction = sum(tables[torch.arange(len(strings)), place, strings[:, place]] for place in range(3))
    torch.testing.assert_close(vae.lower_bound(strings, noise), reconstruction - divergence)


def test_the_bound_is_below_the_log_probability():
    """log p(alpha) by quadrature over a latent space of one dimension, against the expected bound."""
    vae = build(latent=1)
    strings = every_string()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(2)
        grid = torch.linspace(-8, 8, 2001, dtype=torch.double)
        prior = Normal(torch.zeros((), dtype=torch.double), 1.0).log_prob(grid).exp()
        for string in strings[::5]:
            repeated = string.expand(len(grid), -1)
            tables = vae.log_probabilities(repeated, grid[:, None])
            likelihood = tables.gather(-1, repeated[..., None]).sum((-2, -1)).exp()
            exact = torch.trapezoid(likelihood * prior, grid).log()
            mean, log_variance = vae.encode(string[None])
            bounds = vae.lower_bound(repeated, ((grid - mean) / (log_variance / 2).exp()).reshape(-1, 1))
            density = Normal(mean[0, 0], (log_variance[0, 0] / 2).exp()).log_prob(grid).exp()
            expected_bound = torch.trapezoid(bounds * density, grid)
            assert expected_bound <= exact + 1e-6


def test_it_is_a_distribution_over_the_possible_strings():
    vae, strings = build(), every_string()
    z = torch.randn(1, 2, dtype=torch.double)
    tables = vae.log_probabilities(strings, z.expand(len(strings), -1))
    total = tables.gather(-1, strings[..., None]).sum((-2, -1)).exp().sum()
    torch.testing.assert_close(total, torch.tensor(1.0, dtype=torch.double))
    assert tables[:, 0, 2].max() == -math.inf  # the first place has two values


def test_samples_follow_the_decoder():
    vae = build().float()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(3)
        drawn = vae.sample(6000, torch.Generator().manual_seed(1))
        strings = every_string()
        z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(2))
        for string in strings:
            repeated = string.expand(len(z), -1)
            chance = vae.log_probabilities(repeated, z).gather(-1, repeated[..., None]).sum((-2, -1)).exp().mean()
            assert drawn.count(tuple(string.tolist())) / 6000 == pytest.approx(float(chance), abs=0.025)
    assert drawn == vae.sample(6000, torch.Generator().manual_seed(1))


def test_algorithm_1_learns_the_best_share():
    """Half of the strings have a 1 in the first place and the better accuracies: the samples learn that."""
    choices = (2,) + (3,) * 5
    vae = ArchitectureVae(choices, hidden=24, latent=4, generator=torch.Generator().manual_seed(0))
    strings = [tuple(string) for string in every_string(choices).tolist()][::3]
    scored = [(string, string[0] + sum(string) / 100) for string in strings]
    optimizer = torch.optim.Adam(vae.parameters(), 1e-2)
    before = vae.sample(500, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    bound = train_vae(vae, optimizer, scored, top_share=0.5, iterations=80, generator=generator)
    after = vae.sample(500, torch.Generator().manual_seed(3))
    assert sum(string[0] for string in before) / 500 < 0.8
    assert sum(string[0] for string in after) / 500 > 0.95
    assert bound > -sum(map(math.log, choices))  # better than the uniform distribution
