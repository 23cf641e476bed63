"""The fused executor against the plain one: same modules, same weights, same batch."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastnas import backend
from fastnas.engine import fused_cell
from fastnas.engine.mixture import Alphas
from fastnas.engine.supernet import Supernet
from fastnas.engine.training import batch_statistics
from fastnas.errors import UserError
from fastnas.nn import register_candidate
from fastnas.nn.candidates import _REGISTRY
from fastnas.ops.stages.partial_join import partial_join_bwd
from fastnas.spaces import DartsSpace

FUSED = ("fused", "lean")


def build(*, nodes=3, channels=8, cells=4, k=1, edge_normalisation=False, dtype=torch.double, space=None, **settings):
    torch.manual_seed(0)
    space = space or DartsSpace(nodes=nodes)
    supernet = Supernet(space, channels=channels, cells=cells, classes=10, k=k, **settings).to(dtype)
    alphas = Alphas(space, edge_normalisation=edge_normalisation).to(dtype)
    with torch.no_grad():  # weights that differ, or a wrong index would not show
        for alpha in alphas.parameters():
            alpha += torch.randn_like(alpha)
    return supernet, alphas


def batch(size=14, count=4, dtype=torch.double):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, size, size + 1, generator=generator, dtype=torch.double).to(dtype)
    return x, torch.randint(0, 10, (count,), generator=generator)


def run(supernet, alphas, executor, x, y, train=True):
    """Loss, gradients of weights, of alphas, and the buffers after the pass."""
    supernet, alphas = copy.deepcopy(supernet).train(train), copy.deepcopy(alphas)
    supernet.executor = executor
    loss = F.cross_entropy(supernet(x, alphas()), y)
    weights, arch = list(supernet.parameters()), list(alphas.parameters())
    gradients = torch.autograd.grad(loss, [*weights, *arch])
    return loss, gradients[: len(weights)], gradients[len(weights) :], list(supernet.buffers())


def distance(values, expected):
    """Relative distance of two lists of tensors as one vector."""
    flat = [torch.cat([part.double().flatten() for part in parts]) for parts in (values, expected)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


@pytest.mark.parametrize("executor", FUSED)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("k", "edge_normalisation"), [(1, False), (1, True), (4, True), (2, False)])
def test_loss_gradients_and_running_statistics_equal_the_plain_executors(k, edge_normalisation, train, executor):
    supernet, alphas = build(k=k, edge_normalisation=edge_normalisation)
    plain = run(supernet, alphas, "plain", *batch(), train)
    fused = run(supernet, alphas, executor, *batch(), train)
    assert abs(fused[0] - plain[0]) < 1e-12
    for values, expected in zip(fused[1:], plain[1:], strict=True):
        assert distance(values, expected) < 1e-10


@pytest.mark.parametrize("train", [True, False])
def test_a_cell_of_identities_alone_has_no_statistics(train):
    supernet, alphas = build(space=DartsSpace(nodes=2, candidates=("none", "skip_connect")))
    plain, fused = (run(supernet, alphas, executor, *batch(), train) for executor in ("plain", "fused"))
    assert abs(fused[0] - plain[0]) < 1e-12
    for values, expected in zip(fused[1:], plain[1:], strict=True):
        assert distance(values, expected) < 1e-10


@pytest.mark.parametrize("executor", FUSED)
@pytest.mark.parametrize("k", [1, 4])
def test_float32_is_at_most_twice_as_far_from_float64_as_the_plain_executor(k, executor):
    supernet, alphas = build(k=k, channels=16, edge_normalisation=k > 1)
    exact = run(supernet, alphas, "plain", *batch())
    narrow = supernet.float(), alphas.float()
    plain = run(*narrow, "plain", *batch(dtype=torch.float32))
    fused = run(*narrow, executor, *batch(dtype=torch.float32))
    for value, baseline, reference in zip(fused[1:3], plain[1:3], exact[1:3], strict=True):
        assert distance(value, reference) <= 2 * distance(baseline, reference)


@pytest.mark.parametrize("executor", FUSED)
def test_ten_steps_of_training_stay_together(executor):
    supernet, alphas = build(nodes=2, cells=3)
    losses = []
    for kind in ("plain", executor):
        net, arch = copy.deepcopy(supernet), copy.deepcopy(alphas)
        net.executor = kind
        optimizer = torch.optim.SGD([*net.parameters(), *arch.parameters()], 0.05, 0.9)
        losses.append([])
        for _ in range(10):
            x, y = batch(size=8)
            loss = F.cross_entropy(net(x, arch()), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-8)


@pytest.mark.parametrize("executor", FUSED)
def test_a_sampled_path_touches_only_its_own_weights_and_statistics(executor):
    supernet, _ = build()
    genotype = supernet.space.random_genotype(random.Random(3))
    x, y = batch()
    results = []
    for kind in ("plain", executor):
        net = copy.deepcopy(supernet)
        net.executor = kind
        loss = F.cross_entropy(net(x, genotype), y)
        gradients = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
        results.append((loss, gradients, list(net.buffers())))
    (loss, gradients, buffers), (plain_loss, plain_gradients, plain_buffers) = results[1], results[0]
    assert abs(loss - plain_loss) < 1e-12
    assert [gradient is None for gradient in gradients] == [gradient is None for gradient in plain_gradients]
    found = [gradient for gradient in gradients if gradient is not None]
    assert distance(found, [gradient for gradient in plain_gradients if gradient is not None]) < 1e-10
    assert distance(buffers, plain_buffers) < 1e-12


def test_a_path_through_identities_and_pools_alone():
    space = DartsSpace(nodes=2, candidates=("none", "skip_connect", "max_pool_3x3"))
    supernet, alphas = build(space=space)
    plain, fused = (run(supernet, alphas, kind, *batch()) for kind in ("plain", "fused"))
    assert distance(fused[1] + fused[2], plain[1] + plain[2]) < 1e-10


@pytest.mark.parametrize("executor", FUSED)
@pytest.mark.parametrize("k", [1, 2])
def test_a_registered_candidate_runs_beside_the_fused_ones(k, executor):
    @register_candidate("test_conv_1x1")
    def conv(channels, stride, searching):
        return nn.Sequential(nn.Conv2d(channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels), nn.Tanh())

    try:
        space = DartsSpace(nodes=2, candidates=("none", "test_conv_1x1", "skip_connect", "sep_conv_3x3"))
        supernet, alphas = build(space=space, k=k)
    finally:
        del _REGISTRY["test_conv_1x1"]
    plain, fused = (run(supernet, alphas, kind, *batch()) for kind in ("plain", executor))
    for values, expected in zip(fused[1:], plain[1:], strict=True):
        assert distance(values, expected) < 1e-10


def saved_bytes(supernet, architecture, x):
    """Bytes that autograd keeps for the backward pass, each storage once, the network's own tensors not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*supernet.parameters(), *supernet.buffers(), x)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = supernet(x, architecture).sum()
    del loss
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(("k", "executor", "most"), [(1, "fused", 0.22), (1, "lean", 0.03), (4, "fused", 0.25)])
def test_bytes_saved_for_the_backward_pass(k, executor, most):
    supernet, alphas = build(nodes=4, channels=16, cells=8, k=k, edge_normalisation=k > 1, dtype=torch.float32)
    x = torch.randn(2, 3, 32, 32)
    plain = saved_bytes(supernet, alphas(), x)
    supernet.executor = executor
    assert saved_bytes(supernet, alphas(), x) <= most * plain


def test_a_weight_step_reads_no_state_for_the_gradient_of_the_betas(monkeypatch):
    read = []

    def counting(g, xs, strides, k):
        read.append(len(xs))
        return partial_join_bwd(g, xs, strides, k)

    monkeypatch.setattr(fused_cell, "partial_join_bwd", counting)
    supernet, alphas = build(nodes=2, cells=3, k=4, edge_normalisation=True, executor="fused")
    x, y = batch(size=8)
    F.cross_entropy(supernet(x, alphas().detach()), y).backward()
    assert read == [0] * 6
    F.cross_entropy(supernet(x, alphas()), y).backward()
    assert read[6:] == [3, 2] * 3


@pytest.mark.parametrize(("executor", "copies"), [("fused", 0), ("lean", 9)])
def test_the_backward_pass_copies_no_selected_channels_again(executor, copies):
    """Of three cells with three states that candidates read; lean keeps no copy."""
    supernet, alphas = build(nodes=2, cells=3, k=4, edge_normalisation=True, executor=executor)
    x, y = batch(size=8)
    loss = F.cross_entropy(supernet(x, alphas()), y)
    with torch.profiler.profile(record_shapes=True, acc_events=True) as profile:
        torch.autograd.grad(loss, list(supernet.parameters()))
    found = [
        event
        for event in profile.events()
        if event.name == "aten::copy_" and event.input_shapes[0][3:] in ([2], [4], [8])
    ]
    assert len(found) == copies


def test_gradients_of_a_state_with_two_readers_add_up_in_place():
    """A third map as large as the state would cost time and memory."""
    supernet, alphas = build(nodes=2, cells=3, executor="fused")
    x, y = batch(size=8)
    loss = F.cross_entropy(supernet(x, alphas()), y)
    with torch.profiler.profile(record_shapes=True, acc_events=True) as profile:
        torch.autograd.grad(loss, list(supernet.parameters()))
    added = [(event.name, event.input_shapes[0]) for event in profile.events() if event.name.startswith("aten::add")]
    assert {name for name, shape in added if len(shape) == 4} == {"aten::add_"}


def test_frozen_weights_and_frozen_alphas_get_no_gradient():
    supernet, alphas = build(nodes=2, cells=3, executor="fused")
    x, y = batch(size=8)
    loss = F.cross_entropy(supernet(x, alphas().detach()), y)
    assert all(g is not None for g in torch.autograd.grad(loss, list(supernet.parameters())))
    supernet.requires_grad_(False)
    loss = F.cross_entropy(supernet(x, alphas()), y)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, list(alphas.parameters())))


def test_a_state_dict_of_one_executor_fits_the_other_after_training():
    supernet, alphas = build(nodes=2, cells=3, executor="fused")
    x, _ = batch(size=8)
    supernet(x, alphas())
    other, _ = build(nodes=2, cells=3)
    other.load_state_dict(supernet.state_dict())
    supernet.eval(), other.eval()
    with torch.no_grad():
        torch.testing.assert_close(supernet(x, alphas()), other(x, alphas()))
    before = [buffer.clone() for buffer in supernet.buffers()]
    supernet.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before, supernet.buffers(), strict=True))


def test_statistics_follow_the_network_to_another_dtype():
    supernet, alphas = build(nodes=2, cells=3, dtype=torch.float32, executor="fused")
    x, _ = batch(size=8)
    supernet(x.float(), alphas())
    supernet.double()
    supernet(x, alphas())
    norm = supernet.cells[0].edges[0].candidates[1][1]
    assert norm.running_mean.dtype == torch.double
    assert int(norm.num_batches_tracked) == 2


def test_an_unknown_executor_is_refused():
    with pytest.raises(UserError, match="unknown executor 'fast'; there are plain, fused, lean"):
        Supernet(DartsSpace(), channels=8, cells=3, classes=2, executor="fast")


class Calls(TorchDispatchMode):
    """Names of the ops that are called within."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_the_backend_that_was_asked_for_serves_the_stages():
    supernet, alphas = build(nodes=2, cells=3, executor="fused")
    x, _ = batch(size=8)
    results = []
    for choice, expected in (("", True), ("reference", False)):
        with backend(choice), Calls() as calls:
            results.append(supernet(x, alphas()))
        assert ("fastnas::conv_stage_fwd" in calls.names) == expected
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("executor", FUSED)
def test_batch_statistics_in_evaluation_are_those_of_the_plain_executor_and_leave_no_trace(executor):
    """As sampled paths are scored: running statistics mix all the paths."""
    supernet, alphas = build()
    run(supernet, alphas, executor, *batch())
    supernet.eval()
    before = [buffer.clone() for buffer in supernet.buffers()]
    path = supernet.space.random_genotype(random.Random(1))
    outputs = []
    for kind in ("plain", executor):
        supernet.executor = kind
        with batch_statistics(supernet), torch.no_grad():
            outputs.append([supernet(batch()[0], architecture) for architecture in (path, alphas())])
    for fused, plain in zip(outputs[1], outputs[0], strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before, supernet.buffers(), strict=True))
    supernet.executor = executor
    with torch.no_grad():
        assert not torch.allclose(supernet(batch()[0], path), outputs[0][0])  # running statistics again
