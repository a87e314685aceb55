"""One case's figures: what was found against what its annotator drew, label by label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lib.evaluation.metrics import Surface, dice_by_label, false_alarm, surface
from lib.types import IntArray

NO_SURFACE = Surface(float("nan"), float("nan"))


@dataclass(frozen=True)
class LabelScore:
    """One label of one case; NaN where there is no measurement (see `evaluation.metrics`).

    Attributes:
        dice: in voxels.
        hd95_mm: 95 % Hausdorff distance; NaN where the image has no place in space, too.
        nsd: surface Dice at the campaign's tolerance; NaN as `hd95_mm`.
        false_alarm: whether the label was found that is not there; None where it is there.
        confidence: what RefSeg itself said that the Dice would be.
    """

    dice: float
    hd95_mm: float
    nsd: float
    false_alarm: bool | None
    confidence: float


@dataclass(frozen=True)
class CaseScore:
    """All labels of one case."""

    image_id: str
    labels: Mapping[str, LabelScore]

    @property
    def dice(self) -> float:
        """Mean over the labels that the truth has; NaN if it has none."""
        return mean_of([label.dice for label in self.labels.values()])

    @property
    def confidence(self) -> float:
        """Mean confidence over the same labels as `dice`."""
        return mean_of([s.confidence for s in self.labels.values() if not np.isnan(s.dice)])


@dataclass(frozen=True, eq=False)
class Truth:
    """What the annotator drew on the scored slices of a case.

    Attributes:
        label_map: (I, J, K) canonical; value v is `names[v - 1]`.
        names: all labels of the campaign.
        spacing_mm: of each axis; None where distances have no meaning.
    """

    label_map: IntArray
    names: tuple[str, ...]
    spacing_mm: tuple[float, float, float] | None


def score_case(
    image_id: str,
    found: IntArray,
    truth: Truth,
    confidence: Mapping[str, float],
    *,
    tolerance_mm: float,
) -> CaseScore:
    """Score one case.

    Args:
        image_id: of the case.
        found: (I, J, K), numbered as the truth is.
        truth: what was drawn.
        confidence: of each label found; a label that no reference knew has 0.
        tolerance_mm: of the surface Dice.
    """
    values = range(1, len(truth.names) + 1)
    rows = {}
    for value, name, overlap in zip(
        values, truth.names, dice_by_label(found, truth.label_map, values), strict=True
    ):
        edges = NO_SURFACE
        if truth.spacing_mm is not None:
            box = _box((found == value) | (truth.label_map == value))
            edges = _surface(found, truth, value, box, tolerance_mm)
        rows[name] = LabelScore(
            dice=overlap,
            hd95_mm=edges.hd95_mm,
            nsd=edges.nsd,
            false_alarm=false_alarm(found, truth.label_map, value),
            confidence=float(confidence.get(name, 0.0)),
        )
    return CaseScore(image_id, rows)


def _surface(
    found: IntArray, truth: Truth, value: int, box: tuple[slice, ...], tolerance_mm: float
) -> Surface:
    """Within the box of both masks, unless one is empty: then the whole grid is the measure."""
    one, other = found == value, truth.label_map == value
    if one.any() and other.any():
        one, other = one[box], other[box]
    spacing = truth.spacing_mm or (1.0, 1.0, 1.0)
    return surface(one, other, spacing, tolerance_mm=tolerance_mm)


def _box(mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> tuple[slice, ...]:
    """The part that holds the mask and one voxel around it, so that surfaces are the same."""
    if not mask.any():
        return tuple(slice(None) for _ in mask.shape)
    parts = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        held = np.flatnonzero(mask.any(others))
        parts.append(slice(max(0, int(held[0]) - 1), int(held[-1]) + 2))
    return tuple(parts)


def mean_of(values: Sequence[float]) -> float:
    """Mean of those that are numbers; NaN of none."""
    numbers = [value for value in values if not np.isnan(value)]
    return float(np.mean(numbers)) if numbers else float("nan")
