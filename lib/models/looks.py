"""How the labels of a study look, whatever references say: learned from labelled slices left out.

The network compares; it does not know that what is labelled here is always bright, or never of that
texture. That is in its descriptors, and a linear model finds it in seconds. What the references
say of a slice is one of its inputs, so that it learns what to add to it, and how far to believe
it (stacked generalization, Wolpert 1992): for each label and cell

    score' = gain * score + weights . descriptor + offset

by logistic regression on slices that did not vote for themselves. A label is corrected only if that
foretells the labels of images that it was not learned from, and clearly so.

Dimensions: P cells of a slice, C channels of a descriptor, L labels, N cells of all slices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.types import Correction, Looks

FEWEST_IMAGES = 6  # fewer agree by chance
CLEARLY = 2.0  # standard errors, over images, of what is gained on images left out
FOLDS = 5
PENALTIES = (1e-1, 1e-2, 1e-3)  # of squared weights
GAIN_PENALTY = 1e-3
ITERATIONS = 15
WHOLE = 0.5  # share of a label in cells that it mostly fills; thinner ones cannot be sharpened
SURE = 8.0  # scores beyond are as good
AROUND = 5  # cells near a label are all looked at, of the others every so many'th
EVERY = 4
SMALLEST = 0.05  # added to a direction's variance: what hardly varies is not blown up


@dataclass(frozen=True, eq=False)
class LeftOut:
    """A labelled slice as others' references have it.

    Attributes:
        image_id: that it is of.
        labels: that its annotator knew, and others do.
        descriptors: (P, C).
        scores: (P, L) log-odds of each label against background.
        truth: (P, L) share of each label in the cell.
    """

    image_id: str
    labels: tuple[str, ...]
    descriptors: Tensor
    scores: Tensor
    truth: Tensor


@dataclass(frozen=True, eq=False)
class _Cells:
    """Cells of all slices; `inputs` (N, C) in the basis, the others (N, L).

    rest is the log-odds' other side: of all that is not this label; counts is 0 where the annotator
    did not know the label; slices (N,) numbers the slices.
    """

    inputs: Tensor
    scores: Tensor
    rest: Tensor
    truth: Tensor
    counts: Tensor
    slices: Tensor

    def of(self, chosen: Tensor) -> "_Cells":
        return _Cells(
            self.inputs[chosen],
            self.scores[chosen],
            self.rest[chosen],
            self.truth[chosen],
            self.counts[chosen],
            self.slices[chosen],
        )


@dataclass(frozen=True, eq=False)
class _Model:
    """weights (C, L) in the basis, gain (L,), offset (L,)."""

    weights: Tensor
    gain: Tensor
    offset: Tensor

    def losses(self, cells: _Cells) -> Tensor:
        """Cross entropy (N, L), weighted; each label against all else."""
        odds = self.gain * cells.scores - cells.rest + cells.inputs @ self.weights + self.offset
        each = F.binary_cross_entropy_with_logits(odds, cells.truth, reduction="none")
        return each * cells.counts


@torch.inference_mode(mode=False)
def learn_looks(
    slices: Sequence[LeftOut], make_way: Callable[[], None] = lambda: None
) -> Looks | None:
    """What is to be added to the scores of each label; None, if nothing clearly helps.

    `make_way` is called before each fit.
    """
    images = sorted({one.image_id for one in slices})
    if len(images) < FEWEST_IMAGES:
        return None
    labels = tuple(sorted(set(chain.from_iterable(one.labels for one in slices))))
    mean, basis, penalty = _basis(torch.cat([one.descriptors.float() for one in slices]))
    cells = _cells(slices, labels, mean, basis)
    # neighbors in the alphabet are often of one patient: they are left out together
    fold_of = {image: place * FOLDS // len(images) for place, image in enumerate(images)}
    folds = torch.tensor([fold_of[one.image_id] for one in slices])[cells.slices]
    nothing = _Model(
        torch.zeros(basis.shape[1], len(labels)), torch.ones(len(labels)), torch.zeros(len(labels))
    )
    losses = torch.zeros(1 + len(PENALTIES), len(slices), len(labels))
    by_fold: list[list[_Model]] = []
    for fold in range(FOLDS):
        learned, kept = cells.of(folds != fold), cells.of(folds == fold)
        model, found = nothing, []
        losses[0] += _by_slice(nothing, kept, len(slices))
        for row, strength in enumerate(PENALTIES, start=1):
            make_way()
            model = _fit(model, learned, strength * penalty[:, None])
            losses[row] += _by_slice(model, kept, len(slices))
            found.append(model)
        by_fold.append(found)
    best, helps = _chosen(slices, labels, losses)
    if not bool(helps.any()):
        return None
    whole, model = [], nothing
    for strength in PENALTIES:
        make_way()
        model = _fit(model, cells, strength * penalty[:, None])
        whole.append(model)
    without = [_correction(_picked(models, best), mean, basis, helps) for models in by_fold]
    return Looks(
        labels,
        _correction(_picked(whole, best), mean, basis, helps),
        {image: without[fold_of[image]] for image in images},
    )


def corrected(scores: Tensor, descriptors: Tensor, correction: Correction) -> Tensor:
    """Scores (L, S, S) of a slice with descriptors (C, side, side), corrected."""
    weights = correction.weights.to(scores.device)
    seen = torch.einsum("lc,cyx->lyx", weights, descriptors.float())
    seen = seen + correction.offset.to(scores.device)[:, None, None]
    added = F.interpolate(seen[None], size=scores.shape[-2:], mode="bilinear")[0]
    return correction.gain.to(scores.device)[:, None, None] * scores + added


def _basis(descriptors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), basis (C, C) in which the descriptors are about white, each direction's penalty.

    Descriptors have unit length, so that times C ** 0.5 a channel is about 1. Weights are penalized
    as they are of these; the basis is there for the fit alone, which takes fewer steps in it.
    """
    mean = descriptors.mean(0)
    unit = descriptors.shape[1] ** 0.5
    centered = (descriptors - mean) * unit
    variance, directions = torch.linalg.eigh(centered.T @ centered / len(centered))
    scale = (variance.clamp_min(0) + SMALLEST).rsqrt()
    return mean, unit * directions * scale, scale.square()


def _cells(
    slices: Sequence[LeftOut], labels: tuple[str, ...], mean: Tensor, basis: Tensor
) -> _Cells:
    generator = torch.Generator().manual_seed(0)
    parts: list[_Cells] = []
    for number, one in enumerate(slices):
        side = round(len(one.truth) ** 0.5)
        near = F.max_pool2d(one.truth.amax(1).view(1, 1, side, side), AROUND, 1, AROUND // 2)
        near = near.flatten() > 0
        drawn = near | (torch.rand(len(near), generator=generator) < 1 / EVERY)
        count = torch.where(near, 1.0, float(EVERY))[drawn]
        scores = one.scores.float().clamp(-SURE, SURE)[drawn]
        columns = [labels.index(label) for label in one.labels]
        wide = torch.zeros(len(scores), len(labels))

        def spread(values: Tensor, columns: list[int] = columns, wide: Tensor = wide) -> Tensor:
            return wide.index_copy(1, torch.tensor(columns), values)

        parts.append(
            _Cells(
                (one.descriptors.float()[drawn] - mean) @ basis,
                spread(scores),
                spread(_rest(scores)),
                spread(one.truth.float()[drawn].clamp(0, 1)),
                spread((count / count.sum())[:, None].expand_as(scores)),
                torch.full((len(scores),), number),
            )
        )
    return _Cells(
        *(
            torch.cat([getattr(part, name) for part in parts])
            for name in ("inputs", "scores", "rest", "truth", "counts", "slices")
        )
    )


def _rest(scores: Tensor) -> Tensor:
    """log(1 + sum of exp over the other labels' scores), (N, L): background and rivals."""
    columns = []
    for row in range(scores.shape[1]):
        others = torch.cat(
            [torch.zeros_like(scores[:, :1]), scores[:, :row], scores[:, row + 1 :]], 1
        )
        columns.append(others.logsumexp(1))
    return torch.stack(columns, 1)


def _fit(start: _Model, cells: _Cells, penalty: Tensor) -> _Model:
    """Minimize mean loss and penalties of all labels at once; each label by itself."""
    parts = [start.weights.clone(), start.gain.clone(), start.offset.clone()]
    for part in parts:
        part.requires_grad_(True)
    model = _Model(*parts)
    slices = max(1, len(torch.unique(cells.slices)))
    optimizer = torch.optim.LBFGS(
        parts,
        max_iter=ITERATIONS,
        history_size=8,
        line_search_fn="strong_wolfe",
        tolerance_change=1e-6,
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = model.losses(cells).sum() / slices
        total = total + (penalty * model.weights.square()).sum()
        total = total + GAIN_PENALTY * (model.gain - 1).square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return _Model(*(part.detach() for part in parts))


def _by_slice(model: _Model, cells: _Cells, slices: int) -> Tensor:
    """Mean loss (slices, L) of each slice."""
    losses = model.losses(cells)
    return torch.zeros(slices, losses.shape[1]).index_add(0, cells.slices, losses)


def _chosen(
    slices: Sequence[LeftOut], labels: tuple[str, ...], losses: Tensor
) -> tuple[Tensor, Tensor]:
    """For each label the best penalty's number, and whether it is clearly better than nothing."""
    best = torch.zeros(len(labels), dtype=torch.long)
    helps = torch.zeros(len(labels), dtype=torch.bool)
    for row, label in enumerate(labels):
        gains: dict[str, list[list[float]]] = {}
        shown = set()
        area = inside = 0.0
        for number, one in enumerate(slices):
            if label in one.labels:
                gain = losses[0, number, row] - losses[1:, number, row]
                gains.setdefault(one.image_id, []).append(gain.tolist())
                truth = one.truth[:, one.labels.index(label)].float()
                area += float(truth.sum())
                inside += float(truth[truth > 0.5].sum())
                if bool((truth > 0).any()):
                    shown.add(one.image_id)
        if len(shown) < FEWEST_IMAGES or inside < WHOLE * area:
            continue
        by_image = np.array([np.mean(rows, axis=0) for rows in gains.values()])
        choice = int(by_image.mean(0).argmax())
        mine = by_image[:, choice]
        best[row] = choice
        helps[row] = bool(mine.mean() > CLEARLY * mine.std(ddof=1) / len(mine) ** 0.5)
    return best, helps


def _picked(models: Sequence[_Model], best: Tensor) -> _Model:
    """Of each label the model of its penalty."""
    columns = list(enumerate(best.tolist()))
    return _Model(
        torch.stack([models[which].weights[:, row] for row, which in columns], 1),
        torch.stack([models[which].gain[row] for row, which in columns]),
        torch.stack([models[which].offset[row] for row, which in columns]),
    )


def _correction(model: _Model, mean: Tensor, basis: Tensor, helps: Tensor) -> Correction:
    weights = (basis @ model.weights).T  # (L, C)
    offset = model.offset - weights @ mean
    return Correction(
        weights * helps[:, None],
        torch.where(helps, model.gain.clamp_min(0), 1.0),
        torch.where(helps, offset, 0.0),
    )
