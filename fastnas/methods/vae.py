"""A variational autoencoder of architecture strings (VAENAS, section 3.2 and Algorithm 1).

Encoder q_phi(z | alpha) and decoder p_theta(alpha | z) are LSTMs over the string, the prior of z is N(0, I). Trained is
the variational lower bound of log p_theta(alpha):

    -KL(q_phi(z | alpha) || N(0, I)) + E_{z ~ q_phi(z | alpha)} [log p_theta(alpha | z)]            (eq. 2)

It lives on the CPU: strings are short, and so every device samples the same architectures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastnas.spaces.strings import String

TRAINING_BATCH = 64


class ArchitectureVae(nn.Module):
    """VAE of strings whose place n has `choices[n]` possible values.

    `hidden`: width of the LSTMs and embeddings; `latent`: dimensions of z. Impossible values have probability 0.
    """

    def __init__(self, choices: Sequence[int], *, hidden: int, latent: int, generator: torch.Generator) -> None:
        super().__init__()
        self.length, self.latent = len(choices), latent
        symbols = max(choices)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            self.embedding = nn.Embedding(symbols + 1, hidden)  # the last one stands before the first place
            self.encoder = nn.LSTM(hidden, hidden, batch_first=True)
            self.posterior = nn.Linear(hidden, 2 * latent)
            self.initial = nn.Linear(latent, 2 * hidden)
            self.decoder = nn.LSTM(hidden + latent, hidden, batch_first=True)
            self.output = nn.Linear(hidden, symbols)
        impossible = torch.arange(symbols) >= torch.tensor(choices)[:, None]
        self.register_buffer(
            "mask", torch.zeros(impossible.shape).masked_fill(impossible, -torch.inf), persistent=False
        )

    def encode(self, strings: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B, N] -> mean and log variance of q(z | alpha), [B, latent] each."""
        _, (hidden, _) = self.encoder(self.embedding(strings))
        mean, log_variance = self.posterior(hidden[-1]).chunk(2, dim=-1)
        return mean, log_variance

    def log_probabilities(self, strings: Tensor, z: Tensor) -> Tensor:
        """log p(alpha_n | alpha_<n, z) of every value at every place: [B, N, symbols]."""
        start = torch.full_like(strings[:, :1], self.embedding.num_embeddings - 1)
        earlier = self.embedding(torch.cat([start, strings[:, :-1]], 1))
        repeated = z[:, None].expand(-1, self.length, -1)
        states, _ = self.decoder(torch.cat([earlier, repeated], -1), self._initial_state(z))
        return (self.output(states) + self.mask).log_softmax(-1)

    def lower_bound(self, strings: Tensor, noise: Tensor) -> Tensor:
        """Equation 2 with z = mean + std * noise: strings int64 [B, N], noise [B, latent] -> [B], in nats."""
        mean, log_variance = self.encode(strings)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)
        z = mean + (0.5 * log_variance).exp() * noise
        chosen = self.log_probabilities(strings, z).gather(-1, strings[..., None])
        return chosen.sum((-2, -1)) - divergence

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator) -> list[String]:
        """alpha ~ p_theta(alpha | z) with z ~ N(0, I), place after place."""
        z = torch.randn(count, self.latent, generator=generator)
        state = self._initial_state(z)
        symbol = torch.full((count, 1), self.embedding.num_embeddings - 1)
        places = []
        for place in range(self.length):
            output, state = self.decoder(torch.cat([self.embedding(symbol), z[:, None]], -1), state)
            probabilities = (self.output(output[:, 0]) + self.mask[place]).softmax(-1)
            symbol = torch.multinomial(probabilities, 1, generator=generator)
            places.append(symbol)
        return [tuple(string) for string in torch.cat(places, 1).tolist()]

    def _initial_state(self, z: Tensor) -> tuple[Tensor, Tensor]:
        hidden, cell = self.initial(z)[None].chunk(2, dim=-1)
        return hidden.tanh().contiguous(), cell.contiguous()


def train_vae(
    vae: ArchitectureVae,
    optimizer: torch.optim.Optimizer,
    scored: Sequence[tuple[String, float]],
    *,
    top_share: float,
    iterations: int,
    generator: torch.Generator,
) -> float:
    """Algorithm 1: rank (alpha, accuracy) by accuracy, keep the best share K, train on batches of these.

    Returns the lower bound, in nats, of the last batch. At least one architecture is kept.
    """
    ranked = sorted(scored, key=lambda pair: -pair[1])
    kept = torch.tensor([string for string, _ in ranked[: max(1, round(top_share * len(ranked)))]])
    bound = torch.zeros(())
    for _ in range(iterations):
        rows = torch.randperm(len(kept), generator=generator)[:TRAINING_BATCH]
        noise = torch.randn(len(rows), vae.latent, generator=generator)
        bound = vae.lower_bound(kept[rows], noise).mean()
        optimizer.zero_grad(set_to_none=True)
        (-bound).backward()
        optimizer.step()
    return bound.item()
