import math
import random

import pytest

from fastnas.errors import UserError
from fastnas.spaces import ChoiceBlockSpace, load_genotype
from fastnas.spaces.choice_blocks import OPERATION_SETS, OPERATIONS


def test_the_space_has_the_papers_size():
    space = ChoiceBlockSpace()
    assert len(OPERATIONS) == 7 and len(OPERATION_SETS) == 28
    assert math.prod(space.choices) == 3 * 7 * 15 * 31 * 28**4  # about 6e9 (section 3.1)


def test_every_string_is_another_cell_with_at_least_one_input():
    space = ChoiceBlockSpace(1)
    cells = {space.cell((subset, operations)) for subset in range(3) for operations in range(28)}
    assert len(cells) == 84
    assert {states for ((states, _),) in cells} == {(0,), (1,), (0, 1)}
    assert all(1 <= len(operations) <= 2 for ((_, operations),) in cells)


def test_all_on_has_every_path_and_is_never_drawn():
    space = ChoiceBlockSpace(2)
    assert space.cell(space.all_on().string) == (((0, 1), tuple(range(7))), ((0, 1, 2), tuple(range(7))))
    rng = random.Random(0)
    assert all(max(space.random_genotype(rng).string[1::2]) < 28 for _ in range(200))


def test_it_goes_through_json(tmp_path):
    genotype = ChoiceBlockSpace(2).decode((0, 3, 6, 27), rule="mine")
    assert genotype.lines[0] == "block 0 = sep_conv_7x7 of c_{k-2}"
    path = tmp_path / "genotype.json"
    path.write_text(genotype.to_json())
    assert load_genotype(path) == genotype


@pytest.mark.parametrize("string", [(0, 3), (3, 0, 0, 0), (0, 29, 0, 0)])
def test_strings_of_other_spaces_are_refused(string):
    with pytest.raises(UserError, match="no cell of 2 choice blocks"):
        ChoiceBlockSpace(2).decode(string)


def test_a_string_of_no_numbers_is_refused(tmp_path):
    path = tmp_path / "genotype.json"
    for string in ("[-1]", '["a"]', "[]", "[true]"):
        head = '"format": "fastnas-genotype", "version": 1, "space": "choice_blocks"'
        path.write_text(f'{{{head}, "string": {string}}}')
        with pytest.raises(UserError, match="numbers from 0"):
            load_genotype(path)
