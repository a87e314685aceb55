"""The demo's nouns: a study is a folder of images, and the truth that only the annotator has."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from PIL import Image

Voxels = npt.NDArray[Any]


@dataclass(frozen=True)
class Study:
    """Images as a MONAI Label datastore wants them, and their true label maps elsewhere.

    Attributes:
        name: short, used for folders and headings.
        about: one sentence on where the images come from.
        folder: what the server serves.
        truth: image id -> true label map, on the image's own grid.
        label_names: value in the true label maps -> name.
        rounds: how many images are labelled before each look at the others.
        suffix: of images and label maps, with the dot.
    """

    name: str
    about: str
    folder: Path
    truth: Mapping[str, Path]
    label_names: Mapping[int, str]
    rounds: tuple[int, ...]
    suffix: str

    def image(self, image_id: str) -> Path:
        """The image's file."""
        return self.folder / f"{image_id}{self.suffix}"


def read(path: Path) -> Voxels:
    """Read voxels or pixels as the file stores them: volumes (I, J, K), pictures (H, W)."""
    if path.name.endswith((".nii", ".nii.gz")):
        return np.asanyarray(nib.Nifti1Image.from_filename(path).dataobj)
    with Image.open(path) as picture:
        return np.asarray(picture)


def same_grid(first: Path, second: Path) -> bool:
    """Whether two files have the same shape and, for volumes, the same affine."""
    if read(first).shape != read(second).shape:
        return False
    if not first.name.endswith((".nii", ".nii.gz")):
        return True
    one, other = (nib.Nifti1Image.from_filename(path).affine for path in (first, second))
    return bool(np.allclose(one, other, atol=1e-3))


def dice(found: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]) -> float:
    """Twice the overlap over the sum of the areas; 1 when both are empty."""
    total = int(found.sum()) + int(true.sum())
    return 2.0 * int((found & true).sum()) / total if total else 1.0
