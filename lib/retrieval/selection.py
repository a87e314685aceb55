"""Which of the found neighbors to take: cap per case, diversity, ties without luck."""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from lib.types import FloatArray

# Rounding of a matrix product depends on the batch it was computed in; beyond this many decimals
# similarities count as equal, so that the same slice gets the same references in any batch.
TIE_DECIMALS = 6


def ranked(similarities: FloatArray, ties: Sequence[object]) -> list[int]:
    """Positions by falling similarity (N,), equal ones by `ties` (N sortable values, rising)."""
    rounded = np.round(np.asarray(similarities, dtype=np.float64), TIE_DECIMALS)
    return sorted(range(len(rounded)), key=lambda i: (-rounded[i], ties[i]))


def top_k(
    similarities: FloatArray,
    cases: Sequence[Hashable],
    k: int,
    *,
    cap_per_case: int | None = None,
    ties: Sequence[object] | None = None,
) -> list[int]:
    """Positions of the k most similar, nearest first.

    Args:
        similarities: (N,).
        cases: N values; equal ones belong to one case (one image).
        k: how many to take at most.
        cap_per_case: at most so many of one case; None is no cap. With fewer than k allowed, fewer
            are returned.
        ties: N sortable values that order equal similarities; positions if None.
    """
    if cap_per_case is not None and cap_per_case < 1:
        message = f"cap_per_case is {cap_per_case}; it must be at least 1, or None"
        raise ValueError(message)
    taken: Counter[Hashable] = Counter()
    chosen: list[int] = []
    for position in ranked(similarities, range(len(similarities)) if ties is None else ties):
        if len(chosen) >= k:
            break
        if cap_per_case is not None and taken[cases[position]] >= cap_per_case:
            continue
        taken[cases[position]] += 1
        chosen.append(position)
    return chosen


def diverse(
    similarities: FloatArray,
    between: FloatArray,
    k: int,
    *,
    diversity: float,
    ties: Sequence[object] | None = None,
) -> list[int]:
    """Positions of k similar but not repetitive candidates (maximal marginal relevance).

    Each step takes the candidate with the highest
    `(1 - diversity) * similarity - diversity * nearness to the nearest one taken`.

    Args:
        similarities: (N,) of the query to the candidates.
        between: (N, N) of the candidates to each other.
        k: how many to take at most.
        diversity: 0 is plain similarity, 1 ignores the query after the first.
        ties: N sortable values that order equal scores; positions if None.

    Returns:
        Positions in the order taken: the first is the most similar.
    """
    if not 0 <= diversity <= 1:
        message = f"diversity is {diversity}; it must lie in 0..1"
        raise ValueError(message)
    order = ranked(similarities, range(len(similarities)) if ties is None else ties)
    relevance = np.asarray(similarities, dtype=np.float64)
    nearest = np.full(len(relevance), -np.inf)
    chosen: list[int] = []
    left = list(order)  # in tie order, so that `max` takes the first of equals
    while left and len(chosen) < k:
        if chosen:
            score = (1 - diversity) * relevance - diversity * nearest
            score = np.round(score, TIE_DECIMALS)
            position = max(left, key=score.__getitem__)
        else:
            position = left[0]
        chosen.append(position)
        left.remove(position)
        nearest = np.maximum(nearest, np.asarray(between, dtype=np.float64)[position])
    return chosen
