import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from fastnas.engine.mixture import Mixture
from fastnas.engine.training import batch_statistics, cosine
from fastnas.errors import UserError
from fastnas.methods import Darts
from fastnas.methods import darts as module


def build(problem, executor="fused", **settings):
    torch.manual_seed(0)
    problem = dataclasses.replace(problem, weights=dataclasses.replace(problem.weights, executor=executor))
    method = Darts(module.DartsSettings(**settings), problem)
    method.supernet.double()
    method.alphas.double()
    with torch.no_grad():
        for parameter in method.alphas.parameters():
            parameter.copy_(torch.randn_like(parameter))
    method.start_epoch(0)
    return method


def copies(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def exact_second_order(method, train, search):
    """dL_val(w - xi (dL_train/dw + wd w + mu buffer), alpha)/dalpha by automatic differentiation.

    On the plain executor: the fused one is differentiable once.
    """
    alphas = list(method.alphas.parameters())
    names = [name for name, _ in method.supernet.named_parameters()]
    buffers = {name: buffer.clone() for name, buffer in method.supernet.named_buffers()}

    def loss(parameters, batch):
        mixture = Mixture(method.alphas.alpha_normal.softmax(-1), method.alphas.alpha_reduce.softmax(-1))
        state = dict(zip(names, parameters, strict=True)) | {k: v.clone() for k, v in buffers.items()}
        return F.cross_entropy(functional_call(method.supernet, state, (batch[0], mixture)), batch[1])

    parameters = method.parameters
    gradients = torch.autograd.grad(loss(parameters, train), parameters, create_graph=True, allow_unused=True)
    ahead = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        buffer = method.weight_optimizer.state.get(parameter, {}).get("momentum_buffer", 0.0)
        direction = gradient + method.weights.weight_decay * parameter + method.weights.momentum * buffer
        ahead.append(parameter - method.rate * direction)
    return torch.autograd.grad(loss(ahead, search), alphas)


def relative_error(found, expected):
    difference = sum((a - b).square().sum() for a, b in zip(found, expected, strict=True))
    return float((difference / sum(b.square().sum() for b in expected)).sqrt())


@pytest.mark.parametrize("with_momentum", [False, True])
def test_second_order_gradient_equals_exact_autograd(problem, batches, monkeypatch, with_momentum):
    # The difference quotient is exact in the limit; a small step keeps every ReLU on its side of the kink.
    monkeypatch.setattr(module, "FINITE_DIFFERENCE", 1e-6)
    method, plain = build(problem, order=2), build(problem, "plain", order=2)
    if with_momentum:
        method.weight_step(batches[0])
        plain.weight_step(batches[0])
    expected = exact_second_order(plain, *batches)
    _, found = method.second_order_gradient(*batches)
    _, first_order = method.first_order_gradient(*batches)
    assert relative_error(found, expected) < 1e-4
    assert relative_error(first_order, expected) > 1e-2, "the second-order term must matter in this test"


def test_second_order_with_the_papers_step_is_close_to_exact(problem, batches, monkeypatch):
    """On a smooth network: the papers' step of 0.01 crosses many ReLU kinks of a network as tiny as this one."""
    monkeypatch.setattr(F, "relu", F.silu)
    method = build(problem, "plain", order=2)
    expected = exact_second_order(method, *batches)
    _, found = method.second_order_gradient(*batches)
    assert relative_error(found, expected) < 0.01


def test_second_order_leaves_weights_and_momentum_as_they_were(problem, batches):
    method = build(problem, order=2)
    method.weight_step(batches[0])
    before = copies(method.parameters)
    momentum = copies(s["momentum_buffer"] for s in method.weight_optimizer.state.values())
    method.second_order_gradient(*batches)
    assert all(torch.equal(a, b) for a, b in zip(before, method.parameters, strict=True))
    after = (s["momentum_buffer"] for s in method.weight_optimizer.state.values())
    assert all(torch.equal(a, b) for a, b in zip(momentum, after, strict=True))
    assert all(parameter.requires_grad for parameter in method.parameters)


def test_first_order_gradient_equals_plain_autograd(problem, batches):
    method = build(problem)
    x, y = batches[1]
    loss = F.cross_entropy(method.supernet(x, method.alphas()), y)
    expected = torch.autograd.grad(loss, list(method.alphas.parameters()))
    found_loss, found = method.first_order_gradient(*batches)
    torch.testing.assert_close(found_loss, loss.detach())
    assert relative_error(found, expected) < 1e-12


def test_architecture_step_moves_alpha_alone_and_weight_step_the_weights_alone(problem, batches):
    method = build(problem)
    weights, alphas = copies(method.parameters), copies(method.alphas.parameters())
    method.architecture_step(*batches)
    assert all(torch.equal(a, b) for a, b in zip(weights, method.parameters, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(alphas, method.alphas.parameters(), strict=True))
    alphas = copies(method.alphas.parameters())
    method.weight_step(batches[0])
    assert all(torch.equal(a, b) for a, b in zip(alphas, method.alphas.parameters(), strict=True))
    assert not torch.equal(weights[0], method.parameters[0])


def test_step_searches_before_it_trains_and_on_the_search_batch(problem, batches):
    train, search = batches
    together, apart = build(problem), build(problem)
    figures = together.step(0, train, search)
    search_loss = apart.architecture_step(train, search)
    loss = apart.weight_step(train)["loss"]
    assert torch.equal(figures["search_loss"], search_loss)
    assert torch.equal(figures["loss"], loss)
    assert torch.equal(together.alphas.alpha_normal, apart.alphas.alpha_normal)


def test_warmup_trains_weights_only(problem, batches):
    method = build(problem, warmup_epochs=2)
    alphas = copies(method.alphas.parameters())
    assert "search_loss" not in method.step(0, *batches)
    assert all(torch.equal(a, b) for a, b in zip(alphas, method.alphas.parameters(), strict=True))
    method.start_epoch(2)
    assert "search_loss" in method.step(1, *batches)


def test_weights_are_clipped(problem, batches):
    method = build(problem)
    x, y = batches[0]
    method.weight_step((1e3 * x, y))
    norm = torch.stack([p.grad.norm() for p in method.parameters if p.grad is not None]).norm()
    assert norm <= 5.0 * (1 + 1e-9)


def test_alphas_are_not_clipped(problem, batches, monkeypatch):
    """The gradient that reaches Adam is the whole one, however long."""
    method = build(problem)
    _, gradients = method.first_order_gradient(*batches)
    long = [1e3 * gradient for gradient in gradients]
    assert torch.stack([gradient.norm() for gradient in long]).norm() > method.weights.grad_clip
    monkeypatch.setattr(method, "first_order_gradient", lambda train, search: (torch.zeros(()), long))
    before = copies(method.alphas.parameters())
    method.architecture_step(*batches)
    for parameter, start, gradient in zip(method.alphas.parameters(), before, long, strict=True):
        first_moment = (1 - 0.5) * (gradient + method.settings.arch_weight_decay * start)
        torch.testing.assert_close(method.arch_optimizer.state[parameter]["exp_avg"], first_moment)


def test_weight_step_keeps_nothing_for_alpha(problem, batches):
    method = build(problem)
    method.supernet.executor = "plain"  # the fused one needs nothing for alpha that it does not keep anyway

    def saved(mixture):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            method.supernet(batches[0][0], mixture)
        return total

    assert saved(method.alphas().detach()) < saved(method.alphas())


def test_optimisers_have_the_papers_settings(problem):
    method = Darts(module.DartsSettings(), problem)
    arch = method.arch_optimizer.param_groups[0]
    assert (arch["lr"], arch["betas"], arch["weight_decay"]) == (3e-4, (0.5, 0.999), 1e-3)
    weights = method.weight_optimizer.param_groups[0]
    assert (weights["momentum"], weights["weight_decay"]) == (0.9, 3e-4)


def test_learning_rate_of_the_first_epoch_is_the_full_one(problem):
    method = Darts(module.DartsSettings(), problem)
    method.start_epoch(0)
    assert method.weight_optimizer.param_groups[0]["lr"] == 0.1
    method.start_epoch(5)
    assert method.weight_optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_state_round_trip_continues_identically(problem, batches):
    first = build(problem)
    first.step(0, *batches)
    second = build(problem)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    a, b = first.step(1, *batches), second.step(1, *batches)
    assert torch.equal(a["loss"], b["loss"])
    assert torch.equal(first.alphas.alpha_reduce, second.alphas.alpha_reduce)


def test_end_epoch_measures_and_derives(problem, batches):
    method = build(problem)
    with torch.no_grad():
        for alpha in method.alphas.parameters():
            alpha.zero_()
    figures = method.end_epoch([batches[1]])
    assert figures["entropy"] == pytest.approx(torch.log(torch.tensor(4.0)).item())
    assert 0 <= figures["search_accuracy"] <= 1
    assert method.derive().rule == "top2"


@pytest.mark.parametrize("betas", [(0.5,), (0.5, 1.0), (0.5, 0.9, 0.9)])
def test_adam_needs_two_decay_rates_below_one(betas):
    with pytest.raises(UserError, match="arch-betas must be two numbers"):
        module.DartsSettings(arch_betas=betas)


def collapse(method):
    """Skips win on every edge of both cells."""
    with torch.no_grad():
        for alpha in method.alphas.parameters():
            alpha.zero_()
            alpha[:, 2] = torch.arange(3.0, 8.0)


def test_skips_and_entropies_show_a_collapse_whatever_the_cap(problem, batches):
    for cap in (None, 1):
        method = build(problem, max_skips=cap)
        collapse(method)
        figures = method.end_epoch([batches[1]])
        assert (figures["skips_normal"], figures["skips_reduce"]) == (4, 4)
        expected = torch.distributions.Categorical(logits=method.alphas.alpha_normal.detach()).entropy()
        assert figures["edge_entropy_normal"] == pytest.approx(expected.tolist())
        assert figures["entropy_normal"] == pytest.approx(float(expected.mean()))


@pytest.mark.parametrize("cap", [0, 1, 2, 3])
def test_the_cap_keeps_the_strongest_skips_of_the_normal_cell(problem, cap):
    method = build(problem, max_skips=cap)
    collapse(method)
    genotype = method.derive()
    skips = [(node, source) for node, pairs in enumerate(genotype.normal) for name, source in pairs if "skip" in name]
    strongest_first = [(1, 2), (1, 1), (0, 1)]  # alpha grows along the edges
    assert set(skips) == set(strongest_first[:cap])
    assert genotype.rule == f"top2, at most {cap} skips"
    assert sum("skip" in name for pairs in genotype.reduce for name, _ in pairs) == 4


def test_child_accuracy_is_that_of_the_derived_path(problem, batches):
    method = build(problem)
    figures = method.end_epoch([batches[0], batches[1]])
    with torch.no_grad(), batch_statistics(method.supernet):
        right = [method.supernet(x, method.derive()).argmax(-1) == y for x, y in batches]
    assert figures["child_accuracy"] == pytest.approx(float(torch.cat(right).float().mean()))


def test_the_learning_rate_can_warm_up(problem):
    weights = dataclasses.replace(problem.weights, lr_warmup_epochs=4)
    method = Darts(module.DartsSettings(), dataclasses.replace(problem, weights=weights))
    rates = []
    for epoch in range(6):
        method.start_epoch(epoch)
        rates.append(method.weight_optimizer.param_groups[0]["lr"] / cosine(epoch, 10, 0.1, 0.0))
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
