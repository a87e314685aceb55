"""Which DICOM series are a volume, where it lies, and which are refused with a sentence."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import FileDataset

from lib.errors import ImageError
from lib.imaging.io import read_image
from tests.dicom_series import write_multiframe, write_series

SPACING = (0.5, 0.75, 3.0)


def voxels(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 900, shape).astype(np.uint16)


def lps(image: object, index: tuple[int, int, int]) -> np.ndarray:
    """Where a voxel of the file lies, in DICOM's coordinates."""
    point = image.source.affine_ras @ [*index, 1]  # type: ignore[attr-defined]
    return point[:3] * [-1, -1, 1]


def test_a_tilted_gantry_gives_a_sheared_grid_and_not_a_straight_one(tmp_path: Path) -> None:
    slope = math.tan(math.radians(15))

    def tilt(image: FileDataset, index: int) -> None:
        image.ImagePositionPatient = [1, 2 + index * 3 * slope, index * 3]
        image.GantryDetectorTilt = 15

    array = voxels(6, 7, 5)
    write_series(tmp_path / "ct", array, spacing_mm=SPACING, modality="CT", edit=tilt)
    image = read_image(tmp_path / "ct")
    np.testing.assert_allclose(lps(image, (0, 0, 4)), [1, 2 + 12 * slope, 12], atol=1e-6)
    np.testing.assert_allclose(lps(image, (3, 2, 1)), [2.5, 3.5 + 3 * slope, 3], atol=1e-6)
    np.testing.assert_array_equal(image.voxels[:, :, ::-1], array)


def test_slices_are_ordered_by_place_whatever_their_numbers_and_names(tmp_path: Path) -> None:
    array, places = voxels(4, 5, 6), [3, 0, 5, 1, 4, 2]

    def shuffle(image: FileDataset, index: int) -> None:
        image.ImagePositionPatient = [0, 0, places[index] * 3]

    write_series(tmp_path / "mr", array[:, :, places], spacing_mm=SPACING, edit=shuffle)
    np.testing.assert_array_equal(read_image(tmp_path / "mr").voxels[:, :, ::-1], array)


def test_frames_of_one_file_are_ordered_by_place_too(tmp_path: Path) -> None:
    array = voxels(6, 7, 5)
    write_multiframe(tmp_path / "mr", array, spacing_mm=SPACING, order=[4, 0, 2, 1, 3])
    image = read_image(tmp_path / "mr")
    assert image.source.spacing_mm == pytest.approx(SPACING)
    np.testing.assert_array_equal(image.voxels[:, :, ::-1], array)


def test_a_slice_that_was_copied_twice_counts_once(tmp_path: Path) -> None:
    array = voxels(4, 5, 3)
    write_series(tmp_path / "mr", array, spacing_mm=SPACING)
    shutil.copy(tmp_path / "mr" / "IM0001", tmp_path / "mr" / "IM0001 copy")
    np.testing.assert_array_equal(read_image(tmp_path / "mr").voxels[:, :, ::-1], array)


def at_one_place(image: FileDataset, index: int) -> None:
    image.ImagePositionPatient = [0, 0, max(index, 1) * 3]


def gap(image: FileDataset, index: int) -> None:
    image.ImagePositionPatient = [0, 0, (index + (index > 2)) * 3]


def turned(image: FileDataset, index: int) -> None:
    if index == 2:
        image.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]


def without(keyword: str) -> Callable[[FileDataset, int], None]:
    def remove(image: FileDataset, index: int) -> None:
        if index == 1:
            delattr(image, keyword)

    return remove


def larger_pixels(image: FileDataset, index: int) -> None:
    if index == 3:
        image.PixelSpacing = [0.8, 0.8]


def sideways(image: FileDataset, index: int) -> None:
    image.ImagePositionPatient = [index * 30, 0, index * 3]


def no_direction(image: FileDataset, index: int) -> None:
    image.ImageOrientationPatient = [1, 0, 0, 1, 0, 0]


REFUSED = {
    "two slices at one place": (at_one_place, "IM0000 and IM0001 lie at the same place"),
    "a slice is missing": (gap, "IM0002 and IM0003 6 mm"),
    "a scout among them": (turned, "face different ways"),
    "no spacing": (without("PixelSpacing"), "IM0001 does not say how large its pixels are"),
    "no position": (without("ImagePositionPatient"), "does not say where it lies"),
    "no orientation": (without("ImageOrientationPatient"), "which way it faces"),
    "pixels of two sizes": (larger_pixels, "have different sizes"),
    "a stack of stairs": (sideways, "shifted sideways"),
    "one direction twice": (no_direction, "right angle"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_grid_is_refused_with_a_sentence_that_names_the_slice(
    case: str, tmp_path: Path
) -> None:
    edit, sentence = REFUSED[case]
    write_series(tmp_path / "mr", voxels(4, 5, 5), spacing_mm=SPACING, edit=edit)
    with pytest.raises(ImageError, match=sentence):
        read_image(tmp_path / "mr")


def test_frames_without_a_place_are_refused(tmp_path: Path) -> None:
    def many(image: FileDataset, index: int) -> None:
        del image.ImagePositionPatient
        image.NumberOfFrames = 2
        image.PixelData += image.PixelData

    write_series(tmp_path / "mr", voxels(4, 5, 1), spacing_mm=SPACING, edit=many)
    with pytest.raises(ImageError, match="frame 1 of IM0000 does not say where it lies"):
        read_image(tmp_path / "mr")


def test_time_points_as_frames_are_refused(tmp_path: Path) -> None:
    write_multiframe(tmp_path / "mr", voxels(4, 5, 3), spacing_mm=SPACING, order=[0, 1, 2, 0])
    with pytest.raises(ImageError, match="lie at the same place"):
        read_image(tmp_path / "mr")
