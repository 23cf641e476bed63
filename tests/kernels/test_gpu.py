"""What only a GPU can show: captured graphs, repeatability, compilation, addresses beyond 32 bits, several streams."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastnas
from fastnas import _backends
from fastnas.engine.mixture import Alphas
from fastnas.engine.supernet import Supernet
from fastnas.spaces import DartsSpace

bank = importlib.import_module("fastnas.ops.depthwise_bank").depthwise_bank
fused_norm = importlib.import_module("fastnas.ops.norm_mixed_sum").norm_mixed_sum
pytestmark = pytest.mark.gpu
Case = tuple[Callable[..., Tensor], list[Tensor]]


def cases() -> dict[str, Callable[[torch.dtype], Case]]:
    """Each op with its inputs on the GPU; those that require gradients get them."""

    def maps(count: int, channels: int, side: int, dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(32, channels, side, side, device="cuda").to(dtype) for _ in range(count)]

    def leaves(tensors: list[Tensor]) -> list[Tensor]:
        return [t.requires_grad_() for t in tensors]

    def mixed_sum(dtype: torch.dtype) -> Case:
        return lambda w, *xs: fastnas.mixed_sum(xs, w), leaves([torch.rand(8, device="cuda"), *maps(8, 16, 32, dtype)])

    def path_dropout(dtype: torch.dtype) -> Case:
        mask = torch.rand(2, 7, device="cuda") < 0.5
        return lambda *xs: fastnas.path_dropout(xs, mask), leaves(maps(7, 16, 32, dtype))

    def partial_shuffle(dtype: torch.dtype) -> Case:
        tensors = [torch.rand(8, device="cuda"), *maps(1, 16, 32, dtype), *maps(8, 4, 16, dtype)]
        return lambda w, x, *m: fastnas.partial_shuffle(m, w, x[:, 4:], stride=2), leaves(tensors)

    def partial_shuffle_subset(dtype: torch.dtype) -> Case:
        channels = fastnas.sample_channels(16, 4, device="cuda")
        tensors = [torch.rand(8, device="cuda"), *maps(1, 16, 32, dtype), *maps(8, 4, 32, dtype)]
        return lambda w, x, *m: fastnas.partial_shuffle(m, w, x, channels=channels), leaves(tensors)

    def gumbel_softmax(dtype: torch.dtype) -> Case:
        logits = torch.randn(28, 8, device="cuda").to(dtype)
        seed, tau = torch.tensor(7, device="cuda"), torch.tensor(0.8, device="cuda")
        return lambda x: fastnas.gumbel_softmax(x, tau, seed=seed), leaves([logits])

    def norm_mixed_sum(dtype: torch.dtype) -> Case:
        tensors = [torch.rand(8, device="cuda"), *maps(8, 16, 32, dtype)]
        return lambda w, *xs: fused_norm(xs[:7], w, plain=xs[7:]), leaves(tensors)

    def depthwise_bank(dtype: torch.dtype) -> Case:
        ws = [torch.randn(16, 1, k, k, device="cuda").to(dtype) for k in (3, 5, 3, 5)]

        def call(x: Tensor, *ws: Tensor) -> Tensor:
            return torch.cat([y.flatten() for y in bank(x, ws, [1, 1, 2, 2], max_pool=True, avg_pool=True)])

        return call, leaves([*maps(1, 16, 32, dtype), *ws])

    ops = (
        mixed_sum,
        path_dropout,
        partial_shuffle,
        partial_shuffle_subset,
        gumbel_softmax,
        norm_mixed_sum,
        depthwise_bank,
    )
    return {f.__name__: f for f in ops}


@pytest.fixture(params=[*cases(), "mixed_sum=cuda", "gumbel_softmax=cuda", "depthwise_bank=cuda"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[[torch.dtype], Case]]:
    torch.manual_seed(0)
    op, _, backend = request.param.partition("=")
    if not backend:
        yield cases()[op]
    elif problem := _backends._problem(backend, op, "cuda"):
        pytest.skip(problem)
    else:
        with fastnas.backend(request.param):
            yield cases()[op]


def passes(f: Callable[..., Tensor], tensors: list[Tensor], g: Tensor) -> tuple[Tensor, ...]:
    y = f(*tensors)
    return y, *torch.autograd.grad(y, tensors, g)


def test_triton_is_the_automatic_choice_but_for_the_ops_of_the_table() -> None:
    rows = [row for row in _backends.table() if row.device == "cuda"]
    assert rows
    assert all(row.backend == ("cuda" if row.op in _backends._CUDA_FIRST else "triton") for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_graph_replays_with_new_values(make, dtype: torch.dtype) -> None:
    f, tensors = make(dtype)
    g = torch.randn_like(f(*tensors))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            passes(f, tensors, g)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = passes(f, tensors, g)
    with torch.no_grad():
        for t in (*tensors, g):
            t.copy_(torch.randn_like(t))
    graph.replay()
    torch.cuda.synchronize()
    for ours, eager in zip(captured, passes(f, tensors, g), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_the_same_every_time(make, dtype: torch.dtype) -> None:
    f, tensors = make(dtype)
    g = torch.randn_like(f(*tensors))
    first = passes(f, tensors, g)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, passes(f, tensors, g), strict=True))


def test_compiles_as_one_graph(make) -> None:
    f, tensors = make(torch.float32)
    g = torch.randn_like(f(*tensors))
    compiled = torch.compile(lambda *t: f(*(x * 2 for x in t)), fullgraph=True)
    ours, eager = passes(compiled, tensors, g), passes(lambda *t: f(*(x * 2 for x in t)), tensors, g)
    torch.testing.assert_close(ours, eager)


def test_autocast_leaves_dtypes_alone(make) -> None:
    f, tensors = make(torch.float32)
    g = torch.randn_like(f(*tensors))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        inside = passes(f, tensors, g)
    assert all(torch.equal(a, b) for a, b in zip(inside, passes(f, tensors, g), strict=True))


def test_a_side_stream_is_used(make) -> None:
    f, tensors = make(torch.float32)
    expected = f(*tensors)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        y = f(*tensors)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_cuda_maps_beyond_32_bits_and_slices_that_are_not_aligned() -> None:
    if problem := _backends._problem("cuda", "mixed_sum", "cuda"):
        pytest.skip(problem)
    x = torch.zeros(2**31 + 49_153, device="cuda", dtype=torch.bfloat16)
    x[-5:] = 3
    w = torch.ones(1, device="cuda", requires_grad=True)
    with fastnas.backend("mixed_sum=cuda"):
        for part in (x[:-1], x[1:]):  # whole accesses of 16 bytes, and not
            y = fastnas.mixed_sum([part], w)
            assert torch.equal(y[-8:], part[-8:])
            (dw,) = torch.autograd.grad(y, w, part)
            assert dw.item() == 9 * part[-5:].count_nonzero().item()
            del y


def test_addresses_beyond_32_bits() -> None:
    batch, rest = 2**17 + 3, 2**14  # 2^31 + 49,152 elements, 4.3 GB in bfloat16
    x = torch.zeros(batch, rest, device="cuda", dtype=torch.bfloat16)
    x[-1, -5:] = 3
    y = fastnas.mixed_sum([x], torch.ones(1, device="cuda"))
    assert torch.equal(y[-1], x[-1])
    assert not y[:2].any()
    del y
    mask = torch.tensor([[0.0], [2.0]], device="cuda")
    y = fastnas.path_dropout([x], mask)
    assert torch.equal(y[-1], 2 * x[-1])
    assert not y[:2].any()
    del y
    maps = x.view(batch, 4, 64, 64)
    y = fastnas.partial_shuffle([maps[:, :1]], None, maps[:, 1:])
    assert torch.equal(y[-1], maps[-1])  # one mixed channel in four: the shuffle is the identity


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_noise_is_that_of_the_cpu(backend: str) -> None:
    if problem := _backends._problem(backend, "gumbel_softmax", "cuda"):
        pytest.skip(problem)
    logits = torch.randn(64, 9)
    with fastnas.backend(f"gumbel_softmax={backend}"):
        ours = fastnas.gumbel_softmax(logits.cuda(), 0.5, seed=11).cpu()
    torch.testing.assert_close(ours, fastnas.gumbel_softmax(logits, 0.5, seed=11), rtol=1e-5, atol=1e-6)


def test_half_of_the_paths_dropped_are_not_read() -> None:
    """Reading them would fault: the memory behind them is gone as far as the kernel's mask is concerned (NaN shows)."""
    kept = torch.randn(64, 16, 32, 32, device="cuda")
    nan = torch.full_like(kept, torch.nan)
    y = fastnas.path_dropout([kept, nan], torch.tensor([[True, False]], device="cuda"))
    assert torch.equal(y, kept)


def supernet(k: int) -> tuple[Supernet, Alphas]:
    torch.manual_seed(0)
    space = DartsSpace(nodes=3)
    return Supernet(space, channels=16, cells=5, classes=10, k=k), Alphas(space, edge_normalisation=k > 1)


def search_step(net: Supernet, arch: Alphas, x: Tensor, y: Tensor) -> list[Tensor]:
    loss = F.cross_entropy(net(x, arch()), y)
    return [loss.detach(), *torch.autograd.grad(loss, [*net.parameters(), *arch.parameters()])]


@pytest.mark.parametrize("executor", ["fused", "lean"])
@pytest.mark.parametrize("k", [1, 4])
def test_a_fused_search_step_is_the_plain_one_of_the_cpu_in_float64(k: int, executor: str) -> None:
    net, arch = supernet(k)
    x, y = torch.randn(8, 3, 16, 15), torch.randint(0, 10, (8,))
    results = []
    for kind, where, dtype in (("plain", "cpu", torch.double), (executor, "cuda", torch.float32)):
        nets = copy.deepcopy(net).to(where, dtype), copy.deepcopy(arch).to(where, dtype)
        nets[0].executor = kind
        step = search_step(*nets, x.to(where, dtype), y.to(where))
        results.append(torch.cat([value.double().cpu().flatten() for value in (*step, *nets[0].buffers())]))
    assert float((results[1] - results[0]).norm() / results[0].norm()) < 1e-3


@pytest.mark.parametrize("k", [1, 4])
def test_a_captured_search_step_replays_with_a_new_batch(k: int) -> None:
    net, arch = (module.cuda() for module in supernet(k))
    net.executor = "fused"
    x, y = torch.randn(8, 3, 16, 16, device="cuda"), torch.randint(0, 10, (8,), device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            search_step(net, arch, x, y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = search_step(net, arch, x, y)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    for ours, eager in zip(captured, search_step(net, arch, x, y), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
