import copy
import random

import pytest
import torch
import torch.nn.functional as F

from fastnas.engine.training import evaluate, recalibrate
from fastnas.methods import Spos
from fastnas.methods.spos import SposSettings

SMALL = {"generations": 2, "population": 4, "parents": 2, "crossovers": 2, "mutations": 1}


def build(problem, **settings):
    torch.manual_seed(0)
    method = Spos(SposSettings(**SMALL | settings), problem)
    method.supernet.double()
    method.start_epoch(0)
    return method


def test_paths_are_uniform_and_a_function_of_the_step(problem):
    method = build(problem)
    drawn = [method.sample(index) for index in range(3000)]
    assert drawn[7] == method.sample(7)
    for place, size in enumerate(problem.space.choices):
        shares = [sum(string[place] == choice for string in drawn) / 3000 for choice in range(size)]
        assert shares == pytest.approx([1 / size] * size, abs=0.04)


def test_a_step_trains_the_weights_of_the_path_alone(problem, batches):
    method = build(problem)
    before = {name: p.detach().clone() for name, p in method.supernet.named_parameters()}
    twin = copy.deepcopy(method.supernet)
    path = problem.space.decode(method.sample(3))
    F.cross_entropy(twin(batches[0][0], path), batches[0][1]).backward()
    used = {name for name, p in twin.named_parameters() if p.grad is not None}
    method.step(3, *batches)
    moved = {name for name, p in method.supernet.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= used and len(moved) > len(used) / 2 and used != set(before)


def test_recalibration_takes_the_mean_statistics_of_the_path(problem, batches):
    method = build(problem)
    path = problem.space.decode(method.sample(0))
    for _ in range(3):
        method.step(5, *batches)  # other paths leave their traces in shared statistics
    recalibrate(method.supernet, lambda x: method.supernet(x, path), batches)
    norm = method.supernet.stem.layers[1]
    with torch.no_grad():
        maps = [method.supernet.stem.layers[0](x) for x, _ in batches]
    torch.testing.assert_close(norm.running_mean, sum(m.mean((0, 2, 3)) for m in maps) / 2)
    torch.testing.assert_close(norm.running_var, sum(m.var((0, 2, 3)) for m in maps) / 2)
    assert norm.momentum == 0.1 and not norm.training


def test_scores_use_recalibrated_statistics(problem, batches):
    method = build(problem)
    method.step(0, *batches)
    string = method.sample(4)
    path = problem.space.decode(string)
    found = method.recalibrated_accuracy(string, batches)
    recalibrate(method.supernet, lambda x: method.supernet(x, path), [batches[0]])
    assert found == evaluate(lambda x: method.supernet(x, path), batches)["accuracy"]


def test_recalibration_batches_are_the_last_of_the_epoch(problem, batches):
    method = build(problem, recalibration_batches=2)
    trains = [(batches[0][0] + index, batches[0][1]) for index in range(3)]
    for index, train in enumerate(trains):
        method.step(index, train, batches[1])
    assert [x is train[0] for (x, _), train in zip(method.recent, trains[1:], strict=True)] == [True, True]
    method.start_epoch(1)  # a resumed search has no batches of earlier epochs
    assert not method.recent


def test_evolution_follows_the_last_epoch_and_gives_the_genotype(problem, batches):
    method = build(problem)
    method.step(0, *batches)
    figures = method.end_epoch([batches[1]])
    assert method.found is None and "top_accuracies" not in figures
    method.start_epoch(9)
    method.step(1, *batches)
    figures = method.end_epoch([batches[1]])
    assert figures["top_accuracies"][0] == figures["search_accuracy"] == max(figures["top_accuracies"])
    assert method.derive() == problem.space.decode(method.found, rule="evolution")


def test_limits_reach_the_evolution(problem, batches):
    method = build(problem, max_parameters=3000, target_channels=4, target_cells=3)
    method.start_epoch(9)
    method.step(0, *batches)
    method.end_epoch([batches[1]])
    assert method.limits.costs.of(method.derive()).parameters <= 3000
    rng = random.Random(0)
    assert not all(method.limits.allow(problem.space.random_genotype(rng)) for _ in range(20))


def test_state_round_trip(problem, batches):
    first = build(problem)
    first.start_epoch(9)
    first.step(0, *batches)
    first.end_epoch([batches[1]])
    second = build(problem)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.derive() == first.derive()
    for method in (first, second):
        method.start_epoch(1)
    assert torch.equal(first.step(1, *batches)["loss"], second.step(1, *batches)["loss"])
