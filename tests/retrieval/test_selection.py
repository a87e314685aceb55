from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.retrieval.selection import diverse, top_k

# Few different values, so that ties abound.
candidates = st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.9]), st.integers(0, 3)), max_size=15)


@settings(deadline=None)
@given(candidates, st.integers(0, 8), st.one_of(st.none(), st.integers(1, 3)), st.randoms())
def test_top_k_is_the_best_that_the_cap_allows_in_whatever_order_it_comes(pairs, k, cap, random):
    named = [(value, case, name) for name, (value, case) in enumerate(pairs)]
    random.shuffle(named)
    chosen = top_k(
        np.array([value for value, _, _ in named]),
        [case for _, case, _ in named],
        k,
        cap_per_case=cap,
        ties=[name for _, _, name in named],
    )
    names = [named[i][2] for i in chosen]

    wanted: list[int] = []
    taken: Counter[int] = Counter()
    for _, case, name in sorted(named, key=lambda item: (-item[0], item[2])):
        if len(wanted) < k and (cap is None or taken[case] < cap):
            wanted.append(name)
            taken[case] += 1
    assert names == wanted


def test_rounding_of_a_matrix_product_does_not_order():
    assert top_k(np.array([0.5, 0.5 + 1e-8]), ["a", "b"], 2) == [0, 1]


def test_a_cap_of_zero_is_refused():
    with pytest.raises(ValueError, match="cap_per_case is 0"):
        top_k(np.array([0.5]), ["a"], 1, cap_per_case=0)


def test_diversity_passes_over_a_twin():
    similarities = np.array([0.9, 0.89, 0.6])
    between = np.array([[1, 0.99, 0.1], [0.99, 1, 0.1], [0.1, 0.1, 1]])
    assert diverse(similarities, between, 2, diversity=0.5) == [0, 2]
    assert diverse(similarities, between, 2, diversity=0) == [0, 1]


@settings(deadline=None)
@given(candidates, st.integers(0, 20), st.floats(0, 1))
def test_diversity_takes_each_once_and_the_most_similar_first(pairs, k, diversity):
    similarities = np.array([value for value, _ in pairs])
    chosen = diverse(similarities, np.eye(len(pairs)), k, diversity=diversity)
    assert len(set(chosen)) == len(chosen) == min(k, len(pairs))
    if chosen:
        assert similarities[chosen[0]] == similarities.max()


def test_diversity_beyond_one_is_refused():
    with pytest.raises(ValueError, match="diversity is 2"):
        diverse(np.array([0.5]), np.eye(1), 1, diversity=2)
