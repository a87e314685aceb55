"""Label maps as DICOM SEG and back; highdicom and pydicom-seg say what others would read."""

import math
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pydicom_seg
import pytest
import SimpleITK
from pydicom.dataset import FileDataset

from lib.errors import LabelError
from lib.imaging.dicom_seg import write_seg
from lib.imaging.dicom_seg_reading import read_seg
from lib.imaging.io import ImageVolume, read_image, source_label_map
from lib.types import IntArray
from tests.dicom_series import write_multiframe, write_series

SPACING = (0.5, 0.75, 3.0)
SHAPE = (9, 7, 5)


def voxels(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 900, shape).astype(np.uint16)


def labels(image: ImageVolume, *numbers: int) -> IntArray:
    found = np.random.default_rng(1).choice([0, 0, *numbers], image.geometry.shape)
    return found.astype(np.int32)


def series(folder: Path, kind: str) -> ImageVolume:
    slope = math.tan(math.radians(20))

    def tilt(image: FileDataset, index: int) -> None:
        image.ImagePositionPatient = [1, 2 + index * 3 * slope, index * 3]

    def oblique(image: FileDataset, index: int) -> None:
        image.ImageOrientationPatient = [0.8, 0.6, 0, 0, 0, -1]
        image.ImagePositionPatient = [-0.6 * 3 * index, 0.8 * 3 * index, 40]

    def bare(image: FileDataset, index: int) -> None:
        for keyword in ("PatientName", "PatientID", "SliceThickness"):
            delattr(image, keyword)

    if kind == "frames":
        write_multiframe(folder, voxels(*SHAPE), spacing_mm=SPACING, order=[4, 0, 2, 1, 3])
    else:
        edit = {"plain": None, "tilted": tilt, "oblique": oblique, "bare": bare, "one": None}[kind]
        shape = (*SHAPE[:2], 1) if kind == "one" else SHAPE
        write_series(folder, voxels(*shape), spacing_mm=SPACING, edit=edit)
    return read_image(folder)


@pytest.mark.parametrize("kind", ["plain", "tilted", "oblique", "frames", "bare", "one"])
def test_a_label_map_comes_back_voxel_for_voxel_with_names_and_numbers(
    kind: str, tmp_path: Path
) -> None:
    image = series(tmp_path / "mr", kind)
    drawn, names = labels(image, 1, 3), {1: "Leber", 2: "nowhere", 3: "Milz (ö), 3 µm"}
    write_seg(tmp_path / "seg.dcm", drawn, image, names)
    found, told = read_seg(tmp_path / "seg.dcm", image)
    np.testing.assert_array_equal(found, drawn)
    assert told == names


def test_others_read_the_same_voxels_and_names(tmp_path: Path) -> None:
    image = series(tmp_path / "mr", "plain")
    drawn = labels(image, 1, 2)
    write_seg(tmp_path / "seg.dcm", drawn, image, {1: "liver", 2: "spleen"})
    source = source_label_map(drawn, image)

    read = pydicom_seg.MultiClassReader().read(pydicom.dcmread(tmp_path / "seg.dcm"))
    by_itk = SimpleITK.GetArrayFromImage(read.image)
    np.testing.assert_array_equal(by_itk.T, source)
    assert read.image.GetSpacing() == pytest.approx(SPACING)

    seg = highdicom.seg.segread(str(tmp_path / "seg.dcm"))
    files = sorted((tmp_path / "mr").iterdir())
    uids = [str(pydicom.dcmread(file).SOPInstanceUID) for file in files]
    planes = seg.get_pixels_by_source_instance(uids, combine_segments=True)
    np.testing.assert_array_equal(planes.T, source)
    assert [seg.get_segment_description(n).segment_label for n in (1, 2)] == ["liver", "spleen"]
    first = pydicom.dcmread(files[0])
    assert seg.StudyInstanceUID == first.StudyInstanceUID
    assert seg.PatientID == "phantom"
    reference = seg.ReferencedSeriesSequence[0]
    assert reference.SeriesInstanceUID == first.SeriesInstanceUID


def test_numbers_with_gaps_and_names_that_dicom_cannot_hold_come_back(tmp_path: Path) -> None:
    image = series(tmp_path / "mr", "plain")
    drawn = labels(image, 2, 7, 300)
    names = {2: "a very long name " * 6, 7: "left\\right ", 300: "plain", 9: "{}"}
    write_seg(tmp_path / "seg.dcm", drawn, image, names)
    found, told = read_seg(tmp_path / "seg.dcm", image)
    np.testing.assert_array_equal(found, drawn)
    assert told == names
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert [int(entry.SegmentNumber) for entry in seg.SegmentSequence] == [1, 2, 3, 4]
    assert max(len(entry.SegmentLabel) for entry in seg.SegmentSequence) <= 64


def test_a_map_without_a_voxel_says_that_its_labels_were_looked_for(tmp_path: Path) -> None:
    image = series(tmp_path / "mr", "plain")
    write_seg(tmp_path / "seg.dcm", np.zeros(image.geometry.shape, np.int32), image, {1: "liver"})
    found, told = read_seg(tmp_path / "seg.dcm", image)
    assert not found.any()
    assert told == {1: "liver"}
    with pytest.raises(LabelError, match="names no label"):
        write_seg(tmp_path / "b.dcm", np.zeros(image.geometry.shape, np.int32), image, {})


def test_a_patient_name_in_another_character_set_stays_readable(tmp_path: Path) -> None:
    def german(image: FileDataset, index: int) -> None:
        image.SpecificCharacterSet, image.PatientName = "ISO_IR 100", "Müller^Jürgen"

    write_series(tmp_path / "mr", voxels(*SHAPE), spacing_mm=SPACING, edit=german)
    image = read_image(tmp_path / "mr")
    write_seg(tmp_path / "seg.dcm", labels(image, 1), image, {1: "Größe"})
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert str(seg.PatientName) == "Müller^Jürgen"
    assert seg.SegmentSequence[0].SegmentLabel == "Größe"


@pytest.mark.parametrize("kind", ["plain", "frames"])
def test_segs_of_other_programs_are_read(kind: str, tmp_path: Path) -> None:
    """Fractional, as highdicom writes it; overlapping segments; no names of ours."""
    image = series(tmp_path / "mr", kind)
    drawn = labels(image, 1, 2)
    write_seg(tmp_path / "seg.dcm", drawn, image, {1: "liver", 2: "spleen"})
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    seg.Manufacturer = "another"
    seg.SegmentationType, seg.SegmentationFractionalType = "FRACTIONAL", "PROBABILITY"
    seg.MaximumFractionalValue = 200
    bits = np.unpackbits(np.frombuffer(seg.PixelData, np.uint8), bitorder="little")
    count = int(seg.NumberOfFrames) * SHAPE[0] * SHAPE[1]
    seg.PixelData = np.where(bits[:count] > 0, 190, 40).astype(np.uint8).tobytes()
    seg.BitsAllocated = seg.BitsStored = 8
    seg.HighBit = 7
    seg.save_as(tmp_path / "other.dcm")
    found, told = read_seg(tmp_path / "other.dcm", image)
    np.testing.assert_array_equal(found, drawn)
    assert told == {1: "liver", 2: "spleen"}


def test_a_seg_turned_on_its_grid_is_put_back(tmp_path: Path) -> None:
    """As 3D Slicer may write it: rows and columns reversed, same voxels."""
    image = series(tmp_path / "mr", "plain")
    drawn = labels(image, 1)
    write_seg(tmp_path / "seg.dcm", drawn, image, {1: "liver"})
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    size, frames = SHAPE[0] * SHAPE[1], int(seg.NumberOfFrames)
    bits = np.unpackbits(np.frombuffer(seg.PixelData, np.uint8), bitorder="little")
    turned = bits[: frames * size].reshape(frames, size)[:, ::-1]
    seg.PixelData = np.packbits(turned.ravel(), bitorder="little").tobytes()
    seg.PixelData += b"\0" * (len(seg.PixelData) % 2)
    shared = seg.SharedFunctionalGroupsSequence[0]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]
    for group in seg.PerFrameFunctionalGroupsSequence:
        place = group.PlanePositionSequence[0]
        x, y, z = (float(value) for value in place.ImagePositionPatient)
        far = [x + (SHAPE[0] - 1) * SPACING[0], y + (SHAPE[1] - 1) * SPACING[1], z]
        place.ImagePositionPatient = far
    seg.save_as(tmp_path / "turned.dcm")
    found, _ = read_seg(tmp_path / "turned.dcm", image)
    np.testing.assert_array_equal(found, drawn)


@pytest.mark.parametrize("head_first", [True, False])
def test_a_seg_of_ohif_is_believed_only_where_it_does_not_mix_up_slices(
    head_first: bool, tmp_path: Path
) -> None:
    """It was seen in a browser (`make scenes`) that the other order comes back upside down."""

    def number(image: FileDataset, index: int) -> None:
        image.InstanceNumber = SHAPE[2] - index if head_first else index + 1

    write_series(tmp_path / "ct", voxels(*SHAPE), spacing_mm=SPACING, edit=number)
    image = read_image(tmp_path / "ct")
    drawn = labels(image, 1)
    write_seg(tmp_path / "seg.dcm", drawn, image, {1: "liver"})
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    seg.Manufacturer = seg.ManufacturerModelName = "Unspecified"
    seg.save_as(tmp_path / "ohif.dcm")
    if head_first:
        np.testing.assert_array_equal(read_seg(tmp_path / "ohif.dcm", image)[0], drawn)
    else:
        with pytest.raises(LabelError, match="made by OHIF"):
            read_seg(tmp_path / "ohif.dcm", image)


def test_what_does_not_fit_is_refused_with_a_sentence(tmp_path: Path) -> None:
    image = series(tmp_path / "mr", "plain")
    drawn = labels(image, 1)
    write_seg(tmp_path / "seg.dcm", drawn, image, {1: "liver"})
    write_series(tmp_path / "fine", voxels(9, 7, 5), spacing_mm=(0.25, 0.75, 3.0))
    write_series(tmp_path / "small", voxels(5, 4, 3), spacing_mm=SPACING)
    with pytest.raises(LabelError, match="another grid"):
        read_seg(tmp_path / "seg.dcm", read_image(tmp_path / "fine"))
    with pytest.raises(LabelError, match="beyond its image"):
        read_seg(tmp_path / "seg.dcm", read_image(tmp_path / "small"))
    with pytest.raises(LabelError, match="no segmentation"):
        read_seg(next((tmp_path / "mr").iterdir()), image)
    whole = (tmp_path / "seg.dcm").read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[: len(whole) * 9 // 10])
    with pytest.raises(LabelError, match="cannot be read"):
        read_seg(tmp_path / "cut.dcm", image)
