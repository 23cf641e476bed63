"""The parts of a training from scratch: rates, arithmetic, averaged weights."""

import pytest
import torch
from torch import nn

from fastnas import _backends
from fastnas.engine.fused_conv import fuse_convolutions
from fastnas.engine.retraining import Arithmetic, WeightAverage
from fastnas.engine.training import learning_rate
from fastnas.errors import UserError
from fastnas.nn import SepConv

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CHOICE = {"fused": None, "channels_last": None, "precision": "float32"}


def rates(**settings):
    return [learning_rate(epoch, 4, 0.8, 0.0, **{"schedule": "linear", "warmup": 0} | settings) for epoch in range(4)]


def test_rates():
    assert rates() == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert rates(warmup=2) == pytest.approx([0.4, 0.6, 0.4, 0.2])
    assert rates(schedule="cosine") == pytest.approx([0.8, 0.4 + 0.4 * 0.5**0.5, 0.4, 0.4 - 0.4 * 0.5**0.5])


def test_what_measured_faster_is_the_default():
    compiled = _backends.choose("conv_stage", "cpu") == "native"
    assert Arithmetic.choose(CPU, **CHOICE) == Arithmetic(CPU, compiled, True, "float32")
    with _backends.backend("reference"):
        assert Arithmetic.choose(CPU, **CHOICE) == Arithmetic(CPU, False, True, "float32")
    assert Arithmetic.choose(CUDA, **CHOICE) == Arithmetic(CUDA, False, False, "float32")
    assert not Arithmetic.choose(CPU, **CHOICE | {"fused": False}).fused


def test_a_gpu_without_bfloat16_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(UserError, match="leave --precision at float32"):
        Arithmetic.choose(CUDA, **CHOICE | {"precision": "bfloat16"})


@pytest.mark.parametrize(("fused", "precision"), [(True, "float32"), (False, "float32"), (True, "bfloat16")])
def test_a_network_is_prepared(fused, precision):
    arithmetic = Arithmetic(CPU, fused, True, precision)
    network = arithmetic.prepare(SepConv(4, 3, 1, affine=True))
    assert ("forward" in vars(network)) == (fused and precision == "float32")
    x = arithmetic.images(torch.randn(2, 4, 6, 6))
    assert x.is_contiguous(memory_format=torch.channels_last)
    with arithmetic.autocast():
        z = torch.mm(torch.eye(2), torch.eye(2))
        y = network(x)
    assert z.dtype == getattr(torch, precision)
    assert y.is_contiguous(memory_format=torch.channels_last) and network[1].weight.dtype == torch.float32


def test_the_average_follows_its_equation():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).double()
    average = WeightAverage(network, 0.3)
    wanted, buffer = network[0].weight.detach().clone(), network[1].running_mean.clone()
    for step in range(6):
        network(torch.randn(4, 1, 3, 3, dtype=torch.double)).square().mean().backward()
        with torch.no_grad():
            network[0].weight -= 0.1 * network[0].weight.grad
        average.update(network, step)
        decay = min(0.3, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * network[0].weight.detach()
        buffer = decay * buffer + (1 - decay) * network[1].running_mean
    torch.testing.assert_close(average.state["0.weight"], wanted)
    torch.testing.assert_close(average.state["1.running_mean"], buffer)
    assert int(average.state["1.num_batches_tracked"]) == 6
    other = WeightAverage(network, 0.3)
    other.load(average.state)
    torch.testing.assert_close(other.state, average.state)
    with pytest.raises(KeyError):
        other.load({})


def test_fusing_twice_is_fusing_once():
    network = SepConv(4, 3, 1, affine=True)
    fuse_convolutions(network)
    fuse_convolutions(network)
    network(torch.randn(2, 4, 5, 5))
    assert int(network[3].num_batches_tracked) == 1
