"""Which image to label next: greedy kernel coverage of the pool (MaxHerding, arXiv 2407.12212).

The coverage of a slice is its kernel with the nearest labelled slice; the next image is the one
whose slices, taken together, add most coverage. Greedy choice is within 1 - 1/e of the best set,
because the objective is submodular; that also lets gains be evaluated lazily.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lib.types import FloatArray

_BLOCK = 2048
_WIDTH_SAMPLE = 1024
_GAIN_DECIMALS = 7  # below, differences are rounding of the matrix product, hence ties


@dataclass(frozen=True)
class Pick:
    """One image of the ranking.

    Attributes:
        group: the image's number in `groups`.
        gain: mean coverage over the pool that labelling it adds, in 0..1.
    """

    group: int
    gain: float


def coverage_order(
    embeddings: FloatArray,
    groups: npt.NDArray[np.int64],
    labelled: npt.NDArray[np.bool_],
    n: int,
    seed: int = 0,
    *,
    width: float | None = None,
    max_targets: int = 4096,
    max_candidates: int = 20_000,
) -> list[Pick]:
    """Rank the n images to label next.

    Args:
        embeddings: (N, E) unit float32, one row per slice (any order).
        groups: (N,) the image of each slice.
        labelled: (N,) bool; these slices are the first centers. An image with a labelled slice is
            never ranked.
        n: how many images to rank; fewer are returned when fewer are unlabelled.
        seed: orders equal gains, and draws the samples below. Same input and seed, same ranking.
        width: of the kernel; None takes it from the data (see `kernel_width`).
        max_targets: coverage is measured on at most so many slices, a random sample of more. (A
            pool of 100,000 needs no more: the error of a mean of 4,096 is below 1 %.)
        max_candidates: images with together about so many slices compete, a random sample of more.

    Returns:
        Images in the order in which to label them, each with the gain it adds to those before it.
    """
    embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
    groups = np.asarray(groups, dtype=np.int64)
    labelled = np.asarray(labelled, dtype=bool)
    if not len(embeddings) == len(groups) == len(labelled):
        message = f"{len(embeddings)} embeddings, {len(groups)} groups, {len(labelled)} flags"
        message += "; all must have one entry per slice"
        raise ValueError(message)
    generator = np.random.default_rng(seed)
    order = np.argsort(groups, kind="stable")
    embeddings, groups, labelled = embeddings[order], groups[order], labelled[order]
    candidates = np.setdiff1d(groups, groups[labelled])
    if n <= 0 or not len(candidates):
        return []
    candidates = generator.permutation(candidates)  # a candidate's rank here orders ties

    centers = embeddings[labelled]
    if width is None:
        width = kernel_width(embeddings, groups, centers, generator)
    targets = embeddings
    if len(embeddings) > max_targets:
        targets = embeddings[np.sort(generator.choice(len(embeddings), max_targets, replace=False))]
    covered = _coverage_by(targets, centers, width)

    starts = np.searchsorted(groups, candidates)
    stops = np.searchsorted(groups, candidates, side="right")
    # At least n images, and then as many as the limit on slices allows.
    competing = max(n, int(np.searchsorted(np.cumsum(stops - starts), max_candidates)) + 1)
    slices = [embeddings[a:b] for a, b in zip(starts[:competing], stops[:competing], strict=True)]

    heap: list[tuple[float, int, int]] = []  # (-gain, tie rank, picks when it was computed)
    for rank, best in _best_kernels(targets, slices, width):
        heap.append((-_gain(best, covered), rank, 0))
    heapq.heapify(heap)
    picks: list[Pick] = []
    while heap and len(picks) < n:
        gain, rank, computed_at = heapq.heappop(heap)
        if computed_at == len(picks):
            picks.append(Pick(int(candidates[rank]), -gain))
            covered = np.maximum(covered, _coverage_by(targets, slices[rank], width))
        else:
            # Gains only shrink: an old gain that a fresh one beats need not be computed.
            fresh = _gain(_coverage_by(targets, slices[rank], width), covered)
            heapq.heappush(heap, (-fresh, rank, len(picks)))
    return picks


def kernel_width(
    embeddings: FloatArray,
    groups: npt.NDArray[np.int64],
    centers: FloatArray,
    generator: np.random.Generator,
) -> float:
    """The width of the kernel `exp(-(1 - cos) / width)`, from the data.

    With labels: the median of 1 - cos from a slice to its nearest labelled one, so that the
    kernel narrows as labels grow, and at any time half of the pool counts as poorly covered.
    Without: the median of 1 - cos between slices of different images.

    Args:
        embeddings: (N, E) unit vectors.
        groups: (N,) image of each.
        centers: (C, E) labelled slices, C may be 0.
        generator: draws the sample of at most 1,024 slices.
    """
    chosen = np.arange(len(embeddings))
    if len(chosen) > _WIDTH_SAMPLE:
        chosen = np.sort(generator.choice(len(chosen), _WIDTH_SAMPLE, replace=False))
    sample = embeddings[chosen]
    if len(centers):
        nearest = np.full(len(sample), -1.0, dtype=np.float32)
        for start in range(0, len(centers), _BLOCK):
            block = sample @ centers[start : start + _BLOCK].T
            nearest = np.maximum(nearest, block.max(axis=1))
        distances = 1 - nearest
        distances = distances[distances > 1e-4]  # the labelled ones themselves
    else:
        others = groups[chosen][:, None] != groups[chosen][None, :]
        distances = (1 - sample @ sample.T)[others]
    return max(float(np.median(distances)), 1e-3) if len(distances) else 1.0


def _kernel(targets: FloatArray, centers: FloatArray, width: float) -> FloatArray:
    """(T, E), (C, E) -> (T, C) in 0..1."""
    kernel = targets @ centers.T
    kernel -= 1
    kernel /= width
    return np.exp(np.minimum(kernel, 0, out=kernel), out=kernel)


def _coverage_by(targets: FloatArray, centers: FloatArray, width: float) -> FloatArray:
    """(T,) kernel of each target with its nearest center; 0 without centers."""
    covered = np.zeros(len(targets), dtype=np.float32)
    for start in range(0, len(centers), _BLOCK):
        block = _kernel(targets, centers[start : start + _BLOCK], width)
        covered = np.maximum(covered, block.max(axis=1))
    return covered


def _best_kernels(
    targets: FloatArray, slices: list[FloatArray], width: float
) -> Iterator[tuple[int, FloatArray]]:
    """Rank and coverage (T,) of every candidate image, many images in one product."""
    begin = 0
    while begin < len(slices):
        end, rows = begin, 0
        while end < len(slices) and (end == begin or rows + len(slices[end]) <= _BLOCK):
            rows += len(slices[end])
            end += 1
        if end == begin + 1:
            yield begin, _coverage_by(targets, slices[begin], width)
        else:
            kernel = _kernel(targets, np.concatenate(slices[begin:end]), width)
            bounds = np.cumsum([0] + [len(s) for s in slices[begin : end - 1]])
            best = np.maximum.reduceat(kernel, bounds, axis=1)
            for offset in range(end - begin):
                yield begin + offset, best[:, offset]
        begin = end


def _gain(best: FloatArray, covered: FloatArray) -> float:
    added = np.maximum(best - covered, 0).mean(dtype=np.float64)
    return round(float(added), _GAIN_DECIMALS)
