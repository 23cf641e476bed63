"""PARSEC (Casale, Gordon and Fusi 2019): empirical Bayes over architectures, at one child's memory.

An architecture alpha has two slots a node, each one draw from a categorical over (input, candidate) pairs:

    p(alpha | pi) = prod_n prod_{i=1,2} Cat(alpha_{n,i} | pi_{n,i})                                      (eq. 4, 5)

With K samples from it, the gradients of log p(y | X, v, pi) are importance-weighted averages (eq. 8):

    grad_v  = sum_k w_k grad_v log p(y_train | X_train, v, alpha_k)
    grad_pi = sum_k w_k grad_pi log p(alpha_k | pi),     w_k = p(y_search | ., alpha_k) / sum_j p(y_search | ., alpha_j)

pi is a softmax of logits that start at 0 (uniform; the paper gives no start) or at those of an earlier search on a
smaller network or another data set (section 4.2). The search is Algorithm 1; it ends with the mode of p(alpha | pi).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas import distributed, processes
from fastnas.config import option
from fastnas.engine.checkpoint import load_checkpoint
from fastnas.engine.training import Batch, accuracy, assign_gradients, average_gradients, batch_statistics
from fastnas.errors import UserError
from fastnas.methods.base import (
    Checkpointed,
    Figure,
    Problem,
    check_betas,
    edge_figures,
    set_weight_rate,
    shared_accuracy,
    weight_optimizer,
)
from fastnas.spaces import AnyGenotype, DartsSpace, Nasbench201Space
from fastnas.spaces.genotype import Genotype, Node

SLOTS = 2
NEGLIGIBLE = 1e-4  # a child of smaller importance weight moves the gradient by less than rounding does: no backward

# For normal and reduction nodes in turn: int64 [K, 2], the pair chosen in each slot. In NAS-Bench-201, for each edge:
# int64 [K, 1], the candidate.
Choices = list[Tensor]


@dataclass(frozen=True)
class ParsecSettings:
    """The defaults are the paper's (section 4.1), but for `likelihood`, which it leaves open."""

    samples: int = option(16, "K: architectures sampled a step; more explore more", minimum=1)
    arch_lr: float = option(0.02, "learning rate of Adam for pi", above=0)
    arch_betas: tuple[float, ...] = option((0.5, 0.999), "the two decay rates of that Adam", minimum=0, maximum=1)
    likelihood: str = option(
        "sum",
        "log-likelihood of the search batch: the sum over its images is the paper's formula, the mean tempers it",
        choices=("sum", "mean"),
    )
    auxiliary_weight: float = option(
        0.0, "weight of an auxiliary head's loss in the training of the weights; 0 leaves the head out", minimum=0
    )
    warm_start: Path | None = option(None, "run folder of another PARSEC search whose pi this one starts from")

    def __post_init__(self) -> None:
        check_betas(self.arch_betas)


class SlotDistribution(nn.Module):
    """p(alpha | pi): for node n of each cell type, logits [2, (2 + n) * O] over (input, candidate) pairs.

    In NAS-Bench-201 the inputs are fixed: logits [1, O] for each edge over its candidates, `none` among them.
    """

    def __init__(self, space: DartsSpace | Nasbench201Space) -> None:
        super().__init__()
        self.space = space
        if isinstance(space, Nasbench201Space):
            shapes = [(1, len(space.candidates))] * space.num_edges
            self.normal_factors = len(shapes)
        else:
            self.names = space.candidates_without_none
            shapes = 2 * [(SLOTS, (2 + node) * len(self.names)) for node in range(space.nodes)]
            self.normal_factors = space.nodes
        self.logits = nn.ParameterList(torch.zeros(shape) for shape in shapes)

    def load_run(self, run: Path) -> None:
        """Take over pi of an earlier PARSEC search from its checkpoint.

        Raises UserError when there is none, or when its cells have other nodes or candidates.
        """
        state = load_checkpoint(run / "checkpoint.pt", method=Parsec.name)["method"]["distribution"]
        try:
            self.load_state_dict(state)
        except RuntimeError:
            raise UserError(
                f"the distribution of {run} is over other cells: search with the same --nodes and --space"
            ) from None

    def sample(self, count: int, generator: torch.Generator) -> Choices:
        """Draw `count` architectures; the noise comes from the CPU `generator`, so every device draws the same."""
        choices = []
        for logits in self.logits:
            uniform = torch.rand(count, *logits.shape, generator=generator, dtype=torch.float64)
            exponential = -torch.log1p(-uniform)  # the smallest of E_i / p_i is i with probability p_i
            race = exponential / logits.detach().double().cpu().softmax(-1)
            choices.append(race.argmin(-1))
        return choices

    def log_prob(self, choices: Choices) -> Tensor:
        """log p(alpha_k | pi) of each sample, float32 [K]."""
        total = 0.0
        for logits, chosen in zip(self.logits, choices, strict=True):
            log_pi = logits.log_softmax(-1).expand(len(chosen), -1, -1)
            total = total + log_pi.gather(-1, chosen.to(logits.device)[..., None]).sum((-2, -1))
        return total

    def mode(self) -> AnyGenotype:
        """The most probable architecture: slots are independent, so the best pair of each slot."""
        return self.genotype([logits.argmax(-1)[None] for logits in self.logits], 0)

    def genotype(self, choices: Choices, k: int) -> AnyGenotype:
        """Sample k as a genotype."""
        space = self.space
        if isinstance(space, Nasbench201Space):
            return space.decode([int(chosen[k]) for chosen in choices], rule="mode")
        operations = len(self.names)
        nodes: list[Node] = [
            tuple((self.names[pair % operations], pair // operations) for pair in chosen[k].tolist())
            for chosen in choices
        ]
        return Genotype(
            tuple(nodes[: space.nodes]), tuple(nodes[space.nodes :]), space.concat, space.concat, rule="mode"
        )

    @torch.no_grad()
    def entropies(self) -> tuple[float, float]:
        """Entropy of the normal and of the reduction cell's distribution, in nats (the paper's Figure 3b)."""
        each = [float(-(logits.softmax(-1) * logits.log_softmax(-1)).sum()) for logits in self.logits]
        return sum(each[: self.normal_factors]), sum(each[self.normal_factors :])

    @torch.no_grad()
    def edge_probabilities(self) -> tuple[Tensor, Tensor]:
        """How likely each candidate of each edge is to fill a slot, of the normal and the reduction cell: [E, O].

        The mean over the two slots of a node; the edges into one node sum to 1.
        """
        operations = len(self.space.candidates if isinstance(self.space, Nasbench201Space) else self.names)
        each = [logits.softmax(-1).mean(0).view(-1, operations) for logits in self.logits]
        none = torch.empty(0, operations)
        normal, reduce = each[: self.normal_factors], each[self.normal_factors :]
        return torch.cat(normal), torch.cat(reduce) if reduce else none


def importance_weights(log_likelihoods: Tensor) -> Tensor:
    """w_k = p_k / sum_j p_j from log p_k, [K] -> [K], in log space and float64 so that no p underflows."""
    return log_likelihoods.double().softmax(-1)


class Parsec(Checkpointed):
    """See the module's docstring. One child at a time is in memory, whatever K is."""

    name: ClassVar[str] = "parsec"
    Settings: ClassVar[type] = ParsecSettings
    parts: ClassVar[tuple[str, ...]] = ("supernet", "distribution", "weight_optimizer", "arch_optimizer")
    graph_steps: ClassVar[str] = "other children are trained at every step"

    def __init__(self, settings: ParsecSettings, problem: Problem) -> None:
        weights = problem.weights
        self.settings, self.weights, self.problem = settings, weights, problem
        self.supernet = problem.supernet(auxiliary=settings.auxiliary_weight > 0)
        self.distribution = SlotDistribution(problem.space)
        if settings.warm_start is not None:
            self.distribution.load_run(settings.warm_start)
        self.distribution.to(problem.device)
        self.parameters = list(self.supernet.parameters())
        self.weight_optimizer = weight_optimizer(self.parameters, weights)
        self.arch_optimizer = torch.optim.Adam(
            self.distribution.parameters(), settings.arch_lr, betas=settings.arch_betas
        )

    def start_epoch(self, epoch: int) -> None:
        self.supernet.train()
        set_weight_rate(self.weight_optimizer, self.weights, epoch)

    def step(self, index: int, train: Batch, search: Batch) -> dict[str, Tensor]:
        """One round of Algorithm 1."""
        choices = self.distribution.sample(self.settings.samples, self.problem.generator(1, index))
        children = [self.distribution.genotype(choices, k) for k in range(self.settings.samples)]
        log_likelihoods = self._log_likelihoods(children, search)
        weights = importance_weights(log_likelihoods)
        figures = self._weight_step(children, weights.tolist(), train)

        log_prob = self.distribution.log_prob(choices)
        gradients = torch.autograd.grad(-(weights.to(log_prob) @ log_prob), list(self.distribution.parameters()))
        assign_gradients(list(self.distribution.parameters()), gradients)
        self.arch_optimizer.step()
        per_image = 1 if self.settings.likelihood == "mean" else len(search[1]) * processes.world_size()
        return figures | {
            "search_loss": -log_likelihoods.mean() / per_image,
            "effective_samples": 1 / weights.square().sum(),
        }

    @torch.no_grad()
    def _log_likelihoods(self, children: Sequence[AnyGenotype], search: Batch) -> Tensor:
        """log p(y | X, v, alpha_k) of the search batch of all processes, float32 [K]; forward passes alone."""
        x, y = search
        with batch_statistics(self.supernet):
            losses = [
                F.cross_entropy(self.supernet(x, child), y, reduction=self.settings.likelihood) for child in children
            ]
        parts = 1 if self.settings.likelihood == "sum" else processes.world_size()
        return -distributed.total(torch.stack(losses)) / parts

    def _weight_step(
        self, children: Sequence[AnyGenotype], weights: Sequence[float], train: Batch
    ) -> dict[str, Tensor]:
        """grad_v of eq. 8 child by child, then one SGD step. An operation that no child used stays untouched:
        its gradient is None, so that it sees neither weight decay nor momentum.

        log p(y_train) is taken as the mean over the batch, so that the learning rate means what it does in DARTS.
        """
        x, y = train
        self.weight_optimizer.zero_grad(set_to_none=True)
        total_loss = total_accuracy = torch.zeros((), device=x.device)
        for child, weight in zip(children, weights, strict=True):
            if weight < NEGLIGIBLE:
                continue
            logits, loss = self._training_loss(child, x, y)
            (weight * loss).backward()
            total_loss = total_loss + weight * loss.detach()
            total_accuracy = total_accuracy + weight * accuracy(logits.detach(), y)
        average_gradients(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.weights.grad_clip)
        self.weight_optimizer.step()
        return {"loss": total_loss, "accuracy": total_accuracy}

    def _training_loss(self, child: AnyGenotype, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the loss with that of the auxiliary head, if any."""
        if not self.settings.auxiliary_weight:
            logits = self.supernet(x, child)
            return logits, F.cross_entropy(logits, y)
        logits, auxiliary = self.supernet.forward_with_auxiliary(x, child)
        loss = F.cross_entropy(logits, y) + self.settings.auxiliary_weight * F.cross_entropy(auxiliary, y)
        return logits, loss

    def end_epoch(self, search: Iterable[Batch]) -> dict[str, Figure]:
        """Accuracy of the mode with the shared weights (the paper's Figure 3a) and the entropies (Figure 3b), which are
        those of whole cells."""
        self.supernet.eval()
        normal, reduce = self.distribution.entropies()
        edges = edge_figures(*self.distribution.edge_probabilities())
        return {
            "search_accuracy": shared_accuracy(self.supernet, self.distribution.mode(), search),
            "entropy_normal": normal,
            "entropy_reduce": reduce,
            "entropy": normal + reduce,
        } | {name: value for name, value in edges.items() if name.startswith("probabilities")}

    def derive(self) -> AnyGenotype:
        return self.distribution.mode()
