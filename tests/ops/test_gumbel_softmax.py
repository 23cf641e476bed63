from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastnas
from fastnas.reference.gumbel_softmax import gumbel_from_bits, philox, random_bits
from fastnas.reference.gumbel_softmax import gumbel_softmax as reference
from fastnas.testing import DTYPES, assert_as_accurate, saved_bytes

flat = importlib.import_module("fastnas.ops.gumbel_softmax")

SHAPES = {
    "one-element": (1,),
    "one-choice": (5, 1),
    "two-edges": (2, 7),
    "odd": (3, 5, 9),
    "edges": (28, 8),
    "empty": (0, 8),
    "no-choices": (3, 0),
    "long-row": (2, 3001),
    "many-rows": (2500, 7),
}


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(f, logits: Tensor, g: Tensor, tau: float | Tensor = 0.7, **options) -> tuple[Tensor, Tensor]:
    """Output and gradient of the logits."""
    logits = logits.detach().requires_grad_()
    y = f(logits, tau, **options)
    return y, *torch.autograd.grad(y, logits, g)


def eager(logits: Tensor, tau: float, *, noise: Tensor, hard: bool) -> Tensor:
    """What one writes in PyTorch, with given noise."""
    y = torch.softmax((logits + noise.to(logits.dtype)) / tau, dim=-1)
    if not hard:
        return y
    one_hot = F.one_hot(y.argmax(-1), y.shape[-1]).to(y.dtype)
    return one_hot - y.detach() + y


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0, 0, 0, 0], (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_known_answers(counter: list[int], key: tuple[int, int], words: str) -> None:
    assert [f"{int(w):08x}" for w in philox([torch.tensor(c) for c in counter], key)] == words.split()


def test_element_i_takes_word_i_mod_4_of_block_i_div_4() -> None:
    assert [f"{w:08x}" for w in random_bits(3, 0).tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c"]
    seed = 0x299F31D0A4093822
    blocks = [philox([torch.tensor(c) for c in (i, 0, 0, 0)], (0xA4093822, 0x299F31D0)) for i in range(3)]
    assert random_bits(11, seed).tolist() == [int(word) for block in blocks for word in block][:11]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_words_give_finite_noise(dtype: torch.dtype) -> None:
    noise = gumbel_from_bits(torch.tensor([0, 1, 0x1FF, 0x200, 0x7FFFFFFF, 0x80000000, 0xFFFFFDFF, 0xFFFFFFFF]), dtype)
    low, high = -math.log(24 * math.log(2)), -math.log(-math.log1p(-(2.0**-24)))
    assert noise.diff().ge(0).all()
    torch.testing.assert_close(noise[[0, -1]], torch.tensor([low, high], dtype=dtype))


@pytest.mark.parametrize("seed", [0, 1, 7, -1, 2**40 + 3, 2**63 - 1, -(2**63)])
def test_the_kernel_draws_the_noise_of_the_reference(seed: int) -> None:
    # Two choices: log(y0 / y1) at temperature 1 is the difference of the noise.
    y = fastnas.gumbel_softmax(torch.zeros(5000, 2, dtype=torch.float64), seed=seed)
    noise = gumbel_from_bits(random_bits(10_000, seed), torch.float64).view(5000, 2)
    torch.testing.assert_close((y[:, 0] / y[:, 1]).log(), noise[:, 0] - noise[:, 1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_value_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, hard: bool, poisoned: None) -> None:
    logits, g = draw(shape, dtype), draw(shape, dtype, seed=1)
    bits = random_bits(logits.numel(), 11).view(shape)
    ours = run(fastnas.gumbel_softmax, logits, g, seed=11, hard=hard)
    if logits.numel() == 0:
        assert all(t.shape == shape and t.dtype == dtype for t in ours)
        return
    width = torch.float64 if dtype == torch.float64 else torch.float32
    theirs = run(eager, logits, g, noise=gumbel_from_bits(bits, width), hard=hard)
    exact = run(eager, logits.double(), g.double(), noise=gumbel_from_bits(bits, torch.float64), hard=hard)
    torch.testing.assert_close(run(reference, logits.double(), g.double(), seed=11, hard=hard), exact)
    if hard:
        assert torch.equal(ours[0].double(), exact[0].round())  # the noise is the same, so is the choice
        ours, theirs, exact = ours[1:], theirs[1:], exact[1:]
    for value, other, truth in zip(ours, theirs, exact, strict=True):
        if dtype == torch.float64:  # PyTorch's own result is the truth here
            torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-14)
        else:
            assert_as_accurate(value, other, truth)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_straight_through_is_exactly_one_hot_with_the_soft_gradient(dtype: torch.dtype, backend: str) -> None:
    logits, g = draw((500, 8), dtype), draw((500, 8), dtype, seed=1)
    with fastnas.backend(f"gumbel_softmax={backend}"):
        hard, hard_grad = run(fastnas.gumbel_softmax, logits, g, seed=3, hard=True)
        soft, soft_grad = run(fastnas.gumbel_softmax, logits, g, seed=3)
    assert torch.equal(hard, F.one_hot(hard.argmax(-1), 8).to(dtype))
    chosen = soft.gather(1, hard.argmax(-1, keepdim=True)).squeeze(1)
    assert torch.equal(chosen, soft.amax(1))
    assert torch.equal(hard_grad, soft_grad)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_both_backends_draw_the_same_samples(hard: bool) -> None:
    logits, g = draw((28, 8)), draw((28, 8), seed=1)
    samples = []
    for backend in ("native", "reference"):
        with fastnas.backend(f"gumbel_softmax={backend}"):
            samples.append([run(fastnas.gumbel_softmax, logits, g, seed=s, hard=hard) for s in (1, 1, 2)])
    torch.testing.assert_close(samples[0], samples[1], rtol=1e-5, atol=1e-6)
    for first, again, other in samples:
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        assert not torch.equal(first[0], other[0])


def test_samples_do_not_depend_on_the_number_of_threads() -> None:
    logits, g, threads = draw((2500, 7)), draw((2500, 7), seed=1), torch.get_num_threads()
    samples = []
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            samples.append(run(fastnas.gumbel_softmax, logits, g, seed=3))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(t, first) for sample in samples for t, first in zip(sample, samples[0], strict=True))


def test_argmax_frequencies_are_the_softmax_of_the_logits() -> None:
    logits, count = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5]), 40_000
    drawn = fastnas.gumbel_softmax(logits.expand(count, 5), 0.5, seed=2024, hard=True).sum(0)
    expected = count * logits.softmax(0)
    chi_square = ((drawn - expected) ** 2 / expected).sum().item()
    assert drawn.sum() == count
    assert chi_square < 18.5  # 4 degrees of freedom: exceeded by one seed in a thousand


def test_consecutive_seeds_give_independent_choices() -> None:
    zeros = torch.zeros(1, 4)
    first = torch.cat([fastnas.gumbel_softmax(zeros, seed=s, hard=True) for s in range(8000)])
    pairs = first[:-1].T @ first[1:]  # [4, 4] counts of (this choice, next choice)
    expected = 7999 / 16
    assert ((pairs - expected) ** 2 / expected).sum().item() < 37.7  # 15 degrees of freedom


def test_noise_has_the_moments_of_a_gumbel_distribution() -> None:
    noise = gumbel_from_bits(random_bits(40_000, 5), torch.float64)
    assert abs(noise.mean().item() - 0.5772157) < 4 * math.sqrt(math.pi**2 / 6 / 40_000)
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.08


def test_small_tau_tends_to_the_straight_through_choice() -> None:
    logits, g = draw((50, 8)), draw((50, 8), seed=1)
    hard = fastnas.gumbel_softmax(logits, seed=4, hard=True)
    for tau in (1e-4, 1e-20, 1e-37):
        y, grad = run(fastnas.gumbel_softmax, logits, g, tau, seed=4)
        torch.testing.assert_close(y, hard, atol=1e-3, rtol=0)
        assert grad.isfinite().all()


def test_large_tau_tends_to_the_uniform_distribution() -> None:
    y, grad = run(fastnas.gumbel_softmax, draw((50, 8)), torch.ones(50, 8), 1e9, seed=4)
    torch.testing.assert_close(y, torch.full((50, 8), 1 / 8))
    assert grad.abs().max() < 1e-9


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_large_and_infinite_logits(backend: str) -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0, 1.0], [1.0, -torch.inf, 2.0, -torch.inf]])
    with fastnas.backend(f"gumbel_softmax={backend}"):
        y, grad = run(fastnas.gumbel_softmax, logits, torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(2, 4), seed=1)
        hard = fastnas.gumbel_softmax(logits, seed=1, hard=True)
        nan = [fastnas.gumbel_softmax(torch.tensor([[1.0, torch.nan], [0, 0]]), seed=1, hard=h) for h in (0, 1)]
    assert y[0].tolist() == hard[0].tolist() == [1, 0, 0, 0]
    assert (y[1] > 0).tolist() == [True, False, True, False]
    assert grad.isfinite().all()
    for t in nan:
        assert t.isnan().tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_layouts_do_not_change_the_noise_of_an_element(hard: bool) -> None:
    dense, g = draw((6, 4, 8)), draw((6, 4, 8), seed=1)
    wide = draw((6, 4, 16))
    wide[..., ::2] = dense
    expected = run(fastnas.gumbel_softmax, dense, g, seed=9, hard=hard)
    for logits in (dense.permute(2, 0, 1).contiguous().permute(1, 2, 0), wide[..., ::2]):
        assert not logits.is_contiguous()
        ours = run(fastnas.gumbel_softmax, logits, g.mT.contiguous().mT, seed=9, hard=hard)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
        assert ours[0].is_contiguous()
    row = torch.zeros(1, 8).expand(5, 8)
    assert not fastnas.gumbel_softmax(row, seed=9).diff(dim=0).eq(0).any()


def test_tensors_for_seed_and_tau_give_the_same_samples() -> None:
    logits, g = draw((28, 8)), draw((28, 8), seed=1)
    expected = run(fastnas.gumbel_softmax, logits, g, 0.625, seed=-12345678901)
    for tau in (0.625, torch.tensor(0.625), torch.tensor(0.625, dtype=torch.float64)):
        for seed in (-12345678901, torch.tensor(-12345678901)):
            assert all(map(torch.equal, run(fastnas.gumbel_softmax, logits, g, tau, seed=seed), expected))


def test_a_learnt_tau_gets_its_gradient() -> None:
    logits, tau = draw((3, 4), torch.float64), torch.tensor(0.8, dtype=torch.float64)
    inputs = [logits.requires_grad_(), tau.requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, t: fastnas.gumbel_softmax(x, t, seed=2), inputs)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_first_and_second_derivatives(backend: str) -> None:
    logits = draw((2, 4), torch.float64).requires_grad_()
    with fastnas.backend(f"gumbel_softmax={backend}"):
        assert torch.autograd.gradcheck(lambda x: fastnas.gumbel_softmax(x, 0.7, seed=2), [logits])
        assert torch.autograd.gradgradcheck(lambda x: fastnas.gumbel_softmax(x, 0.7, seed=2), [logits])


def test_noise_is_not_saved() -> None:
    logits = draw((28, 8)).requires_grad_()
    assert saved_bytes(lambda: fastnas.gumbel_softmax(logits, seed=1, hard=True)) == logits.nbytes
    assert saved_bytes(lambda: fastnas.gumbel_softmax(logits, seed=1)) == 2 * logits.nbytes  # and the sample itself


@pytest.mark.parametrize("shape", [(1,), (28, 8), (0, 8), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("as_tensors", [False, True], ids=["numbers", "tensors"])
def test_flat_ops_pass_opcheck(shape: tuple[int, ...], as_tensors: bool) -> None:
    logits, g = draw(shape), draw(shape, seed=1)
    tensors = (torch.tensor(5), torch.tensor(0.7)) if as_tensors else (None, None)
    for hard in (False, True):
        torch.library.opcheck(flat._fwd, (logits, 5, 0.7, *tensors, hard))
    torch.library.opcheck(flat._bwd, (g, logits, 5, 0.7, *tensors, None))
    torch.library.opcheck(flat._bwd, (g, logits, 5, 0.7, *tensors, logits.softmax(-1)))
    torch.library.opcheck(flat._fwd, (logits.movedim(0, -1), 5, 0.7, *tensors, False))


@pytest.mark.parametrize("tensors", [(None, None), (torch.tensor(5), torch.tensor(0.7))], ids=["numbers", "tensors"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flat_references_agree_with_the_kernels(dtype: torch.dtype, tensors: tuple) -> None:
    logits, g = draw((8, 28), dtype).T, draw((28, 8), dtype, seed=1)
    for kernel, plain, args in (
        (flat._fwd, flat._fwd_reference, (logits, 5, 0.7, *tensors, False)),
        (flat._fwd, flat._fwd_reference, (logits, 5, 0.7, *tensors, True)),
        (flat._bwd, flat._bwd_reference, (g, logits, 5, 0.7, *tensors, None)),
        (flat._bwd, flat._bwd_reference, (g, logits, 5, 0.7, *tensors, logits.softmax(-1))),
    ):
        torch.testing.assert_close(kernel(*args), plain(*args), check_stride=True)


@pytest.mark.parametrize(("backend", "compiler"), [("native", "inductor"), ("reference", "aot_eager")])
def test_compiles_as_one_graph(backend: str, compiler: str) -> None:
    logits, g = draw((6, 8)), draw((6, 8), seed=1)

    def f(x: Tensor, tau: float | Tensor, seed: int | Tensor) -> Tensor:
        return fastnas.gumbel_softmax(x * 2, tau, seed=seed)

    torch._dynamo.reset()
    with fastnas.backend(f"gumbel_softmax={backend}"):
        compiled = torch.compile(f, fullgraph=True, backend=compiler)
        for seed in (3, 4):
            ours = run(compiled, logits, g, torch.tensor(0.7), seed=torch.tensor(seed))
            torch.testing.assert_close(ours, run(f, logits, g, 0.7, seed=seed))


def test_compiles_with_numbers_for_seed_and_tau() -> None:
    def f(x: Tensor, tau: float, seed: int) -> Tensor:
        return fastnas.gumbel_softmax(x, tau, seed=seed, hard=True)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    logits, g = draw((6, 8)), draw((6, 8), seed=1)
    for seed in (3, 4, -5):
        torch.testing.assert_close(run(compiled, logits, g, 0.7, seed=seed), run(f, logits, g, 0.7, seed=seed))


def test_one_graph_serves_every_seed_and_tau_given_as_tensors() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    f = torch.compile(lambda x, t, s: fastnas.gumbel_softmax(x, t, seed=s), fullgraph=True, backend=count)
    samples = [f(torch.zeros(2, 4), torch.tensor(0.5 + s), torch.tensor(s)) for s in range(4)]
    assert len(graphs) == 1
    assert len({tuple(sample.flatten().tolist()) for sample in samples}) == 4


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_dtypes_alone(dtype: torch.dtype, backend: str) -> None:
    logits, g = draw((28, 8), dtype), draw((28, 8), dtype, seed=1)
    with fastnas.backend(f"gumbel_softmax={backend}"):
        expected = run(fastnas.gumbel_softmax, logits, g, seed=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = run(fastnas.gumbel_softmax, logits, g, seed=1)
    torch.testing.assert_close(inside, expected, rtol=0, atol=0)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("logits", "tau", "seed", "error", "message"),
    [
        ([0.0], 1.0, 0, TypeError, "logits must be a tensor, got list"),
        (X.long(), 1.0, 0, TypeError, "logits must be float32.* got torch.int64"),
        (X[0, 0], 1.0, 0, ValueError, r"logits must have at least one dimension, got shape \(\)"),
        (X, 0.0, 0, ValueError, "tau must be positive, got 0.0"),
        (X, math.nan, 0, ValueError, "tau must be positive, got nan"),
        (X, torch.ones(1), 0, ValueError, r"tau must be a number or a 0-dim tensor, got shape \(1,\)"),
        (X, torch.tensor(1), 0, TypeError, "tau must be float32.* got torch.int64"),
        (X, "1", 0, TypeError, "tau must be a tensor, got str"),
        (X, torch.ones((), device="meta"), 0, ValueError, "tau is on meta, logits on cpu"),
        (X, 1.0, 1.5, TypeError, "seed must be an int or an int64 tensor, got float"),
        (X, 1.0, torch.tensor(1.0), TypeError, "seed must be an int or an int64 tensor, got torch.float32"),
        (X, 1.0, torch.zeros(2, dtype=torch.int64), ValueError, r"seed must be .* got shape \(2,\)"),
        (X, 1.0, torch.zeros((), dtype=torch.int64, device="meta"), ValueError, "seed is on meta, logits on cpu"),
        (X, 1.0, 2**63, ValueError, "seed must fit into 64 bits"),
    ],
)
def test_wrong_arguments_are_named(logits, tau, seed, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"gumbel_softmax: .*{message}"):
        fastnas.gumbel_softmax(logits, tau, seed=seed)


def test_flat_op_protects_memory() -> None:
    with pytest.raises(RuntimeError, match="shape and dtype of logits"):
        flat._bwd(torch.zeros(2, 2), X, 0, 1.0, None, None, None)
