from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastnas
from fastnas.reference.norm_mixed_sum import norm_mixed_sum as reference
from fastnas.testing import DTYPES, MAPS, Case, assert_as_accurate, saved_bytes

flat = importlib.import_module("fastnas.ops.norm_mixed_sum")
K = 4
EPS = 1e-5
SMALL = [case for case in MAPS if case.name not in ("large", "one-element")]
SHAPES = [
    Case("vectors", (6, 7)),
    Case("one-channel", (5, 1, 4, 4)),
    Case("one-channel-vectors", (300, 1)),
    Case("one-image", (1, 6, 12, 13)),
    Case("sequence", (3, 4, 50)),
    Case("volume", (2, 3, 4, 5, 6)),
    Case("runs-of-several-blocks", (2, 3, 50, 90)),
    Case("several-segments", (40, 2, 33, 32)),
    Case("several-tiles", (9, 130, 3, 3)),
    Case("merged-rows-and-a-rest", (37, 4, 1, 5), "channels_last"),
    Case("many-channels", (3, 300, 2, 2), "channels_last"),
    Case("sliced-channels-last", (4, 70, 3, 3), "channels_last"),
]


def weights_for(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.softmax(torch.linspace(-1, 1, count, dtype=torch.float64), 0).to(dtype)


def running_for(count: int, channels: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    means, variances = (f(count, channels, generator=generator, dtype=torch.float64) for f in (torch.randn, torch.rand))
    return list(means.to(dtype)), list((variances + 0.5).to(dtype))


def run(f, ys: list[Tensor], plain: list[Tensor], w: Tensor, g: Tensor, training: bool) -> tuple[Tensor, ...]:
    """Output, gradients of weights, ys and plain, and in training the updated running statistics."""
    w = w.detach().requires_grad_()
    ys = [y.detach().requires_grad_() for y in ys]
    plain = [x.detach().requires_grad_() for x in plain]
    wide = torch.float64 if ys[0].dtype == torch.float64 else torch.float32
    means, variances = running_for(len(ys), ys[0].shape[1], wide)
    y = f(ys, w, means, variances, plain=plain, training=training, momentum=0.3)
    grads = torch.autograd.grad(y, [w, *ys, *plain], g)
    return y, *grads, *(means + variances if training else ())


def exact(ys: list[Tensor], plain: list[Tensor], w: Tensor, g: Tensor, training: bool) -> list[Tensor]:
    """The same by the formulas, in the widest floating type of the machine, so that float64 can be judged too."""

    def wide(t: Tensor) -> np.ndarray:
        return t.detach().double().numpy().astype(np.longdouble)

    axes = tuple(d for d in range(g.dim()) if d != 1)
    shape = [1, -1] + [1] * (g.dim() - 2)
    scales, gs, count = wide(w).ravel(), wide(g), g.numel() // g.shape[1]
    dtype = torch.float64 if ys[0].dtype == torch.float64 else torch.float32
    running = running_for(len(ys), ys[0].shape[1], dtype)
    y, dws, dys, means, variances = np.zeros_like(gs), [], [], [], []
    for k, t in enumerate(ys):
        x, mean, var = wide(t), wide(running[0][k]), wide(running[1][k])
        if training and count:
            batch_mean, batch_var = x.mean(axes), x.var(axes)
            means.append(np.longdouble(0.7) * mean + np.longdouble(0.3) * batch_mean)
            variances.append(np.longdouble(0.7) * var + np.longdouble(0.3) * batch_var * count / (count - 1))
            mean, var = batch_mean, batch_var
        elif training:
            means.append(mean)
            variances.append(var)
        r = 1 / np.sqrt(var + np.longdouble(EPS))
        normal = (x - mean.reshape(shape)) * r.reshape(shape)
        y += scales[k] * normal
        dot = (gs * normal).sum(axes)
        dws.append(dot.sum())
        inner = gs
        if training and count:
            inner = gs - (gs.sum(axes).reshape(shape) + normal * dot.reshape(shape)) / count
        dys.append(scales[k] * r.reshape(shape) * inner)
    dplain = []
    for v, t in zip(scales[len(ys) :], plain, strict=True):
        y += v * wide(t)
        dws.append((gs * wide(t)).sum())
        dplain.append(v * gs)
    results = [y, np.stack(dws).reshape(w.shape), *dys, *dplain, *means, *variances]
    return [torch.from_numpy(np.asarray(t).astype(np.float64)) for t in results]


def compare(ys: list[Tensor], plain: list[Tensor], w: Tensor, g: Tensor, training: bool) -> None:
    ours = run(fastnas.norm_mixed_sum, ys, plain, w, g, training)
    eager = run(reference, ys, plain, w, g, training)
    for value, theirs, truth in zip(ours, eager, exact(ys, plain, w, g, training), strict=True):
        assert_as_accurate(value, theirs, truth)


def inputs(case: Case, dtype: torch.dtype = torch.float32, count: int = K) -> tuple[list[Tensor], Tensor]:
    return case.tensors(count, dtype), case.tensors(1, dtype, seed=1)[0]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, dtype) for case in MAPS for dtype in DTYPES), *((s, d) for s in SHAPES for d in DTYPES[::3])],
    ids=str,
)
def test_value_statistics_and_every_gradient(case: Case, dtype: torch.dtype, poisoned: None) -> None:
    xs, g = inputs(case, dtype)
    compare(xs[:-1], xs[-1:], weights_for(K), g, False)
    if case.name != "one-element":  # it has no variance
        compare(xs[:-1], xs[-1:], weights_for(K), g, True)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("counts", [(1, 0), (2, 0), (3, 2), (4, 1), (5, 0), (8, 0), (9, 4), (24, 1)], ids=str)
def test_any_number_of_tensors(counts: tuple[int, int], training: bool, poisoned: None) -> None:
    for case in (Case("small", (3, 5, 7, 9)), Case("planes", (3, 2, 12, 13))):
        xs, g = inputs(case, count=sum(counts))
        compare(xs[: counts[0]], xs[counts[0] :], weights_for(sum(counts)), g, training)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape_and_strides(data: st.DataObject) -> None:
    """Against float64, loosely: with very few values a channel, PyTorch's own error can be 0 by luck."""
    shape = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=4))
    shape[0] += 2
    ys = []
    for seed in range(data.draw(st.integers(1, 4))):
        order = data.draw(st.permutations(range(len(shape))))
        gap = data.draw(st.integers(0, len(shape)))
        stored = [shape[d] + 2 * (d == gap) for d in order]
        y = torch.randn(stored, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        y = y.permute([order.index(d) for d in range(len(shape))])
        ys.append(y.narrow(gap, 1, shape[gap]) if gap < len(shape) else y)
    g = torch.randn(shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    w = weights_for(len(ys))
    for training in (True, False):
        ours = run(fastnas.norm_mixed_sum, ys, [], w, g, training)
        for value, truth in zip(ours, exact(ys, [], w, g, training), strict=True):
            torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_means_far_from_zero_cost_no_digits(dtype: torch.dtype, layout: str) -> None:
    ys, g = inputs(Case("map", (8, 4, 12, 12), layout), dtype)
    compare([y + 1000 for y in ys], [], weights_for(K), g, True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_outlier_among_the_values_that_center_the_sums(layout: str) -> None:
    ys, g = inputs(Case("map", (8, 4, 12, 12), layout))
    ys[0][0, 0, 0, 0] = 200
    compare(ys, [], weights_for(K), g, True)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_channels_become_zero(value: float) -> None:
    ys = [torch.full((4, 3, 5, 5), value), torch.randn(4, 3, 5, 5)]
    y = fastnas.norm_mixed_sum(ys, torch.tensor([1.0, 0.0]))
    assert y.abs().max() < 1e-3


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_equals_batch_norm_modules(layout: str, training: bool) -> None:
    """Outputs, running statistics and gradients of the modules whose place the op takes, over two steps."""
    modules = [nn.BatchNorm2d(4, affine=False).train(training) for _ in range(3)]
    means = [torch.zeros(4) for _ in modules]
    variances = [torch.ones(4) for _ in modules]
    w = weights_for(4).requires_grad_()
    for step in range(2):
        ys = [y.requires_grad_() for y in Case("map", (6, 4, 9, 8), layout).tensors(3, seed=step)]
        skip = torch.randn(6, 4, 9, 8).requires_grad_()
        ours = fastnas.norm_mixed_sum(ys, w, means, variances, plain=[skip], training=training)
        theirs = sum(w[k] * norm(y) for k, (norm, y) in enumerate(zip(modules, ys, strict=True))) + w[3] * skip
        torch.testing.assert_close(ours, theirs)
        g = torch.randn(6, 4, 9, 8)
        leaves = [w, *ys, skip]
        torch.testing.assert_close(torch.autograd.grad(ours, leaves, g), torch.autograd.grad(theirs, leaves, g))
        for norm, mean, var in zip(modules, means, variances, strict=True):
            torch.testing.assert_close(mean, norm.running_mean)
            torch.testing.assert_close(var, norm.running_var)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_one_value_a_channel_raises_what_batch_norm_raises(backend: str) -> None:
    y = torch.randn(1, 3, 1, 1)
    with pytest.raises(ValueError) as theirs:
        nn.BatchNorm2d(3, affine=False)(y)
    with fastnas.backend(f"norm_mixed_sum={backend}"), pytest.raises(ValueError) as ours:
        fastnas.norm_mixed_sum([y], torch.ones(1))
    assert str(ours.value) == str(theirs.value)
    means, variances = running_for(1, 3)
    assert fastnas.norm_mixed_sum([y], torch.ones(1), means, variances, training=False).shape == y.shape


def test_empty_batch_leaves_running_statistics_alone_as_batch_norm_does() -> None:
    norm, y = nn.BatchNorm2d(3, affine=False), torch.randn(0, 3, 4, 4)
    means, variances = [torch.zeros(3)], [torch.ones(3)]
    out = fastnas.norm_mixed_sum([y.requires_grad_()], torch.ones(1), means, variances)
    assert out.shape == norm(y).shape
    assert torch.autograd.grad(out.sum(), y)[0].shape == y.shape
    assert torch.equal(means[0], norm.running_mean)
    assert torch.equal(variances[0], norm.running_var)


def test_running_statistics_as_one_tensor_and_as_a_list_are_the_same() -> None:
    ys = Case("map", (4, 3, 5, 5)).tensors(2)
    means, variances = running_for(2, 3)
    stacked = torch.stack(means), torch.stack(variances)
    for training in (True, False):
        a = fastnas.norm_mixed_sum(ys, weights_for(2), means, variances, training=training, momentum=0.2)
        b = fastnas.norm_mixed_sum(ys, weights_for(2), *stacked, training=training, momentum=0.2)
        assert torch.equal(a, b)
        assert torch.equal(torch.stack(means), stacked[0])
        assert torch.equal(torch.stack(variances), stacked[1])


def test_node_level_weights_are_taken_row_by_row() -> None:
    ys = Case("odd", (2, 3, 5, 5)).tensors(6)
    w = torch.arange(6.0).view(2, 3).requires_grad_()
    y = fastnas.norm_mixed_sum(ys, w)
    torch.testing.assert_close(y, reference(ys, w))
    (dw,) = torch.autograd.grad(y, w, ys[0])
    assert dw.shape == (2, 3)
    torch.testing.assert_close(dw, torch.autograd.grad(reference(ys, w), w, ys[0])[0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_output_and_gradients_keep_the_layout(layout: str) -> None:
    ys, g = inputs(Case("map", (2, 4, 6, 5), layout), count=3)
    for training in (True, False):
        for t in run(fastnas.norm_mixed_sum, ys, [], weights_for(3), g, training):
            if t.dim() == 4:
                assert t.stride() == ys[0].stride()


@pytest.mark.parametrize(
    "case",
    [
        Case("few-tiles", (16, 3, 40, 40)),
        Case("many-tiles", (16, 16, 16, 16)),
        Case("lanes", (64, 64, 8, 8)),
        Case("channels-last", (16, 12, 40, 40), "channels_last"),
    ],
    ids=str,
)
def test_results_are_the_same_for_any_number_of_threads(case: Case) -> None:
    ys, g = inputs(case, count=3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            results.append(run(fastnas.norm_mixed_sum, ys[:2], ys[2:], weights_for(3), g, True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_normalised_tensor_is_kept_for_backward() -> None:
    """Only the inputs, the weights and two statistics a channel and tensor."""
    xs = [x.requires_grad_() for x in Case("map", (8, 4, 8, 8)).tensors(K)]
    w = weights_for(K)
    means, variances = running_for(K - 1, 4)
    small = w.nbytes + 2 * (K - 1) * 4 * 4

    def kept(training: bool) -> int:
        return saved_bytes(
            lambda: fastnas.norm_mixed_sum(xs[:-1], w, means, variances, plain=xs[-1:], training=training)
        )

    one = xs[0].nbytes
    assert (K - 1) * one <= kept(True) <= (K - 1) * one + small
    assert kept(False) <= small
    w.requires_grad_()
    assert K * one <= kept(True) <= K * one + small
    assert K * one <= kept(False) <= K * one + small
    eager = saved_bytes(lambda: reference(xs[:-1], w, means, variances, plain=xs[-1:]))
    assert eager >= kept(True) + (K - 1) * one


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("frozen", ["weights", "maps", "some ys", "plain"])
def test_frozen_inputs_get_no_gradient_and_others_the_right_one(frozen: str, training: bool) -> None:
    xs, g = inputs(Case("map", (3, 4, 8, 8)), count=4)
    w, statistics = weights_for(4), running_for(3, 4)
    trained = [w] if frozen != "weights" else []
    for k, x in enumerate(xs):
        if not (frozen == "maps" or (frozen == "some ys" and k == 1) or (frozen == "plain" and k == 3)):
            trained.append(x)
    for t in trained:
        t.requires_grad_()

    def grads(f) -> tuple[Tensor, ...]:
        y = f(xs[:3], w, *([t.clone() for t in s] for s in statistics), plain=xs[3:], training=training)
        return torch.autograd.grad(y, trained, g)

    torch.testing.assert_close(grads(fastnas.norm_mixed_sum), grads(reference))


def test_frozen_maps_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("gradients of frozen maps were computed")

    monkeypatch.setattr(flat, "_bwd", never)
    monkeypatch.setattr(flat, "_bwd_maps", never)
    ys, g = inputs(Case("map", (3, 4, 8, 8)), count=3)
    w = weights_for(3).requires_grad_()
    (dw,) = torch.autograd.grad(fastnas.norm_mixed_sum(ys, w), w, g)
    torch.testing.assert_close(dw, torch.autograd.grad(reference(ys, w), w, g)[0])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_first_and_second_derivatives(training: bool) -> None:
    xs = [x.requires_grad_() for x in Case("small", (3, 2, 2, 2)).tensors(3, torch.float64)]
    w = weights_for(3, torch.float64).requires_grad_()
    statistics = running_for(2, 2, torch.float64)

    def f(w: Tensor, *xs: Tensor) -> Tensor:
        running = () if training else statistics
        return fastnas.norm_mixed_sum(xs[:2], w, *running, plain=xs[2:], training=training)

    assert torch.autograd.gradcheck(f, (w, *xs))
    assert torch.autograd.gradgradcheck(f, (w, *xs))
    assert torch.autograd.gradgradcheck(f, (w.detach(), *xs))
    frozen = [x.detach() for x in xs]
    assert torch.autograd.gradcheck(f, (w, *frozen))


def flat_calls(case: Case) -> list[tuple]:
    """Each flat op with its reference and arguments."""
    xs, g = inputs(case, count=3)
    ys, plain, w = xs[:2], xs[2:], weights_for(3)
    mean, var = (torch.stack(t) for t in running_for(2, ys[0].shape[1]))
    return [
        (flat._fwd, flat._fwd_reference, (ys, plain, w, EPS)),
        (flat._eval, flat._fold, (ys, plain, w, mean, var, EPS)),
        (flat._bwd, flat._bwd_reference, (g, ys, plain, w, mean, var, EPS, True)),
        (flat._bwd, flat._bwd_reference, (g, ys, plain, w, mean, var, EPS, False)),
        (flat._bwd_maps, flat._bwd_maps_reference, (g, ys, w, mean, var, EPS, True)),
        (flat._bwd_maps, flat._bwd_maps_reference, (g, [], w, mean, var, EPS, False)),
        (flat._bwd_w, flat._bwd_w_reference, (g, ys, plain, w, mean, var, EPS)),
    ]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_flat_ops_pass_opcheck(case: Case) -> None:
    for kernel, _, args in flat_calls(case):
        torch.library.opcheck(kernel, args)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_flat_references_agree_with_the_kernels(case: Case) -> None:
    for kernel, plain, args in flat_calls(case):
        torch.testing.assert_close(kernel(*args), plain(*args), check_stride=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "compiler", "training"),
    [("native", "inductor", True), ("native", "aot_eager", False), ("reference", "aot_eager", True)],
)
def test_compiles_as_one_graph(backend: str, compiler: str, training: bool) -> None:
    xs, g = inputs(Case("map", (2, 4, 6, 5)), count=3)
    w = weights_for(3)

    def doubled(f):
        return lambda ys, *rest, **named: f([y * 2 for y in ys], *rest, **named)

    with fastnas.backend(f"norm_mixed_sum={backend}"):
        compiled = torch.compile(doubled(fastnas.norm_mixed_sum), fullgraph=True, backend=compiler)
        ours = run(compiled, xs[:2], xs[2:], w, g, training)
    torch.testing.assert_close(ours, run(doubled(reference), xs[:2], xs[2:], w, g, training))


def test_autocast_leaves_dtypes_alone() -> None:
    xs, g = inputs(Case("map", (2, 4, 6, 5)), count=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(fastnas.norm_mixed_sum, xs[:2], xs[2:], weights_for(3), g, True)
    outside = run(fastnas.norm_mixed_sum, xs[:2], xs[2:], weights_for(3), g, True)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


X = torch.zeros(2, 3)
M, V = torch.zeros(3), torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "named", "error", "message"),
    [
        (([], torch.ones(0)), {}, ValueError, "ys is empty"),
        ((X, torch.ones(2)), {}, TypeError, "ys must be a list of tensors"),
        (([X], torch.ones(3)), {"plain": X}, TypeError, "plain must be a list of tensors"),
        (([X, 1.0], torch.ones(2)), {}, TypeError, r"ys\[1\] must be a tensor, got float"),
        (([X.long()], torch.ones(1)), {}, TypeError, r"ys\[0\] must be float32.*int64"),
        (([torch.ones(3)], torch.ones(1)), {}, ValueError, r"ys must be \[N, C, ...\], got ys\[0\] of shape \(3,\)"),
        (([X, X.double()], torch.ones(2)), {}, TypeError, r"ys\[1\] is torch.float64, ys\[0\] is torch.float32"),
        (([X, X.T], torch.ones(2)), {}, ValueError, r"ys\[1\] has shape \(3, 2\), ys\[0\] has \(2, 3\)"),
        (([X], torch.ones(2)), {"plain": [X.T]}, ValueError, r"plain\[0\] has shape \(3, 2\)"),
        (([X, X.to("meta")], torch.ones(2)), {}, ValueError, r"ys\[1\] is on meta, ys\[0\] on cpu"),
        (([X, X], torch.ones(3)), {}, ValueError, "hold 3 values for 2 normalised and 0 plain tensors"),
        (([X], torch.ones(1)), {"plain": [X]}, ValueError, "hold 1 values for 1 normalised and 1 plain tensors"),
        (([X], torch.ones(1, dtype=torch.int64)), {}, TypeError, "weights must be floating point"),
        (([X], torch.ones(1, device="meta")), {}, ValueError, "weights are on meta, ys on cpu"),
        (([X], [1.0]), {}, TypeError, "weights must be a tensor, got list"),
        (([X], torch.ones(1)), {"training": False}, ValueError, "evaluation .* needs running_means and running_vars"),
        (([X], torch.ones(1), [M]), {}, ValueError, "must be given together"),
        (([X], torch.ones(1), [M, M], [V]), {}, ValueError, "running_means has 2 tensors for 1 in ys"),
        (([X], torch.ones(1), [M], [V[:2]]), {}, ValueError, r"running_vars\[0\] has shape \(2,\), expected \(3,\)"),
        (([X], torch.ones(1), M, V), {}, ValueError, r"running_means has shape \(3,\), expected \(1, 3\)"),
        (([X], torch.ones(1), [M.long()], [V]), {}, TypeError, r"running_means\[0\] must be a floating tensor"),
        (([X], torch.ones(1), [M.to("meta")], [V]), {}, ValueError, r"running_means\[0\] is on meta, ys on cpu"),
        (([X], torch.ones(1)), {"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
    ],
)
def test_wrong_arguments_are_named(arguments, named, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"norm_mixed_sum: .*{message}"):
        fastnas.norm_mixed_sum(*arguments, **named)


def test_flat_ops_protect_memory() -> None:
    statistics = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="one weight a tensor"):
        flat._fwd([X, X], [], torch.ones(1), EPS)
    with pytest.raises(RuntimeError, match="differ in dtype or shape"):
        flat._bwd(X, [X, X[:1]], [], torch.ones(2), *statistics, EPS, True)
    with pytest.raises(RuntimeError, match="one weight a tensor"):
        flat._bwd_maps(X, [X], torch.ones(2), *statistics, EPS, True)
    with pytest.raises(RuntimeError, match=r"statistics must be \[tensors, channels\]"):
        flat._eval([X], [], torch.ones(1), *statistics, EPS)
    with pytest.raises(RuntimeError, match=r"statistics must be \[tensors, channels\]"):
        flat._bwd_w(X, [X], [], torch.ones(1), torch.zeros(1, 2), torch.ones(1, 2), EPS)
