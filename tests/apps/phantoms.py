"""Images whose truth is known: a bright ball in noise, as a volume or as a picture."""

from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from PIL import Image

SHAPE = (64, 56, 3)
SPACING_MM = (1.5, 1.5, 6.0)


def ball(seed: int, shape: tuple[int, int, int] = SHAPE) -> npt.NDArray[np.bool_]:
    """A column that widens from slice to slice, somewhere near the middle."""
    rng = np.random.default_rng(seed)
    i, j, k = np.mgrid[: shape[0], : shape[1], : shape[2]]
    center = (shape[0] / 2 + rng.integers(-6, 7), shape[1] / 2 + rng.integers(-6, 7))
    return (i - center[0]) ** 2 + (j - center[1]) ** 2 < (9 + 2 * k) ** 2


def box(shape: tuple[int, int, int] = SHAPE) -> npt.NDArray[np.bool_]:
    """A second structure, in a corner of every image."""
    i, j, _ = np.mgrid[: shape[0], : shape[1], : shape[2]]
    return (i > 3) & (i < 14) & (j > 3) & (j < 12)


def affine(flips: tuple[int, int, int] = (-1, -1, 1)) -> npt.NDArray[np.float64]:
    """An affine in RAS mm; the default is what scanners write (LPS)."""
    matrix = np.diag([*np.multiply(flips, SPACING_MM), 1.0])
    matrix[:3, 3] = (12.5, -40.0, 7.0)
    return matrix


def write_volume(path: Path, seed: int, flips: tuple[int, int, int] = (-1, -1, 1)) -> None:
    noise = np.random.default_rng(1000 + seed).normal(0, 15, SHAPE)
    values = 100 + 250 * ball(seed) + 120 * box() + noise
    nib.save(nib.Nifti1Image(values.astype(np.int16), affine(flips)), path)


def write_labels(path: Path, values: npt.NDArray[np.integer], like: Path) -> Path:
    """A label map on the grid of an image."""
    image = nib.load(like)
    nib.save(nib.Nifti1Image(values.astype(np.uint8), image.affine), path)
    return path


def write_picture(path: Path, seed: int, *, color: bool = False) -> None:
    noise = np.random.default_rng(1000 + seed).normal(0, 8, SHAPE[:2])
    grey = np.clip(60 + 120 * ball(seed)[:, :, 0] + noise, 0, 255).astype(np.uint8).T
    Image.fromarray(np.dstack([grey, grey // 2, grey // 3]) if color else grey).save(path)


def write_picture_labels(path: Path, seed: int) -> Path:
    Image.fromarray(ball(seed)[:, :, 0].astype(np.uint8).T).save(path)
    return path


def dice(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> float:
    return float(2 * (one & other).sum() / max(1, one.sum() + other.sum()))
