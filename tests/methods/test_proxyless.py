import copy

import pytest
import torch
import torch.nn.functional as F

from fastnas.engine.mixture import Mixture
from fastnas.methods import Proxyless
from fastnas.methods.proxyless import Pair, ProxylessSettings, draw, keep_total_probability, two_path_gradient


def build(problem, **settings):
    torch.manual_seed(0)
    method = Proxyless(ProxylessSettings(**{"warmup_epochs": 0, "arch_interval": 1} | settings), problem)
    method.supernet.double()
    method.alphas.double()
    with torch.no_grad():
        for parameter in method.alphas.parameters():
            parameter.copy_(torch.randn_like(parameter))
    method.start_epoch(0)
    return method


def test_two_path_gradient_is_equation_4_and_equals_autograd():
    """sum_j g_j dp_j/dalpha_i with p the softmax over the pair, by automatic differentiation."""
    alpha = torch.randn(3, 5, dtype=torch.double, requires_grad=True)
    pairs = torch.tensor([[0, 3], [4, 1], [2, 3]])
    gate = torch.randn(3, 5, dtype=torch.double)
    p = alpha.gather(1, pairs).softmax(-1)
    (expected,) = torch.autograd.grad((gate.gather(1, pairs) * p).sum(), alpha)
    torch.testing.assert_close(two_path_gradient(alpha, pairs, gate), expected)
    p = p.detach()
    by_hand = gate[1, 4] * p[1, 0] * (1 - p[1, 0]) - gate[1, 1] * p[1, 1] * p[1, 0]  # equation 4, i = 4
    torch.testing.assert_close(expected[1, 4], by_hand)


def test_the_shift_keeps_the_total_probability_of_the_pair():
    before = torch.randn(4, 5, dtype=torch.double)
    pairs = torch.tensor([[0, 3], [4, 1], [2, 3], [1, 1]])
    alpha = before + torch.zeros_like(before).scatter(1, pairs, torch.randn(4, 2, dtype=torch.double))
    alpha[3] = before[3]
    moved = alpha.clone()
    keep_total_probability(alpha, before, pairs)
    old, new = before.softmax(-1), alpha.softmax(-1)
    torch.testing.assert_close(new.gather(1, pairs).sum(-1), old.gather(1, pairs).sum(-1))
    untouched = torch.ones_like(old).scatter(1, pairs, 0).bool()
    torch.testing.assert_close(new[untouched], old[untouched])
    difference = moved.gather(1, pairs).diff(dim=-1)  # the pair's own ratio is what the step made it
    torch.testing.assert_close(alpha.gather(1, pairs).diff(dim=-1), difference)
    assert torch.equal(alpha[3], before[3])


def test_draws_follow_the_probabilities_without_replacement():
    alpha = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    drawn = draw(alpha, 2, torch.Generator().manual_seed(0))
    assert (drawn[:, 0] != drawn[:, 1]).all()
    first = torch.bincount(drawn[:, 0], minlength=3) / 20_000
    assert (first - torch.tensor([0.5, 0.3, 0.2])).abs().max() < 0.02
    second = torch.bincount(drawn[drawn[:, 0] == 0][:, 1], minlength=3) / (drawn[:, 0] == 0).sum()
    assert (second - torch.tensor([0.0, 0.6, 0.4])).abs().max() < 0.02


def test_gate_gradients_equal_those_of_the_network_that_runs_everything(problem, batches):
    method = build(problem)
    pairs = method.sample_pairs(3)
    loss, found = method.gate_gradients(pairs, batches[1])
    gates = []
    for pair in pairs:
        chosen = pair.candidates.gather(1, pair.active[:, None])
        gates.append(torch.zeros(5, 4, dtype=torch.double).scatter(1, chosen, 1.0).requires_grad_())
    full = F.cross_entropy(method.supernet(batches[1][0], Mixture(*gates)), batches[1][1])
    torch.testing.assert_close(loss, full.detach())
    for pair, ours, everything in zip(pairs, found, torch.autograd.grad(full, gates), strict=True):
        torch.testing.assert_close(ours.gather(1, pair.candidates), everything.gather(1, pair.candidates))
        assert (everything.gather(1, pair.candidates) != 0).any()


def test_only_two_candidates_of_an_edge_are_run(problem, batches):
    method = build(problem)
    method.supernet.executor = "plain"  # whose modules are called
    calls = []
    for cell in method.supernet.cells:
        for number, edge in enumerate(cell.edges):
            for index, candidate in enumerate(edge.candidates):
                place = (cell.reduction, number, index)
                candidate.register_forward_hook(lambda *_, place=place: calls.append(place))
    pairs = method.sample_pairs(0)
    method.gate_gradients(pairs, batches[1])
    wanted = {
        (bool(kind), edge, index)
        for kind, pair in enumerate(pairs)
        for edge, two in enumerate(pair.candidates.tolist())
        for index in two
    }
    assert set(calls) == wanted and len(calls) == 3 * 5 * 2


def test_an_architecture_step_moves_the_pair_alone(problem, batches):
    method = build(problem, arch_lr=0.1)
    before = [alpha.detach().clone() for alpha in method.alphas.parameters()]
    weights = [parameter.detach().clone() for parameter in method.supernet.parameters()]
    for index in range(3):  # with Adam's memory of earlier pairs as well
        old = [alpha.detach().clone() for alpha in method.alphas.parameters()]
        pairs = method.sample_pairs(index)
        method.architecture_step(pairs, batches[1])
        for alpha, start, pair in zip(method.alphas.parameters(), old, pairs, strict=True):
            untouched = torch.ones_like(alpha).scatter(1, pair.candidates, 0).bool()
            assert torch.equal(alpha[untouched], start[untouched])
            torch.testing.assert_close(alpha.softmax(-1)[untouched], start.softmax(-1)[untouched])
    assert not torch.equal(before[0], method.alphas.alpha_normal)
    assert all(torch.equal(a, b) for a, b in zip(weights, method.supernet.parameters(), strict=True))


def test_equal_candidates_teach_an_edge_nothing(problem, batches):
    method = build(problem)
    before = method.alphas.alpha_normal.detach().clone()
    same = torch.full((5, 2), 2)
    method.architecture_step([Pair(same, torch.zeros(5, dtype=torch.int64))] * 2, batches[1])
    torch.testing.assert_close(method.alphas.alpha_normal.detach(), before)


def test_schedule_of_the_architecture_steps(problem, batches):
    method = build(problem, warmup_epochs=1, arch_interval=3)
    assert "search_loss" not in method.step(0, *batches)
    method.start_epoch(1)
    assert ["search_loss" in method.step(index, *batches) for index in range(3, 7)] == [True, False, False, True]


def test_a_weight_step_trains_one_path(problem, batches):
    method = build(problem, warmup_epochs=1)
    path = method.sample_path(4)
    twin = copy.deepcopy(method.supernet)
    F.cross_entropy(twin(batches[0][0], path), batches[0][1]).backward()
    used = {name for name, p in twin.named_parameters() if p.grad is not None}
    before = {name: p.detach().clone() for name, p in method.supernet.named_parameters()}
    method.step(4, *batches)
    moved = {name for name, p in method.supernet.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= used < set(before)


def test_derivation_takes_every_edge_and_state_round_trips(problem, batches):
    method = build(problem)
    method.step(0, *batches)
    figures = method.end_epoch([batches[1]])
    assert method.derive().rule == "all-edges" and [len(n) for n in method.derive().normal] == [2, 3]
    assert figures["entropy"] == pytest.approx((figures["entropy_normal"] + figures["entropy_reduce"]) / 2)
    second = build(problem)
    second.load_state_dict(copy.deepcopy(method.state_dict()))
    for each in (method, second):
        each.start_epoch(1)
    assert torch.equal(method.step(1, *batches)["loss"], second.step(1, *batches)["loss"])
    assert torch.equal(method.alphas.alpha_normal, second.alphas.alpha_normal)
