from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import fastnas
from fastnas.reference.depthwise_bank import depthwise_bank as reference
from fastnas.testing import DTYPES, MAPS, Case, assert_as_accurate, saved_bytes

flat = importlib.import_module("fastnas.ops.depthwise_bank")

KERNELS = ((3, 1), (5, 1), (3, 2), (5, 2))  # of a DARTS edge: size, dilation
SMALL = Case("small", (2, 3, 5, 4))
# Groups of 16 planes: several images, several groups an image, planes left over; widths between the sizes of a tile.
WIDE_CASES = (
    Case("pixel-row", (2, 5, 1, 17)),
    Case("pixel-column", (2, 5, 17, 1)),
    Case("four-channels", (5, 4, 8, 8)),
    Case("four-channels-last", (9, 4, 8, 8), "channels_last"),
    Case("eight-channels-last", (3, 8, 4, 4), "channels_last"),
    Case("many-channels-last", (2, 40, 6, 14), "channels_last"),
    Case("sixteen-channels-last", (3, 16, 12, 28), "channels_last"),
    Case("forty-channels", (2, 40, 2, 3)),
    Case("rows-of-fifty", (1, 6, 3, 50)),
)


def weights_of(channels: int, kernels: Sequence[tuple[int, int]] = KERNELS, dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(channels, 1, k, k, generator=generator, dtype=torch.float64) / k).to(dtype) for k, _ in kernels
    ]


def bank(kernels: Sequence[tuple[int, int]] = KERNELS, **options) -> dict:
    return {"dilations": [d for _, d in kernels], "max_pool": True, "avg_pool": True} | options


def run(f: Callable[..., list[Tensor]], x: Tensor, ws: list[Tensor], options: dict) -> tuple[Tensor, ...]:
    """Outputs, gradient of x, gradients of the weights."""
    x, ws = x.detach().requires_grad_(), [w.detach().requires_grad_() for w in ws]
    ys = f(x, ws, **options)
    gs = [cotangent(y, i) for i, y in enumerate(ys)]
    return *ys, *torch.autograd.grad(ys, [x, *ws], gs)


def cotangent(y: Tensor, seed: int) -> Tensor:
    """The same values in every dtype that can hold them: multiples of 1/8."""
    g = torch.randint(-16, 17, y.shape, generator=torch.Generator().manual_seed(seed)) / 8
    return g.to(y.dtype)


def compare(x: Tensor, ws: list[Tensor], options: dict) -> None:
    if x.dtype == torch.float64 or x.numel() == 1:
        # PyTorch's error against itself is 0, and by luck 0 in short sums: such values make every sum exact.
        for t in (x if x._base is None else x._base, *ws):
            t.mul_(8).round_().div_(8)
    ours = run(fastnas.depthwise_bank, x, ws, options)
    eager = run(reference, x, ws, options)
    exact = run(reference, x.double(), [w.double() for w in ws], options)
    for value, theirs, truth in zip(ours, eager, exact, strict=True):
        assert_as_accurate(value, theirs, truth)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MAPS, ids=str)
def test_value_and_every_gradient(case: Case, dtype: torch.dtype, stride: int, poisoned: None) -> None:
    (x,) = case.tensors(1, dtype)
    compare(x, weights_of(x.shape[1], dtype=dtype), bank(stride=stride))


def test_the_input_gradient_of_many_maps_is_as_accurate_as_autograds() -> None:
    # One chain of additions over all 68 taps is not: it shows in the largest error of a million values.
    (x,) = Case("pc-darts", (256, 4, 32, 32)).tensors(1)
    kernels = ((3, 1), (5, 1), (3, 2), (5, 2))
    compare(x, weights_of(4, kernels), bank(kernels, max_pool=False, avg_pool=False))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("case", WIDE_CASES, ids=str)
def test_any_width_and_number_of_channels(case: Case, stride: int, poisoned: None) -> None:
    (x,) = case.tensors(1)
    compare(x, weights_of(x.shape[1]), bank(stride=stride))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in WIDE_CASES if c.layout == "channels_last"], ids=str)
def test_channels_last_in_other_dtypes(case: Case, dtype: torch.dtype, poisoned: None) -> None:
    (x,) = case.tensors(1, dtype)
    compare(x, weights_of(x.shape[1], dtype=dtype), bank())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernels", [((1, 1),), ((7, 1), (1, 3)), ((3, 5), (9, 2)), ((3, 1),) * 9], ids=str)
def test_any_kernels(kernels: tuple[tuple[int, int], ...], stride: int, poisoned: None) -> None:
    (x,) = Case("odd", (3, 5, 7, 9)).tensors(1)
    compare(x, weights_of(5, kernels), bank(kernels, stride=stride, max_pool=False, avg_pool=False))


OPTIONS = [
    (count, {"relu": relu, "max_pool": max_pool, "avg_pool": avg_pool})
    for count, relu, max_pool, avg_pool in itertools.product((0, 2), *[(False, True)] * 3)
    if count or max_pool or avg_pool
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("count", "options"), OPTIONS, ids=str)
def test_any_combination(count: int, options: dict[str, bool], layout: str, poisoned: None) -> None:
    (x,) = Case("odd", (2, 6, 7, 9), layout).tensors(1)
    kernels = KERNELS[:count]
    compare(x, weights_of(6, kernels), bank(kernels, **options))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_outputs_and_gradients_keep_the_layout(layout: str, stride: int) -> None:
    (x,) = Case("map", (2, 4, 8, 6), layout).tensors(1)
    *ys, dx = run(fastnas.depthwise_bank, x, weights_of(4), bank(stride=stride))[: len(KERNELS) + 3]
    for t in (*ys, dx):
        assert t.is_contiguous(
            memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
        )


def test_float32_weights_serve_half_width_maps() -> None:
    (x,) = Case("map", (2, 4, 6, 5)).tensors(1, torch.bfloat16)
    ws = weights_of(4)
    compare(x, ws, bank())
    assert [t.dtype for t in run(fastnas.depthwise_bank, x, ws, bank())[-5:]] == [torch.bfloat16] + [torch.float32] * 4


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_max_pool_takes_the_first_of_equals_and_the_last_nan(layout: str, stride: int) -> None:
    x = torch.randint(0, 3, (4, 8, 9, 7)).float()
    x[0, :, 2:4, 2:4] = float("nan")
    x[1, :, 0, 0] = x[1, :, -1, -1] = float("nan")
    x[2] = -float("inf")
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    options = bank((), avg_pool=False, stride=stride)
    torch.testing.assert_close(
        run(fastnas.depthwise_bank, x, [], options), run(reference, x, [], options), rtol=0, atol=0, equal_nan=True
    )


def test_nan_spreads_as_in_pytorch() -> None:
    (x,) = Case("map", (2, 4, 9, 9)).tensors(1)
    x[0, 1, 4, 4] = float("nan")
    ours, eager = (run(f, x, weights_of(4), bank()) for f in (fastnas.depthwise_bank, reference))
    for value, theirs in zip(ours, eager, strict=True):
        assert torch.equal(value.isnan(), theirs.isnan())


def test_results_are_the_same_for_any_number_of_threads() -> None:
    (x,) = Case("large", (24, 20, 16, 16)).tensors(1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            results.append(run(fastnas.depthwise_bank, x, weights_of(20), bank()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_but_the_input_and_the_weights_is_kept_for_backward() -> None:
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    ws = [w.requires_grad_() for w in weights_of(4)]
    kept = saved_bytes(lambda: fastnas.depthwise_bank(x, ws, **bank()))
    assert kept == x.nbytes + sum(w.nbytes for w in ws)


@pytest.mark.parametrize("trained", ["x", "weights", "one weight", "x and one weight"])
def test_gradients_are_for_those_who_need_them(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(*args):
        asked.append(args[-2:])
        return bwd(*args)

    bwd = flat._bwd
    monkeypatch.setattr(flat, "_bwd", spy)
    (x,), ws = Case("map", (2, 4, 8, 8)).tensors(1), weights_of(4)
    wanted = [x] if "x" in trained else []
    wanted += {"weights": ws, "x": []}.get(trained, ws[1:2])
    for t in wanted:
        t.requires_grad_()
    gradients = []
    for f in (fastnas.depthwise_bank, reference):
        ys = f(x, ws, **bank())
        used = [i for i in range(len(ys)) if "x" in trained or trained == "weights" and i < 4 or i == 1]
        gradients.append(torch.autograd.grad([ys[i] for i in used], wanted, [cotangent(ys[i], i) for i in used]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert asked == [("x" in trained, trained != "x")]


@pytest.mark.parametrize("used", [[0], [2, 4], [5], [3, 5]], ids=str)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_unused_outputs_cost_nothing(used: list[int], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served = []

    def spy(gs, *args):
        served.append(len(gs))
        return bwd(gs, *args)

    bwd = flat._bwd
    monkeypatch.setattr(flat, "_bwd", spy)
    x, ws = torch.randn(2, 4, 8, 8, requires_grad=True), [w.requires_grad_() for w in weights_of(4)]

    def gradients(f: Callable[..., list[Tensor]]) -> tuple[Tensor | None, ...]:
        ys = f(x, ws, **bank())
        return torch.autograd.grad(
            [ys[i] for i in used], [x, *ws], [cotangent(ys[i], i) for i in used], allow_unused=True
        )

    with fastnas.backend(backend):
        ours = gradients(fastnas.depthwise_bank)
    for value, theirs in zip(ours, gradients(reference), strict=True):
        assert (value is None) == (theirs is None)
        if value is not None:
            torch.testing.assert_close(value, theirs, rtol=1e-4, atol=1e-4)
    assert served == ([len(used)] if backend == "native" else [])


@pytest.mark.parametrize("layout", ["sum", "permuted", "other layout"])
def test_gradients_may_come_in_any_layout(layout: str) -> None:
    (x,), w = Case("map", (2, 4, 6, 5)).tensors(1), weights_of(4, ((3, 1),))
    w, options = w[0].requires_grad_(), bank(((3, 1),), max_pool=False, avg_pool=False)
    x.requires_grad_()
    g = {
        "sum": torch.ones(()).expand(2, 4, 6, 5),
        "permuted": torch.randn(6, 5, 4, 2).permute(3, 2, 0, 1),
        "other layout": torch.randn(2, 4, 6, 5).to(memory_format=torch.channels_last),
    }[layout]
    ours = torch.autograd.grad(fastnas.depthwise_bank(x, [w], **options), [x, w], [g])
    torch.testing.assert_close(ours, torch.autograd.grad(reference(x, [w], **options), [x, w], [g]))


@pytest.mark.parametrize("stride", [1, 2])
def test_first_and_second_derivatives(stride: int) -> None:
    (x,) = SMALL.tensors(1, torch.float64)
    kernels = ((3, 1), (3, 2))
    ws = [w.requires_grad_() for w in weights_of(3, kernels, torch.float64)]

    def f(x: Tensor, *ws: Tensor) -> tuple[Tensor, ...]:
        return tuple(fastnas.depthwise_bank(x, ws, **bank(kernels, stride=stride)))

    assert torch.autograd.gradcheck(f, (x.requires_grad_(), *ws), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, *ws), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x.detach(), *ws), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, *(w.detach() for w in ws)), fast_mode=True)


def test_second_derivatives_reach_what_made_the_input() -> None:
    start = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    w = weights_of(3, ((3, 1),), torch.float64)[0].requires_grad_()

    def penalty(f: Callable[..., list[Tensor]]) -> tuple[Tensor, ...]:
        (y,) = f(start.sin(), [w], [1])
        (dx,) = torch.autograd.grad(y.square().sum(), start, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [start, w])

    torch.testing.assert_close(penalty(fastnas.depthwise_bank), penalty(reference))


CHECKED = [c for c in MAPS if c.name in ("one-element", "odd", "empty-batch", "channels-last", "sliced", "cropped")]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_flat_ops_pass_opcheck(case: Case, stride: int) -> None:
    (x,) = case.tensors(1)
    ws, dilations = weights_of(x.shape[1], ((3, 1), (3, 2))), [1, 2]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(flat._fwd, (x, ws, dilations, stride, True, True, True), test_utils=tests)
    gs = [cotangent(y, i) for i, y in enumerate(flat._fwd(x, ws, dilations, stride, True, True, True))]
    for needs in ((True, True), (True, False), (False, True)):
        args = (gs, x, ws, dilations, stride, True, True, True, *needs)
        torch.library.opcheck(flat._bwd, args, test_utils=tests)


def test_flat_ops_pass_opcheck_with_dynamic_shapes() -> None:
    (x,), ws = Case("odd", (3, 5, 7, 9)).tensors(1), weights_of(5, ((3, 1), (3, 2)))
    torch.library.opcheck(flat._fwd, (x, ws, [1, 2], 2, True, True, True))
    gs = flat._fwd(x, ws, [1, 2], 2, True, True, True)
    torch.library.opcheck(flat._bwd, (gs, x, ws, [1, 2], 2, True, True, True, True, True))


@pytest.mark.parametrize("case", [c for c in MAPS if c.name != "large"], ids=str)
def test_flat_references_agree_with_the_kernels(case: Case) -> None:
    (x,) = case.tensors(1)
    ws = weights_of(x.shape[1])
    args = (x, ws, [d for _, d in KERNELS], 2, True, True, True)
    ys = flat._fwd(*args)
    torch.testing.assert_close(ys, flat._fwd_reference(*args), check_stride=True, rtol=1e-4, atol=1e-5)
    gs = [cotangent(y, i) for i, y in enumerate(ys)]
    for needs in ((True, True), (True, False), (False, True)):
        (dx, dws), (dx_plain, dws_plain) = (f(gs, *args, *needs) for f in (flat._bwd, flat._bwd_reference))
        torch.testing.assert_close(dx, dx_plain, check_stride=True, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dws, dws_plain, check_stride=True, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("backend", "compiler", "used"),
    [
        ("native", "inductor", slice(0, 1)),
        ("native", "aot_eager", slice(None)),
        ("reference", "aot_eager", slice(None)),
    ],
)
def test_compiles_as_one_graph(backend: str, compiler: str, used: slice) -> None:
    (x,), ws = Case("map", (2, 4, 6, 5)).tensors(1), weights_of(4, ((3, 1), (5, 2)))
    options = bank(((3, 1), (5, 2)))
    x.requires_grad_()

    def f(op: Callable[..., list[Tensor]], x: Tensor, w0: Tensor, w1: Tensor) -> list[Tensor]:
        return [y * 2 for y in op(x * 2, [w0, w1], **options)[used]]

    with fastnas.backend(backend):
        ys = torch.compile(f, fullgraph=True, backend=compiler)(fastnas.depthwise_bank, x, *ws)
        (ours,) = torch.autograd.grad(ys, x, [cotangent(y, i) for i, y in enumerate(ys)])
    truth = f(reference, x, *ws)
    (theirs,) = torch.autograd.grad(truth, x, [cotangent(y, i) for i, y in enumerate(truth)])
    torch.testing.assert_close(ys, truth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_autocast_leaves_dtypes_alone(backend: str) -> None:
    (x,), ws = Case("map", (2, 4, 6, 5)).tensors(1), weights_of(4)
    with fastnas.backend(backend):
        outside = run(fastnas.depthwise_bank, x, ws, bank())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = run(fastnas.depthwise_bank, x, ws, bank())
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def test_the_meta_device_gives_shapes() -> None:
    ys = fastnas.depthwise_bank(torch.empty(2, 4, 9, 8, device="meta"), [], [], stride=2, max_pool=True)
    assert [y.shape for y in ys] == [(2, 4, 5, 4)]


X, W = torch.zeros(2, 3, 4, 4), torch.zeros(3, 1, 3, 3)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((1.0, [W], [1]), {}, TypeError, "x must be a tensor, got float"),
        ((X.long(), [W], [1]), {}, TypeError, "x must be float32.*int64"),
        ((X[0], [W], [1]), {}, ValueError, r"x must be \[B, C, H, W\].*\(3, 4, 4\)"),
        ((X[:, :, :0], [W], [1]), {}, ValueError, r"x must be .* H, W > 0, got shape \(2, 3, 0, 4\)"),
        ((X, W, [1]), {}, TypeError, "weights must be a list of tensors"),
        ((X, [W, W], [1]), {}, ValueError, "1 dilations for 2 weights"),
        ((X, [], []), {}, ValueError, "no output is asked for"),
        ((X, [W], [1]), {"stride": 3}, ValueError, "stride must be 1 or 2, got 3"),
        ((X, [W, 1.0], [1, 1]), {}, TypeError, r"weights\[1\] must be a tensor, got float"),
        ((X, [W.double()], [1]), {}, TypeError, r"weights\[0\] must be torch.float32.*got torch.float64"),
        ((X, [W[:2]], [1]), {}, ValueError, r"weights\[0\] must have shape \(3, 1, k, k\).*\(2, 1, 3, 3\)"),
        ((X, [W[..., :2, :2]], [1]), {}, ValueError, r"with odd k, got \(3, 1, 2, 2\)"),
        ((X, [W[..., :1]], [1]), {}, ValueError, r"with odd k, got \(3, 1, 3, 1\)"),
        ((X, [W.to("meta")], [1]), {}, ValueError, r"weights\[0\] is on meta, x on cpu"),
        ((X, [W], [0]), {}, ValueError, r"dilations\[0\] must be a positive int, got 0"),
        ((X, [W], [1.0]), {}, ValueError, r"dilations\[0\] must be a positive int, got 1.0"),
    ],
)
def test_wrong_arguments_are_named(args: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"depthwise_bank: .*{message}"):
        fastnas.depthwise_bank(*args, **options)


def test_flat_ops_protect_memory() -> None:
    with pytest.raises(RuntimeError, match="x must be"):
        flat._fwd(X[0], [], [], 1, True, True, False)
    with pytest.raises(RuntimeError, match="one dilation a weight"):
        flat._fwd(X, [W], [], 1, True, False, False)
    with pytest.raises(RuntimeError, match=r"\[C, 1, k, k\]"):
        flat._fwd(X, [W[:1]], [1], 1, True, False, False)
    with pytest.raises(RuntimeError, match="one gradient an output"):
        flat._bwd([X], X, [W], [1], 1, True, True, False, True, True)
    with pytest.raises(RuntimeError, match="differs from its output"):
        flat._bwd([X[:1]], X, [W], [1], 1, True, False, False, True, True)
