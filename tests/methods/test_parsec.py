import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from fastnas.engine.training import batch_statistics
from fastnas.errors import UserError
from fastnas.methods import Parsec
from fastnas.methods.parsec import ParsecSettings, SlotDistribution, importance_weights
from fastnas.spaces import DartsSpace, Nasbench201Space


def build(problem, **settings):
    torch.manual_seed(0)
    method = Parsec(ParsecSettings(**{"samples": 3} | settings), problem)
    method.supernet.double()
    method.distribution.double()
    method.start_epoch(0)
    return method


def test_slots_are_categoricals_over_input_and_candidate_pairs(problem):
    distribution = SlotDistribution(problem.space)
    # three candidates besides none; 2 and 3 possible inputs; two cell types
    assert [tuple(logits.shape) for logits in distribution.logits] == [(2, 6), (2, 9), (2, 6), (2, 9)]
    normal, reduce = distribution.entropies()
    assert normal == reduce == pytest.approx(2 * (math.log(6) + math.log(9)), rel=1e-6)


def test_size_of_the_papers_space():
    distribution = SlotDistribution(DartsSpace())
    assert [logits.shape[1] for logits in distribution.logits[:4]] == [14, 21, 28, 35]  # 7 (n + 1)


def test_samples_follow_pi(problem):
    distribution = SlotDistribution(problem.space)
    with torch.no_grad():
        distribution.logits[0][0].copy_(torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.05]).log())
    choices = distribution.sample(4000, torch.Generator().manual_seed(1))
    frequencies = torch.bincount(choices[0][:, 0], minlength=6) / 4000
    expected = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.05])
    assert (frequencies - expected).abs().max() < 0.03
    again = distribution.sample(4000, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(choices, again, strict=True))


def test_log_prob_and_genotype_agree_with_the_choices(problem):
    distribution = SlotDistribution(problem.space)
    with torch.no_grad():
        for logits in distribution.logits:
            logits.copy_(torch.randn_like(logits))
    choices = distribution.sample(5, torch.Generator().manual_seed(0))
    expected = sum(
        logits.softmax(-1)[slot, chosen[3, slot]].log()
        for logits, chosen in zip(distribution.logits, choices, strict=True)
        for slot in range(2)
    )
    torch.testing.assert_close(distribution.log_prob(choices)[3], expected)
    genotype = distribution.genotype(choices, 3)
    pair = int(choices[1][3, 1])
    assert genotype.normal[1][1] == (distribution.names[pair % 3], pair // 3)
    assert "none" not in {name for node in genotype.normal + genotype.reduce for name, _ in node}


def test_importance_weights_are_the_normalised_likelihoods():
    logs = torch.tensor([-1.0, -2.0, -4.0])
    torch.testing.assert_close(importance_weights(logs), logs.double().exp() / logs.double().exp().sum())
    extreme = importance_weights(torch.tensor([-10_000.0, -10_001.0]))
    torch.testing.assert_close(extreme.sum(), torch.tensor(1.0, dtype=torch.double))
    torch.testing.assert_close(extreme[0] / extreme[1], torch.tensor(math.e, dtype=torch.double))


def test_step_applies_the_gradients_of_equation_8(problem, batches):
    train, search = batches
    method = build(problem, likelihood="mean")
    choices = method.distribution.sample(3, problem.generator(1, 7))
    children = [method.distribution.genotype(choices, k) for k in range(3)]
    state = {name: value.clone() for name, value in method.supernet.state_dict().items()}
    with torch.no_grad(), batch_statistics(method.supernet):
        losses = torch.stack([F.cross_entropy(method.supernet(search[0], child), search[1]) for child in children])
    weights = (-losses).softmax(0)
    expected = {}
    for weight, child in zip(weights, children, strict=True):
        method.supernet.zero_grad()
        F.cross_entropy(method.supernet(train[0], child), train[1]).backward()
        for name, parameter in method.supernet.named_parameters():
            if parameter.grad is not None:
                expected[name] = expected.get(name, 0) + weight * parameter.grad
    method.supernet.zero_grad()
    method.supernet.load_state_dict(state)
    before = {name: parameter.detach().clone() for name, parameter in method.supernet.named_parameters()}

    method.step(7, train, search)
    clip = min(1.0, 5.0 / float(torch.stack([g.norm() for g in expected.values()]).norm()))
    decay = method.weights.weight_decay
    for name, parameter in method.supernet.named_parameters():
        if name in expected:
            step = method.weights.lr * (clip * expected[name] + decay * before[name])
            torch.testing.assert_close(parameter.detach(), before[name] - step)
        else:  # an idle path: no decay, no momentum
            assert torch.equal(parameter, before[name]), name

    # grad_pi log Cat(i) = onehot(i) - pi; Adam descends along its negative
    for logits, chosen in zip(method.distribution.logits, choices, strict=True):
        pi = torch.full_like(logits, 1 / logits.shape[1])
        ascent = sum(w * (F.one_hot(chosen[k], logits.shape[1]).double() - pi) for k, w in enumerate(weights.double()))
        torch.testing.assert_close(logits.grad, -ascent, atol=1e-6, rtol=1e-5)


def test_likelihood_is_the_sum_over_the_batch_by_default(problem, batches):
    _, search = batches
    by_sum, by_mean = build(problem), build(problem, likelihood="mean")
    children = [by_sum.distribution.genotype(by_sum.distribution.sample(1, problem.generator(0)), 0)]
    total, mean = by_sum._log_likelihoods(children, search), by_mean._log_likelihoods(children, search)
    torch.testing.assert_close(total, 4 * mean)
    assert ParsecSettings().likelihood == "sum"


def test_defaults_are_the_papers():
    settings = ParsecSettings()
    assert (settings.samples, settings.arch_lr, settings.arch_betas) == (16, 0.02, (0.5, 0.999))


def test_derives_the_mode(problem):
    method = build(problem)
    with torch.no_grad():
        method.distribution.logits[1][1, 7] = 9.0  # node 1, second slot: candidate 1 of input 2
    genotype = method.derive()
    assert genotype.normal[1][1] == ("skip_connect", 2)
    assert genotype.rule == "mode"


def test_memory_is_that_of_one_child(problem, batches):
    """What a step keeps for backward at any time is what its largest child keeps."""
    method = build(problem, samples=4)
    live = peak = 0

    class Counted:
        def __init__(self, tensor):
            nonlocal live, peak
            self.tensor, self.size = tensor, tensor.numel()
            live += self.size
            peak = max(peak, live)

        def __del__(self):
            nonlocal live
            live -= self.size

    hooks = torch.autograd.graph.saved_tensors_hooks(Counted, lambda counted: counted.tensor)
    choices = method.distribution.sample(4, problem.generator(1, 0))
    children = [method.distribution.genotype(choices, k) for k in range(4)]
    alone = []
    for child in children:
        peak = live = 0
        with hooks:
            loss = F.cross_entropy(method.supernet(batches[0][0], child), batches[0][1])
        alone.append(peak)
        del loss
    peak = live = 0
    with hooks:
        method._weight_step(children, [0.25] * 4, batches[0])
    assert peak <= 1.05 * max(alone)


def test_an_auxiliary_head_counts_in_the_training_of_the_weights_alone(problem, batches):
    """Section 4.2: the tuned network has the auxiliary tower of the final one."""
    plain, method = build(problem), build(problem, auxiliary_weight=0.4)
    method.supernet.load_state_dict(plain.supernet.state_dict(), strict=False)
    child = method.derive()
    (x, y), search = batches
    assert torch.equal(method._log_likelihoods([child], search), plain._log_likelihoods([child], search))
    logits, auxiliary = method.supernet.forward_with_auxiliary(x, child)
    expected = F.cross_entropy(logits, y) + 0.4 * F.cross_entropy(auxiliary, y)
    torch.testing.assert_close(method._training_loss(child, x, y)[1], expected)
    method._weight_step([child], [1.0], batches[0])
    assert all(parameter.grad is not None for parameter in method.supernet.auxiliary.parameters())
    assert plain.supernet.auxiliary is None and plain.supernet.forward_with_auxiliary(x, child)[1] is None
    with pytest.raises(UserError, match="nasbench201 has no auxiliary head"):
        build(dataclasses.replace(problem, space=Nasbench201Space()), auxiliary_weight=0.4)


def test_gradient_of_pi_against_enumeration():
    """grad_pi log p(y | pi) of a space of 4^4 = 256 architectures: exact by summing over all of them (eq. 3, 7), and by
    samples and importance weights (eq. 6, 8)."""
    space = DartsSpace(nodes=1, candidates=("skip_connect", "avg_pool_3x3"))
    distribution = SlotDistribution(space).double()
    with torch.no_grad():
        for logits in distribution.logits:
            logits.copy_(torch.randn(logits.shape, dtype=torch.double))
    table = torch.randn(4, 4, 4, 4, dtype=torch.double)  # log p(y | alpha): anything will do

    def log_likelihood(choices):
        (a, b), (c, d) = (chosen.T for chosen in choices)
        return table[a, b, c, d]

    everything = torch.cartesian_prod(*[torch.arange(4)] * 4)
    choices = [everything[:, :2], everything[:, 2:]]
    evidence = (log_likelihood(choices) + distribution.log_prob(choices)).logsumexp(0)
    exact = torch.autograd.grad(evidence, list(distribution.parameters()))

    rounds, samples = 20, 20_000
    estimates = []
    for index in range(rounds):
        choices = distribution.sample(samples, torch.Generator().manual_seed(index))
        weights = importance_weights(log_likelihood(choices))
        estimates.append(torch.autograd.grad(weights @ distribution.log_prob(choices), list(distribution.parameters())))
    for expected, *found in zip(exact, *estimates, strict=True):
        found = torch.stack(found)
        error = found.std(0) / rounds**0.5
        assert ((found.mean(0) - expected).abs() < 4.5 * error + 1e-4).all()
        assert error.max() < 0.01 < expected.abs().max()
