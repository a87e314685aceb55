"""Pools seen by regions: what their cosines compare, and what a ranking tells of them."""

import numpy as np
import pytest

from lib.retrieval.poolview import PLACE_AXES, PoolView
from lib.retrieval.ranking import NAMES, make_ranking
from lib.retrieval.regions import PLACE, RegionBasis

SIDE, WIDTH = 4, 48
REGIONS = SIDE * SIDE


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """(count, REGIONS, WIDTH): tissues of their own, far from zero as ReLU leaves them."""
    rng = np.random.default_rng(seed)
    return (3 + rng.standard_normal((count, REGIONS, WIDTH))).astype(np.float32)


def seen(rows: np.ndarray) -> np.ndarray:
    """(n, REGIONS, E) as a pool of these pictures sees them."""
    flat = rows.reshape(-1, WIDTH)
    return RegionBasis.of(flat, REGIONS).apply(flat).reshape(len(rows), REGIONS, -1)


def test_what_all_pictures_share_tells_nothing() -> None:
    rows = pictures(40)
    raw = rows / np.linalg.norm(rows, axis=2, keepdims=True)
    assert (raw[0] @ raw[1].T).mean() > 0.8
    found = seen(rows)
    np.testing.assert_allclose(np.linalg.norm(found, axis=2), 1, atol=1e-5)
    place = 4 * PLACE / (1 + 4 * PLACE)  # the part of a cosine that a place of one's own has
    assert abs(float((found[0] * found[1]).sum(1).mean()) - place) < 0.1
    assert np.allclose(found, seen(rows * 1000 + 7), atol=1e-2)  # nor do their units


def test_a_region_finds_its_like_wherever_it_lies_and_rather_where_it_lay() -> None:
    rows = pictures(40)
    rows[1, 0] = rows[2, 5] = rows[0, 5]  # of picture 0, in a corner of 1, at its own place in 2
    found = seen(rows)
    cosines = found[0, 5] @ found.reshape(-1, found.shape[2]).T
    order = np.argsort(-cosines)
    assert order[:2].tolist() in ([5, 2 * REGIONS + 5], [2 * REGIONS + 5, 5])
    assert order[2] == REGIONS + 0
    at = (np.array([[0, 0], [1, 1]]) + 0.5) / SIDE
    lost = PLACE * ((at[0] - at[1]) ** 2).sum() / (1 + 4 * PLACE)
    assert cosines[order[0]] - cosines[order[2]] == pytest.approx(lost, rel=0.05)


def test_channels_count_alike_and_the_main_axes_are_kept() -> None:
    """A signal in eight hidden numbers, seen by very unequal channels, in a little noise."""
    rng = np.random.default_rng(3)
    hidden = rng.standard_normal((60, REGIONS, 8))
    hidden[1] = hidden[0]
    rows = hidden @ rng.standard_normal((8, WIDTH))
    rows += 0.3 * rng.standard_normal(rows.shape)
    rows *= 10.0 ** rng.uniform(-2, 2, WIDTH)
    found = seen(rows.astype(np.float32))
    same = (found[0] * found[1]).sum(1)
    other = (found[0] * found[2:].reshape(58, REGIONS, -1)).sum(2)
    assert np.median(same) > 0.98
    assert np.quantile(other, 0.99) < np.quantile(same, 0.1)


def test_the_axes_are_those_of_all_regions_of_a_large_pool() -> None:
    """More rows than are looked at, with a tissue that only every other column shows."""
    rng = np.random.default_rng(4)
    rows = rng.standard_normal((2400, REGIONS, WIDTH)).astype(np.float32)
    rows[:, 1::2] += 5
    basis = RegionBasis.of(rows.reshape(-1, WIDTH), REGIONS)
    np.testing.assert_allclose(basis.mean, 2.5, atol=0.2)


def test_rows_of_whole_pictures_stay_as_they_are() -> None:
    rows = pictures(9)[:, 0]
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    found = RegionBasis.of(unit, 1).apply(unit.astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(found, unit, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def pool_of(count: int, depth: int) -> PoolView:
    found = seen(pictures(count * depth)).reshape(count, depth * REGIONS, -1)
    numbers = np.repeat(np.arange(depth) * 7, REGIONS)
    return PoolView.of(
        {f"i{n:02}": found[n] for n in range(count)},
        {f"i{n:02}": numbers.tolist() for n in range(count)},
        regions=REGIONS,
    )


def test_a_picture_is_the_mean_of_its_regions() -> None:
    pool = pool_of(6, 3)
    whole = pool.whole()
    assert whole.ids == pool.ids
    assert whole.starts.tolist() == [0, 3, 6, 9, 12, 15, 18]
    assert whole.slices.tolist() == [0, 7, 14] * 6
    mean = pool.vectors[REGIONS : 2 * REGIONS, :-PLACE_AXES].mean(0)
    np.testing.assert_allclose(whole.vectors[1], mean / np.linalg.norm(mean), atol=1e-6)
    alike = whole.vectors @ whole.vectors.T  # nor is what all of them share part of it
    assert abs(float(alike[~np.eye(len(alike), dtype=bool)].mean())) < 0.2
    assert whole.whole() is whole
    part = pool.part(["i04", "i01", "none"])
    assert part.ids == ("i01", "i04")
    assert part.regions == REGIONS
    np.testing.assert_array_equal(part.whole().vectors, whole.part(["i01", "i04"]).vectors)


@pytest.mark.parametrize("name", NAMES)
def test_every_ranking_names_slices_and_not_regions(name: str) -> None:
    ranking = make_ranking(name, pool_of(8, 5), 0)
    for _ in range(8):
        (proposal,) = ranking.next()
        ranking.add_labelled([proposal.image_id])
        assert len(set(proposal.slices)) == len(proposal.slices) <= 5
        assert set(proposal.slices) <= {0, 7, 14, 21, 28}
    assert ranking.next() == []


def test_coverage_takes_the_picture_whose_parts_the_others_have() -> None:
    rows = pictures(12)
    for n in range(1, 12):  # a patchwork of picture 0, a region from each; the rest is their own
        rows[n, n] = rows[0, n]
    rows[3, 4:8] = rows[5, 4:8]
    pool = PoolView.of({f"i{n:02}": r for n, r in enumerate(seen(rows))}, regions=REGIONS)
    (first,) = make_ranking("coverage", pool, 0).next()
    assert first.image_id == "i00"
