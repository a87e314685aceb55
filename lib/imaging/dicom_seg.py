"""Label maps as DICOM Segmentation objects (SEG), and back.

A SEG numbers its segments 1, 2, 3, ... without gaps and cuts names at 64 characters. A number or a
name that this would change is written into the segment's description, as JSON, and read from it.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import generate_uid

from lib.errors import ImageError, LabelError
from lib.imaging.dicom_series import dicom_volume, read_header
from lib.imaging.geometry import to_canonical
from lib.imaging.io import ImageVolume, source_label_map
from lib.imaging.volumes import dicom_files
from lib.types import IntArray

logger = logging.getLogger(__name__)

SEG_STORAGE = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # and label map
MAKER = "RefSeg"
_LONGEST_NAME = 64
_MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)
_OFF_GRID = 0.25  # of a voxel: headers are rounded
_RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class SegIdentity:
    """By what a PACS knows a SEG."""

    study: str
    series: str
    instance: str


def write_seg(
    path: Path,
    label_map: IntArray,
    image: ImageVolume,
    names: Mapping[int, str],
    *,
    by_machine: bool = False,
    version: str = "1",
) -> SegIdentity:
    """Write a label map of a DICOM folder as a SEG of the same study.

    Args:
        path: file to write.
        label_map: (I, J, K) on the image's canonical grid.
        image: read from a folder of DICOM files.
        names: number -> name; those without voxels are written, too: they were looked for.
        by_machine: no person has looked at it.
        version: of the software.

    Raises:
        LabelError: the series cannot carry a SEG, or there is no label at all.
    """
    import highdicom
    from pydicom.sr.coding import Code

    numbers = sorted({int(n) for n in np.unique(label_map) if n} | set(names))
    if not numbers:
        msg = (
            "The label map is empty and names no label, which a DICOM SEG cannot say. Name the "
            "labels that are not there, in label_info."
        )
        raise LabelError(msg)
    sources, frames = _sources(image, source_label_map(label_map, image))
    segments = np.zeros(max(numbers) + 1, np.uint16)
    segments[numbers] = np.arange(1, len(numbers) + 1)
    structure = Code("123037004", "SCT", "Anatomical Structure")  # own names have no code
    kinds = highdicom.seg.SegmentAlgorithmTypeValues
    algorithm = highdicom.AlgorithmIdentificationSequence(
        MAKER, Code("123110", "DCM", "Artificial Intelligence"), version
    )
    descriptions = []
    for segment, number in enumerate(numbers, start=1):
        name = names.get(number) or f"label_{number}"
        told = _plain(name)
        entry = highdicom.seg.SegmentDescription(
            segment,
            told,
            structure,
            structure,
            kinds.AUTOMATIC if by_machine else kinds.MANUAL,
            algorithm if by_machine else None,
        )
        if told != name or segment != number:
            entry.SegmentDescription = json.dumps({"name": name, "number": number})
        descriptions.append(entry)
    series, instance = generate_uid(), generate_uid()
    patient, sources[0].PatientName = sources[0].PatientName, ""  # highdicom quotes odd ones
    try:
        seg = highdicom.seg.Segmentation(
            sources,
            segments[frames].astype(np.uint8 if len(numbers) < 256 else np.uint16),
            highdicom.seg.SegmentationTypeValues.BINARY,
            descriptions,
            series_instance_uid=series,
            series_number=300,
            sop_instance_uid=instance,
            instance_number=1,
            manufacturer=MAKER,
            manufacturer_model_name=MAKER,
            software_versions=version,
            device_serial_number="0",
            content_label="LABELS",
            content_description="Labels of RefSeg",
            omit_empty_frames=bool(frames.any()),
        )
    except (AttributeError, KeyError, ValueError, TypeError) as error:
        logger.info("no SEG of %s: %s", image.path.name, error)
        msg = (
            f"Series {image.path.name} lacks what a DICOM SEG has to refer to ({error}). "
            "Mend the series, or use a folder of files as the studies."
        )
        raise LabelError(msg) from error
    seg.SpecificCharacterSet, seg.PatientName = "ISO_IR 192", patient
    seg.SeriesDescription = "Labels of RefSeg"
    if not frames.any():
        logger.info("a SEG without any voxel is written for %s", image.path.name)
    seg.save_as(path)
    return SegIdentity(str(seg.StudyInstanceUID), series, instance)


def instance_of(path: Path) -> Dataset:
    """A DICOM file whole, to be sent."""
    return pydicom.dcmread(path)


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
    for number in np.unique(found):
        names.setdefault(int(number), f"label_{number}")
    names.pop(0, None)
    labels, _ = to_canonical(found, image.source)
    return np.ascontiguousarray(labels), dict(sorted(names.items()))


def _sources(image: ImageVolume, labels: IntArray) -> tuple[list[Dataset], npt.NDArray[Any]]:
    """Headers, and (frames, rows, columns) of labels in the same order."""
    if not image.path.is_dir():
        msg = f"{image.path.name} is no folder of DICOM files, so it can have no DICOM SEG."
        raise LabelError(msg)
    try:
        files = dicom_files(image.path)
        volume = dicom_volume(image.path, files)
    except ImageError as error:
        raise LabelError(str(error)) from error
    planes = np.ascontiguousarray(labels.T)
    thickness = image.source.spacing_mm[2]
    if volume is None:
        return [_complete(files[0], thickness)], planes
    if volume.frames is None:
        return [_complete(file, thickness) for file in volume.files], planes
    frames = np.empty_like(planes)
    frames[list(volume.frames)] = planes
    return [_complete(volume.files[0], thickness)], frames


def _complete(file: Path, thickness_mm: float) -> Dataset:
    """A header with what may be empty, and which many leave out; no file is changed."""
    header = read_header(file)
    for keyword in _MAY_BE_EMPTY:
        if keyword not in header:
            setattr(header, keyword, None)
    if header.get("SliceThickness") is None:
        header.SliceThickness = thickness_mm
    own = header.get("PerFrameFunctionalGroupsSequence")
    if own:
        if not header.get("SharedFunctionalGroupsSequence"):
            header.SharedFunctionalGroupsSequence = Sequence([Dataset()])
        shared = header.SharedFunctionalGroupsSequence[0]
        for name in ("PixelMeasuresSequence", "PlaneOrientationSequence"):
            if name not in shared and name in own[0]:  # the same in all, which was checked
                setattr(shared, name, own[0][name].value)
        if shared.get("PixelMeasuresSequence"):
            measures = shared.PixelMeasuresSequence[0]
            measures.SliceThickness = measures.get("SliceThickness") or thickness_mm
    return header


def _plain(name: str) -> str:
    """A name as DICOM can hold it: 64 characters, no backslash or control character."""
    kept = re.sub(r"[\\\x00-\x1f\x7f]", " ", name).strip()
    return kept[:_LONGEST_NAME].strip() or "label"


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
