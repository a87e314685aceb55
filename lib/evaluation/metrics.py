"""Dice of label maps, its conventions, and the spread of a mean."""

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
