"""Rankings of images one by one, by how far they are from all labels or by their risk."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from lib.retrieval.centers import Centers, RiskCurve
from lib.retrieval.poolview import PoolView, Proposal

Floats = npt.NDArray[np.float64]

_SAMPLE = 1024


class _OneByOne(ABC):
    """A `Ranking` by a score of each image that the labels alone change."""

    def __init__(self, pool: PoolView, seed: int, labels: Sequence[str]) -> None:
        self._pool = pool
        self._seed = seed
        self._centers = Centers(pool, pool.vectors, labels)
        self._rank = np.argsort(np.random.default_rng(seed).permutation(len(pool)))
        self._risk: Mapping[str, float] = {}

    def add_labelled(self, ids: Iterable[str], labels: Iterable[str] | None = None) -> None:
        """See `Ranking`."""
        self._centers.add(ids, labels)

    def remove_labelled(self, ids: Iterable[str]) -> None:
        """See `Ranking`."""
        self._centers.remove(ids)

    def set_risk(self, risk: Mapping[str, float]) -> None:
        """See `Ranking`."""
        self._risk = dict(risk)

    def next(self, exclude: Collection[str] = (), n: int = 1) -> list[Proposal]:
        """See `Ranking`."""
        kept, self._centers = self._centers, self._centers.copy() if n > 1 else self._centers
        barred = sorted(kept.numbers(exclude))
        proposals: list[Proposal] = []
        while len(proposals) < n:
            open_ = self._centers.lacking().any(axis=0)
            open_[barred] = False
            if not open_.any():
                break
            scores = np.where(open_, self._scores(), -np.inf)
            ties = np.flatnonzero(scores >= scores.max() - 1e-6)
            best = int(ties[np.argmin(self._rank[ties])])
            name = self._pool.ids[best]
            score = float(scores[best])
            proposals.append(Proposal(name, score, self._reason(best), self._far_slices(best)))
            if len(proposals) < n:
                self._centers.add([name])
        self._centers = kept
        return proposals

    def _distances(self) -> Floats:
        """(N,) 1 - cos of each slice to the nearest labelled one, for the label farthest away.

        2, the most that there is, without any.
        """
        return 1.0 - np.maximum(self._centers.nearest.min(axis=0), -1).astype(np.float64)

    def _far_slices(self, image: int) -> tuple[int, ...]:
        start, stop = self._pool.starts[image], self._pool.starts[image + 1]
        far = np.round(self._distances()[start:stop], 6)
        order = np.argsort(-far, kind="stable")[:3]
        return tuple(int(self._pool.slices[start + row]) for row in order)

    @abstractmethod
    def _scores(self) -> Floats:
        """Of each image (N,), the highest is next."""

    @abstractmethod
    def _reason(self, image: int) -> str:
        """Why an image is next, for a person."""


class Farthest(_OneByOne):
    """k-center (core-set): the image with the slice that is farthest from all labels."""

    def _scores(self) -> Floats:
        if not len(self._pool):
            return np.zeros(0)
        return np.maximum.reduceat(self._distances(), self._pool.starts[:-1])

    def _reason(self, image: int) -> str:  # noqa: ARG002  # each image's is the same
        return "the farthest from all labels" if self._centers.labelled else "no label is there yet"


class Riskiest(_OneByOne):
    """The image of the highest risk; where none is known, a risk that rises with the distance."""

    def __init__(self, pool: PoolView, seed: int, labels: Sequence[str]) -> None:
        super().__init__(pool, seed, labels)
        self._width = median_distance(pool, seed)

    def _scores(self) -> Floats:
        if not len(self._pool):
            return np.zeros(0)
        counts = np.diff(self._pool.starts)
        means = np.add.reduceat(self._distances(), self._pool.starts[:-1]) / counts
        curve = RiskCurve(self._width).fit(self._centers, self._pool, self._risk, self._seed)
        known = np.array([self._risk.get(name, np.nan) for name in self._pool.ids])
        return np.where(np.isnan(known), curve(means), known)

    def _reason(self, image: int) -> str:
        if not self._centers.labelled:
            return "no label is there yet"
        risk = self._risk.get(self._pool.ids[image])
        if risk is None:
            return "far from all labels, where the references would do worst"
        return f"its own mask would reach Dice {1 - risk:.2f}, the least of all"


def median_distance(pool: PoolView, seed: int) -> float:
    """Median of 1 - cos between slices of different images, of a sample; 1 where there is none."""
    rows = np.arange(len(pool.vectors))
    if len(rows) > _SAMPLE:
        rows = np.sort(np.random.default_rng(seed).choice(len(rows), _SAMPLE, replace=False))
    sample, owners = pool.vectors[rows], pool.owners[rows]
    distances = (1 - sample @ sample.T)[owners[:, None] != owners[None, :]]
    return max(float(np.median(distances)), 1e-3) if len(distances) else 1.0
