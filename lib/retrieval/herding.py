"""Greedy kernel coverage, image by image, for pools of any size.

MaxHerding (arXiv 2407.12212): the coverage of a row (a region of a slice, or a slice) is its kernel
with the nearest labelled row; the next image is the one whose rows, taken together, add most
coverage. Uncertainty Herding (arXiv 2412.20644) weighs the rows by their risk. The objective is
submodular: greedy choice is within 1 - 1/e of the best set, and a gain that was computed once is an
upper bound later. Here such bounds outlive everything that changes (labels that come and go, the
weights), so that the next image costs some hundred gains and not all of them. How:

- a label comes: gains shrink, bounds stay.
- a label goes, m falls to m': no gain grows by more than the weighted mean of m - m'.
- weights w become w': no gain grows by more than the mean of (w' - w)+ (1 - m), nor by more than
  the largest w' / w.

Two departures from the papers (why: docs/results.md): the kernel's width stays that of the pool,
since one that narrows as labels come gained nothing; and risk counts by the share of the images
that is labelled, since what is hard to segment is a poor reference, too.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from lib.retrieval.centers import Centers, Numbers, RiskCurve
from lib.retrieval.poolview import PoolView, Proposal
from lib.types import FloatArray

_BLOCK = 512  # rows of one product: what it makes stays in the cache
_FIRST_LOOK = 32  # gains computed at once, and how many more when that did not settle it
_LOOK_GROWTH = 2
_GAIN_DECIMALS = 6  # below, differences are rounding of the matrix product, hence ties
_WIDTH_SAMPLE = 1024
_SAME = 1e-4  # 1 - cos of what is the same picture
_NARROWEST = 1e-3  # width of a kernel; rounding would count below
_PART = 0.25  # of an image must be nearer to be told as covered better
SLICES_TOLD = 3

Floats = npt.NDArray[np.float64]


@dataclass
class _State:
    """What a pick changes; copied before a batch, put back after it."""

    centers: Centers
    weights: Floats  # (T,)
    covered: FloatArray  # (L, T)
    bounds: Floats  # (M,) no gain is higher
    fresh: npt.NDArray[np.bool_]  # (M,) the bound is the gain

    def copy(self) -> "_State":
        return _State(
            self.centers.copy(),
            self.weights,
            self.covered.copy(),
            self.bounds.copy(),
            self.fresh.copy(),
        )


class Herding:
    """A `Ranking` by coverage of the pool, or by coverage of what is at risk.

    Args:
        pool: the images.
        seed: orders equal gains, and draws the samples below.
        labels: names that an image must be annotated for; coverage is the mean over them.
        weighting: "even", or "risk": the more of the pool is labelled, the more a row counts by its
            risk.
        kernel: "smooth", exp(-(1 - cos) / width), or "ball", 1 where 1 - cos <= width.
        width: of the kernel; None takes it from the data: the median of 1 - cos between rows of
            different images.
        max_targets: coverage is measured on at most so many rows, a random sample of more. (The
            error of a mean of 2,048 is below 1 %.)
        max_candidates: images with together about so many rows compete, a random sample of more.
    """

    def __init__(
        self,
        pool: PoolView,
        seed: int = 0,
        *,
        labels: Sequence[str] = (),
        weighting: Literal["even", "risk"] = "even",
        kernel: Literal["smooth", "ball"] = "smooth",
        width: float | None = None,
        max_targets: int = 2048,
        max_candidates: int = 32_768,
    ) -> None:
        self._pool = pool
        self._seed = seed
        self._weighting = weighting
        self._ball = kernel == "ball"
        self._max_candidates = max_candidates
        generator = np.random.default_rng(seed)
        self._order = generator.permutation(len(pool))  # of ties, and who competes
        self._rank = np.argsort(self._order)
        rows = np.arange(len(pool.vectors))
        if len(rows) > max_targets:
            rows = np.sort(generator.choice(len(rows), max_targets, replace=False))
        self._targets = np.ascontiguousarray(pool.vectors[rows])
        self._owners = pool.owners[rows]
        self._width = width if width is not None else self._spread(generator)
        self._risk: Mapping[str, float] = {}
        self._known = np.full(len(rows), np.nan)  # risk of each target's image
        centers = Centers(pool, self._targets, labels)
        self._state = _State(
            centers=centers,
            weights=np.ones(len(rows)),
            covered=np.zeros_like(centers.nearest),
            bounds=np.full(len(pool), np.inf),
            fresh=np.zeros(len(pool), dtype=bool),
        )

    # -- Ranking ------------------------------------------------------------------------------

    def add_labelled(self, ids: Iterable[str], labels: Iterable[str] | None = None) -> None:
        """See `Ranking`."""
        self._state.centers.add(ids, labels)
        self._follow()

    def remove_labelled(self, ids: Iterable[str]) -> None:
        """See `Ranking`."""
        state = self._state
        gone = state.centers.remove(ids)
        before = state.covered
        state.covered = self._kernel(state.centers.nearest)
        state.bounds += float(((before - state.covered) * state.weights).mean(dtype=np.float64))
        state.bounds[list(gone)] = np.inf
        self._follow()

    def set_risk(self, risk: Mapping[str, float]) -> None:
        """See `Ranking`."""
        if self._weighting == "even":
            return
        self._risk = dict(risk)
        values = np.array([risk.get(name, np.nan) for name in self._pool.ids])
        self._known = values[self._owners] if len(values) else np.zeros(0)
        self._follow()

    def next(self, exclude: Collection[str] = (), n: int = 1) -> list[Proposal]:
        """See `Ranking`."""
        kept = self._state.copy() if n > 1 else self._state
        barred = sorted(self._state.centers.numbers(exclude))
        proposals: list[Proposal] = []
        while len(proposals) < n:
            picked = self._pick(barred)
            if picked is None:
                break
            proposals.append(self._proposal(picked))
            if len(proposals) < n:
                self._state.centers.add([self._pool.ids[picked]])
                self._follow()
        self._state = kept
        return proposals

    # -- the parts ----------------------------------------------------------------------------

    def _spread(self, generator: np.random.Generator) -> float:
        """Median of 1 - cos between slices of different images."""
        chosen = np.arange(len(self._targets))
        if len(chosen) > _WIDTH_SAMPLE:
            chosen = np.sort(generator.choice(len(chosen), _WIDTH_SAMPLE, replace=False))
        sample, owners = self._targets[chosen], self._owners[chosen]
        others = owners[:, None] != owners[None, :]
        distances = (1 - sample @ sample.T)[others]
        distances = distances[distances > _SAME]  # empty corners, the same on all pictures
        return max(float(np.median(distances)), _NARROWEST) if len(distances) else 1.0

    def _kernel(self, cosines: FloatArray) -> FloatArray:
        if self._ball:
            return (cosines >= 1 - self._width).astype(np.float32)
        values = (cosines - 1) / np.float32(self._width)
        return np.exp(np.minimum(values, 0, out=values), out=values)

    def _follow(self) -> None:
        """Bring weights and bounds in step with the centers."""
        state = self._state
        state.covered = self._kernel(state.centers.nearest)
        if self._weighting == "risk" and len(state.weights):
            weights = self._risk_weights()
            added = float((np.maximum(weights - state.weights, 0) * (1 - state.covered)).mean())
            bounds = state.bounds + added
            if (state.weights > 0).all():
                bounds = np.minimum(bounds, state.bounds * (weights / state.weights).max())
            state.bounds, state.weights = bounds, weights
        state.bounds += 10.0**-_GAIN_DECIMALS  # what rounding may have taken
        state.fresh[:] = False

    def _risk_weights(self) -> Floats:
        """(T,) of mean 1: even at the start, in proportion to risk when all is labelled."""
        centers = self._state.centers
        curve = RiskCurve(self._width).fit(centers, self._pool, self._risk, self._seed)
        risk = curve(1 - centers.nearest.min(axis=0))
        risk = np.where(np.isnan(self._known), risk, self._known)
        share = 1 - float(centers.lacking().mean())
        mean = float(risk.mean())
        return (1 - share) + share * risk / mean if mean > 0 else np.ones(len(risk))

    def _pick(self, barred: list[int]) -> int | None:
        """The image of the highest gain, ties by rank; looks at as few as it can."""
        state = self._state
        lacking = state.centers.lacking()
        open_ = lacking.any(axis=0)
        open_[barred] = False
        racing = self._order[open_[self._order]]
        if not len(racing):
            return None
        total = np.cumsum(np.diff(self._pool.starts)[racing])
        racing = racing[: int(np.searchsorted(total, self._max_candidates)) + 1]
        look = _FIRST_LOOK
        while True:
            bounds = state.bounds[racing]
            ties = racing[bounds == bounds.max()]
            best = int(ties[np.argmin(self._rank[ties])])
            if state.fresh[best]:
                return best
            stale = racing[~state.fresh[racing]]
            unknown = stale[np.isinf(state.bounds[stale])]
            if len(unknown):
                chosen = unknown
            elif len(stale) > look:
                chosen = stale[np.argpartition(-state.bounds[stale], look)[:look]]
            else:
                chosen = stale
            self._evaluate(chosen, lacking)
            look *= _LOOK_GROWTH

    def _evaluate(self, images: Numbers, lacking: npt.NDArray[np.bool_]) -> None:
        state = self._state
        counts = np.diff(self._pool.starts)[images]
        begin = 0
        while begin < len(images):
            sums = np.cumsum(counts[begin : begin + _BLOCK])
            end = begin + max(1, int(np.searchsorted(sums, _BLOCK, side="right")))
            part = images[begin:end]
            gains = self._gains(self._kernels(part), lacking[:, part])
            state.bounds[part] = np.round(gains, _GAIN_DECIMALS)
            state.fresh[part] = True
            begin = end

    def _kernels(self, images: Numbers) -> FloatArray:
        """(B, T) kernel of each target with the nearest slice of each image."""
        counts = np.diff(self._pool.starts)[images]
        rows = self._pool.rows(images)
        cosines = self._pool.vectors[rows] @ self._targets.T
        if (counts == counts[0]).all():  # several times as fast
            cosines = cosines.reshape(len(images), int(counts[0]), -1).max(axis=1)
        else:
            cosines = np.maximum.reduceat(cosines, np.cumsum(counts) - counts, axis=0)
        return self._kernel(cosines)

    def _gains(self, kernels: FloatArray, lacking: npt.NDArray[np.bool_]) -> Floats:
        """(B,) weighted mean over labels and targets of what each row of (B, T) adds."""
        state = self._state
        gains = np.zeros(len(kernels))
        weights = state.weights.astype(np.float32)
        for row, labels in state.centers.groups():
            added = kernels - state.covered[row]
            np.maximum(added, 0, out=added)
            gains += labels * lacking[row] * (added @ weights)
        return gains / max(1, state.covered.size)

    # -- what is told -------------------------------------------------------------------------

    def _proposal(self, image: int) -> Proposal:
        state = self._state
        name = self._pool.ids[image]
        score = float(state.bounds[image])
        return Proposal(name, score, self._reason(image), self._best_slices(image))

    def _reason(self, image: int) -> str:
        state = self._state
        own = self._pool.vectors[self._pool.starts[image] : self._pool.starts[image + 1]]
        lacking = state.centers.lacking()[:, image]
        if not state.centers.labelled:
            reason = f"the most typical of {len(self._pool)} images; no label is there yet"
        else:
            near = (own @ self._targets.T).max(axis=0)
            nearer = near > state.centers.nearest[lacking].min(axis=0) + _SAME
            shares = np.bincount(self._owners, nearer, len(self._pool))
            seen = np.bincount(self._owners, minlength=len(self._pool))
            better = (shares >= _PART * seen) & (seen > 0)
            better[image] = False
            known = int((seen > 0).sum())
            about = "" if len(self._targets) == len(self._pool.vectors) else "about "
            number = round(int(better.sum()) * len(self._pool) / max(1, known))
            images = f"{about}{number} image{'' if number == 1 else 's'}"
            reason = f"covers parts of {images} that no label is as near to"
            if not number:
                reason = "all images have a label near; this one adds most to how near"
        if not lacking.all():
            reason += "; it is labelled in part"
        risk = self._risk.get(self._pool.ids[image])
        return reason if risk is None else f"{reason}; its own mask would reach Dice {1 - risk:.2f}"

    def _best_slices(self, image: int) -> tuple[int, ...]:
        """The image's own slices, greedily by the coverage that they add."""
        state = self._state
        start, stop = self._pool.starts[image], self._pool.starts[image + 1]
        cosines = self._pool.vectors[start:stop] @ self._targets.T
        cosines = cosines.reshape(-1, self._pool.regions, cosines.shape[1]).max(axis=1)
        kernels = self._kernel(cosines)
        numbers = self._pool.slices[start : stop : self._pool.regions]
        covered = state.covered[state.centers.lacking()[:, image]].min(axis=0)
        left = list(range(len(kernels)))
        told: list[int] = []
        while left and len(told) < SLICES_TOLD:
            gains = np.round(
                np.maximum(kernels[left] - covered, 0) @ state.weights / len(covered),
                _GAIN_DECIMALS,
            )
            best = left.pop(int(np.argmax(gains)))
            covered = np.maximum(covered, kernels[best])
            told.append(int(numbers[best]))
        return tuple(told)
