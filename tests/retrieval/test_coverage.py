import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.retrieval.coverage import coverage_order


def unit(generator: np.random.Generator, count: int, size: int) -> np.ndarray:
    vectors = generator.standard_normal((count, size)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def coverage(vectors: np.ndarray, centers: np.ndarray, width: float) -> float:
    """Mean over the pool of the kernel with the nearest center, word by word from the paper."""
    total = 0.0
    for x in vectors.astype(np.float64):
        values = [np.exp(-max(0.0, 1 - x @ c) / width) for c in centers.astype(np.float64)]
        total += max(values, default=0.0)
    return total / len(vectors)


@st.composite
def pools(draw):
    generator = np.random.default_rng(draw(st.integers(0, 10_000)))
    count = draw(st.integers(1, 24))
    vectors = unit(generator, count, 6)
    if draw(st.booleans()):  # twins, for ties
        vectors[count // 2 :] = vectors[: count - count // 2]
    groups = generator.integers(0, draw(st.integers(1, 8)), count) * 10
    labelled = np.isin(groups, generator.choice(groups, draw(st.integers(0, 2))))
    if draw(st.booleans()):  # a volume labelled in some of its slices only
        labelled &= generator.random(count) < 0.5
    return vectors, groups, labelled


@settings(max_examples=80, deadline=None)
@given(pools(), st.integers(0, 6), st.integers(0, 5), st.sampled_from([0.05, 0.3, 1.0]))
def test_each_pick_is_a_greedy_one_and_its_gain_is_the_coverage_it_adds(pool, n, seed, width):
    vectors, groups, labelled = pool
    picks = coverage_order(vectors, groups, labelled, n, seed, width=width)

    left = set(groups.tolist()) - set(groups[labelled].tolist())
    assert len(picks) == min(n, len(left))
    centers = vectors[labelled]
    for pick in picks:
        before = coverage(vectors, centers, width)
        gains = {
            g: coverage(vectors, np.concatenate([centers, vectors[groups == g]]), width) - before
            for g in left
        }
        assert pick.group in left
        assert pick.gain == pytest.approx(gains[pick.group], abs=1e-5)
        assert gains[pick.group] == pytest.approx(max(gains.values()), abs=1e-5)
        left.remove(pick.group)
        centers = np.concatenate([centers, vectors[groups == pick.group]])


@settings(max_examples=30, deadline=None)
@given(pools(), st.integers(0, 5), st.randoms())
def test_the_order_of_the_rows_does_not_matter(pool, seed, random):
    vectors, groups, labelled = pool
    shuffled = list(range(len(groups)))
    random.shuffle(shuffled)
    straight = coverage_order(vectors, groups, labelled, 4, seed, width=0.3)
    mixed = coverage_order(
        vectors[shuffled], groups[shuffled], labelled[shuffled], 4, seed, width=0.3
    )
    assert [p.group for p in straight] == [p.group for p in mixed]


def test_a_seed_repeats_and_another_orders_ties_anew():
    twins = np.tile(np.float32([[1, 0]]), (50, 1))
    nothing = np.zeros(50, dtype=bool)
    orders = [
        [p.group for p in coverage_order(twins, np.arange(50), nothing, 50, seed)]
        for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == list(range(50))


def test_from_zero_labels_one_image_of_each_cluster_comes_first():
    generator = np.random.default_rng(0)
    centers = np.eye(5, 32, dtype=np.float32)
    cluster = generator.integers(0, 5, 300)
    vectors = centers[cluster] + 0.02 * unit(generator, 300, 32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    picks = coverage_order(vectors, np.arange(300), np.zeros(300, dtype=bool), 5)
    assert {cluster[p.group] for p in picks} == set(range(5))
    sizes = [int((cluster == cluster[p.group]).sum()) for p in picks]
    assert sizes == sorted(sizes, reverse=True)


def test_labelled_images_push_the_next_one_away():
    vectors = np.eye(3, dtype=np.float32)[[0, 0, 0, 1, 2, 2]]
    labelled = np.array([True, False, False, False, False, False])
    groups = np.arange(6)
    order = [p.group for p in coverage_order(vectors, groups, labelled, 5)]
    assert order[0] in (4, 5)
    assert order[1] == 3
    assert 0 not in order


def test_everything_labelled_or_nothing_there_gives_nothing():
    some = np.float32([[1, 0]])
    assert coverage_order(some, np.array([0]), np.array([True]), 3) == []
    empty = np.zeros((0, 2), dtype=np.float32)
    assert coverage_order(empty, np.zeros(0, int), np.zeros(0, bool), 3) == []


def test_arrays_of_different_length_are_refused():
    with pytest.raises(ValueError, match="one entry per slice"):
        coverage_order(np.eye(2, dtype=np.float32), np.array([0]), np.array([False, False]), 1)


def test_a_large_pool_is_sampled_and_still_near_the_whole():
    generator = np.random.default_rng(1)
    vectors = unit(generator, 6_000, 16)
    groups = np.arange(6_000) // 20
    nothing = np.zeros(6_000, dtype=bool)
    sampled = coverage_order(
        vectors, groups, nothing, 3, width=0.2, max_targets=1000, max_candidates=3000
    )
    whole = coverage_order(vectors, groups, nothing, 3, width=0.2, max_targets=6_000)
    assert sum(p.gain for p in sampled) == pytest.approx(sum(p.gain for p in whole), rel=0.1)
