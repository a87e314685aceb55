"""From scores to masks: how much of what a network half believes is painted.

A network that learned not to paint what is absent is careful: where it is in doubt it says less
than one half everywhere, and a threshold at one half leaves holes. What an annotator gains from is
Dice, and the threshold with the highest expected Dice is not one half but half of the Dice that can
be had (Lipton et al., arXiv 1402.1892, theorem 1, for F1): low where the network is in doubt, one
half where it is sure. It is found here for each label over the whole image, from the network's own
probabilities, without a knob.

Adjacent slices of a volume are segmented one by one, so each has errors of its own, while a
structure goes on from one to the next. So a slice's scores are averaged with those of its
neighbors, and neighbors count for more the more of the structure goes on: by the overlap of what is
believed of adjacent slices, over the whole volume. Thin slices help each other much, thick ones
hardly; what shows on a single thin slice is taken for an error. Folds and nets overlap, too, but
lie elsewhere on the next slice: what comes in many pieces is left as each slice shows it. Where
both neighbors of a thin slice agree, it need not be segmented at all (`Decision.bridge`).
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
BOTTOM = (LOWEST + 1) * STEP  # a score that is stored so was this low or lower
BINS = 1024
SOME_BELIEF = (
    0.4  # a label whose probability is nowhere above this is not painted more than is sure
)
AGREED = 0.8  # overlap of two slices, of each label, from which the one between them is their mean
SPECK = 1 / 2048  # of the pixels: less belief than this is not disagreed about
BELIEVED = 0.05  # a probability below this is no belief: tails overlap where there is nothing
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
        self.bridged: set[int] = set()  # slices that were not segmented
        self._capacity = slices
        self._scores: npt.NDArray[np.int8] | None = None
        self._place: dict[int, int] = {}
        self._counts = np.zeros((labels, BINS))
        self._sums = np.zeros((labels, BINS))
        self._tails = np.zeros(labels)  # sum of the probabilities that are stored as `BOTTOM`
        self._settled = False  # whether these two are of all scores that came
        self._weight = torch.zeros(labels)  # of an adjacent slice
        self._shift = torch.zeros(labels)  # of the scores, above 0 where above the threshold

    def add(self, index: int, scores: torch.Tensor, rows: Sequence[int]) -> None:
        """Keep the scores (R, S, S) of slice `index`; row i belongs to label `rows[i]`."""
        side = scores.shape[-1]
        if self._scores is None:
            self._scores = _room((self._capacity, self._labels, side, side))
        stored = np.full((self._labels, side, side), LOWEST, np.int8)
        scaled = (scores.float() / STEP).round().clamp(LOWEST + 1, 127)
        stored[list(rows)] = scaled.to(torch.int8).cpu().numpy()
        self._settled = False
        self._place[index] = len(self._place)
        self._scores[self._place[index]] = stored
        believed = _probabilities(scores.double().clamp(-30, 30)).cpu()
        self._count(believed, rows)
        bottom = torch.from_numpy(stored[list(rows)] == LOWEST + 1).flatten(1)
        self._tails[list(rows)] += (believed * bottom).sum(1).numpy()

    def bridge(self, index: int) -> bool:
        """Take a slice from its two neighbors, if they agree on every label; whether they do."""
        if not (self._adjacent and {index - 1, index + 1} <= self._place.keys()):
            return False
        if any(shape.scattered for shape in self._shapes):
            return False
        (before, known), (after, also) = self._stored(index - 1), self._stored(index + 1)
        if not torch.equal(known, also):
            return False
        one, other = _believed(before), _believed(after)
        speck = SPECK * one.shape[1]
        overlap = (2 * torch.minimum(one, other).sum(1) + speck) / ((one + other).sum(1) + speck)
        if bool((overlap < AGREED).any()):
            return False
        mean = (before + after) / 2
        mean = torch.where(mean <= BOTTOM, 2 * BOTTOM, mean)  # it was lower: no belief at all
        self.add(index, mean[known], torch.nonzero(known).flatten().tolist())
        self.bridged.add(index)
        return True

    def _count(self, believed: torch.Tensor, rows: Sequence[int]) -> None:
        """Add pixels to the counts by their probabilities (R, P)."""
        for row, values in zip(rows, believed.numpy(), strict=True):
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

        2 sum(p m) / sum(p + m) over all slices, averaged with their neighbors, at the network's
        working size; call it when all scores are in.
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
        if self._settled:
            return
        shared, total = torch.zeros(self._labels), torch.zeros(self._labels)
        before: tuple[int, torch.Tensor, torch.Tensor] | None = None
        for index in sorted(self._place) if self._adjacent else ():
            scores, known = self._stored(index)
            believed = _believed(scores)
            if before is not None and before[0] == index - 1:
                both = (known & before[2]).float()
                shared += both * 2 * torch.minimum(believed, before[1]).sum(1)
                total += both * (believed + before[1]).sum(1)
            before = index, believed, known
        self._weight = (shared / total.clamp_min(1e-6)) ** CONTEXT
        for row, shape in enumerate(self._shapes):
            if shape.scattered:
                self._weight[row] = 0
        self._settled = True
        if bool((self._weight > 0).any()):
            self._count_averages()
        cut = torch.from_numpy(self._thresholds())
        self._shift = ((1 - cut) / cut).log().float()

    def _count_averages(self) -> None:
        """Count all pixels anew, as they are averaged."""
        self._counts[:], self._sums[:] = 0, 0
        self._sums[:, 0] = self._tails
        for index in self._place:
            scores, known = self._averaged(index), self._stored(index)[1]
            believed = _probabilities(scores[known].double())
            believed[scores[known].flatten(1) <= BOTTOM] = 0  # they are in the tails
            self._count(believed, torch.nonzero(known).flatten().tolist())

    def _averaged(self, index: int) -> torch.Tensor:
        """The scores (L, S, S) of a slice, averaged with its neighbors' as far as these count."""
        scores, known = self._stored(index)
        if not bool(self._weight.any()):
            return scores
        weight = self._weight[:, None, None]
        mean = scores.clone()
        for other in (index - 1, index + 1):
            if other in self._place:
                theirs, also = self._stored(other)
                mean += weight * torch.where((known & also)[:, None, None], theirs, scores)
            else:
                mean += weight * scores
        return mean / (1 + 2 * weight)

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


def _believed(scores: torch.Tensor) -> torch.Tensor:
    """The probabilities, without those that are hardly any."""
    found = _probabilities(scores)
    return torch.where(found > BELIEVED, found, 0)


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
