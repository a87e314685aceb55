"""Shapes of masks: what is seen on labels, and what is kept of a mask."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lib.imaging.pieces import ENOUGH, shape_of, tidy, usual_shape
from lib.types import Shape

ANY, ONE, SOLID = Shape(), Shape(1, False), Shape(1, True)
MANY = Shape(scattered=True)


def blobs(*boxes: tuple[int, int, int], side: int = 40) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    for y, x, size in boxes:
        mask[y : y + size, x : x + size] = True
    return mask


def pieces_by_hand(mask: np.ndarray) -> int:
    """Flood by flood."""
    left, count = {(int(y), int(x)) for y, x in np.argwhere(mask)}, 0
    while left:
        count, edge = count + 1, [left.pop()]
        while edge:
            y, x = edge.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge += near
    return count


def test_pieces_and_holes_are_counted_but_crumbs_and_pinholes_are_not() -> None:
    two = blobs((1, 1, 10), (20, 20, 12))
    assert shape_of(two) == Shape(2, closed=True)
    two[39, 0] = True
    two[25, 25] = False
    assert shape_of(two) == Shape(2, closed=True)
    two[22:26, 22:26] = False
    assert shape_of(two) == Shape(2, closed=False)
    cells = blobs(*((y, x, 2) for y in range(0, 40, 4) for x in range(0, 40, 4)))
    assert shape_of(cells).pieces == 0
    few = blobs(*((y, 0, 6) for y in range(0, 40, 8)))
    assert shape_of(few).pieces == 5
    net = np.zeros((200, 200), bool)
    net[::20] = net[:, ::20] = True
    assert shape_of(net) == Shape(0, closed=False)
    ring = blobs((10, 10, 20))
    ring[14:26, 14:26] = False
    assert shape_of(ring) == Shape(1, closed=False)
    corner = blobs((0, 0, 5), (5, 5, 5))
    assert shape_of(corner).pieces == 1


@pytest.mark.parametrize(
    ("seen", "usual"),
    [
        ([SOLID] * (ENOUGH - 1), ANY),
        ([SOLID] * ENOUGH, SOLID),
        ([SOLID] * 19 + [Shape(4, closed=False)], SOLID),
        ([SOLID] * 18 + [Shape(4, closed=False)] * 2, MANY),
        ([SOLID] * 5 + [Shape(2, closed=True)] * 5, Shape(2, closed=True)),
        ([Shape(7, closed=True)] * 20, Shape(closed=True, scattered=True)),
        ([Shape(0, closed=False)] * 20, MANY),
        ([Shape(1, closed=False)] * 20, ONE),
    ],
)
def test_what_nearly_all_masks_have_in_common_is_usual(seen: list[Shape], usual: Shape) -> None:
    assert usual_shape(seen) == usual


def test_the_largest_piece_stays_and_its_holes_are_filled_but_not_with_what_is_another_label() -> (
    None
):
    values = np.zeros((40, 40), np.int32)
    values[blobs((1, 1, 12), (25, 25, 8))] = 1
    values[4:7, 4:7] = 0
    values[9, 9] = 2
    whole = values.copy()
    tidy(values, [SOLID, ANY])
    assert (values[25:33, 25:33] == 0).all()
    assert (values[4:7, 4:7] == 1).all()
    assert values[9, 9] == 2
    tidy(whole, [ONE, ANY])
    assert (whole[4:7, 4:7] == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.int32, (9, 8), elements=st.integers(0, 3)),
    st.lists(st.builds(Shape, st.integers(0, 3), st.booleans()), min_size=3, max_size=3),
)
def test_a_tidied_slice_has_the_shapes_and_nothing_new_but_filled_holes(
    values: np.ndarray, shapes: list[Shape]
) -> None:
    before = values.copy()
    tidy(values, shapes)
    for number, shape in enumerate(shapes, start=1):
        mask, was = values == number, before == number
        if not shape.closed:
            assert not (mask & ~was).any()
        if shape.pieces:
            assert pieces_by_hand(mask) <= shape.pieces
            if pieces_by_hand(was) <= shape.pieces:
                assert (mask | ~was).all()
        else:
            assert (mask | ~was).all()
        if was.any() and shape.pieces:
            assert mask.any()
    tidied = values.copy()
    tidy(tidied, [Shape(s.pieces) for s in shapes])
    assert np.array_equal(tidied, values)


def test_no_shape_changes_nothing() -> None:
    values = np.random.default_rng(0).integers(0, 3, (30, 30)).astype(np.int32)
    before = values.copy()
    tidy(values, [ANY, ANY])
    tidy(values, [])
    assert np.array_equal(values, before)
