"""What labelled slices say of those between them: shapes that are known, moved and cut off."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lib.contours as contours_module
from lib.contours import NOWHERE, SURE, Contours
from lib.types import IntArray

SIDE = 64


def discs(radii: list[float], *, side: int = SIDE, shift: float = 0.0, seed: int = 0) -> IntArray:
    """(N, S, S) with a disc on each slice, its center off by up to `shift`; radius 0: none."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] + 0.5
    maps = np.zeros((len(radii), side, side), np.int32)
    for index, radius in enumerate(radii):
        cy, cx = side / 2 + rng.uniform(-shift, shift, 2)
        maps[index][(y - cy) ** 2 + (x - cx) ** 2 <= radius**2] = 1
    return maps


def contours(maps: IntArray, slices: list[int], value: int | None = 1, mm: float = 1.0) -> Contours:
    return Contours(maps, slices, [value], slice_mm=mm, pixel_mm=1.0)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 5), st.floats(14, 18), st.floats(-0.4, 0.4), st.sampled_from([48, 64, 96]))
def test_a_contour_that_moves_evenly_is_found_between(
    gap: int, radius: float, growth: float, side: int
) -> None:
    radii = [radius + growth * i for i in range(4 * gap + 1)]
    maps = discs(radii)
    own = list(range(0, len(radii), gap))
    said = contours(maps, own)
    for index in set(range(len(radii))) - set(own):
        odds = said.scores(index, side)[0].numpy()
        truth = discs([radii[index] * side / SIDE], side=side)[0] > 0
        assert dice(odds > 0, truth) > 0.9
        assert np.abs(odds).max() <= SURE


def test_close_slices_say_more_than_distant_ones_and_steady_ones_more_than_ragged() -> None:
    center = (SIDE // 2, SIDE // 2)

    def said(gap: int, shift: float, mm: float = 1.0) -> float:
        maps = discs([12.0] * 33, shift=shift)
        odds = contours(maps, list(range(0, 33, gap)), mm=mm).scores(16 + gap // 2, SIDE)
        return float(odds[0][center])

    assert said(4, 6) > said(8, 6) > said(16, 6) > 0
    # the same two ends: what the slices farther off do tells how far to believe them
    steady, ragged = discs([12.0] * 41), discs([12.0] * 41, shift=6)
    ragged[[20, 22]] = steady[[20, 22]]
    inside = SIDE // 2, SIDE // 2 + 9
    own = list(range(0, 41, 2))
    sure = float(contours(steady, own).scores(21, SIDE)[0][inside])
    unknown = float(contours(steady, [20, 22]).scores(21, SIDE)[0][inside])
    unsure = float(contours(ragged, own).scores(21, SIDE)[0][inside])
    assert sure > 1.3 * unknown
    assert unknown > 1.3 * unsure > 0


def test_where_one_end_shows_nothing_it_ends_between() -> None:
    maps = discs([14.0] * 5 + [0.0] * 5)
    said = contours(maps, [0, 8])
    center = [float(said.scores(i, SIDE)[0][SIDE // 2, SIDE // 2]) for i in range(1, 8)]
    assert center == sorted(center, reverse=True)
    assert center[0] > 0 > center[-1]
    assert center[3] == pytest.approx(0, abs=0.2)
    assert center[-1] > -5  # for it may end later than half-way


def test_where_neither_end_shows_it_the_more_is_said_against_it_the_nearer_they_are() -> None:
    maps = discs([0.0] * 9)
    for gap in (2, 8):
        odds = contours(maps, [0, gap]).scores(1, SIDE)
        assert (odds == -NOWHERE / gap).all()
    assert (contours(maps, [0, 8], value=-1).scores(1, SIDE) == -NOWHERE / 8).all()


def test_nothing_is_said_of_unknown_labels_own_slices_and_beyond_the_ends() -> None:
    maps = discs([10.0] * 9)
    assert (contours(maps, [2, 6], value=None).scores(4, SIDE) == 0).all()
    said = contours(maps, [2, 6])
    for index in (0, 1, 2, 6, 7, 8):
        assert (said.scores(index, SIDE) == 0).all()
    assert (said.scores(3, SIDE) != 0).any()


@pytest.mark.parametrize("place", [(31, 31), (30, 33)])
def test_what_is_thinner_than_a_working_pixel_is_there_all_the_same(place: tuple[int, int]) -> None:
    maps = np.zeros((3, 4 * SIDE, 4 * SIDE), np.int32)
    maps[:, 4 * place[0] + 1, 20:-20] = 1
    odds = contours(maps, [0, 2]).scores(1, SIDE)[0].numpy()
    assert (odds[place[0], 8:-8] > 0).all()
    assert (odds[[place[0] - 3, place[0] + 3]] < 0).all()


def test_many_labels_are_not_measured_again_for_each_slice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels, made = 80, [0]
    maps = np.tile(np.arange(1, 2 * SIDE + 1, dtype=np.int32)[None, :, None], (9, 1, SIDE))
    said = Contours(maps, [0, 8], list(range(1, labels + 1)), slice_mm=1, pixel_mm=1)
    real = contours_module._signed
    monkeypatch.setattr(
        contours_module, "_signed", lambda s: made.__setitem__(0, made[0] + 1) or real(s)
    )
    for index in range(1, 8):
        said.scores(index, 32)
    assert made[0] == 2 * labels


def test_two_labels_are_told_apart_and_a_full_slice_is_a_shape_like_others() -> None:
    maps = discs([10.0] * 5)
    maps[:, 40:] = 2
    both = Contours(maps, [0, 4], [1, 2], slice_mm=1, pixel_mm=1)
    odds = both.scores(2, SIDE).numpy()
    assert dice(odds[0] > 0, maps[2] == 1) > 0.95
    assert dice(odds[1] > 0, maps[2] == 2) > 0.95
    full = np.ones((3, SIDE, SIDE), np.int32)
    assert (contours(full, [0, 2]).scores(1, SIDE) > 0).all()
