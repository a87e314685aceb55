import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.retrieval.index import VectorIndex


def unit(generator: np.random.Generator, count: int, size: int) -> np.ndarray:
    vectors = generator.standard_normal((count, size)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute_force(held: dict[int, np.ndarray], query: np.ndarray, k: int) -> list[float]:
    return sorted((float(vector @ query) for vector in held.values()), reverse=True)[:k]


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=40),
    k=st.integers(1, 12),
    seed=st.integers(0, 1000),
    subset=st.sets(st.integers(0, 35)),
)
def test_search_after_any_adding_and_removing_equals_brute_force(steps, k, seed, subset):
    generator = np.random.default_rng(seed)
    index, held = VectorIndex(), {}
    for adds, number in steps:
        if adds and number not in held:
            held[number] = unit(generator, 1, 12)[0]
            index.add(np.array([number]), held[number][None])
        elif not adds:
            held.pop(number, None)
            index.remove(np.array([number]))
    queries = unit(generator, 3, 12)
    for within in (None, np.array(sorted(subset), dtype=np.int64)):
        allowed = held if within is None else {i: v for i, v in held.items() if i in subset}
        similarities, ids = index.search(queries, k, within=within)
        assert ids.shape == (3, min(k, len(allowed)))
        for query, row, values in zip(queries, ids, similarities, strict=True):
            assert len(set(row)) == len(row)
            np.testing.assert_allclose(values, brute_force(allowed, query, k), atol=1e-6)
            np.testing.assert_allclose(values, [held[i] @ query for i in row], atol=1e-6)


def test_equal_similarities_come_by_rising_id():
    index = VectorIndex()
    index.add(np.array([9, 4, 7, 1]), np.tile(np.float32([[1, 0]]), (4, 1)))
    assert index.search(np.float32([[1, 0]]), 4)[1].tolist() == [[1, 4, 7, 9]]


def test_an_id_is_taken_once_and_sizes_must_agree():
    index = VectorIndex()
    index.add(np.array([1]), np.float32([[1, 0]]))
    with pytest.raises(ValueError, match="already"):
        index.add(np.array([1]), np.float32([[0, 1]]))
    with pytest.raises(ValueError, match="3 entries in an index of 2"):
        index.add(np.array([2]), np.float32([[0, 1, 0]]))


@pytest.fixture(scope="module")
def clustered():
    generator = np.random.default_rng(3)
    centers = unit(generator, 60, 32)
    vectors = centers[generator.integers(0, 60, 6000)]
    vectors = vectors + 0.15 * generator.standard_normal(vectors.shape)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return vectors[:5000], vectors[5000:]


@pytest.fixture(scope="module")
def index(clustered):
    index = VectorIndex(exact_up_to=2000)
    for start in range(0, 5000, 500):
        part = np.arange(start, start + 500)
        index.add(part * 3, clustered[0][part])
    return index


def test_beyond_a_size_the_index_is_approximate_by_itself(index):
    assert index.approximate
    assert not VectorIndex(exact_up_to=2000).approximate


def test_recall_of_sixteen_is_at_least_99_percent(index, clustered):
    vectors, queries = clustered
    truth = np.argsort(-queries @ vectors.T, axis=1)[:, :16] * 3
    found = index.search(queries, 16)[1]
    hits = sum(len(set(a) & set(b)) for a, b in zip(truth, found, strict=True))
    assert hits >= 0.99 * truth.size


def test_recall_holds_for_slices_of_volumes_that_are_not_in_the_index():
    generator = np.random.default_rng(7)
    mapping = generator.standard_normal((8, 32))
    walks = generator.standard_normal((160, 1, 8))
    walks = walks + np.cumsum(0.05 * generator.standard_normal((160, 25, 8)), axis=1)
    vectors = (walks.reshape(-1, 8) @ mapping).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    held, queries = vectors[:3500], vectors[3500:]
    index = VectorIndex(exact_up_to=2000)
    index.add(np.arange(3500), held, np.arange(3500) // 25)
    assert index.approximate
    truth = np.argsort(-queries @ held.T, axis=1)[:, :16]
    found = index.search(queries, 16)[1]
    hits = sum(len(set(a) & set(b)) for a, b in zip(truth, found, strict=True))
    assert hits >= 0.99 * truth.size


def test_a_subset_is_searched_and_nothing_else(index, clustered):
    vectors, queries = clustered
    for subset in (np.arange(0, 5000, 2), np.arange(0, 5000, 100)):
        truth = subset[np.argsort(-queries @ vectors[subset].T, axis=1)[:, :16]] * 3
        found = index.search(queries, 16, within=subset * 3)[1]
        assert set(found[found >= 0]) <= set(subset * 3)
        hits = sum(len(set(a) & set(b)) for a, b in zip(truth, found, strict=True))
        assert hits >= 0.97 * truth.size


def test_what_is_removed_is_not_found_and_the_rest_still_is(clustered):
    vectors, _ = clustered
    index = VectorIndex(exact_up_to=2000)
    index.add(np.arange(5000), vectors)
    index.remove(np.arange(0, 5000, 2))
    assert len(index) == 2500
    found = index.search(vectors[:200], 1)[1][:, 0]
    assert (found % 2 == 1).all()
    assert (found[1::2] == np.arange(1, 200, 2)).mean() >= 0.99
    np.testing.assert_array_equal(index.vectors(np.array([7, 5, 9])), vectors[[7, 5, 9]])
    index.remove(np.arange(1001, 5000, 2))
    assert not index.approximate
    assert index.search(vectors[1:2], 1)[1].tolist() == [[1]]


def test_a_gpu_index_finds_what_the_cpu_finds():
    import faiss

    if not getattr(faiss, "get_num_gpus", lambda: 0)():
        pytest.skip("this faiss has no GPU to search on")
    generator = np.random.default_rng(5)
    vectors = unit(generator, 500, 32)
    answers = []
    for gpu in (True, False):
        index = VectorIndex(gpu=gpu)
        index.add(np.arange(500), vectors)
        index.remove(np.arange(100))
        answers.append(index.search(vectors, 8)[1])
    np.testing.assert_array_equal(*answers)
