import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnas.errors import UserError
from fastnas.nn import candidate_names
from fastnas.spaces import PUBLISHED, Genotype, load_genotype


@st.composite
def genotypes(draw):
    nodes = draw(st.integers(1, 6))

    def cell():
        return tuple(
            tuple(draw(st.tuples(st.sampled_from(candidate_names()), st.integers(0, 1 + node))) for _ in range(2))
            for node in range(nodes)
        )

    concat = tuple(range(2, 2 + nodes))
    return Genotype(
        cell(), cell(), concat, concat, rule=draw(st.text(st.characters(exclude_categories="CZ"), max_size=10))
    )


@given(genotypes())
@settings(max_examples=50, deadline=None)
def test_json_and_tuple_notation_round_trip(genotype):
    assert Genotype.from_json(genotype.to_json()) == genotype
    assert Genotype.from_darts(genotype.to_darts(), rule=genotype.rule) == genotype


def test_reads_the_released_notation_with_range_and_an_assignment_free_call():
    text = (
        "Genotype(normal=[('skip_connect', 0), ('none', 1)], normal_concat=range(2, 3), "
        "reduce=[('max_pool_3x3', 1), ('max_pool_3x3', 0)], reduce_concat=[2])"
    )
    genotype = Genotype.from_darts(text)
    assert genotype.normal == ((("skip_connect", 0), ("none", 1)),)
    assert genotype.normal_concat == (2,)


def test_tuple_notation_with_all_edges_is_grouped_by_node():
    flat = [("skip_connect", source) for node in range(3) for source in range(2 + node)]
    text = f"Genotype(normal={flat}, normal_concat=range(2, 5), reduce={flat}, reduce_concat=range(2, 5))"
    genotype = Genotype.from_darts(text)
    assert [len(node) for node in genotype.normal] == [2, 3, 4]
    assert Genotype.from_darts(genotype.to_darts()) == genotype


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('echo hi')",
        "Genotype(normal=__import__('os'), normal_concat=[2], reduce=[], reduce_concat=[2])",
        "Genotype(normal=[('skip_connect', 0)]*10**9, normal_concat=[2], reduce=[], reduce_concat=[2])",
        "Genotype(normal=[], normal_concat=range(10**12), reduce=[], reduce_concat=[2])",
        "Genotype(normal=[('skip_connect', 0), ('skip_connect', 1)], normal_concat=[2])",
        "Genotype(**{'normal': []})",
        "Genotype(",
        "(" * 5000,
        "",
        "x" * 300_000,
    ],
)
def test_hostile_or_broken_notation_is_one_clear_error(text):
    with pytest.raises(UserError, match="genotype") as error:
        Genotype.from_darts(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "not a fastnas genotype"),
        ({"normal": [[["sep_conv_9x9", 0]]]}, "sep_conv_9x9"),
        ({"normal": [[["none", 2]]], "normal_concat": [2]}, "reads state 2"),
        ({"normal": [[["none", True]]]}, "pairs"),
        ({"normal": "text"}, "must be a list"),
        ({"normal_concat": [17]}, "normal_concat"),
        ({"normal_concat": []}, "normal_concat"),
        ({"surprise": 1}, "surprise"),
        ({"rule": 3}, "rule must be text"),
    ],
)
def test_each_broken_json_field_is_named(change, message):
    data = json.loads(PUBLISHED["DARTS_V2"].to_json()) | change
    with pytest.raises(UserError, match=message):
        Genotype.from_json(json.dumps(data))


def test_genotype_is_frozen():
    with pytest.raises(AttributeError):
        PUBLISHED["DARTS_V2"].normal = ()


def test_load_by_name_file_and_run_folder(tmp_path):
    expected = PUBLISHED["PC_DARTS_cifar"]
    assert load_genotype("PC_DARTS_cifar") is expected
    (tmp_path / "genotype.json").write_text(expected.to_json())
    assert load_genotype(tmp_path) == load_genotype(tmp_path / "genotype.json") == expected
    (tmp_path / "tuple.txt").write_text(expected.to_darts())
    assert load_genotype(tmp_path / "tuple.txt").normal == expected.normal


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1, 2]"])
def test_load_names_the_broken_file(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.json"):
        load_genotype(path)


def test_load_missing_lists_the_published_names():
    with pytest.raises(UserError, match="DARTS_V2"):
        load_genotype("DARTS_V9")
