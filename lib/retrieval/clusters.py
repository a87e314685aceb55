"""Rankings out of clusters: TypiClust, and the radius by which ProbCover covers."""

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.cluster.vq import kmeans2

from lib.retrieval.centers import Centers
from lib.retrieval.poolview import PoolView, Proposal
from lib.types import FloatArray

_NEIGHBORS = 20  # as in the paper
_SMALLEST = 5  # the same
_MOST_CLUSTERS = 500  # the same
_SAMPLE = 5000
_RADIUS_SAMPLE = 1024
_PURITY = 0.95  # as in the paper
_ROUNDS = 20


class TypiClust:
    """A `Ranking`: the most typical image of the largest cluster that has no label.

    As in Hacohen 2022 (arXiv 2202.02794), over the mean vectors of images; one cluster more than
    there are labels. Of a pool of more than 5,000 images a random sample takes part.
    """

    def __init__(self, pool: PoolView, seed: int = 0, *, labels: Sequence[str] = ()) -> None:
        self._pool = pool
        self._seed = seed
        self._centers = Centers(pool, np.zeros((0, pool.vectors.shape[1]), np.float32), labels)
        self._order = np.random.default_rng(seed).permutation(len(pool))
        self._rank = np.argsort(self._order)
        counts = np.diff(pool.starts)[:, None]
        sums = np.add.reduceat(pool.vectors, pool.starts[:-1]) if len(pool) else pool.vectors
        means = sums / np.maximum(counts, 1)
        lengths = np.linalg.norm(means, axis=1, keepdims=True)
        self._means: FloatArray = (means / np.maximum(lengths, 1e-12)).astype(np.float32)

    def add_labelled(self, ids: Iterable[str], labels: Iterable[str] | None = None) -> None:
        """See `Ranking`."""
        self._centers.add(ids, labels)

    def remove_labelled(self, ids: Iterable[str]) -> None:
        """See `Ranking`."""
        self._centers.remove(ids)

    def set_risk(self, risk: Mapping[str, float]) -> None:
        """See `Ranking`; risk does not matter here."""

    def next(self, exclude: Collection[str] = (), n: int = 1) -> list[Proposal]:
        """See `Ranking`."""
        kept, self._centers = self._centers, self._centers.copy() if n > 1 else self._centers
        barred = kept.numbers(exclude)
        proposals: list[Proposal] = []
        while len(proposals) < n:
            proposal = self._one(barred)
            if proposal is None:
                break
            proposals.append(proposal)
            if len(proposals) < n:
                self._centers.add([proposal.image_id])
        self._centers = kept
        return proposals

    def _one(self, barred: set[int]) -> Proposal | None:
        open_ = self._centers.lacking().any(axis=0)
        open_[sorted(barred)] = False
        labelled = self._centers.labelled
        candidates = [int(m) for m in self._order if open_[m]][:_SAMPLE]
        if not candidates:
            return None
        members = np.array(sorted({*candidates, *labelled}), dtype=np.int64)
        count = min(len(labelled) + 1, _MOST_CLUSTERS, len(members))
        cluster = assign_clusters(self._means[members], count, self._seed)
        has_label = np.isin(members, list(labelled))
        may = open_[members]
        sizes = np.bincount(cluster, minlength=count)
        owned = np.bincount(cluster, weights=has_label, minlength=count)
        usable = np.bincount(cluster, weights=may, minlength=count) > 0
        # fewest labels first, too small ones last, then the largest
        keys = np.lexsort((np.arange(count), -sizes, sizes < _SMALLEST, owned, ~usable))
        chosen = np.flatnonzero(cluster == keys[0])
        vectors = self._means[members[chosen]]
        distances = np.sqrt(np.maximum(2 - 2 * vectors @ vectors.T, 0))
        near = np.sort(distances, axis=1)[:, 1 : _NEIGHBORS + 1]
        spread = near.mean(axis=1) if near.shape[1] else np.zeros(len(chosen))
        spread = np.where(may[chosen], np.round(spread, 6), np.inf)
        ties = members[chosen[spread <= spread.min() + 1e-6]]
        image = int(ties[np.argmin(self._rank[ties])])
        start, stop = self._pool.starts[image], self._pool.starts[image + 1]
        typical = np.argsort(-self._pool.vectors[start:stop] @ self._means[image], kind="stable")
        return Proposal(
            self._pool.ids[image],
            float(1 / (spread.min() + 1e-6)),
            f"the most typical of {sizes[keys[0]]} images that are alike",
            tuple(int(self._pool.slices[start + row]) for row in typical[:3]),
        )


def assign_clusters(vectors: FloatArray, count: int, seed: int) -> npt.NDArray[np.int64]:
    """k-means from a k-means++ start: (M, E) -> (M,) numbers of clusters, some may be empty."""
    if count < 2 or len(vectors) <= count:
        return np.arange(len(vectors), dtype=np.int64) % max(count, 1)
    starts = _spread_out(vectors.astype(np.float64), count, np.random.default_rng(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of clusters that end up empty
        found = kmeans2(vectors.astype(np.float64), starts, iter=_ROUNDS, minit="matrix")
    return found[1].astype(np.int64)


def _spread_out(
    vectors: npt.NDArray[np.float64], count: int, generator: np.random.Generator
) -> npt.NDArray[np.float64]:
    """The k-means++ start; fewer than `count` where there are fewer different vectors.

    SciPy's own divides by zero then.
    """
    chosen = [int(generator.integers(len(vectors)))]
    squares = ((vectors - vectors[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < count and squares.max() > 1e-9:
        chosen.append(int(generator.choice(len(vectors), p=squares / squares.sum())))
        squares = np.minimum(squares, ((vectors - vectors[chosen[-1]]) ** 2).sum(axis=1))
    return vectors[chosen]


def pure_radius(pool: PoolView, seed: int) -> float:
    """ProbCover's radius as 1 - cos: the largest whose balls are 95 % pure (arXiv 2205.11320).

    Pure: all slices within it are in the same cluster. The number of clusters, which the paper
    takes from the task, is the square root of half of the slices here.
    """
    rows = np.arange(len(pool.vectors))
    if len(rows) > _RADIUS_SAMPLE:
        draw = np.random.default_rng(seed).choice(len(rows), _RADIUS_SAMPLE, replace=False)
        rows = np.sort(draw)
    sample = pool.vectors[rows]
    if len(sample) < 3:
        return 0.1
    cluster = assign_clusters(sample, max(2, round(np.sqrt(len(sample) / 2))), seed)
    distances = 1 - sample @ sample.T
    foreign = np.where(cluster[:, None] != cluster[None, :], distances, 2.0).min(axis=1)
    # a ball is pure up to the nearest slice of another cluster
    return max(float(np.quantile(foreign, 1 - _PURITY)), 1e-3)
