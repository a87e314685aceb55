"""DICOM Segmentation objects (SEG), of RefSeg's or of anyone's making, as label maps."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset

from lib.errors import LabelError
from lib.imaging.dicom_seg import MAKER
from lib.imaging.dicom_series import dicom_volume, read_header
from lib.imaging.geometry import to_canonical
from lib.imaging.io import ImageVolume
from lib.imaging.volumes import dicom_files
from lib.types import IntArray

logger = logging.getLogger(__name__)

SEG_STORAGE = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # and label map
_MODEL = "ManufacturerModelName"
_OFF_GRID = 0.25  # of a voxel: headers are rounded
_RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_seg(path: Path, image: ImageVolume) -> tuple[IntArray, dict[int, str]]:
    """Read a SEG of anyone's making onto the grid of its image.

    Where segments overlap, the one of the highest number is seen.

    Returns:
        (I, J, K) int32 on the image's canonical grid, and number -> name of all segments.

    Raises:
        LabelError: no SEG, damaged, or on a grid that is not the image's.
    """
    try:
        seg = pydicom.dcmread(path)
        if str(seg.get("SOPClassUID")) not in SEG_STORAGE:
            msg = f"{path.name} is DICOM, but no segmentation."
            raise LabelError(msg)
        _check_order(path, seg, image)
        numbers, names = _told(seg)
        found = np.zeros(image.source.shape, np.int32)
        by_number = sorted(_painted(seg), key=lambda part: part[0])
        to_index = np.linalg.inv(image.source.affine_ras)
        overlap = 0
        for segment, index, plane in by_number:
            points = _voxels(path, to_index @ _affine(seg, index), plane, image.source.shape)
            here = found[points[0], points[1], points[2]]
            overlap += int(np.count_nonzero(here))
            found[points[0], points[1], points[2]] = numbers.get(segment, segment)
    except LabelError:
        raise
    except Exception as error:  # as elsewhere: decoders raise nearly every type on damaged bytes
        logger.info("cannot read SEG %s: %s", path.name, error)
        msg = f"The DICOM SEG {path.name} cannot be read; it is damaged or of an unknown kind."
        raise LabelError(msg) from error
    if overlap:
        logger.warning("segments overlap in %d voxels; the highest number is used", overlap)
    for number in np.flatnonzero(np.bincount(found.ravel())):  # `unique` sorts all voxels
        names.setdefault(int(number), f"label_{number}")
    names.pop(0, None)
    labels, _ = to_canonical(found, image.source)
    return np.ascontiguousarray(labels), dict(sorted(names.items()))


def _check_order(path: Path, seg: Dataset, image: ImageVolume) -> None:
    """Refuse frames at wrong places, which OHIF's library (dcmjs) makes of some series.

    It writes frames in the order of instance numbers, and positions in the order against the
    normal: right only where a series is numbered in that order. Seen with OHIF 3.9.
    """
    by_dcmjs = all(seg.get(name) == "Unspecified" for name in ("Manufacturer", _MODEL))
    if not by_dcmjs or not image.path.is_dir():
        return
    volume = dicom_volume(image.path, dicom_files(image.path))
    if volume is None or volume.frames is not None:
        return
    told = [read_header(file).get("InstanceNumber") for file in volume.files]
    numbers = [int(number) for number in told if number is not None]
    if numbers != sorted(numbers, reverse=True):
        msg = (
            f"The DICOM SEG {path.name} was made by OHIF, which puts slices at wrong places where "
            "a series is not numbered from the head down. Draw this one in 3D Slicer."
        )
        raise LabelError(msg)


def _told(seg: Dataset) -> tuple[dict[int, int], dict[int, str]]:
    """Segment -> number, and number -> name."""
    numbers, names = {}, {}
    for entry in seg.SegmentSequence:
        segment = number = int(entry.SegmentNumber)
        name = str(entry.get("SegmentLabel") or "").strip() or f"label_{segment}"
        if str(seg.get("Manufacturer")) == MAKER:
            try:
                own = json.loads(entry.get("SegmentDescription") or "{}")
                name, number = str(own.get("name", name)), int(own.get("number", number))
            except (ValueError, AttributeError, TypeError):
                logger.info("segment %d has a description of another's", segment)
        numbers[segment], names[number] = number, name
    names.pop(0, None)
    return numbers, names


def _painted(seg: Dataset) -> Iterator[tuple[int, int, npt.NDArray[np.bool_]]]:
    """Segment, frame and its (rows, columns) for each that is not empty."""
    kind = str(seg.get("SegmentationType") or "BINARY")
    threshold = max(1, int(seg.get("MaximumFractionalValue") or 1) // 2)
    for index, values in enumerate(_frames(seg)):
        if kind == "LABELMAP":
            for segment in np.unique(values):
                if segment:
                    yield int(segment), index, values == segment
            continue
        plane = values >= threshold if kind == "FRACTIONAL" else values > 0
        if plane.any():
            yield _segment(seg, index), index, plane


def _frames(seg: Dataset) -> Iterator[npt.NDArray[Any]]:
    rows, columns, count = int(seg.Rows), int(seg.Columns), int(seg.get("NumberOfFrames") or 1)
    size = rows * columns
    if int(seg.BitsAllocated) != 1 or seg.file_meta.TransferSyntaxUID.is_encapsulated:
        yield from seg.pixel_array.reshape(count, rows, columns)
        return
    data = np.frombuffer(seg.PixelData, np.uint8)
    if data.size * 8 < count * size:
        msg = "fewer pixels than frames"
        raise ValueError(msg)
    for index in range(count):  # frame by frame: unpacked at once they take eight times the file
        start = index * size
        part = np.unpackbits(data[start // 8 : (start + size + 7) // 8], bitorder="little")
        yield part[start % 8 : start % 8 + size].reshape(rows, columns)


def _groups(seg: Dataset, index: int) -> list[Dataset]:
    own = seg.get("PerFrameFunctionalGroupsSequence") or []
    return [*own[index : index + 1], *(seg.get("SharedFunctionalGroupsSequence") or [])[:1]]


def _segment(seg: Dataset, index: int) -> int:
    for group in _groups(seg, index):
        if group.get("SegmentIdentificationSequence"):
            return int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
    return 1


def _affine(seg: Dataset, index: int) -> npt.NDArray[np.float64]:
    """(4, 3): column, row, 1 of a frame -> point in mm, RAS+."""
    groups = _groups(seg, index)

    def numbers(sequence: str, keyword: str) -> npt.NDArray[np.float64]:
        found = next(group[sequence][0] for group in groups if group.get(sequence))
        return np.array([float(value) for value in found[keyword].value])

    turned = numbers("PlaneOrientationSequence", "ImageOrientationPatient")
    spacing = numbers("PixelMeasuresSequence", "PixelSpacing")
    affine = np.zeros((4, 3))
    affine[:3, 0] = turned[:3] * spacing[1]
    affine[:3, 1] = turned[3:] * spacing[0]
    affine[:3, 2] = numbers("PlanePositionSequence", "ImagePositionPatient")
    affine[3, 2] = 1
    return np.asarray(_RAS_FROM_LPS @ affine, dtype=np.float64)


def _voxels(
    path: Path,
    index_of: npt.NDArray[np.float64],
    plane: npt.NDArray[np.bool_],
    shape: tuple[int, int, int],
) -> npt.NDArray[np.intp]:
    """(3, n) indices of a frame's pixels in the image, of which it must have each."""
    rows, columns = np.nonzero(plane)
    exact = index_of[:3] @ np.stack([columns, rows, np.ones_like(rows)]).astype(np.float64)
    nearest = np.rint(exact)
    limits = np.array(shape)[:, None]
    if np.abs(exact - nearest).max() > _OFF_GRID or not _is_turn(index_of):
        msg = (
            f"The DICOM SEG {path.name} lies on another grid than its image. Export it with the "
            "image's own geometry."
        )
        raise LabelError(msg)
    if (nearest < 0).any() or (nearest >= limits).any():
        msg = f"The DICOM SEG {path.name} reaches beyond its image. It may belong to another."
        raise LabelError(msg)
    return nearest.astype(np.intp)


def _is_turn(index_of: npt.NDArray[np.float64]) -> bool:
    """Whether each step on the frame is a step of one voxel, so that none is left out."""
    steps = np.abs(index_of[:3, :2])
    return bool(np.allclose(np.sort(steps, axis=0), [[0, 0], [0, 0], [1, 1]], atol=0.01))
