"""What the pages tell of a mask."""

from pathlib import Path

import nibabel
import numpy as np

from apps.refseg.server.page_masks import _mask_of
from lib.imaging.io import read_image


def test_a_label_that_is_nowhere_in_the_mask_is_not_among_those_found(tmp_path: Path) -> None:
    drawn = np.zeros((8, 6, 3), np.int16)
    drawn[2:4, 2:4, 1] = 2
    for name in ("image.nii.gz", "mask.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(drawn, np.diag([1, 1, 3, 1])), tmp_path / name)
    params = {"label_names": {"liver": 1, "tumor": 2}, "confidence": {"liver": 0.9, "tumor": 0.6}}
    image = read_image(tmp_path / "image.nii.gz")
    mask = _mask_of("image", tmp_path / "mask.nii.gz", params, image)
    assert mask.found == {"tumor"}
    assert mask.confidence == {"liver": 0.9, "tumor": 0.6}
