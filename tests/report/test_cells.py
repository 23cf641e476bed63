"""The drawing shows every operation, and no label meets another label or a line."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnas.report.cells import describe_cells, draw_cells

SVG = "{http://www.w3.org/2000/svg}"
OPERATIONS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
    "a_<candidate>_with_a_long_name & more",
)


@dataclass(frozen=True)
class Cells:
    """The attributes of a genotype that the drawing uses, with the unknown names that a registry may hold."""

    normal: tuple
    reduce: tuple
    normal_concat: tuple = (2, 3, 4, 5)
    reduce_concat: tuple = (2, 3, 4, 5)


DARTS_V2 = Cells(
    normal=(
        (("sep_conv_3x3", 0), ("sep_conv_3x3", 1)),
        (("sep_conv_3x3", 0), ("sep_conv_3x3", 1)),
        (("sep_conv_3x3", 1), ("skip_connect", 0)),
        (("skip_connect", 0), ("dil_conv_3x3", 2)),
    ),
    reduce=(
        (("max_pool_3x3", 0), ("max_pool_3x3", 1)),
        (("skip_connect", 2), ("max_pool_3x3", 1)),
        (("max_pool_3x3", 0), ("skip_connect", 2)),
        (("skip_connect", 2), ("max_pool_3x3", 1)),
    ),
)


@st.composite
def genotypes(draw) -> Cells:
    """Two to seven nodes; two edges a node, parallel ones too, or all edges of small cells."""
    cells, concats = [], []
    for _ in range(2):
        count = draw(st.integers(2, 7))
        every_edge = count <= 4 and draw(st.booleans())
        nodes = []
        for index in range(count):
            sources = range(2 + index) if every_edge else [draw(st.integers(0, 1 + index)) for _ in range(2)]
            nodes.append(tuple((draw(st.sampled_from(OPERATIONS)), source) for source in sources))
        cells.append(tuple(nodes))
        concats.append(tuple(draw(st.sets(st.integers(0, count + 1), min_size=1))))
    return Cells(*cells, *concats)


Box = tuple[float, float, float, float]


@dataclass
class Edge:
    label: Box
    text: str
    lines: list[tuple[float, float]]
    title: str


def box(rect: ElementTree.Element) -> Box:
    x, y, width, height = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def points(path: str) -> list[tuple[float, float]]:
    """Points along a path of the commands M H V c q, about 2 px apart."""
    here = 0j
    found: list[complex] = []
    for command, numbers in re.findall(r"([A-Za-z])([^A-Za-z]*)", path):
        n = [float(number) for number in re.findall(r"-?[\d.]+", numbers)]
        if command == "M":
            here = complex(*n)
            continue
        if command == "H":
            control = [complex(n[0], here.imag)]
        elif command == "V":
            control = [complex(here.real, n[0])]
        else:
            assert command in "cq"
            control = [here + complex(*pair) for pair in zip(n[::2], n[1::2], strict=True)]
        count = max(2, int(abs(control[-1] - here) / 2))
        for t in (index / count for index in range(count + 1)):
            curve = [here, *control]
            while len(curve) > 1:
                curve = [p + t * (q - p) for p, q in zip(curve, curve[1:], strict=False)]
            found.append(curve[0])
        here = control[-1]
    return [(point.real, point.imag) for point in found]


def read_panel(group: ElementTree.Element) -> tuple[Box, list[Edge], list[Box], list[tuple[float, float]]]:
    """The frame, the edges, the boxes of states and output, and the points of the rails."""
    frame, *states = group.findall(f"{SVG}rect")
    size = (0.0, 0.0, float(frame.get("width")), float(frame.get("height")))
    edges = []
    for edge in group.findall(f"{SVG}g"):
        line = next(path for path in edge.findall(f"{SVG}path") if path.get("stroke-width") == "2.2")
        rect, text = edge.find(f"{SVG}rect"), edge.find(f"{SVG}text").text
        edges.append(Edge(box(rect), text, points(line.get("d")), edge.find(f"{SVG}title").text))
    rails = [path.get("d") for path in group.findall(f"{SVG}path") if path.get("stroke")]
    return size, edges, [box(rect) for rect in states], [p for rail in rails for p in points(rail)]


def panels(svg: str) -> list[ElementTree.Element]:
    groups = ElementTree.fromstring(svg).findall(f"{SVG}g")
    return [group for group in groups if group.find(f"{SVG}g") is not None]


def apart(a: Box, b: Box, gap: float) -> bool:
    return a[2] + gap <= b[0] or b[2] + gap <= a[0] or a[3] + gap <= b[1] or b[3] + gap <= a[1]


def outside(point: tuple[float, float], a: Box, gap: float) -> bool:
    return not (a[0] - gap < point[0] < a[2] + gap and a[1] - gap < point[1] < a[3] + gap)


@settings(max_examples=60, deadline=None)
@given(genotypes())
def test_nothing_overlaps(genotype):
    for group in panels(draw_cells(genotype)):
        frame, edges, states, rails = read_panel(group)
        boxes = [edge.label for edge in edges] + states
        assert all(apart(a, b, 4) for a, b in combinations(boxes, 2))
        assert all(a[0] > 0 and a[1] > 60 and a[2] < frame[2] and a[3] < frame[3] for a in boxes)
        for edge in edges:
            width = len(edge.text) * 6.6  # about DejaVu Sans at 12 px, the widest of the fonts named
            assert width + 8 <= edge.label[2] - edge.label[0]
            others = [point for other in edges if other is not edge for point in other.lines]
            assert all(outside(point, edge.label, 1) for point in others + rails)
            assert all(outside(point, state, -1) for state in states for point in edge.lines)


@settings(max_examples=20, deadline=None)
@given(genotypes())
def test_every_operation_is_drawn_from_its_source_to_its_node(genotype):
    def state(number: int) -> str:
        return ("c_{k-2}", "c_{k-1}")[number] if number < 2 else f"node {number - 2}"

    for group, nodes in zip(panels(draw_cells(genotype)), (genotype.normal, genotype.reduce), strict=True):
        _, edges, states, _ = read_panel(group)
        titles = [
            f"{state(index + 2)}: {name} of {state(source)}"
            for index, node in enumerate(nodes)
            for name, source in node
        ]
        assert sorted(edge.title for edge in edges) == sorted(titles)
        for edge in edges:
            target, source = (
                states[number]
                for name in (edge.title.split(":")[0], edge.title.rsplit(" of ", 1)[1])
                for number in range(len(nodes) + 2)
                if state(number) == name
            )
            assert edge.lines[0][1] == pytest.approx((source[1] + source[3]) / 2)
            assert target[0] < edge.lines[-1][0] < target[2]
            assert edge.lines[-1][1] == pytest.approx(target[1], abs=8)


def test_lines_into_a_node_do_not_cross():
    genotype = Cells(*[tuple(tuple(("sep_conv_3x3", s) for s in range(2 + i)) for i in range(4))] * 2)
    for group in panels(draw_cells(genotype)):
        _, edges, states, _ = read_panel(group)
        into_last = [e for e in edges if e.title.startswith("node 3")]
        lanes = [edge.lines[-1][0] for edge in sorted(into_last, key=lambda edge: edge.label[1])]
        assert lanes == sorted(lanes, reverse=True) and len(set(lanes)) == 5


def test_text_colour_and_legend():
    svg = draw_cells(DARTS_V2)
    texts = [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    for label, number in {"sep 3×3": 5, "skip": 5, "dil 3×3": 1, "max 3×3": 5}.items():
        assert texts.count(label) == number
    for title in ("separable convolution", "dilated convolution", "pooling", "skip connection"):
        assert texts.count(title) == 1
    assert "none" not in texts and "other operation" not in texts
    assert "Normal cell" in texts and "Reduction cell" in texts
    lines = {}
    for group in panels(svg):
        for edge in group.findall(f"{SVG}g"):
            lines.setdefault(edge.find(f"{SVG}rect").get("stroke"), set()).add(edge.find(f"{SVG}text").text)
    assert sorted(map(sorted, lines.values())) == [["dil 3×3"], ["max 3×3"], ["sep 3×3"], ["skip"]]


def test_the_file_stands_alone():
    svg = draw_cells(DARTS_V2)
    assert "<style" not in svg and "href" not in svg and "url(" not in svg
    assert svg == draw_cells(DARTS_V2)


def test_text_drawing():
    text = describe_cells(DARTS_V2)
    assert text.splitlines()[:6] == [
        "Normal cell",
        "  node 0 = sep_conv_3x3(c_{k-2}) + sep_conv_3x3(c_{k-1})",
        "  node 1 = sep_conv_3x3(c_{k-2}) + sep_conv_3x3(c_{k-1})",
        "  node 2 = sep_conv_3x3(c_{k-1}) + skip_connect(c_{k-2})",
        "  node 3 = skip_connect(c_{k-2}) + dil_conv_3x3(node 0)",
        "  output = concat(node 0, node 1, node 2, node 3)",
    ]
    assert text.splitlines()[6] == "Reduction cell"
    assert len(text.splitlines()) == 12
