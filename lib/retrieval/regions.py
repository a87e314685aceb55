"""Pictures as their regions: what a pool of images is compared by when the next one is chosen.

Two pictures are alike for label transfer when each part of one finds its like in the other; the
mean of a whole picture tells less. (The image that is labelled first by regions teaches the others
more than the one by whole pictures: `benchmarks/first_image.py`.) Descriptors are centred and
scaled by the pool's own statistics, since what all its pictures share tells nothing within it, and
shortened to their main axes. Where a region lies counts a little.
"""

from dataclasses import dataclass

import numpy as np

from lib.retrieval.poolview import PLACE_AXES
from lib.types import FloatArray

AXES = 32  # three quarters of the variance
PLACE = 1.0  # weight of the squared distance between places, in picture widths, beside the cosine
_SAMPLE = 32_768  # rows that the axes are taken from
_TINY = 1e-6


@dataclass(frozen=True, eq=False)
class RegionBasis:
    """Turns the stored rows of a pool into unit vectors whose cosines compare regions.

    Attributes:
        regions: rows of a slice, a square number of them, row by row over the picture. 1: there
            are none, rows are the unit vectors of an embedder and stay as they are.
        mean: (C,) of the pool.
        scale: (C,) its standard deviation.
        axes: (C, AXES) main axes of what was centred and scaled.
    """

    regions: int
    mean: FloatArray
    scale: FloatArray
    axes: FloatArray

    @classmethod
    def of(cls, rows: FloatArray, regions: int) -> "RegionBasis":
        """From rows (N, C) of a pool, or of a part of it that was drawn."""
        if regions == 1:
            nothing = np.zeros((0, 0), np.float32)
            return cls(regions, nothing, nothing, nothing)
        if len(rows) > _SAMPLE:
            draw = np.random.default_rng(0).choice(len(rows), _SAMPLE, replace=False)
            rows = rows[np.sort(draw)]
        mean = rows.mean(0, dtype=np.float64).astype(np.float32)
        scale = rows.std(0, dtype=np.float64).astype(np.float32) + np.float32(_TINY)
        unit = _unit((rows - mean) / scale)
        _, axes = np.linalg.eigh(unit.T @ unit)  # ascending
        return cls(regions, mean, scale, np.ascontiguousarray(axes[:, ::-1][:, :AXES]))

    def apply(self, rows: FloatArray) -> FloatArray:
        """Rows (N, C) of whole slices, one after the other -> (N, E) unit float32."""
        if self.regions == 1:
            return _unit(rows)  # half precision has taken from their length
        axes = self.axes / self.scale[:, None]
        content = _unit(rows @ axes - self.mean @ axes).reshape(-1, self.regions, axes.shape[1])
        places = np.broadcast_to(_places(self.regions), (*content.shape[:2], PLACE_AXES))
        both = np.concatenate([content, places], 2).reshape(len(rows), -1)
        return both / np.float32((1 + 4 * PLACE) ** 0.5)


def _places(regions: int) -> FloatArray:
    """(R, 4) whose inner products are constants less PLACE times the squared distance.

    cos(d) is 1 - d^2 / 2 for distances below a picture's width, up to d^4 / 24.
    """
    side = round(regions**0.5)
    at = (np.arange(side) + 0.5) / side
    y, x = (each.ravel() for each in np.meshgrid(at, at, indexing="ij"))
    rows = np.stack([np.cos(y), np.sin(y), np.cos(x), np.sin(x)], 1)
    return ((2 * PLACE) ** 0.5 * rows).astype(np.float32)


def _unit(rows: FloatArray) -> FloatArray:
    lengths = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _TINY)
    return (rows / lengths).astype(np.float32)
