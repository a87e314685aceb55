"""Which images are labelled for what, and how near each slice is to the nearest labelled one."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

from lib.retrieval.poolview import PoolView
from lib.types import FloatArray

_BLOCK = 512
_KNOWN_SAMPLE = 512
_KNOWN_ROWS = 2048  # all labelled rows are compared with each
_KNOWN_ENOUGH = 8  # images of known risk from which a curve over distance says something

Numbers = npt.NDArray[np.int64]


class Centers:
    """Similarity of points to the nearest labelled slice, for each label; kept bit by bit.

    Adding an image costs one product with the points; removing one costs that of all that are left.

    Attributes:
        nearest: (L, P) float32 cosine of each point with the nearest labelled slice; -inf without.

    Args:
        pool: the images.
        points: (P, E) unit float32.
        labels: names; empty: one nameless label for all.
    """

    def __init__(self, pool: PoolView, points: FloatArray, labels: Sequence[str]) -> None:
        self._pool = pool
        self._points = points
        self._labels = tuple(dict.fromkeys(labels)) or ("",)
        self._images: dict[str, set[int]] = {name: set() for name in self._labels}
        self._number = {name: number for number, name in enumerate(pool.ids)}
        self.nearest = np.full((len(self._labels), len(points)), -np.inf, dtype=np.float32)

    def numbers(self, ids: Iterable[str]) -> set[int]:
        """Positions of ids in the pool; those that are not there are passed over."""
        return {self._number[name] for name in ids if name in self._number}

    def add(self, ids: Iterable[str], labels: Iterable[str] | None = None) -> None:
        """Images are annotated with labels (None: all); other names do not count."""
        images = self.numbers(ids)
        names = self._labels if labels is None or self._labels == ("",) else tuple(labels)
        new = {
            row: images - self._images[name]
            for row, name in enumerate(self._labels)
            if name in names
        }
        fresh = sorted(set().union(*new.values()))
        for image in fresh:
            rows = [row for row, added in new.items() if image in added]
            own = self._pool.vectors[self._pool.starts[image] : self._pool.starts[image + 1]]
            near = (own @ self._points.T).max(axis=0)
            for row in rows:
                np.maximum(self.nearest[row], near, out=self.nearest[row])
                self._images[self._labels[row]].add(image)

    def remove(self, ids: Iterable[str]) -> set[int]:
        """Images have no label any more; the numbers of those that had one."""
        images = self.numbers(ids)
        gone: set[int] = set()
        done: dict[frozenset[int], int] = {}  # labels on the same images: computed once
        for row, name in enumerate(self._labels):
            had = images & self._images[name]
            if not had:
                continue
            gone |= had
            self._images[name] -= had
            left = frozenset(self._images[name])
            if left in done:
                self.nearest[row] = self.nearest[done[left]]
            else:
                self.nearest[row] = self.to_labelled(self._points, left)
                done[left] = row
        return gone

    def to_labelled(self, points: FloatArray, images: Iterable[int]) -> FloatArray:
        """(P,) cosine of points with the nearest slice of some images; -inf without."""
        nearest = np.full(len(points), -np.inf, dtype=np.float32)
        rows = self._pool.rows(np.array(sorted(images), dtype=np.int64))
        for start in range(0, len(rows), _BLOCK):
            block = self._pool.vectors[rows[start : start + _BLOCK]] @ points.T
            np.maximum(nearest, block.max(axis=0), out=nearest)
        return nearest

    @property
    def labelled(self) -> set[int]:
        """Images with any label."""
        return set().union(*self._images.values())

    def lacking(self) -> npt.NDArray[np.bool_]:
        """(L, M) whether an image still lacks a label."""
        lacking = np.ones((len(self._labels), len(self._pool)), dtype=bool)
        for row, name in enumerate(self._labels):
            lacking[row, list(self._images[name])] = False
        return lacking

    def groups(self) -> list[tuple[int, int]]:
        """Labels on the same images are one: (a row of `nearest`, how many labels it is)."""
        found: dict[frozenset[int], list[int]] = {}
        for row, name in enumerate(self._labels):
            found.setdefault(frozenset(self._images[name]), []).append(row)
        return [(rows[0], len(rows)) for rows in found.values()]

    def copy(self) -> "Centers":
        """A copy to try things on; the points are shared."""
        other = Centers.__new__(Centers)
        other.__dict__.update(self.__dict__)
        other._images = {name: set(images) for name, images in self._images.items()}
        other.nearest = self.nearest.copy()
        return other


class RiskCurve:
    """Expected risk by the distance to the nearest label, rising, from images of known risk.

    Below eight known images the risk is 1 - exp(-distance / width): the uncovered share.
    """

    def __init__(self, width: float) -> None:
        self._width = width
        self._x: npt.NDArray[np.float64] | None = None
        self._y: npt.NDArray[np.float64] | None = None

    def fit(
        self, centers: Centers, pool: PoolView, risk: Mapping[str, float], seed: int
    ) -> "RiskCurve":
        """Learn from the risks known, of at most 512 images and 2,048 of their rows."""
        self._x = self._y = None
        labelled = centers.labelled
        known = sorted(centers.numbers(risk) - labelled)
        if len(known) < _KNOWN_ENOUGH or not labelled:
            return self
        if len(known) > _KNOWN_SAMPLE:
            draw = np.random.default_rng(seed).choice(known, _KNOWN_SAMPLE, replace=False)
            known = sorted(draw.tolist())
        most = max(1, _KNOWN_ROWS // len(known))
        generator = np.random.default_rng(seed)
        chosen = []
        for number in known:
            rows = np.arange(pool.starts[number], pool.starts[number + 1])
            some = len(rows) > most
            chosen.append(np.sort(generator.choice(rows, most, replace=False)) if some else rows)
        near = centers.to_labelled(pool.vectors[np.concatenate(chosen)], labelled)
        counts = np.array([len(rows) for rows in chosen])
        means = np.add.reduceat(1 - near, np.cumsum(counts) - counts) / counts
        order = np.argsort(means, kind="stable")
        values = np.array([risk[pool.ids[number]] for number in known])[order]
        self._x = means[order].astype(np.float64)
        self._y = isotonic_regression(values).x
        return self

    def __call__(self, distances: npt.NDArray[np.float64] | FloatArray) -> npt.NDArray[np.float64]:
        """Distances (P,), inf without any label -> risk (P,) in 0..1."""
        far = np.asarray(distances, dtype=np.float64)
        if self._x is None or self._y is None:
            return 1 - np.exp(-np.maximum(far, 0) / self._width)
        return np.interp(far, self._x, self._y)
