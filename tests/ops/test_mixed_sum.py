from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastnas
from fastnas.reference.mixed_sum import mixed_sum as reference
from fastnas.testing import CASES, DTYPES, MAPS, Case, assert_as_accurate, saved_bytes

flat = importlib.import_module("fastnas.ops.mixed_sum")
K = 6
SMALL = [case for case in MAPS if case.name != "large"]


def weights_for(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.softmax(torch.linspace(-1, 1, count, dtype=torch.float64), 0).to(dtype)


def run(f, xs: list[Tensor], w: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Output, gradient of the weights, gradients of the xs."""
    w = w.detach().requires_grad_()
    xs = [x.detach().requires_grad_() for x in xs]
    y = f(xs, w)
    return y, *torch.autograd.grad(y, [w, *xs], g)


def compare(xs: list[Tensor], w: Tensor, g: Tensor) -> None:
    ours = run(fastnas.mixed_sum, xs, w, g)
    eager = run(reference, xs, w, g)
    exact = run(reference, [x.double() for x in xs], w.double(), g.double())
    for value, theirs, truth in zip(ours, eager, exact, strict=True):
        assert_as_accurate(value, theirs, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_every_gradient(case: Case, dtype: torch.dtype, poisoned: None) -> None:
    compare(case.tensors(K, dtype), weights_for(K), case.tensors(1, dtype, seed=1)[0])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 13, 64])
def test_any_number_of_tensors(count: int, poisoned: None) -> None:
    case = Case("odd", (3, 5, 7, 9))
    compare(case.tensors(count), weights_for(count), case.tensors(1, seed=1)[0])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape_and_strides(data: st.DataObject) -> None:
    """With positive values alone, so that no sum cancels and the rounding that is allowed is one of what was added."""
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    xs = []
    for seed in range(data.draw(st.integers(1, 6))):
        order = data.draw(st.permutations(range(len(shape))))
        gap = data.draw(st.integers(0, len(shape)))
        stored = [shape[d] + 2 * (d == gap) for d in order]
        x = torch.rand(stored, generator=torch.Generator().manual_seed(seed)) + 0.5
        x = x.permute([order.index(d) for d in range(len(shape))])
        xs.append(x.narrow(gap, 1, shape[gap]) if gap < len(shape) else x)
    compare(xs, weights_for(len(xs)), xs[-1] + 1)


def test_runs_longer_than_a_block_and_rows_of_them(poisoned: None) -> None:
    wide = [torch.randn(3, 2, 5000)[:, 1] for _ in range(K)]
    compare(wide, weights_for(K), torch.randn(3, 5000))


def test_node_level_weights_are_taken_row_by_row() -> None:
    xs = Case("odd", (2, 3, 5, 5)).tensors(6)
    w = torch.arange(6.0).view(2, 3).requires_grad_()
    y = fastnas.mixed_sum(xs, w)
    torch.testing.assert_close(y, sum(k * x for k, x in enumerate(xs)))
    (dw,) = torch.autograd.grad(y.sum(), w)
    torch.testing.assert_close(dw, torch.stack([x.sum() for x in xs]).view(2, 3))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_output_and_gradients_keep_the_layout(layout: str) -> None:
    xs = Case("map", (2, 4, 6, 5), layout).tensors(3)
    g = xs[0] + 1
    for t in run(fastnas.mixed_sum, xs, weights_for(3), g):
        if t.dim() == 4:
            assert t.stride() == xs[0].stride()


def test_gradients_are_the_same_for_any_number_of_threads() -> None:
    xs, g = Case("large", (8, 16, 32, 32)).tensors(K), torch.randn(8, 16, 32, 32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            results.append(run(fastnas.mixed_sum, xs, weights_for(K), g))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_frozen_weights_keep_no_tensor_for_backward() -> None:
    xs = [x.requires_grad_() for x in Case("map", (2, 4, 8, 8)).tensors(K)]
    w = weights_for(K)
    assert saved_bytes(lambda: fastnas.mixed_sum(xs, w)) <= w.nbytes
    assert saved_bytes(lambda: fastnas.mixed_sum(xs, w.requires_grad_())) >= sum(x.nbytes for x in xs)


@pytest.mark.parametrize("frozen", ["weights", "xs", "some xs"])
def test_frozen_inputs_get_no_gradient_and_others_the_right_one(frozen: str) -> None:
    xs, w = Case("map", (2, 4, 8, 8)).tensors(3), weights_for(3).clone()
    g = torch.randn(2, 4, 8, 8)
    trained = [x for k, x in enumerate(xs) if frozen == "weights" or (frozen == "some xs" and k != 1)]
    trained += [w] if frozen != "weights" else []
    for t in trained:
        t.requires_grad_()
    ours = torch.autograd.grad(fastnas.mixed_sum(xs, w), trained, g)
    torch.testing.assert_close(ours, torch.autograd.grad(reference(xs, w), trained, g))


def test_first_and_second_derivatives() -> None:
    xs = [x.requires_grad_() for x in Case("small", (2, 2, 3, 2)).tensors(3, torch.float64)]
    w = weights_for(3, torch.float64).requires_grad_()

    def f(w: Tensor, *xs: Tensor) -> Tensor:
        return fastnas.mixed_sum(xs, w)

    assert torch.autograd.gradcheck(f, (w, *xs))
    assert torch.autograd.gradgradcheck(f, (w, *xs))
    assert torch.autograd.gradgradcheck(f, (w.detach(), *xs))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_flat_ops_pass_opcheck(case: Case) -> None:
    xs, w, g = case.tensors(3), weights_for(3), case.tensors(1, seed=1)[0]
    torch.library.opcheck(flat._fwd, (xs, w))
    torch.library.opcheck(flat._bwd, (g, xs, w))
    torch.library.opcheck(flat._bwd_xs, (g, w))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_flat_references_agree_with_the_kernels(case: Case) -> None:
    xs, w, g = case.tensors(3), weights_for(3), case.tensors(1, seed=1)[0]
    for kernel, plain, args in (
        (flat._fwd, flat._fwd_reference, (xs, w)),
        (flat._bwd, flat._bwd_reference, (g, xs, w)),
        (flat._bwd_xs, flat._bwd_xs_reference, (g, w)),
    ):
        torch.testing.assert_close(kernel(*args), plain(*args), check_stride=True)


@pytest.mark.parametrize(("backend", "compiler"), [("native", "inductor"), ("reference", "aot_eager")])
def test_compiles_as_one_graph(backend: str, compiler: str) -> None:
    xs, w, g = Case("map", (2, 4, 6, 5)).tensors(3), weights_for(3), torch.randn(2, 4, 6, 5)
    with fastnas.backend(f"mixed_sum={backend}"):
        f = lambda xs, w: fastnas.mixed_sum([x * 2 for x in xs], w)  # noqa: E731
        compiled = torch.compile(f, fullgraph=True, backend=compiler)
        ours = run(compiled, xs, w, g)
    torch.testing.assert_close(ours, run(lambda xs, w: reference([x * 2 for x in xs], w), xs, w, g))


def test_autocast_leaves_dtypes_alone() -> None:
    xs, w, g = Case("map", (2, 4, 6, 5)).tensors(3), weights_for(3), torch.randn(2, 4, 6, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(fastnas.mixed_sum, xs, w, g)
    torch.testing.assert_close(inside, run(fastnas.mixed_sum, xs, w, g), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_width_number_survives(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)
    y = fastnas.mixed_sum([x], torch.ones(1))
    same = (y.view(torch.int16) == bits) | (x.isnan() & y.isnan())
    assert same.all()
    for factor in (0.333, 1e-5, 3.7, 1e-9):
        w = torch.tensor([factor])
        torch.testing.assert_close(fastnas.mixed_sum([x], w), (x.float() * w).to(dtype), rtol=0, atol=0, equal_nan=True)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("xs", "weights", "error", "message"),
    [
        ([], torch.ones(0), ValueError, "xs is empty"),
        (X, torch.ones(2), TypeError, "must be a list of tensors"),
        ([X, 1.0], torch.ones(2), TypeError, r"xs\[1\] must be a tensor, got float"),
        ([X.long()], torch.ones(1), TypeError, r"xs\[0\] must be float32.*int64"),
        ([X, X.double()], torch.ones(2), TypeError, r"xs\[1\] is torch.float64, xs\[0\] is torch.float32"),
        ([X, X.T], torch.ones(2), ValueError, r"xs\[1\] has shape \(3, 2\), xs\[0\] has \(2, 3\)"),
        ([X, X.to("meta")], torch.ones(2), ValueError, r"xs\[1\] is on meta, xs\[0\] on cpu"),
        ([X, X], torch.ones(3), ValueError, r"weights of shape \(3,\) hold 3 values for 2 tensors"),
        ([X, X], torch.ones(2, dtype=torch.int64), TypeError, "weights must be floating point"),
        ([X, X], torch.ones(2, device="meta"), ValueError, "weights are on meta, xs on cpu"),
        ([X, X], [0.5, 0.5], TypeError, "weights must be a tensor, got list"),
    ],
)
def test_wrong_arguments_are_named(xs, weights, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"mixed_sum: .*{message}"):
        fastnas.mixed_sum(xs, weights)


def test_flat_ops_protect_memory() -> None:
    with pytest.raises(RuntimeError, match="one weight a tensor"):
        flat._fwd([X, X], torch.ones(1))
    with pytest.raises(RuntimeError, match="differ in dtype or shape"):
        flat._bwd(torch.zeros(5), [X, X], torch.ones(2))
