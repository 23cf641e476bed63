from __future__ import annotations

import importlib
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastnas
from fastnas.reference.partial_shuffle import partial_shuffle as reference
from fastnas.testing import DTYPES, Case, assert_as_accurate, saved_bytes

flat = importlib.import_module("fastnas.ops.partial_shuffle")


@dataclass(frozen=True)
class Setting:
    """Inputs of one edge: ``total`` channels of which ``total // k`` are mixed, ``paths`` candidates."""

    name: str
    batch: int
    total: int
    k: int
    size: tuple[int, int]
    stride: int = 1
    layout: str = "contiguous"
    paths: int = 3

    def __str__(self) -> str:
        return self.name

    def draw(self, dtype: torch.dtype = torch.float32, channels: bool = False):
        """``mixed, weights, bypass, channels, g``; the bypass is a view of a larger tensor, as in a supernet."""
        height, width = (-(-n // self.stride) for n in self.size)
        count = self.total // self.k
        x = Case("", (self.batch, self.total, *self.size), self.layout).tensors(1, dtype)[0]
        mixed = Case("", (self.batch, count, height, width), self.layout).tensors(self.paths, dtype, seed=1)
        g = Case("", (self.batch, self.total, height, width), self.layout).tensors(1, dtype, seed=2)[0]
        weights = torch.linspace(-0.4, 1.0, self.paths, dtype=torch.float64 if dtype == torch.float64 else None)
        if not channels:
            return mixed, weights, x[:, count:], None, g
        generator = torch.Generator().manual_seed(3)
        return mixed, weights, x, fastnas.sample_channels(self.total, self.k, generator), g


SETTINGS = (
    Setting("one-element", 1, 1, 1, (1, 1)),
    Setting("k1", 2, 3, 1, (4, 5)),
    Setting("k1-stride2", 2, 3, 1, (5, 4), stride=2),
    Setting("k2", 3, 6, 2, (5, 7)),
    Setting("k4", 2, 8, 4, (6, 6)),
    Setting("k8-one-mixed-channel", 2, 8, 8, (5, 3)),
    Setting("empty-batch", 0, 8, 4, (6, 6)),
    Setting("stride2-even", 2, 8, 4, (8, 6), stride=2),
    Setting("stride2-odd", 2, 8, 4, (7, 9), stride=2),
    Setting("stride2-one-pixel", 2, 4, 2, (1, 1), stride=2),
    Setting("stride2-empty", 0, 8, 4, (7, 7), stride=2),
    Setting("large", 8, 16, 4, (34, 37), stride=2, paths=8),
    Setting("long-plane", 2, 4, 2, (70, 71), paths=8),
    Setting("channels-last", 3, 12, 4, (5, 7), layout="channels_last"),
    Setting("channels-last-k1", 3, 5, 1, (5, 7), layout="channels_last"),
    Setting("channels-last-stride2-odd", 3, 24, 4, (7, 9), stride=2, layout="channels_last"),
    Setting("channels-last-wide", 1, 8, 4, (3, 1100), layout="channels_last"),
    Setting("sliced", 2, 8, 4, (5, 6), layout="sliced"),
    Setting("cropped-stride2", 2, 8, 2, (5, 7), stride=2, layout="cropped"),
    Setting("expanded", 3, 8, 4, (5, 6), layout="expanded"),
    Setting("expanded-stride2", 3, 8, 4, (5, 6), stride=2, layout="expanded"),
    Setting("mixed-strides", 3, 8, 4, (6, 5), layout="mixed", paths=5),
)
SMALL = tuple(s for s in SETTINGS if s.name not in ("large", "long-plane", "channels-last-wide"))
FEW = tuple(s for s in SMALL if s.name in ("k1", "empty-batch", "stride2-odd", "channels-last", "mixed-strides"))
FORMS = pytest.mark.parametrize("channels", [False, True], ids=["shuffled", "channels"])


def run(f, mixed, weights, bypass, channels, g, *, stride: int = 1) -> tuple[Tensor, ...]:
    """Output and gradients of the mixed tensors, the weights and the bypass."""
    mixed = [m.detach().requires_grad_() for m in mixed]
    weights, bypass = weights.detach().requires_grad_(), bypass.detach().requires_grad_()
    y = f(mixed, weights, bypass, stride=stride, channels=channels)
    return y, *torch.autograd.grad(y, [*mixed, weights, bypass], g)


def compare(inputs: tuple, stride: int) -> None:
    mixed, weights, bypass, channels, g = inputs
    ours, eager = run(fastnas.partial_shuffle, *inputs, stride=stride), run(reference, *inputs, stride=stride)
    doubles = ([m.double() for m in mixed], weights.double(), bypass.double(), channels, g.double())
    for value, theirs, truth in zip(ours, eager, run(reference, *doubles, stride=stride), strict=True):
        if value.dtype == torch.float64:  # PyTorch's own result is the truth here
            torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)
        else:
            assert_as_accurate(value, theirs, truth)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_value_and_every_gradient(setting: Setting, dtype: torch.dtype, channels: bool, poisoned: None) -> None:
    compare(setting.draw(dtype, channels), setting.stride)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_shape_and_strides(data: st.DataObject) -> None:
    """With positive values alone, so that no sum cancels and the rounding that is allowed is one of what was added."""
    batch, count = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    total, stride = count * data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2))
    size = [data.draw(st.integers(1, 9)) for _ in range(2)]
    out = [-(-n // stride) for n in size]
    seeds = iter(range(100))

    def any_layout(*shape: int) -> Tensor:
        order = data.draw(st.permutations(range(4)))
        dense = torch.rand([shape[d] for d in order], generator=torch.Generator().manual_seed(next(seeds)))
        return (dense + 0.5).permute([order.index(d) for d in range(4)])

    mixed = [any_layout(batch, count, *out) for _ in range(data.draw(st.integers(1, 3)))]
    x, g = any_layout(batch, total, *size), any_layout(batch, total, *out)
    channels = fastnas.sample_channels(total, total // count) if data.draw(st.booleans()) else None
    compare((mixed, torch.rand(len(mixed)), x if channels is not None else x[:, count:], channels, g), stride)


def flow(order: list[int], k: int, count: int) -> list[int]:
    """The channels of the result when channel c of the concatenation holds the number c everywhere."""
    s = torch.arange(k * count).float().view(1, -1, 1, 1).expand(2, -1, 3, 3)
    y = fastnas.partial_shuffle([s[:, :count]], torch.ones(1), s[:, count:])
    assert y.shape == (2, k * count, 3, 3)
    assert (y == y[:1, :, :1, :1]).all()
    return y[0, :, 0, 0].int().tolist()


@pytest.mark.parametrize(
    ("k", "count", "order"),
    [
        (1, 3, [0, 1, 2]),
        (2, 1, [0, 1]),
        (2, 3, [0, 3, 1, 4, 2, 5]),
        (4, 2, [0, 2, 4, 6, 1, 3, 5, 7]),
        (4, 4, [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]),
        (8, 2, [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]),
    ],
)
def test_channels_are_shuffled_with_k_groups(k: int, count: int, order: list[int]) -> None:
    # y[c * K + g] = s[g * (C/K) + c]
    assert flow(order, k, count) == order
    assert [g * count + c for c in range(count) for g in range(k)] == order


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_two_groups_are_the_channel_shuffle_of_shufflenet(layout: str) -> None:
    left, right = Case("", (3, 6, 5, 7), layout).tensors(2)
    assert torch.equal(fastnas.partial_shuffle([left], None, right), F.channel_shuffle(torch.cat([left, right], 1), 2))


@pytest.mark.parametrize("stride", [1, 2])
def test_channels_follow_equation_1_with_the_mask(stride: int) -> None:
    x, channels = torch.randn(3, 8, 7, 6), torch.tensor([1, 4, 6, 7])
    pool = (lambda t: F.max_pool2d(t, 2, 2, ceil_mode=True)) if stride == 2 else (lambda t: t)
    mask = torch.zeros(8).index_fill(0, channels, 1.0).view(1, 8, 1, 1)
    mixed = [torch.randn(3, 4, *pool(x).shape[2:]) for _ in range(3)]
    weights = torch.rand(3).softmax(0)
    placed = [torch.zeros_like(pool(x)).index_copy(1, channels, m) for m in mixed]
    expected = sum(w * m for w, m in zip(weights, placed, strict=True)) + (1 - mask) * pool(x)
    y = fastnas.partial_shuffle(mixed, weights, x, stride=stride, channels=channels)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pool_chooses_as_max_pool2d_among_ties_and_nans(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randint(0, 3, (4, 20, 37, 35), generator=torch.Generator().manual_seed(0)).to(dtype)
    x[x == 2] = torch.inf
    x[:, 10:][torch.rand(4, 10, 37, 35) < 0.2] = torch.nan
    x[:, 15:][torch.rand(4, 5, 37, 35) < 0.5] = -torch.inf
    x = x.to(memory_format=layout).requires_grad_()
    mixed, g = torch.zeros(4, 4, 19, 18, dtype=dtype), torch.randn(4, 20, 19, 18).to(dtype)
    y = fastnas.partial_shuffle([mixed], None, x[:, 4:], stride=2)
    expected = reference([mixed], None, x[:, 4:], stride=2)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    for cotangent in (g, g.to(memory_format=layout)):
        ours, theirs = (torch.autograd.grad(t, x, cotangent, retain_graph=True)[0] for t in (y, expected))
        assert torch.equal(ours, theirs)


@FORMS
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_output_and_gradients_keep_the_layout(layout: str, stride: int, channels: bool) -> None:
    setting = Setting("", 3, 12, 4, (6, 8), stride, layout)
    kind = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    y, *mixed, weights, bypass = run(fastnas.partial_shuffle, *setting.draw(channels=channels), stride=stride)
    for t in (y, *mixed, bypass):
        assert t.is_contiguous(memory_format=kind)


def allocated(run) -> int:
    """Bytes allocated while ``run()`` executes, whether freed again or not."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        kept = run()
    del kept
    sizes = [e.self_cpu_memory_usage for e in profiler.events()]
    return sum(size for size in sizes if size > 0)


@FORMS
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_nothing_but_the_results_is_allocated(layout: str, stride: int, channels: bool) -> None:
    mixed, weights, bypass, at, _ = Setting("", 16, 16, 4, (32, 32), stride, layout).draw(channels=channels)
    y = flat._fwd(mixed, weights, bypass, at, stride)
    needed = allocated(lambda: torch.empty_like(y))
    assert needed >= y.nbytes
    assert allocated(lambda: flat._fwd(mixed, weights, bypass, at, stride)) == needed

    args = (y, mixed, weights, bypass if stride == 2 else None, at, True)
    dmixed, dweights, dbypass = flat._bwd(*args)
    needed = allocated(lambda: [torch.empty_like(t) for t in (*dmixed, dweights, dbypass)])
    assert allocated(lambda: flat._bwd(*args)) == needed


def saved(stride: int, *, weights_grad: bool, bypass_grad: bool) -> tuple[int, int, int]:
    mixed, weights, bypass, _, _ = Setting("", 4, 16, 4, (8, 8), stride).draw()
    bypass = bypass.contiguous()
    mixed = [m.requires_grad_() for m in mixed]
    weights.requires_grad_(weights_grad)
    bypass.requires_grad_(bypass_grad)
    size = saved_bytes(lambda: fastnas.partial_shuffle(mixed, weights, bypass, stride=stride))
    return size - weights.nbytes, sum(m.nbytes for m in mixed), bypass.nbytes


def test_only_what_a_gradient_needs_is_kept() -> None:
    size, mixed, bypass = saved(1, weights_grad=True, bypass_grad=True)
    assert size == mixed
    size, mixed, bypass = saved(2, weights_grad=True, bypass_grad=True)
    assert size == mixed + bypass
    assert saved(1, weights_grad=False, bypass_grad=True)[0] == 0
    size, mixed, bypass = saved(2, weights_grad=False, bypass_grad=True)
    assert size == bypass
    assert saved(2, weights_grad=False, bypass_grad=False)[0] == 0


@FORMS
@pytest.mark.parametrize("wanted", ["mixed", "weights", "bypass"])
@pytest.mark.parametrize("stride", [1, 2])
def test_each_gradient_alone(stride: int, wanted: str, channels: bool) -> None:
    mixed, weights, bypass, at, g = Setting("", 2, 8, 4, (7, 6), stride).draw(channels=channels)
    leaves = {"mixed": mixed, "weights": [weights], "bypass": [bypass := bypass.clone()]}[wanted]
    for leaf in leaves:
        leaf.requires_grad_()
    ours, theirs = (
        torch.autograd.grad(f(mixed, weights, bypass, stride=stride, channels=at), leaves, g)
        for f in (fastnas.partial_shuffle, reference)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("stride", [1, 2])
def test_plain_shuffle_without_weights_has_gradients(stride: int) -> None:
    mixed, _, bypass, _, g = Setting("", 2, 8, 4, (7, 6), stride, paths=1).draw()
    leaves = [mixed[0].requires_grad_(), bypass.detach().requires_grad_()]
    ours, theirs = (
        torch.autograd.grad(f([leaves[0]], None, leaves[1], stride=stride), leaves, g)
        for f in (fastnas.partial_shuffle, reference)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@FORMS
@pytest.mark.parametrize("stride", [1, 2])
def test_first_and_second_derivatives(stride: int, channels: bool) -> None:
    mixed, weights, bypass, at, _ = Setting("", 2, 4, 2, (3, 3), stride, paths=2).draw(torch.float64, channels)
    inputs = [t.clone().requires_grad_() for t in (weights, bypass, *mixed)]

    def f(weights: Tensor, bypass: Tensor, *mixed: Tensor) -> Tensor:
        return fastnas.partial_shuffle(mixed, weights, bypass, stride=stride, channels=at)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_second_derivatives_with_frozen_weights() -> None:
    mixed, weights, bypass, _, _ = Setting("", 1, 4, 2, (2, 2), paths=2).draw(torch.float64)
    inputs = [t.clone().requires_grad_() for t in (bypass, *mixed)]
    assert torch.autograd.gradgradcheck(lambda b, *m: fastnas.partial_shuffle(m, weights, b), inputs)


def test_weights_of_half_width_and_gradient_dtypes() -> None:
    mixed, weights, bypass, _, g = Setting("", 2, 8, 4, (5, 6)).draw(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        ours = run(fastnas.partial_shuffle, mixed, weights.to(dtype), bypass, None, g)
        assert [t.dtype for t in ours[-3:]] == [torch.bfloat16, dtype, torch.bfloat16]
        torch.testing.assert_close(
            ours, run(reference, mixed, weights.to(dtype), bypass, None, g), rtol=3e-2, atol=3e-2
        )


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    inputs, threads = Setting("", 64, 16, 4, (16, 16), paths=8).draw(), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            results.append(run(fastnas.partial_shuffle, *inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@FORMS
@pytest.mark.parametrize("setting", FEW, ids=str)
def test_flat_ops_pass_opcheck(setting: Setting, channels: bool) -> None:
    mixed, weights, bypass, at, g = setting.draw(channels=channels)
    if bypass.numel() == 0:  # opcheck cannot copy an empty slice
        bypass = torch.empty_like(bypass, memory_format=torch.contiguous_format)
    pooled = bypass if setting.stride == 2 else None
    torch.library.opcheck(flat._fwd, (mixed, weights, bypass, at, setting.stride))
    torch.library.opcheck(flat._bwd, (g, mixed, weights, pooled, at, True))
    torch.library.opcheck(flat._bwd_frozen, (g, weights, pooled, at, mixed[0].shape[1], True))


@FORMS
@pytest.mark.parametrize("setting", SMALL, ids=str)
def test_flat_references_agree_with_the_kernels(setting: Setting, channels: bool) -> None:
    mixed, weights, bypass, at, g = setting.draw(channels=channels)
    pooled, count = bypass if setting.stride == 2 else None, mixed[0].shape[1]
    for kernel, plain, args in (
        (flat._fwd, flat._fwd_reference, (mixed, weights, bypass, at, setting.stride)),
        (flat._fwd, flat._fwd_reference, (mixed[:1], None, bypass, at, setting.stride)),
        (flat._bwd, flat._bwd_reference, (g, mixed, weights, pooled, at, True)),
        (flat._bwd, flat._bwd_reference, (g, mixed, weights, None, at, False)),
        (flat._bwd_frozen, flat._bwd_frozen_reference, (g, weights, pooled, at, count, True)),
        (flat._bwd_frozen, flat._bwd_frozen_reference, (g, None, None, at, count, False)),
    ):
        torch.testing.assert_close(kernel(*args), plain(*args), check_stride=True)


@pytest.mark.parametrize(("backend", "compiler"), [("native", "inductor"), ("reference", "aot_eager")])
def test_compiles_as_one_graph(backend: str, compiler: str) -> None:
    mixed, weights, x, _, g = Setting("", 4, 8, 4, (6, 5), stride=2).draw()
    x = torch.randn(4, 8, 6, 5)

    def f(op, mixed, weights, x, *, stride, channels):
        return op([m * 2 for m in mixed], weights.softmax(0), x[:, 2:], stride=stride, channels=channels)

    torch._dynamo.reset()
    with fastnas.backend(f"partial_shuffle={backend}"):
        compiled = torch.compile(f, fullgraph=True, backend=compiler)
        ours = run(lambda *a, **k: compiled(fastnas.partial_shuffle, *a, **k), mixed, weights, x, None, g, stride=2)
    torch.testing.assert_close(ours, run(lambda *a, **k: f(reference, *a, **k), mixed, weights, x, None, g, stride=2))


def test_autocast_leaves_dtypes_alone() -> None:
    inputs = Setting("", 4, 8, 4, (6, 5)).draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(fastnas.partial_shuffle, *inputs)
    torch.testing.assert_close(inside, run(fastnas.partial_shuffle, *inputs), rtol=0, atol=0)


def test_sampled_channels_are_sorted_distinct_seeded_and_uniform() -> None:
    draws = [fastnas.sample_channels(16, 4, torch.Generator().manual_seed(seed)) for seed in range(2000)]
    for channels in draws[:50]:
        assert channels.dtype == torch.int64
        assert channels.shape == (4,)
        assert channels.diff().gt(0).all()
    counts = torch.bincount(torch.cat(draws), minlength=16)
    assert counts.shape == (16,)
    assert ((counts - 500) ** 2 / 500).sum() < 45
    assert torch.equal(draws[7], fastnas.sample_channels(16, 4, torch.Generator().manual_seed(7)))
    assert fastnas.sample_channels(6, 1).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("channels", "k"), [(16, 3), (16, 0), (16, -4), (0, 1)])
def test_wrong_sampling_arguments_are_named(channels: int, k: int) -> None:
    with pytest.raises(ValueError, match="sample_channels: k must be a positive divisor of channels"):
        fastnas.sample_channels(channels, k)


M, B, W = torch.zeros(2, 2, 4, 4), torch.zeros(2, 6, 4, 4), torch.ones(1)
AT = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mixed": []}, ValueError, "mixed is empty"),
        ({"mixed": M}, TypeError, "mixed must be a list of tensors"),
        ({"mixed": [M.long()]}, TypeError, r"mixed\[0\] must be float32"),
        ({"mixed": [M[0]]}, ValueError, r"mixed\[0\] must have 4 dimensions .* got shape \(2, 4, 4\)"),
        ({"mixed": [M[:, :0]]}, ValueError, r"mixed\[0\] has no channels"),
        ({"mixed": [M, M[:1]]}, ValueError, r"mixed\[1\] has shape \(1, 2, 4, 4\), mixed\[0\] has \(2, 2, 4, 4\)"),
        ({"mixed": [M, M.double()]}, TypeError, r"mixed\[1\] is torch.float64, mixed\[0\] is torch.float32"),
        ({"mixed": [M, None]}, TypeError, r"mixed\[1\] must be .* got NoneType"),
        ({"mixed": [M, M.to("meta")]}, ValueError, r"mixed\[1\] is on meta, mixed\[0\] on cpu"),
        ({"weights": torch.ones(2)}, ValueError, r"weights have shape \(2,\), expected \(1,\)"),
        ({"weights": torch.ones(1, dtype=torch.int64)}, TypeError, "weights must be float32"),
        ({"weights": W.to("meta")}, ValueError, "weights are on meta"),
        ({"mixed": [M, M], "weights": None}, ValueError, "weights may be None for one mixed tensor only, got 2"),
        ({"bypass": None}, TypeError, "bypass must be a tensor, got NoneType"),
        ({"bypass": B.double()}, TypeError, r"bypass is torch.float64, mixed\[0\] is torch.float32"),
        ({"bypass": B[0]}, ValueError, "bypass must have 4 dimensions"),
        ({"bypass": B[:1]}, ValueError, r"bypass of shape \(1, 6, 4, 4\) and stride 1 does not fit"),
        ({"bypass": B[..., :3]}, ValueError, "it gives 2 images of 4 x 3"),
        ({"bypass": B, "stride": 2}, ValueError, "it gives 2 images of 2 x 2"),
        ({"bypass": B[:, 1:]}, ValueError, r"bypass has 5 channels, not a multiple of the 2 of mixed; pass x\[:, C"),
        ({"bypass": B.to("meta")}, ValueError, r"bypass is on meta, mixed\[0\] on cpu"),
        ({"stride": 3}, ValueError, "stride must be 1 or 2, got 3"),
        ({"channels": [0, 1]}, TypeError, "channels must be an int64 tensor, got list"),
        ({"channels": AT.int()}, TypeError, "channels must be an int64 tensor, got torch.int32"),
        ({"channels": AT[:1]}, ValueError, r"channels have shape \(1,\)"),
        ({"channels": AT, "bypass": B[:, :1]}, ValueError, "1 channels of bypass"),
        ({"channels": AT.to("meta")}, ValueError, "channels are on meta"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, error: type[Exception], message: str) -> None:
    arguments = {"mixed": [M], "weights": W, "bypass": B} | arguments
    with pytest.raises(error, match=f"partial_shuffle: .*{message}"):
        fastnas.partial_shuffle(**arguments)


def test_gradients_have_the_layout_of_the_result_whatever_that_of_its_gradient() -> None:
    mixed = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    bypass = torch.randn(2, 16, 6, 6).to(memory_format=torch.channels_last)[:, 4:].requires_grad_()
    y = fastnas.partial_shuffle([mixed], None, bypass)
    g = torch.randn(y.shape)
    grads = torch.autograd.grad(y, [mixed, bypass], g)
    assert all(grad.is_contiguous(memory_format=torch.channels_last) for grad in grads)
    assert torch.equal(torch.cat(grads, 1), torch.cat([g[:, k::4] for k in range(4)], 1))


@pytest.mark.parametrize("at", [[1, 0], [2, 2], [-1, 0], [4, 6]], ids=str)
def test_wrong_channels_are_named(at: list[int]) -> None:
    with pytest.raises(ValueError, match=r"channels must be sorted, distinct and inside \[0, 6\)"):
        fastnas.partial_shuffle([M], W, B, channels=torch.tensor(at))


def test_flat_ops_protect_memory() -> None:
    with pytest.raises(RuntimeError, match="do not fit together"):
        flat._fwd([M], W, B, None, 2)
    with pytest.raises(RuntimeError, match="one weight a tensor"):
        flat._fwd([M, M], W, B, None, 1)
    with pytest.raises(RuntimeError, match="bypass does not fit"):
        flat._bwd(torch.zeros(2, 8, 4, 4), [M], W, B, None, True)
    with pytest.raises(RuntimeError, match="differ in dtype or shape"):
        flat._bwd(torch.zeros(2, 8, 4, 4), [M[..., :2]], W, None, None, True)
