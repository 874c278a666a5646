"""Models that read pictures beside text: captured for any number of pictures, none included."""

from __future__ import annotations

import pytest
import torch

from graphopt.compiler.verify import random_inputs
from graphopt.ir.pictures import splices
from graphopt.views import Views
from tests.pictures import ENTRIES, IMAGE, question, reader, reader_program


@pytest.mark.parametrize("rows", [1, 3])
def test_pictures_are_read_as_eager_reads_them(rows: int) -> None:
    given = question(rows)
    with torch.no_grad():
        expected = reader()(**given).logits
        got = reader_program().module()(**given)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_rows_may_hold_different_numbers_of_pictures() -> None:
    given = question(2, text=40)
    given["input_ids"][0, 38:54] = IMAGE
    given["pixel_values"] = torch.randn(3, *given["pixel_values"].shape[1:])
    with torch.no_grad():
        expected = reader()(**given).logits
        got = reader_program().module()(**given)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_text_alone_needs_no_picture() -> None:
    ids = question(2)["input_ids"][:, :3]
    with torch.no_grad():
        expected = reader()(input_ids=ids).logits
        got = reader_program().module()(input_ids=ids)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_place_of_pictures_is_found_in_the_graph() -> None:
    program = reader_program()
    (splice,) = splices(program)
    assert (splice.token, splice.entries) == (IMAGE, ENTRIES)
    assert (splice.tokens.role, splice.pictures.role) == ("tokens", "pictures")
    assert splice.pictures.shape[0] == "I"
    paths = [block.path for block in Views(program).blocks]
    assert [path.rpartition(".")[2] for path in paths] == ["0", "1", "0", "1", "2", "3"]


def test_random_inputs_hold_one_picture_a_row() -> None:
    given = random_inputs(reader_program(), {"B": 3, "S": 7}, 0)
    assert given["pixel_values"].shape[0] == 3
    assert ((given["input_ids"] == IMAGE).sum(1) == ENTRIES).all()
    assert given["input_ids"].shape == given["attention_mask"].shape == (3, 7 + ENTRIES)
    assert (given["input_ids"][:, -1] != IMAGE).all()
