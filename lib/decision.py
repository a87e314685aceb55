"""From scores to masks: how much of what a network half believes is painted.

A network that learned not to paint what is absent is careful: where it is in doubt it says less
than one half everywhere, and a threshold at one half leaves holes. What an annotator gains from is
Dice, and the threshold with the highest expected Dice is not one half but half of the Dice that can
be had (Lipton et al., arXiv 1402.1892, theorem 1, for F1): low where the network is in doubt, one
half where it is sure. It is found here for each label over the whole image, from the network's own
probabilities, without a knob.
"""

import tempfile
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from lib.imaging.pieces import tidy
from lib.types import IntArray, Shape

STEP = 1 / 16  # of a stored score; they are kept as int8, so up to +-8
LOWEST = -128  # "no reference knows this label here"
BINS = 1024
SOME_BELIEF = (
    0.4  # a label whose probability is nowhere above this is not painted more than is sure
)
CONTEXT = 3  # a neighbor counts by this power of the overlap of adjacent slices
FLOOR = 0.15  # a threshold below this would rest on the tail of the probabilities alone
IN_MEMORY = 256 * 2**20  # bytes of scores of an image; more than that waits in a temporary file


class Decision:
    """Collects the scores of an image's slices, then draws its label map.

    Memory is bounded: one byte for each label and working pixel, in a temporary file where an
    image has many.
    """

    def __init__(
        self, labels: int, slices: int, shapes: Sequence[Shape] = (), *, adjacent: bool = True
    ) -> None:
        """Nothing is decided yet.

        Args:
            labels: how many.
            slices: at most so many will come.
            shapes: of each label, which what is drawn is made to have; empty: any.
            adjacent: whether slices whose numbers differ by one are neighbors.
        """
        self._labels = labels
        self._shapes = shapes
        self._adjacent = adjacent
        self._capacity = slices
        self._scores: npt.NDArray[np.int8] | None = None
        self._place: dict[int, int] = {}
        self._counts = np.zeros((labels, BINS))
        self._sums = np.zeros((labels, BINS))
        self._neighbor: torch.Tensor | None = None  # weight (L,) of an adjacent slice
        self._shift = torch.zeros(labels)  # of the scores, above 0 where above the threshold

    def add(self, index: int, scores: torch.Tensor, rows: Sequence[int]) -> None:
        """Keep the scores (R, S, S) of slice `index`; row i belongs to label `rows[i]`."""
        side = scores.shape[-1]
        if self._scores is None:
            self._scores = _room((self._capacity, self._labels, side, side))
        stored = np.full((self._labels, side, side), LOWEST, np.int8)
        scaled = (scores.float() / STEP).round().clamp(LOWEST + 1, 127)
        stored[list(rows)] = scaled.to(torch.int8).cpu().numpy()
        self._neighbor = None
        self._place[index] = len(self._place)
        self._scores[self._place[index]] = stored
        self._count(scores.double().clamp(-30, 30), rows)

    def _count(self, scores: torch.Tensor, rows: Sequence[int]) -> None:
        """Add the pixels of scores (R, S, S) to the counts by probability."""
        for row, values in zip(rows, _probabilities(scores).cpu().numpy(), strict=True):
            bins = np.minimum((values * BINS).astype(np.int64), BINS - 1)
            self._counts[row] += np.bincount(bins, minlength=BINS)
            self._sums[row] += np.bincount(bins, values, minlength=BINS)

    def _thresholds(self) -> npt.NDArray[np.float64]:
        """The probability (L,) from which each label is painted, by what was counted."""
        return np.array(
            [
                best_threshold(counts, sums)
                for counts, sums in zip(self._counts, self._sums, strict=True)
            ]
        )

    def draw(self, index: int, shape: tuple[int, int]) -> IntArray:
        """Draw one slice -> (H, W) int32, 0 or label + 1; call it when all scores are in."""
        if self._scores is None or index not in self._place:
            return np.zeros(shape, np.int32)
        self._settle()
        drawn = merge(self._averaged(index) + self._shift[:, None, None], shape)
        tidy(drawn, self._shapes)
        return drawn

    def sharpness(self) -> list[float]:
        """Expected Dice of each label's mask by the probabilities of its pixels; NaN: none painted.

        2 sum(p m) / sum(p + m) over all slices, at the network's working size; call it when all
        scores are in.
        """
        self._settle()
        hit, painted = np.zeros(self._labels + 1), np.zeros(self._labels + 1)
        for index in self._place:
            scores = self._averaged(index)
            mask = self.draw(index, (scores.shape[-2], scores.shape[-1])).ravel()
            odds = torch.cat([torch.zeros_like(scores[:1]), scores])
            own = torch.softmax(odds.flatten(1), 0).gather(0, torch.from_numpy(mask[None]).long())
            hit += np.bincount(mask, own[0].numpy(), minlength=len(hit))
            painted += np.bincount(mask, minlength=len(hit))
        shares = [
            2 * inside / (area + likely) if area else float("nan")
            for inside, area, likely in zip(hit[1:], painted[1:], self._sums.sum(1), strict=True)
        ]
        return [float(share) for share in shares]

    def _settle(self) -> None:
        """Find what neighbors count and what is painted, once all scores are in."""
        if self._neighbor is not None:
            return
        shared, total = torch.zeros(self._labels), torch.zeros(self._labels)
        before: tuple[int, torch.Tensor, torch.Tensor] | None = None
        for index in sorted(self._place) if self._adjacent else ():
            scores, known = self._stored(index)
            believed = _probabilities(scores)
            if before is not None and before[0] == index - 1:
                both = (known & before[2]).float()
                shared += both * 2 * torch.minimum(believed, before[1]).sum(1)
                total += both * (believed + before[1]).sum(1)
            before = index, believed, known
        self._neighbor = (shared / total.clamp_min(1e-6)) ** CONTEXT
        if bool((total > 0).any()):
            self._counts[:], self._sums[:] = 0, 0
            for index in self._place:
                known = self._stored(index)[1]
                rows = torch.nonzero(known).flatten().tolist()
                self._count(self._averaged(index)[known].double(), rows)
        cut = torch.from_numpy(self._thresholds())
        self._shift = ((1 - cut) / cut).log().float()

    def _averaged(self, index: int) -> torch.Tensor:
        """The scores (L, S, S) of a slice, averaged with its neighbors' as far as these count."""
        scores, known = self._stored(index)
        assert self._neighbor is not None
        if not bool(self._neighbor.any()):
            return scores
        mean = scores.clone()
        for other in (index - 1, index + 1):
            if other in self._place:
                theirs, also = self._stored(other)
                mean += self._neighbor[:, None, None] * torch.where(
                    (known & also)[:, None, None], theirs, scores
                )
            else:
                mean += self._neighbor[:, None, None] * scores
        return mean / (1 + 2 * self._neighbor[:, None, None])

    def _stored(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores (L, S, S) of a slice, as far as they are kept, and which (L,) are known."""
        assert self._scores is not None
        stored = torch.from_numpy(np.array(self._scores[self._place[index]]))
        unknown = stored == LOWEST
        return torch.where(unknown, -1e4, stored.float() * STEP), ~unknown.flatten(1).any(1)


def _probabilities(scores: torch.Tensor) -> torch.Tensor:
    """Probability of each label at each pixel: (L, S, S) log-odds -> (L, S * S)."""
    zero = torch.zeros_like(scores[:1])
    return torch.softmax(torch.cat([zero, scores]), 0)[1:].flatten(1)


def best_threshold(counts: npt.NDArray[np.float64], sums: npt.NDArray[np.float64]) -> float:
    """The threshold of highest expected Dice, never above one half.

    Args:
        counts: (BINS,) pixels by probability, evenly spaced bins of 0..1.
        sums: (BINS,) sum of the probabilities in each bin.
    """
    seen = np.flatnonzero(counts)
    if len(seen) == 0 or (seen[-1] + 1) / BINS < SOME_BELIEF:
        return 0.5
    painted, right = counts[::-1].cumsum(), sums[::-1].cumsum()  # from the surest pixel down
    expected = 2 * right / (painted + sums.sum())
    bottom = BINS - 1 - int(expected.argmax())  # the last bin that is painted
    return float(np.clip(bottom / BINS, FLOOR, 0.5))


def merge(scores: torch.Tensor, shape: tuple[int, int]) -> IntArray:
    """Let labels compete pixel by pixel: (L, S, S) scores -> (H, W) int32, 0 or label row + 1."""
    full = torch.nn.functional.interpolate(
        scores[None].float(), size=shape, mode="bilinear", align_corners=False
    )[0]
    best, row = full.max(0)
    return torch.where(best > 0, row + 1, 0).to(torch.int32).cpu().numpy()


def _room(shape: tuple[int, int, int, int]) -> npt.NDArray[np.int8]:
    if int(np.prod(shape, dtype=np.int64)) <= IN_MEMORY:
        return np.empty(shape, np.int8)
    with tempfile.TemporaryFile() as file:  # the map outlives the name, and the file goes with it
        return np.memmap(file, np.int8, "w+", shape=shape)
