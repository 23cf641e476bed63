import copy
import dataclasses

import pytest
import torch

from fastnas.methods import VaenasGradient, VaenasOneShot, vaenas
from fastnas.methods.vaenas import VaenasGradientSettings, VaenasOneShotSettings
from fastnas.spaces import NasnetSpace
from fastnas.spaces.strings import String

VAE = {"ranked": 6, "rank_batches": 1, "vae_iterations": 3, "vae_hidden": 8, "vae_latent": 2}
EVOLUTION = {"generations": 1, "population": 4, "parents": 2, "crossovers": 0, "mutations": 0, "vae_seeds": 3}


@pytest.fixture
def problem(problem):
    return dataclasses.replace(problem, space=NasnetSpace(nodes=2))


def one_shot(problem, **settings):
    torch.manual_seed(0)
    method = VaenasOneShot(VaenasOneShotSettings(**VAE | EVOLUTION | settings), problem)
    method.supernet.double()
    method.start_epoch(0)
    return method


def gradient_based(problem, **settings):
    torch.manual_seed(0)
    settings = VAE | {"warmup_epochs": 0, "arch_interval": 1} | settings
    method = VaenasGradient(VaenasGradientSettings(**settings), problem)
    method.supernet.double()
    method.alphas.double()
    method.start_epoch(0)
    return method


def fix_samples(method, string: String, monkeypatch):
    monkeypatch.setattr(method.sampler, "sample", lambda count, *stream: [string] * count)


def test_epsilon_starts_at_0_and_grows_with_every_step_to_1(problem):
    method = one_shot(problem, epsilon_step=0.01)
    assert [method.epsilon(index) for index in (0, 1, 50, 100, 500)] == pytest.approx([0, 0.01, 0.5, 1, 1])


def test_paths_come_from_the_mixture_of_equation_5(problem, monkeypatch):
    method = one_shot(problem, epsilon_step=0.001)
    learnt = (4,) * 10
    fix_samples(method, learnt, monkeypatch)
    assert learnt not in [method.sample(0) for _ in range(20)]
    share = sum(method.gamma(0.3, 1, 9, index)[0] == learnt for index in range(2000)) / 2000
    assert share == pytest.approx(0.3, abs=0.04)
    assert method.gamma(0.3, 2000, 9).count(learnt) / 2000 == pytest.approx(0.3, abs=0.04)
    uniform = [string for string in method.gamma(0.0, 4000, 9)]
    for choice in range(8):
        assert sum(s[3] == choice for s in uniform) / 4000 == pytest.approx(1 / 8, abs=0.03)
    assert method.sample(1001) == learnt


def test_the_autoencoder_learns_from_samples_of_the_mixture(problem, batches, monkeypatch):
    method = one_shot(problem, epsilon_step=1.0, vae_interval=2)
    seen = []
    monkeypatch.setattr(method.sampler, "learn", lambda scored, epoch: seen.append(scored) or {})
    learnt = (4,) * 10
    fix_samples(method, learnt, monkeypatch)
    method.step(0, *batches)
    assert method.end_epoch([batches[1]])["epsilon"] == method.epsilon(1) == 1
    assert not seen  # n_vae = 2
    method.start_epoch(1)
    method.step(1, *batches)
    method.end_epoch([batches[1]])
    assert [string for string, _ in seen[0]] == [learnt] * 6
    assert seen[0][0][1] == method.accuracy(learnt, [batches[1]])


def test_the_evolution_starts_from_samples_within_the_limit(problem, batches, monkeypatch):
    method = one_shot(problem, max_parameters=4000, target_channels=4, target_cells=3)
    method.start_epoch(9)
    method.step(0, *batches)
    small, large = (3,) * 10, (6,) * 10
    monkeypatch.setattr(method.sampler, "sample", lambda count, *stream: [small, large] * (count // 2 + 1))
    assert set(method.seeds()) == {small} and len(method.seeds()) == 3
    scored = []
    monkeypatch.setattr(method, "recalibrated_accuracy", lambda string, search: scored.append(string) or 0.5)
    method.end_epoch([batches[1]])
    assert scored[0] == small and large not in scored
    assert all(method.limits.allow(method.space.decode(string)) for string in scored)
    assert method.derive().rule == "evolution"


def test_gradient_based_paths_come_from_the_autoencoder_alone(problem, batches, monkeypatch):
    method = gradient_based(problem)
    first, second = (4,) * 10, (5,) * 10
    monkeypatch.setattr(method.sampler, "sample", lambda count, *stream: [first, second])
    assert method.sample_path(0) == problem.space.decode(first)
    pairs = method.sample_pairs(0)
    assert all(pair.candidates.tolist() == [[4, 5]] * 5 and not pair.active.any() for pair in pairs)
    before = method.alphas.alpha_normal.detach().clone()
    method.step(0, *batches)
    moved = (method.alphas.alpha_normal != before).any(0)
    assert moved.tolist() == [index in (4, 5) for index in range(8)]


def test_gradient_based_ranks_uniform_architectures(problem, batches, monkeypatch):
    method = gradient_based(problem, ranked=400)
    seen = []
    monkeypatch.setattr(method.sampler, "learn", lambda scored, epoch: seen.extend(scored) or {})
    monkeypatch.setattr(vaenas, "shared_accuracy", lambda supernet, path, search: 0.5)
    method.end_epoch([batches[1]])
    shares = [sum(string[0] == choice for string, _ in seen) / 400 for choice in range(8)]
    assert shares == pytest.approx([1 / 8] * 8, abs=0.06)


@pytest.mark.parametrize("build", [one_shot, gradient_based])
def test_state_round_trip_continues_identically(build, problem, batches):
    first = build(problem)
    first.step(0, *batches)
    figures = first.end_epoch([batches[1]])
    assert figures["kept_accuracy"] >= figures["ranked_accuracy"]
    second = build(problem)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    records = []
    for method in (first, second):
        method.start_epoch(9)
        loss = method.step(1, *batches)["loss"]
        records.append((float(loss), method.end_epoch([batches[1]]), method.derive()))
    assert records[0] == records[1]
