import dataclasses

import pytest
import torch

from fastnas.errors import UserError
from fastnas.methods import RandomSearch
from fastnas.methods.random_search import RandomSettings


def run(problem, batches, samples, epochs):
    weights = dataclasses.replace(problem.weights, epochs=epochs)
    method = RandomSearch(RandomSettings(samples=samples), dataclasses.replace(problem, weights=weights))
    batches = [(x.float(), y) for x, y in batches]
    children = []
    for epoch in range(epochs):
        method.start_epoch(epoch)
        children.append(method.child)
        method.step(epoch, *batches)
        method.end_epoch([batches[1]])
    return method, children


def test_each_sample_gets_an_equal_share_and_the_best_is_derived(problem, batches):
    method, children = run(problem, batches, samples=3, epochs=7)
    assert children == [0, 0, 1, 1, 2, 2, 2]
    assert len(method.scores) == 3
    method.scores = [0.2, 0.9, 0.5]
    assert method.derive() == method.genotypes[1]
    assert len(set(method.genotypes)) == 3


def test_each_child_starts_from_scratch_at_the_full_rate(problem, batches):
    method, _ = run(problem, batches, samples=2, epochs=4)
    method.start_epoch(0)
    assert method.optimizer.param_groups[0]["lr"] == problem.weights.lr
    assert not method.optimizer.state


def test_resume_continues_identically(problem, batches):
    first, _ = run(problem, batches, samples=2, epochs=2)
    weights = dataclasses.replace(problem.weights, epochs=4)
    fresh = [RandomSearch(RandomSettings(samples=2), dataclasses.replace(problem, weights=weights)) for _ in range(2)]
    batches = [(x.float(), y) for x, y in batches]
    fresh[0].start_epoch(0)
    fresh[0].step(0, *batches)
    fresh[0].end_epoch([batches[1]])
    fresh[1].load_state_dict(fresh[0].state_dict())
    for method in fresh:
        method.start_epoch(1)
    a, b = (method.step(1, *batches)["loss"] for method in fresh)
    assert torch.equal(a, b)


def test_too_many_samples_for_the_epochs(problem):
    with pytest.raises(UserError, match="20 samples need at least 20 epochs, got 10"):
        RandomSearch(RandomSettings(samples=20), problem)
