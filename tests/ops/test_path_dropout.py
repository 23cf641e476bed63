from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastnas
from fastnas.reference.path_dropout import path_dropout as reference
from fastnas.testing import CASES, DTYPES, MAPS, Case, assert_as_accurate, saved_bytes

flat = importlib.import_module("fastnas.ops.path_dropout")
K = 5


def bool_mask(groups: int, paths: int = K, seed: int = 0) -> Tensor:
    return torch.rand(groups, paths, generator=torch.Generator().manual_seed(seed)) < 0.5


def run(f, xs: list[Tensor], mask: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of the xs."""
    xs = [x.detach().requires_grad_() for x in xs]
    y = f(xs, mask)
    return y, *torch.autograd.grad(y, xs, g)


def compare(xs: list[Tensor], mask: Tensor, g: Tensor) -> None:
    ours = run(fastnas.path_dropout, xs, mask, g)
    eager = run(reference, xs, mask, g)
    exact_mask = mask.double() if mask.is_floating_point() else mask
    exact = run(reference, [x.double() for x in xs], exact_mask, g.double())
    for value, theirs, truth in zip(ours, eager, exact, strict=True):
        assert_as_accurate(value, theirs, truth)


@pytest.mark.parametrize("scaled", [False, True], ids=["bool", "scaled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_every_gradient(case: Case, dtype: torch.dtype, scaled: bool, poisoned: None) -> None:
    mask = bool_mask(3) * 1.7 if scaled else bool_mask(3)
    compare(case.tensors(K, dtype), mask, case.tensors(1, dtype, seed=1)[0])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape_strides_and_groups(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    paths = data.draw(st.integers(1, 6))
    xs = []
    for seed in range(paths):
        order = data.draw(st.permutations(range(len(shape))))
        x = torch.rand([shape[d] for d in order], generator=torch.Generator().manual_seed(seed)) + 0.5
        xs.append(x.permute([order.index(d) for d in range(len(shape))]))
    compare(xs, bool_mask(data.draw(st.integers(1, 12)), paths), xs[-1] + 1)


def test_ghost_batches_are_consecutive_runs_of_samples() -> None:
    x = torch.ones(7, 2)
    mask = torch.tensor([[1.0], [10.0], [100.0]])
    y = fastnas.path_dropout([x], mask)
    assert y[:, 0].tolist() == [1, 1, 1, 10, 10, 100, 100]  # b * 3 // 7


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_dropped_paths_are_not_read(backend: str) -> None:
    kept, dropped = torch.randn(4, 3, 5, 5), torch.full((4, 3, 5, 5), torch.nan)
    xs = [kept.requires_grad_(), dropped.requires_grad_()]
    with fastnas.backend(f"path_dropout={backend}"):
        y = fastnas.path_dropout(xs, torch.tensor([[True, False]]))
        grads = torch.autograd.grad(y, xs, torch.full_like(y, torch.inf))
    assert torch.equal(y, kept)
    assert torch.equal(grads[1], torch.zeros_like(kept))


def test_all_paths_dropped_gives_zero(poisoned: None) -> None:
    xs = Case("map", (4, 3, 5, 5)).tensors(2)
    assert not fastnas.path_dropout(xs, torch.zeros(2, 2, dtype=torch.bool)).any()


@pytest.mark.parametrize("kept", [[0], [1, 4], list(range(K))], ids=str)
def test_paths_that_nothing_drops_get_the_gradient_itself(kept: list[int]) -> None:
    mask = torch.rand(2, K) / 2
    mask[:, kept] = 1
    xs, g = [torch.randn(4, 3) for _ in range(K)], torch.randn(4, 3)
    compare(xs, mask, g)
    _, *grads = run(fastnas.path_dropout, xs, mask, g)
    assert [k for k, grad in enumerate(grads) if grad.data_ptr() == g.data_ptr()] == kept


def test_only_the_mask_is_kept_for_backward() -> None:
    xs, mask = [x.requires_grad_() for x in Case("map", (4, 3, 8, 8)).tensors(K)], bool_mask(2)
    assert saved_bytes(lambda: fastnas.path_dropout(xs, mask)) <= mask.nbytes


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_output_and_gradients_keep_the_layout(layout: str) -> None:
    xs = Case("map", (4, 3, 6, 5), layout).tensors(K)
    for t in run(fastnas.path_dropout, xs, bool_mask(2), xs[0] + 1):
        assert t.stride() == xs[0].stride()


def test_first_and_second_derivatives() -> None:
    xs = [x.requires_grad_() for x in Case("small", (4, 2, 3, 2)).tensors(3, torch.float64)]
    mask = torch.tensor([[0.0, 1.5, 0.5], [2.0, 0.0, 0.0]], dtype=torch.float64)

    def f(*xs: Tensor) -> Tensor:
        return fastnas.path_dropout(xs, mask)

    assert torch.autograd.gradcheck(f, xs)
    assert torch.autograd.gradgradcheck(f, xs)


def test_the_mask_gets_no_gradient() -> None:
    x, mask = torch.randn(4, 3, requires_grad=True), torch.ones(2, 1, requires_grad=True)
    for backend in ("native", "reference"):
        with fastnas.backend(f"path_dropout={backend}"):
            y = fastnas.path_dropout([x], mask)
        assert torch.autograd.grad(y.sum(), [x, mask], allow_unused=True)[1] is None


@pytest.mark.parametrize("case", [case for case in MAPS if case.name != "large"], ids=str)
def test_flat_ops_pass_opcheck(case: Case) -> None:
    xs, mask, g = case.tensors(K), bool_mask(2), case.tensors(1, seed=1)[0]
    torch.library.opcheck(flat._fwd, (xs, mask))
    torch.library.opcheck(flat._bwd, (g, mask))


@pytest.mark.parametrize("case", [*MAPS, Case("batch-inside", (3, 4, 6, 5), "batch_inside")], ids=str)
def test_flat_references_agree_with_the_kernels(case: Case) -> None:
    if case.layout == "batch_inside":  # the batch is not the outermost dimension in memory
        xs = [x.transpose(0, 1) for x in Case("", (4, 3, 6, 5)).tensors(K)]
    else:
        xs = case.tensors(K)
    mask, g = bool_mask(2) * 0.5, xs[0] + 1
    for kernel, plain, args in (
        (flat._fwd, flat._fwd_reference, (xs, mask)),
        (flat._bwd, flat._bwd_reference, (g, mask)),
    ):
        torch.testing.assert_close(kernel(*args), plain(*args), check_stride=True)


@pytest.mark.parametrize(("backend", "compiler"), [("native", "inductor"), ("reference", "aot_eager")])
def test_compiles_as_one_graph(backend: str, compiler: str) -> None:
    xs, mask, g = Case("map", (4, 3, 6, 5)).tensors(3), bool_mask(2, 3), torch.randn(4, 3, 6, 5)
    with fastnas.backend(f"path_dropout={backend}"):
        f = lambda xs, m: fastnas.path_dropout([x * 2 for x in xs], m)  # noqa: E731
        compiled = torch.compile(f, fullgraph=True, backend=compiler)
        ours = run(compiled, xs, mask, g)
    torch.testing.assert_close(ours, run(lambda xs, m: reference([x * 2 for x in xs], m), xs, mask, g))


def test_autocast_leaves_dtypes_alone() -> None:
    xs, g = Case("map", (4, 3, 6, 5)).tensors(K), torch.randn(4, 3, 6, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(fastnas.path_dropout, xs, bool_mask(2), g)
    torch.testing.assert_close(inside, run(fastnas.path_dropout, xs, bool_mask(2), g), rtol=0, atol=0)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("xs", "mask", "error", "message"),
    [
        ([], torch.ones(1, 0), ValueError, "xs is empty"),
        ([X.long()], torch.ones(1, 1), TypeError, r"xs\[0\] must be float32"),
        ([X, X.T], torch.ones(1, 2), ValueError, r"xs\[1\] has shape \(3, 2\)"),
        ([X[0, 0]], torch.ones(1, 1), ValueError, "must have a batch dimension"),
        (
            [X],
            torch.ones(1, 1, dtype=torch.int32),
            TypeError,
            "mask must be bool or floating point, got torch.int32",
        ),
        ([X], [[True]], TypeError, "mask must be a tensor, got list"),
        ([X], torch.ones(1), ValueError, r"mask must be \[groups, 1\] for 1 tensors, got \[1\]"),
        ([X, X], torch.ones(1, 3), ValueError, r"mask must be \[groups, 2\] for 2 tensors, got \[1, 3\]"),
        ([X], torch.ones(0, 1), ValueError, r"got \[0, 1\]"),
        ([X], torch.ones(1, 1, device="meta"), ValueError, "mask is on meta, xs on cpu"),
    ],
)
def test_wrong_arguments_are_named(xs, mask, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"path_dropout: .*{message}"):
        fastnas.path_dropout(xs, mask)


def test_flat_op_protects_memory() -> None:
    with pytest.raises(RuntimeError, match="mask must be"):
        flat._fwd([X, X], torch.ones(1, 1))


@pytest.mark.parametrize("paths", [1, 2, 7])
def test_sampled_masks_drop_everything_at_the_given_rate(paths: int) -> None:
    rate, groups = 0.3, 20_000
    mask = fastnas.sample_path_mask(paths, rate, groups, generator=torch.Generator().manual_seed(0))
    assert mask.shape == (groups, paths)
    assert mask.dtype == torch.bool
    assert abs((~mask).float().mean().item() - rate ** (1 / paths)) < 0.01
    assert abs((~mask).all(1).float().mean().item() - rate) < 0.015


def test_sampled_masks_at_the_ends_of_the_range_and_by_seed() -> None:
    assert fastnas.sample_path_mask(4, 0.0, 50).all()
    assert not fastnas.sample_path_mask(4, 1.0, 50).any()
    draws = [fastnas.sample_path_mask(4, 0.5, 9, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 0.1, 1), "at least 1"), ((1, 0.1, 0), "at least 1"), ((1, -0.1, 1), "rate"), ((1, 1.1, 1), "rate")],
)
def test_wrong_sampling_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"sample_path_mask: .*{message}"):
        fastnas.sample_path_mask(*arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_drop_path_scales_kept_samples_and_zeroes_the_rest(dtype: torch.dtype) -> None:
    x = torch.ones(4000, 2, 3, dtype=dtype, requires_grad=True)
    y = fastnas.drop_path(x, 0.8, generator=torch.Generator().manual_seed(0))
    kept = y[:, 0, 0] != 0
    assert abs(kept.float().mean().item() - 0.8) < 0.03
    torch.testing.assert_close(y, (kept.double() / 0.8).to(dtype).view(-1, 1, 1).expand_as(x))
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    torch.testing.assert_close(dx, y.detach())


def test_drop_path_is_the_identity_when_nothing_can_be_dropped() -> None:
    x = torch.randn(4, 3)
    assert fastnas.drop_path(x, 0.5, training=False) is x
    assert fastnas.drop_path(x, 1.0) is x
    assert fastnas.drop_path(x[:0], 0.5).shape == (0, 3)


@pytest.mark.parametrize(
    ("x", "keep_prob", "error", "message"),
    [
        (X, 0.0, ValueError, r"keep_prob must be in \(0, 1\], got 0.0"),
        (X, 1.5, ValueError, "keep_prob"),
        (X[0, 0], 0.5, ValueError, "batch dimension"),
        (X.long(), 0.5, TypeError, "x must be float32"),
    ],
)
def test_wrong_drop_path_arguments_are_named(x, keep_prob, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"drop_path: .*{message}"):
        fastnas.drop_path(x, keep_prob)
