import copy

import pytest
import torch
import torch.nn.functional as F

from fastnas.engine import stems
from fastnas.engine.cost import NetworkCost
from fastnas.engine.exact_norm import exact_norm
from fastnas.engine.mixture import Mixture
from fastnas.methods import Snas
from fastnas.methods.snas import SnasSettings
from fastnas.nn import MixedOp
from fastnas.ops import gumbel_softmax
from fastnas.reference.gumbel_softmax import gumbel_from_bits, random_bits


def build(problem, **settings):
    torch.manual_seed(0)
    method = Snas(SnasSettings(**settings), problem)
    method.supernet.double()
    method.log_alphas.double()
    method.costs = tuple(cost.double() for cost in method.costs)
    with torch.no_grad():
        for parameter in method.log_alphas.parameters():
            parameter.copy_(torch.randn_like(parameter))
    method.start_epoch(3)
    return method


def test_samples_follow_equation_5(problem):
    method = build(problem)
    z = method.sample(1, 7)
    for alpha, sample, kind in (
        (method.log_alphas.alpha_normal, z.normal, 0),
        (method.log_alphas.alpha_reduce, z.reduce, 1),
    ):
        noise = gumbel_from_bits(random_bits(alpha.numel(), problem.seed_of(1, 7, kind)), torch.double)
        expected = ((alpha + noise.view_as(alpha)) / method.temperature).softmax(-1)
        torch.testing.assert_close(sample, expected)
    assert not torch.equal(z.normal, z.reduce)
    assert not torch.equal(z.normal, method.sample(1, 8).normal)
    assert torch.equal(z.normal, method.sample(1, 7).normal)


def test_search_gradient_is_that_of_equation_6(problem, batches):
    """dL/dx_j and O_ij(x_i) are taken from the network by hooks, the rest is the equation."""
    method = build(problem, resource="none")
    method.supernet.executor = "plain"  # whose modules are called
    x, y = batches[0]
    outputs, gradients = {}, {}
    for cell in method.supernet.cells:
        for edge in cell.edges:
            for index, candidate in enumerate(edge.candidates):
                candidate.register_forward_hook(
                    lambda _, __, out, key=(edge, index): outputs.update({key: out.detach()})
                )
            edge.register_forward_hook(
                lambda module, _, out: out.register_hook(lambda g, key=module: gradients.update({key: g})) and None
            )
    z = method.sample(1, 0)
    loss = F.cross_entropy(method.supernet(x, z), y)
    found = torch.autograd.grad(loss, list(method.log_alphas.parameters()))
    for reduction, sample, gradient in ((False, z.normal.detach(), found[0]), (True, z.reduce.detach(), found[1])):
        expected = torch.zeros_like(sample)
        for cell in method.supernet.cells:
            if cell.reduction != reduction:
                continue
            for number, edge in enumerate(cell.edges):
                assert isinstance(edge, MixedOp)
                credit = torch.stack([(gradients[edge] * outputs[edge, k]).sum() for k in range(4)])
                mean = (credit * sample[number]).sum()
                expected[number] += (credit - mean) * sample[number] / method.temperature
        torch.testing.assert_close(gradient, expected)


def test_mean_search_gradient_is_the_policy_gradient_of_equation_7():
    """E[dL/dlog alpha] = E[grad log p(Z) [c^T Z]] with c = dL/dx_j O_ij held constant, p the concrete density."""
    samples, temperature = 400_000, 0.8
    log_alpha = torch.tensor([0.3, -0.5, 0.1], dtype=torch.double, requires_grad=True)
    c = torch.tensor([1.0, -2.0, 0.5], dtype=torch.double)
    z = gumbel_softmax(log_alpha.expand(samples, 3), temperature, seed=3)
    (search,) = torch.autograd.grad((z @ c).mean(), log_alpha)
    z, alpha = z.detach(), log_alpha.detach().exp()
    powers = alpha * z.clamp_min(1e-300) ** -temperature
    score = 1 - 3 * powers / powers.sum(-1, keepdim=True)  # gradient of the log density by log alpha
    credits = score * (z @ c)[:, None]
    error = credits.std(0) / samples**0.5
    assert ((credits.mean(0) - search).abs() < 4 * error).all()
    assert (search.abs() > 20 * error).any(), "the gradient must be well above the sampling noise"


def test_cost_is_linear_in_z_and_one_for_a_uniform_z(problem):
    method = build(problem)
    uniform = Mixture(*(torch.full((5, 4), 0.25, dtype=torch.double) for _ in range(2)))
    torch.testing.assert_close(method.cost(uniform), torch.tensor(1.0, dtype=torch.double), rtol=1e-6, atol=0)
    a, b = method.sample(0, 0), method.sample(0, 1)
    both = Mixture(0.3 * a.normal + 0.7 * b.normal, 0.3 * a.reduce + 0.7 * b.reduce)
    torch.testing.assert_close(method.cost(both), 0.3 * method.cost(a) + 0.7 * method.cost(b))
    normal, reduce = method.costs
    assert (normal[:, 0] == 0).all() and (reduce[:, 0] == 0).all()  # none is free
    assert (normal[:, 1] > normal[:, 2]).all()  # a pool costs more than a skip, which costs more than nothing
    assert (normal[:, 2] > 0).all() and (normal[:, 3] > normal[:, 1]).all()


@pytest.mark.parametrize("resource", ["none", "mild", "moderate", "aggressive"])
def test_one_loss_trains_both_and_holds_the_cost(problem, batches, resource):
    method, twin = build(problem, resource=resource), build(problem, resource=resource)
    train, search = batches
    eta = {"none": 0.0, "mild": 0.1, "moderate": 0.3, "aggressive": 1.0}[resource]
    z = twin.sample(1, 5)
    loss = F.cross_entropy(twin.supernet(train[0], z), train[1])
    alphas, weights = list(twin.log_alphas.parameters()), twin.parameters
    expected = torch.autograd.grad(loss + eta * twin.cost(z), alphas + weights, allow_unused=True)
    figures = method.step(5, train, search)
    torch.testing.assert_close(figures["loss"], loss.detach())
    for parameter, gradient in zip(method.log_alphas.parameters(), expected, strict=False):
        torch.testing.assert_close(parameter.grad, gradient)
    norm = torch.stack([g.norm() for g in expected[2:] if g is not None]).norm()
    clip = min(1.0, 5.0 / float(norm))
    for parameter, gradient in zip(method.parameters, expected[2:], strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, clip * gradient, rtol=1e-5, atol=1e-12)


def test_the_search_half_teaches_nothing(problem, batches):
    method, twin = build(problem), build(problem)
    method.step(0, batches[0], batches[1])
    twin.step(0, batches[0], batches[0])
    assert torch.equal(method.log_alphas.alpha_normal, twin.log_alphas.alpha_normal)


def test_temperature_goes_down_linearly_to_its_end(problem):
    method = build(problem)
    temperatures = []
    for epoch in range(10):
        method.start_epoch(epoch)
        temperatures.append(method.temperature)
    assert temperatures[0] == 1.0 and temperatures[-1] == pytest.approx(0.03)
    steps = [a - b for a, b in zip(temperatures, temperatures[1:], strict=False)]
    assert steps == pytest.approx([0.97 / 9] * 9)


def test_the_derived_child_is_what_cold_samples_converge_to(problem, batches):
    """With certain alphas and a low temperature the sampled network and the child have one accuracy."""
    method = build(problem)
    with torch.no_grad():
        for parameter in method.log_alphas.parameters():
            parameter.mul_(100)
    method.start_epoch(9)
    figures = method.end_epoch([batches[1], batches[0]])
    assert figures["child_accuracy"] == figures["search_accuracy"]
    assert figures["entropy"] == pytest.approx(0, abs=0.1)


def test_both_accuracies_are_on_batch_statistics_and_leave_no_trace(problem, batches, monkeypatch):
    """The running statistics of shared operations mix all samples."""
    method = build(problem)
    norm, seen = method.supernet.stem.layers[1], []
    monkeypatch.setattr(stems, "exact_norm", lambda norm, x: (seen.append(norm.training), exact_norm(norm, x))[1])
    before = norm.running_mean.clone()
    method.end_epoch([batches[1]])
    assert seen == [True, True] and torch.equal(norm.running_mean, before)


def test_the_derivation_keeps_none(problem):
    method = build(problem)
    with torch.no_grad():
        method.log_alphas.alpha_normal[0, 0] = 9.0
    genotype = method.derive()
    assert genotype.rule == "all-edges"
    assert genotype.normal[0][0] == ("none", 0)
    assert [len(node) for node in genotype.normal] == [2, 3]


def test_entropy_of_each_edge(problem, batches):
    method = build(problem)
    figures = method.end_epoch([batches[1]])
    expected = torch.distributions.Categorical(logits=method.log_alphas.alpha_reduce.detach()).entropy()
    assert figures["edge_entropy_reduce"] == pytest.approx(expected.tolist())
    mean = sum(figures["edge_entropy_normal"] + figures["edge_entropy_reduce"]) / 10
    assert figures["entropy"] == pytest.approx(mean)


def test_state_round_trip_continues_identically(problem, batches):
    first = build(problem)
    first.step(0, *batches)
    second = build(problem)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(first.step(1, *batches)["loss"], second.step(1, *batches)["loss"])
    assert torch.equal(first.log_alphas.alpha_reduce, second.log_alphas.alpha_reduce)


def test_costs_are_those_of_the_network_that_searches(problem):
    method = build(problem)
    costs = NetworkCost(problem.space, channels=4, cells=3, image_size=32, classes=3, in_channels=2)
    uniform = costs.normal.mean(-1).sum(-1) + costs.reduce.mean(-1).sum(-1)
    expected = sum(costs.normal[i] / uniform[i] for i in (0, 2, 3)) / 3
    torch.testing.assert_close(method.costs[0], expected, rtol=1e-6, atol=0)
