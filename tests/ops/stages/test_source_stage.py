"""source_stage: one compiled call against the stages one after another, which plain PyTorch serves."""

import random

import pytest
import torch

import fastnas
from fastnas import _backends
from fastnas.ops.stages.source_layout import STAGES, Convolutions, Layout, Term, end_to_end
from fastnas.ops.stages.source_stage import source_stage_bwd, source_stage_fwd
from fastnas.ops.stages.source_steps import backward_stage_by_stage, forward_stage_by_stage

native = pytest.mark.skipif(_backends.choose("conv_stage", "cpu") != "native", reason="no compiled kernels")
EPS = 1e-5
CHANNELS = 8


def layout_of(seed: int, stride: int) -> Layout:
    """Terms of every kind in random order."""
    draw = random.Random(seed)
    first, second, second_from, terms = Convolutions(), Convolutions(), [], []
    nodes = draw.randint(1, 3)

    def part(stage: Convolutions, source: int, side: int, first: int = 0, shift: int = 0, half: bool = False) -> None:
        stage.parts += [source, stage.outputs - 1, first, draw.choice((1, 2)) if side > 1 else 1, shift]
        stage.sides.append(side if side > 1 else 0)
        stage.widths.append(CHANNELS // 2 if half else CHANNELS)

    kinds = [draw.choice(("none", "state", "pool", "reduce", "dil", "sep")) for _ in range(6)]
    if seed % 4 == 0:
        kinds = ["state"] * 2  # nothing else, as on a sampled path
    for edge, kind in enumerate(kinds):
        place = None
        if kind == "state" and stride == 1:
            place = "state", 0
        elif kind == "pool":
            place = "pool", draw.randrange(2)
        elif kind == "reduce":
            first.outputs += 1
            part(first, 0, 1, half=True)
            part(first, 0, 1, first=4, shift=1, half=True)
            place = "first", first.outputs - 1
        elif kind in ("dil", "sep"):
            first.outputs += 1
            part(first, 0, draw.choice((3, 5)))
            place = "first", first.outputs - 1
            if kind == "sep":
                second_from.append(first.outputs - 1)
                second.outputs += 1
                part(second, len(second_from) - 1, draw.choice((3, 5)))
                place = "second", second.outputs - 1
        if place:
            terms.append(Term(edge, draw.randrange(4), len(terms) % nodes, *place))
    nodes = min(nodes, len(terms))
    return Layout(stride, nodes, first, second, second_from, terms)


def problem(seed: int, stride: int, dtype: torch.dtype = torch.double):
    """Layout, x, weights, mixture and gradients of the nodes."""
    layout = layout_of(seed, stride)
    torch.manual_seed(seed)
    shapes = [*layout.first.shapes(CHANNELS), *layout.second.shapes(CHANNELS)]
    weights = [torch.randn(shape, dtype=dtype) / (1 if shape[1] == 1 else CHANNELS) for shape in shapes]
    flat = torch.cat([weight.flatten() for weight in weights]) if weights else torch.empty(0, dtype=dtype)
    size = (2, -(-7 // stride), -(-6 // stride), CHANNELS)
    x = torch.randn(2, 7, 6, CHANNELS + 3, dtype=dtype)[..., 3:]
    return (
        layout,
        x,
        [flat] if seed % 2 else weights,
        torch.randn(6, 4, dtype=dtype),
        [torch.randn(size, dtype=dtype) for _ in range(layout.nodes)],
    )


def everything(forward, backward, layout, x, weights, mixture, gs, *, training: bool, keep: bool, base: bool):
    """All results of both passes, and the nodes, the second of which held something before."""
    nodes = [torch.full_like(g, float(number)) for number, g in enumerate(gs)]
    begun = [int(number == 1) for number in range(len(gs))]
    given = None if training else torch.rand(layout.rows - 1, 2, x.shape[-1], dtype=x.dtype) + 0.5
    norms, stats, first, second = forward(layout, x, weights, mixture, given, nodes, begun, EPS, keep)
    under = torch.ones_like(x) if base else None
    gradients = backward(layout, x, weights, mixture, norms, first, second, gs, under, training, True, True)
    return [*nodes, norms, stats, first, second, *gradients]


@native
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("seed", range(12))
def test_one_call_gives_what_the_stages_give(seed: int, stride: int, poisoned: None) -> None:
    given = problem(seed, stride)
    if not given[0].terms:
        return
    for training, keep, base in ((True, True, False), (True, False, True), (False, True, True)):
        settings = {"training": training, "keep": keep, "base": base}
        torch.manual_seed(1)
        ours = everything(source_stage_fwd, source_stage_bwd, *given, **settings)
        torch.manual_seed(1)
        with fastnas.backend("reference"):
            theirs = everything(forward_stage_by_stage, backward_stage_by_stage, *given, **settings)
        for value, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


@native
@pytest.mark.parametrize("need_dx, need_dw", [(True, False), (False, True), (False, False)])
def test_only_what_is_asked_for(need_dx: bool, need_dw: bool) -> None:
    layout, x, weights, mixture, gs = problem(2, 1)
    nodes, begun = [torch.empty_like(g) for g in gs], [0] * len(gs)
    norms, _, first, second = source_stage_fwd(layout, x, weights, mixture, None, nodes, begun, EPS, True)
    arguments = (layout, x, weights, mixture, norms, first, second, gs, None, True)
    whole = source_stage_bwd(*arguments, True, True)
    dx, d_terms, dw = source_stage_bwd(*arguments, need_dx, need_dw)
    torch.testing.assert_close(d_terms, whole[1])
    assert [bool(dx.numel()), bool(dw.numel())] == [need_dx, need_dw]


def test_a_layout_survives_packing() -> None:
    for seed in range(12):
        layout = layout_of(seed, 1)
        again = Layout.unpack(layout.packed)
        assert again.packed == layout.packed
        assert (again.terms, again.first, again.second) == (layout.terms, layout.first, layout.second)
        assert {term.stage for term in layout.terms} <= set(STAGES)


@native
@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda numbers: numbers[:-1], "ends too early"),
        (lambda numbers: [*numbers, 0], "behind its end"),
        (lambda numbers: [*numbers[:-2], 7, 0], "what is not there"),
        (lambda numbers: [*numbers[:-5], 99, *numbers[-4:]], "has no weight"),
        (lambda numbers: [*numbers[:5], 99, *numbers[6:]], "weights are missing"),
        (lambda numbers: [*numbers[:5], 0, *numbers[6:]], "more weights than parts"),
    ],
)
def test_a_wrong_layout_is_an_error(spoil, message: str) -> None:
    layout, x, weights, mixture, gs = problem(2, 1)
    nodes = [torch.empty_like(g) for g in gs]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastnas.source_stage_fwd(
            x, end_to_end(weights, x), spoil(layout.packed), mixture, None, nodes, [0] * len(gs), EPS, True
        )


@native
def test_the_flat_ops_keep_the_rules_of_custom_ops() -> None:
    layout, x, [weights], mixture, gs = problem(3, 1, torch.float32)
    nodes = [torch.zeros_like(g) for g in gs]
    forward = (x, weights, layout.packed, mixture, None, nodes, [1] * len(gs), EPS, True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastnas.source_stage_fwd.default, forward, test_utils=tests)
    norms, _, first, second = torch.ops.fastnas.source_stage_fwd(*forward)
    backward = (x, weights, layout.packed, mixture, norms, first, second, gs, None, True, True, True)
    torch.library.opcheck(torch.ops.fastnas.source_stage_bwd.default, backward, test_utils=tests)
