import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fastnas.engine.training import evaluate
from fastnas.errors import UserError
from fastnas.methods import OneShot, Problem, WeightSettings
from fastnas.methods.one_shot import OneShotSettings, score, symmetric_divergence, with_penalty
from fastnas.spaces import ChoiceBlockSpace


@pytest.fixture
def problem() -> Problem:
    weights = WeightSettings(epochs=5, batch_size=4, channels=2, cells=3, nodes=2, lr=0.1, weight_decay=0.01)
    return Problem(ChoiceBlockSpace(2), 3, 2, weights, torch.device("cpu"), seed=0)


def build(problem, **settings):
    torch.manual_seed(0)
    method = OneShot(OneShotSettings(**{"ghost_batch": 2, "candidates": 4} | settings), problem)
    method.supernet.double()
    method.start_epoch(0)
    return method


def test_dropout_starts_at_nothing_and_ends_at_its_rate(problem):
    method = build(problem)
    ramps = []
    for epoch in range(5):
        method.start_epoch(epoch)
        ramps.append(method.ramp)
    assert ramps == [0, 0.25, 0.5, 0.75, 1]
    method.start_epoch(0)
    assert all(mask.all() for mask in method.masks(3).operations)
    assert build(problem, dropout_ramp=False).ramp == 1


def test_masks_are_a_function_of_the_step(problem):
    method = build(problem, dropout_rate=0.05, dropout_ramp=False)
    first, again, other = method.masks(3), method.masks(3), method.masks(4)
    assert all(map(torch.equal, first.inputs, again.inputs))
    assert not all(map(torch.equal, first.operations, other.operations))
    assert not torch.equal(first.operations[0][0], first.operations[0][1])  # ghost batches differ


def test_the_penalty_is_that_of_active_paths_alone(problem, batches):
    method = build(problem, dropout_rate=0.02, dropout_ramp=False)
    masks = method.masks(0)
    parameters, shares = zip(*method.supernet.usage(masks), strict=True)
    assert set(shares) == {0.0, 0.5, 1.0}
    logits = method.supernet(batches[0][0], masks)
    loss = F.cross_entropy(logits, batches[0][1])
    plain = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    found = with_penalty(plain, parameters, shares, 0.01)
    used = [p for p, gradient in zip(parameters, plain, strict=True) if gradient is not None]
    share_of = dict(zip(parameters, shares, strict=True))
    penalty = 0.005 * sum(share_of[p] * p.square().sum() for p in used)
    expected = iter(torch.autograd.grad(loss + penalty, used))
    for share, gradient, mine in zip(shares, plain, found, strict=True):
        if gradient is None:
            assert mine is None
        else:
            assert share > 0
            torch.testing.assert_close(mine, next(expected))


def test_a_step_leaves_dropped_operations_alone(problem, batches):
    method = build(problem, dropout_rate=0.5, dropout_ramp=False)
    before = {name: p.detach().clone() for name, p in method.supernet.named_parameters()}
    names = {parameter: name for name, parameter in method.supernet.named_parameters()}
    shares = {names[parameter]: share for parameter, share in method.supernet.usage(method.masks(0))}
    method.step(0, *batches)
    moved = {name for name, p in method.supernet.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(shares[name] > 0 for name in moved)


def test_scores_are_accuracies_with_batch_statistics(problem, batches):
    method = build(problem)
    drawn = [problem.space.decode((0, 1, 0, 2)), problem.space.decode((2, 27, 6, 9))]
    expected = [evaluate(lambda x, a=a: method.supernet(x, a), batches)["accuracy"] for a in drawn]
    assert score(method.supernet, drawn, batches) == pytest.approx(expected)


def test_the_last_epoch_takes_the_best_of_random_architectures(problem, batches):
    method = build(problem)
    assert method.end_epoch(batches).keys() == {"search_accuracy", "entropy"}
    assert method.derive().rule == "random"
    method.start_epoch(4)
    figures = method.end_epoch(batches)
    assert figures["search_accuracy"] >= figures["candidate_accuracy"]
    assert method.derive().rule == "best of random"
    assert score(method.supernet, [method.derive()], batches) == [pytest.approx(figures["search_accuracy"])]


def test_divergence_is_the_symmetric_one():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.double)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.double)
    expected = sum(float((a * (a / b).log()).sum()) for a, b in ((p, q), (q, p)))
    assert float(symmetric_divergence(p.log()[None], q.log()[None])) == pytest.approx(expected)
    assert float(symmetric_divergence(p.log()[None], p.log()[None])) == 0


def test_batches_must_hold_whole_ghost_batches(problem):
    with pytest.raises(UserError, match="cannot be cut into ghost batches of 3"):
        build(problem, ghost_batch=3)


def test_state_round_trip(problem, batches):
    first = build(problem)
    first.start_epoch(4)
    first.step(0, *batches)
    first.end_epoch(batches)
    second = build(dataclasses.replace(problem, seed=0))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.derive() == first.derive()
    for method in (first, second):
        method.start_epoch(1)
    assert torch.equal(first.step(1, *batches)["loss"], second.step(1, *batches)["loss"])
