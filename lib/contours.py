"""What an annotator's own slices say of the slices between them: contours, drawn on.

Between two labelled slices a structure's contour moves from the one to the other. So its signed
distance is interpolated, as shape-based interpolation does (Raya and Udupa 1990), and becomes
log-odds by how far contours stray from it: by the annotator's own slices, each left out in turn and
interpolated by its neighbors. Close slices of a smooth structure say nearly all, distant or ragged
ones little, and the network's scores, to which they are added, say the rest.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from lib.types import FloatArray, IntArray

SLOPE = 1.0  # believed beforehand: so many mm a contour strays per mm between the slices
WORTH = 1.0  # left-out slices that this belief is worth
MOST_LEFT_OUT = 16  # more say no more of how far contours stray
NEAR = 1.5  # working pixels from the interpolated contour, where it is measured how far off it is
LOGISTIC = 1.7  # log-odds of x standard deviations of a normal distribution, by x
SURE = 8.0  # log-odds at most
NOWHERE = 4.0  # log-odds against a label that neither slice shows, times their distance
# Deviation of where a structure ends, of its depth: at its middle this makes the odds of a slice
# about (1 - share) : share, as if it may end anywhere between with equal chance.
ENDS = 0.8
_MAPS_KEPT = 64


@dataclass(frozen=True)
class _Stray:
    """Variance of a contour between two slices, in working pixels, over share * (1 - share).

    Attributes:
        believed: before anything was measured, of slices next to each other; goes with gap^2.
        measured: sum over the slices left out, by gap: a contour is taken for a random walk, since
            what was measured over double the gap would else make jitter look small.
        count: of them.
    """

    believed: float
    measured: float
    count: int

    def over(self, gap: int) -> float:
        """Of slices so far apart."""
        return (WORTH * self.believed * gap**2 + self.measured * gap) / (WORTH + self.count)


class Contours:
    """Log-odds of labels on the slices between annotated ones of the same volume.

    Args:
        maps: (N, H, W) label maps of the volume's slices, of which the annotated ones are read.
        slices: numbers of the annotated slices.
        values: of the labels in `maps`, -1 for one that is annotated and drawn nowhere, None for
            one that these slices say nothing of.
        slice_mm: distance of slices.
        pixel_mm: side of a pixel, as that of a square of the same area.
    """

    def __init__(
        self,
        maps: IntArray,
        slices: Sequence[int],
        values: Sequence[int | None],
        *,
        slice_mm: float,
        pixel_mm: float,
    ) -> None:
        self._maps = maps
        self._slices = np.array(sorted(slices))
        self._values = tuple(values)
        self._slice_mm = slice_mm
        self._pixel_mm = pixel_mm
        self._side = 0
        self._kept: OrderedDict[tuple[int, int], FloatArray | None] = OrderedDict()
        self._strays: dict[int, _Stray] = {}

    def scores(self, index: int, side: int) -> torch.Tensor:
        """Log-odds (L, side, side) of a slice; zero where nothing is said, as beyond the ends."""
        if side != self._side:
            self._side = side
            self._kept.clear()
            self._strays.clear()
        found = torch.zeros(len(self._values), side, side)
        after = int(np.searchsorted(self._slices, index))
        if not 0 < after < len(self._slices) or self._slices[after] == index:
            return found
        low, high = int(self._slices[after - 1]), int(self._slices[after])
        gap, share = high - low, (index - low) / (high - low)
        asked = [row for row, value in enumerate(self._values) if value is not None]
        strays = {row: self._stray(row) for row in asked}  # once, before these slices are kept
        for row in asked:
            distance, vague = self._between(row, low, high, index)
            if distance is None:
                found[row] = -NOWHERE / gap
                continue
            variance = strays[row].over(gap) * share * (1 - share) + self._grain() + vague
            odds = np.clip(LOGISTIC / variance**0.5 * distance, -SURE, SURE)
            found[row] = torch.from_numpy(odds)
        return found

    def _between(
        self, row: int, low: int, high: int, index: int
    ) -> tuple[FloatArray | None, float]:
        """Signed distance in working pixels, and its variance where one end shows nothing.

        Where that is, the structure may end anywhere between.
        """
        before, after = self._distance(row, low), self._distance(row, high)
        share = (index - low) / (high - low)
        vague = 0.0
        if before is None and after is None:
            return None, vague
        if before is None or after is None:
            shown = before if after is None else after
            assert shown is not None
            depth = float(shown.max())
            nothing = np.full_like(shown, -depth)
            before, after = (shown, nothing) if after is None else (nothing, shown)
            vague = (ENDS * depth) ** 2
        assert before is not None
        return before * np.float32(1 - share) + after * np.float32(share), vague

    def _stray(self, row: int) -> _Stray:
        """How far a label's contour strays: by slices left out, and the belief."""
        if row in self._strays:
            return self._strays[row]
        height, width = self._maps.shape[1:]
        working_mm = self._pixel_mm * (height * width) ** 0.5 / self._side
        found: list[float] = []
        inner = range(1, len(self._slices) - 1)
        for place in inner[:: -(-len(inner) // MOST_LEFT_OUT) or 1]:
            low, middle, high = (int(n) for n in self._slices[place - 1 : place + 2])
            truth = self._distance(row, middle)
            if truth is None or self._distance(row, low) is None:
                continue
            if self._distance(row, high) is None:
                continue
            distance, _ = self._between(row, low, high, middle)
            assert distance is not None
            off = np.abs(distance)
            near = off <= max(NEAR, float(off.min()) + 0.5)
            gap, share = high - low, (middle - low) / (high - low)
            missed = max(0.0, float(np.square(truth[near]).mean()) - self._grain())
            found.append(missed / (gap * share * (1 - share)))
        believed = (SLOPE * self._slice_mm / working_mm) ** 2
        self._strays[row] = _Stray(believed, sum(found), len(found))
        return self._strays[row]

    def _grain(self) -> float:
        """Variance of a contour in working pixels that is of the image's own pixels."""
        height, width = self._maps.shape[1:]
        return self._side**2 / (height * width) / 6 + 0.1

    def _distance(self, row: int, index: int) -> FloatArray | None:
        """Signed distance (S, S) to a label's contour, positive inside; None: it is not shown."""
        key = row, index
        if key not in self._kept:
            shown = torch.from_numpy(self._maps[index] == self._values[row])[None, None].float()
            size = (self._side, self._side)
            shares = F.interpolate(shown, size=size, mode="bilinear", antialias=True)
            self._kept[key] = _signed(shares[0, 0].numpy())
            while len(self._kept) > max(_MAPS_KEPT, 2 * len(self._values)):
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def _signed(shares: FloatArray) -> FloatArray | None:
    from scipy.ndimage import distance_transform_edt

    most = float(shares.max())
    if most <= 0:
        return None
    mask: npt.NDArray[np.bool_] = shares >= min(0.5, most / 2)  # thinner than a pixel: still there
    if mask.all():
        return np.full(mask.shape, len(mask), np.float32)
    inside, outside = distance_transform_edt(mask), distance_transform_edt(~mask)
    found: FloatArray = (inside - outside - (mask - 0.5)).astype(np.float32)
    return found
