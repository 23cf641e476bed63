"""Steps as CUDA graphs: a CPU can show that the step runs all the same, once a call, and that a line says why."""

import contextlib

import pytest
import torch

from fastnas.engine import graphs
from fastnas.engine.graphs import WARM_UP, CapturedStep, keep_on_device
from fastnas.engine.training import set_learning_rate


@pytest.fixture
def network():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 1)


def trainer(network, optimizer):
    def step(x):
        loss = network(x).square().mean()
        for parameter, gradient in zip(
            network.parameters(), torch.autograd.grad(loss, list(network.parameters())), strict=True
        ):
            parameter.grad = gradient
        optimizer.step()
        return {"loss": loss.detach()}

    return step


def test_a_recording_that_fails_falls_back_loses_no_step_and_says_why_once(as_on_a_gpu, monkeypatch):
    def fail(step, inputs, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "_record", fail)
    calls, said = [], []
    step = CapturedStep("architecture step", lambda x: calls.append(x) or {"x": x.clone()}, say=said.append)
    results = [step(torch.full((1,), float(i))) for i in range(WARM_UP + 3)]
    assert [float(result["x"]) for result in results] == list(range(WARM_UP + 3))
    assert len(calls) == WARM_UP + 3
    assert said == [
        "architecture step: no CUDA graph, recording failed: operation not permitted when stream is capturing"
    ]


def test_the_reason_is_what_the_step_did_not_that_the_recording_could_not_be_ended(monkeypatch):
    @contextlib.contextmanager
    def graph(*_, **__):
        try:
            yield
        except ValueError as error:
            raise RuntimeError("the recording could not be ended") from error

    for name in ("CUDAGraph", "current_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", graph)

    def wrong(x):
        raise ValueError("reads a value")

    with pytest.raises(ValueError, match="reads a value"):
        graphs._record(wrong, (torch.ones(1),), None)


def test_replays_read_new_inputs_and_other_shapes_run_as_they_are(as_on_a_gpu):
    said = []
    step = CapturedStep("step", lambda x: {"sum": x.sum()}, say=said.append)
    sizes = [2] * (WARM_UP + 2) + [1, 2]
    for number, size in enumerate(sizes):
        assert float(step(torch.full((size,), float(number)))["sum"]) == size * number
    assert step.captured
    step.forget()
    assert not step.captured
    assert float(step(torch.ones(5))["sum"]) == 5  # recorded anew, for the shape of now
    assert step.captured
    assert len(as_on_a_gpu.steps) == 2
    assert said == ["step: runs as a CUDA graph"] * 2


def test_numbers_and_nested_inputs_reach_replays_as_tensors(as_on_a_gpu):
    seen = []

    def run(batch, seed, scale):
        seen.append((seed, scale))
        return batch[0] * scale + seed

    step = CapturedStep("step", run)
    for number in range(WARM_UP + 2):
        x = torch.full((2,), float(number))
        seed = 2**62 + number
        assert torch.equal(step((x, x), seed, 0.5), x * 0.5 + seed)
    assert all(seed.dtype == torch.int64 and scale.dtype == torch.float64 for seed, scale in seen)
    assert len({(id(seed), id(scale)) for seed, scale in seen}) == 1  # the same tensors every time
    assert int(seen[0][0]) == seed


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimiser_on_the_device_updates_as_before_at_a_rate_that_is_set_later(network, make):
    networks = [network, torch.nn.Linear(3, 1)]
    networks[1].load_state_dict(network.state_dict())
    options = {"momentum": 0.9} if make is torch.optim.SGD else {"betas": (0.5, 0.999)}
    optimizers = [make(net.parameters(), 0.1, weight_decay=0.1, foreach=True, **options) for net in networks]
    steps = [trainer(*pair) for pair in zip(networks, optimizers, strict=True)]
    for number in range(4):
        if number == 1:
            keep_on_device(optimizers[1])
        for optimizer, step in zip(optimizers, steps, strict=True):
            set_learning_rate(optimizer, 0.1 / (number + 1))
            step(torch.ones(4, 3))
    assert isinstance(optimizers[1].param_groups[0]["lr"], torch.Tensor)
    for ours, theirs in zip(networks[1].parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
def test_a_recorded_step_trains_as_the_step_itself():
    xs = [torch.randn(4, 3, device="cuda") for _ in range(WARM_UP + 6)]
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 1).cuda()
        optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
        keep_on_device(optimizer)
        step = trainer(net, optimizer)
        step = CapturedStep("step", step) if captured else step
        losses = []
        for number, x in enumerate(xs):
            set_learning_rate(optimizer, 0.1 / (number + 1))
            losses.append(float(step(x)["loss"]))
        results.append(losses)
        assert not captured or step.captured
    assert results[1] == pytest.approx(results[0], rel=1e-5)
