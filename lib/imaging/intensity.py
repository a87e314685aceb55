"""From a volume's numbers to grey in 0..1."""

import math

import numpy as np

from lib.errors import RequestError
from lib.types import FloatArray

PERCENTILES = (0.5, 99.5)

# Percentiles of a million voxels are exact to far below a grey level.
_SAMPLE = 1_000_000


def grey_range(voxels: FloatArray) -> tuple[float, float]:
    """Robust black and white of a volume: percentiles 0.5 and 99.5 of what is not padding.

    Voxels at the exact minimum are left out: air that a scanner set to zero, or the filling
    around a CT's circle. They can be nearly all of a volume, and then the upper percentile of
    the whole would fall into them and saturate the body.

    Args:
        voxels: any shape, finite.

    Returns:
        (black, white), white > black; a constant volume gives (value, value).
    """
    flat = voxels[tuple(slice(None, None, step) for step in _strides(voxels.shape))].ravel()
    low, high = float(voxels.min()), float(voxels.max())
    inside = flat[flat > low]
    if inside.size:
        black, white = (float(v) for v in np.percentile(inside, PERCENTILES))
        if white > black:
            return black, white
    return low, high


def check_window(window: tuple[float, float]) -> tuple[float, float]:
    """Refuse a window that is not two growing finite numbers."""
    low, high = window
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        msg = f"A window is two numbers, low < high, got {window}. Give e.g. -160,240 for CT."
        raise RequestError(msg)
    return float(low), float(high)


def to_grey(values: FloatArray, grey: tuple[float, float]) -> FloatArray:
    """Scale so that black is 0 and white 1, cut off beyond; all 0 where black equals white."""
    black, white = grey
    if white <= black:
        return np.zeros_like(values, dtype=np.float32)
    # float64 between: the difference of two large float32 can overflow.
    scaled = (values.astype(np.float64) - black) / (white - black)
    return np.clip(scaled, 0, 1).astype(np.float32)


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Even steps along each axis that leave about `_SAMPLE` voxels; short axes stay whole."""
    steps = [1] * len(shape)
    while math.prod(math.ceil(n / s) for n, s in zip(shape, steps, strict=True)) > _SAMPLE:
        longest = max(range(len(shape)), key=lambda a: shape[a] / steps[a])
        steps[longest] += 1
    return steps
