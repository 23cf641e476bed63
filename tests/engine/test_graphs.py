"""Steps as CUDA graphs: a CPU can show that the step runs all the same, once a call, and that the log says why."""

import logging

import pytest
import torch

from fastnas.engine import graphs
from fastnas.engine.graphs import WARM_UP, CapturedStep


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


class Replay:
    """Stands for a recorded graph: runs the step on the kept inputs."""

    def __init__(self, step, inputs, figures):
        self.step, self.inputs, self.figures = step, inputs, figures

    def replay(self):
        self.figures.update(self.step(*self.inputs))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Everything but the recording itself."""

    def record(step, inputs):
        figures = {}
        return Replay(step, inputs, figures), figures

    monkeypatch.setattr(graphs, "_unsupported", lambda inputs: None)
    monkeypatch.setattr(graphs, "_on_a_side_stream", lambda step, inputs: step(*inputs))
    monkeypatch.setattr(graphs, "_record", record)


def test_on_the_cpu_the_step_runs_as_it_is_and_the_log_says_why_once(network, caplog):
    step = CapturedStep("weight step", trainer(network, torch.optim.SGD(network.parameters(), 0.1)))
    with caplog.at_level(logging.INFO):
        losses = [float(step(torch.ones(4, 3))["loss"]) for _ in range(WARM_UP + 3)]
    assert losses == sorted(losses, reverse=True)
    assert not step.captured
    assert [record.getMessage() for record in caplog.records] == [
        "weight step: no CUDA graph, the inputs are on cpu",
    ]


def test_a_recording_that_fails_falls_back_and_loses_no_step(network, caplog, as_on_a_gpu, monkeypatch):
    def fail(step, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "_record", fail)
    calls = []
    step = CapturedStep("architecture step", lambda x: calls.append(x) or {"x": x})
    with caplog.at_level(logging.INFO):
        results = [step(torch.full((1,), float(i))) for i in range(WARM_UP + 2)]
    assert [float(result["x"]) for result in results] == list(range(WARM_UP + 2))
    assert len(calls) == WARM_UP + 2
    assert [record.getMessage() for record in caplog.records] == [
        "architecture step: no CUDA graph, recording failed: operation not permitted when stream is capturing",
    ]


def test_replays_read_new_inputs_and_other_shapes_run_as_they_are(as_on_a_gpu):
    step = CapturedStep("step", lambda x: {"sum": x.sum()})
    sizes = [2] * (WARM_UP + 2) + [1, 2]
    for number, size in enumerate(sizes):
        assert float(step(torch.full((size,), float(number)))["sum"]) == size * number
    assert step.captured
    step.forget()
    assert not step.captured
    assert float(step(torch.ones(5))["sum"]) == 5  # recorded anew, for the shape of now
    assert step.captured


@pytest.mark.gpu
def test_a_recorded_step_trains_as_the_step_itself(network):
    xs = [torch.randn(4, 3, device="cuda") for _ in range(WARM_UP + 4)]
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 1).cuda()
        step = trainer(net, torch.optim.SGD(net.parameters(), 0.1, 0.9))
        step = CapturedStep("step", step) if captured else step
        results.append([float(step(x)["loss"]) for x in xs])
        assert not captured or step.captured
    assert results[1] == pytest.approx(results[0], rel=1e-5)
