"""Dice and surface distances of label maps, their conventions, and the spread of a mean.

Where the truth has nothing of a label there is no measurement: NaN, and what was found is counted
by `false_alarm`. Where the truth has it and nothing was found, Dice and NSD are 0 and HD95 is the
longest distance that the grid has, so that a structure missed does not vanish from a mean.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lib.types import IntArray


def dice(found: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> float:
    """Dice of two masks of one shape, 2D or 3D, in voxels.

    A mask found where the truth is empty has Dice 0; both empty is no measurement, and NaN.
    """
    total = int(found.sum()) + int(truth.sum())
    return float("nan") if total == 0 else 2 * int((found & truth).sum()) / total


def dice_by_label(found: IntArray, truth: IntArray, values: Sequence[int]) -> list[float]:
    """Dice of each value; NaN where the truth has none of it.

    What is found of a label that the truth has not is not in these figures: count it with
    `false_alarm`. So the mean over cases is of cases that show the structure, as papers report it.
    """
    return [
        dice(found == value, truth == value) if bool((truth == value).any()) else float("nan")
        for value in values
    ]


def false_alarm(found: IntArray, truth: IntArray, value: int) -> bool | None:
    """Whether a label was found that is not there; None where it is there."""
    if bool((truth == value).any()):
        return None
    return bool((found == value).any())


@dataclass(frozen=True)
class Surface:
    """How far two surfaces are apart.

    Attributes:
        hd95_mm: 95th percentile of the distances between the surfaces, the larger of both ways.
        nsd: share of both surfaces that is within the tolerance of the other, 0..1.
    """

    hd95_mm: float
    nsd: float


def surface(
    found: npt.NDArray[np.bool_],
    truth: npt.NDArray[np.bool_],
    spacing_mm: Sequence[float],
    *,
    tolerance_mm: float,
) -> Surface:
    """Hausdorff distance (95 %) and normalized surface Dice, as MONAI has them.

    Axes of one voxel are left out: such a volume is a plane. Conventions of empty masks: see the
    head of this file.

    Args:
        found: (I, J, K) or (H, W).
        truth: same shape.
        spacing_mm: of each axis.
        tolerance_mm: for the surface Dice.
    """
    kept = [axis for axis, size in enumerate(truth.shape) if size > 1]
    spacing = [float(spacing_mm[axis]) for axis in kept]
    if not truth.any():
        return Surface(float("nan"), float("nan"))
    if not found.any():
        lengths = [(truth.shape[a] - 1) * mm for a, mm in zip(kept, spacing, strict=True)]
        return Surface(float(np.linalg.norm(lengths)), 0.0)
    if len(kept) < 2:
        return Surface(float("nan"), float("nan"))
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    pair = [torch.from_numpy(mask.squeeze())[None, None] for mask in (found, truth)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI's, of its own inner calls
        far = compute_hausdorff_distance(
            *pair, include_background=True, percentile=95, spacing=spacing
        )
        near = compute_surface_dice(
            *pair, class_thresholds=[tolerance_mm], include_background=True, spacing=spacing
        )
    return Surface(float(far), float(near))


@dataclass(frozen=True)
class Mean:
    """A mean over cases with the 95 % bootstrap interval of resampling the cases."""

    mean: float
    low: float
    high: float
    cases: int

    @classmethod
    def of(cls, values: Sequence[float], *, seed: int = 0, draws: int = 2000) -> "Mean":
        """Mean of the values that are numbers; all NaN if there is none."""
        numbers = np.array([v for v in values if not np.isnan(v)])
        if not len(numbers):
            return cls(float("nan"), float("nan"), float("nan"), 0)
        rng = np.random.default_rng(seed)
        means = rng.choice(numbers, size=(draws, len(numbers))).mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        return cls(float(numbers.mean()), float(low), float(high), len(numbers))
