"""NAS-Bench-201 and NAS-Bench-101: cells, small tables, and the real ones where they are."""

from __future__ import annotations

import gzip
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fastnas import lookup
from fastnas.engine.networks import build_network
from fastnas.errors import UserError
from fastnas.spaces.nasbench101 import PAIRS, Nasbench101Space, Nasbench101Table
from fastnas.spaces.nasbench201 import Nasbench201Space, read_nasbench201

DATA = Path(os.environ.get("FASTNAS_TEST_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")) / "nas"
REAL_201, REAL_101 = DATA / "nasbench201.csv.gz", DATA / "nasbench101.npz"
SPACE_201, SPACE_101 = Nasbench201Space(), Nasbench101Space()


def bits(*edges: tuple[int, int]) -> tuple[int, ...]:
    return tuple(int(pair in edges) for pair in PAIRS)


def test_edges_of_a_201_cell():
    assert [SPACE_201.edge_slice(node) for node in range(3)] == [slice(0, 1), slice(1, 3), slice(3, 6)]
    text = "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|none~2|"
    assert SPACE_201.text((3, 3, 4, 1, 3, 0)) == text
    assert SPACE_201.decode((3, 3, 4, 1, 3, 0)).notation() == text
    with pytest.raises(UserError, match="no cell of NAS-Bench-201"):
        SPACE_201.decode((5, 0, 0, 0, 0, 0))


@pytest.mark.parametrize("packed", [False, True])
def test_a_201_table_and_its_command(tmp_path, packed, capsys):
    genotype = SPACE_201.decode((3, 3, 4, 1, 3, 0))
    content = f"index,arch,c10_test\n0,{genotype.notation()},93.5\n".encode()
    table = tmp_path / "table.csv"
    table.write_bytes(gzip.compress(content) if packed else content)
    (tmp_path / "genotype.json").write_text(genotype.to_json())
    assert lookup.main(["--genotype", str(tmp_path), "--table", str(table)]) == 0
    assert "c10_test             93.5" in capsys.readouterr().out
    assert (tmp_path / "lookup.json").exists()
    (tmp_path / "genotype.json").write_text(SPACE_201.decode((0,) * 6).to_json())
    with pytest.raises(UserError, match="has no row"):
        lookup.look_up(str(tmp_path), table)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("no.csv", None, "cannot read"),
        ("a.csv", b"x,y\n1,2\n", "no column arch"),
        ("b.csv", b"arch,acc\na,z\n", "no table of NAS-Bench-201"),
        ("c.csv", b"\x1f\x8bxx", "cannot read|no table"),
    ],
)
def test_broken_201_tables_are_named(tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem):
        read_nasbench201(tmp_path / name)


def test_other_spaces_are_in_no_table(tmp_path):
    with pytest.raises(UserError, match="of the space darts"):
        lookup.look_up("DARTS_V2", tmp_path / "table")


def test_a_101_cell_is_pruned_to_what_lies_between_input_and_output():
    string = (*bits((0, 2), (2, 6), (0, 3), (1, 4)), 0, 1, 2, 0, 0)
    assert SPACE_101.prune(string) == (((0, 1), (1, 2)), (1,))
    assert SPACE_101.is_valid(string)
    assert not SPACE_101.is_valid((*bits((0, 3), (1, 6)), 0, 0, 0, 0, 0))  # no path
    assert not SPACE_101.is_valid((1,) * 21 + (0,) * 5)  # too many edges
    assert SPACE_101.prune((*bits((0, 6)), 0, 0, 0, 0, 0)) == (((0, 1),), ())


def test_the_nine_largest_numbers_are_edges():
    scores = [0.0] * 12 + [1.0] * 9
    string = SPACE_101.from_scores(scores, [0] * 5)
    assert string is None or sum(string[:21]) == 9
    scores[PAIRS.index((0, 6))] = 2.0
    assert SPACE_101.from_scores(scores, [0] * 5)[PAIRS.index((0, 6))] == 1


def test_101_descendants_are_valid():
    rng = random.Random(0)
    for _ in range(100):
        a, b = SPACE_101.random_string(rng), SPACE_101.random_string(rng)
        child = SPACE_101.mutate(a, 0.0, rng)
        assert sum(x != y for x, y in zip(a, child, strict=True)) == 2 and SPACE_101.is_valid(child)
        child = SPACE_101.cross(a, b, rng)
        assert SPACE_101.is_valid(child) and sum(child[:21]) == 9
        assert all(edge in (x, y) for edge, x, y in zip(child, a, b, strict=True))


def test_a_101_table_finds_every_isomorphic_form(tmp_path):
    # input -> 1 -> output and input -> 2 -> output, with different operations: two forms, one row
    edges = sum(1 << (s + t * (t - 1) // 2) for s, t in ((0, 1), (0, 2), (1, 3), (2, 3)))
    path = tmp_path / "table.npz"
    arrays = {"num_vertices": np.uint8([4]), "adj_bits": np.uint32([edges]), "test_hits": np.uint16([14976])}
    np.savez(path, ops=np.uint8([[2, 0, 255, 255, 255]]), params=np.int32([7]), **arrays)
    table = Nasbench101Table.read(path)
    for operations in ((2, 0), (0, 2)):
        string = (*bits((0, 1), (0, 2), (1, 6), (2, 6)), *operations, 0, 0, 0)
        assert table.row(string) == {"test_accuracy": 50.0, "parameters": 7.0}
    with pytest.raises(UserError, match="lacks this cell"):
        table.accuracy((*bits((0, 6)), 0, 0, 0, 0, 0))
    with pytest.raises(UserError, match="cannot read"):
        Nasbench101Table.read(tmp_path / "no.npz")
    np.savez(path, ops=np.uint8([[2]]))
    with pytest.raises(UserError, match="no table of NAS-Bench-101"):
        Nasbench101Table.read(path)


@pytest.mark.skipif(not REAL_201.is_file(), reason=f"needs {REAL_201} (set FASTNAS_TEST_DATA)")
def test_the_real_201_table():
    table = read_nasbench201(REAL_201)
    assert len(table) == 15625
    assert table[SPACE_201.text((1,) * 6)]["c10_test"] == pytest.approx(54.30, abs=0.01)
    rng = random.Random(0)
    for string in ((3,) * 6, (1,) * 6, *(SPACE_201.random_genotype(rng).string for _ in range(3))):
        genotype = SPACE_201.decode(string)
        network = build_network(genotype, channels=16, cells=15, classes=10)
        parameters = sum(p.numel() for p in network.parameters())
        assert parameters == table[genotype.notation()]["params_c10"]


@pytest.mark.skipif(not REAL_101.is_file(), reason=f"needs {REAL_101} (set FASTNAS_TEST_DATA)")
def test_a_101_cell_built_alone_has_the_parameters_of_the_real_table():
    table, rng = Nasbench101Table.read(REAL_101), random.Random(1)
    for genotype in (SPACE_101.random_genotype(rng) for _ in range(20)):
        with torch.device("meta"):
            network = build_network(genotype, channels=128, cells=9, classes=10)
        assert sum(p.numel() for p in network.parameters()) == table.row(genotype.string)["parameters"]


@pytest.mark.skipif(not REAL_101.is_file(), reason=f"needs {REAL_101} (set FASTNAS_TEST_DATA)")
def test_the_real_101_table_has_every_cell():
    table, rng = Nasbench101Table.read(REAL_101), random.Random(0)
    accuracies = [table.accuracy(SPACE_101.random_string(rng)) for _ in range(300)]
    assert 85 < sum(accuracies) / 300 < 93 and max(accuracies) < 94.32
