"""Label maps as DICOM Segmentation objects (SEG); `dicom_seg_reading` is the way back.

A SEG numbers its segments 1, 2, 3, ... without gaps and cuts names at 64 characters. A number or a
name that this would change is written into the segment's description, as JSON, and read from it.
"""

import json
import logging
import math
import re
from collections.abc import Mapping
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
from lib.imaging.io import ImageVolume, source_label_map
from lib.imaging.volumes import dicom_files
from lib.types import IntArray

logger = logging.getLogger(__name__)

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

    numbers = sorted(
        {int(n) for n in np.flatnonzero(np.bincount(label_map.ravel())) if n} | set(names)
    )
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
        entry.RecommendedDisplayCIELabValue = _color(segment)
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


def _color(segment: int) -> list[int]:
    """A color far from those of its neighbors, as DICOM encodes CIELab; viewers ask for one."""
    turn = segment * math.pi * (3 - math.sqrt(5))  # the golden angle
    lightness, a, b = 65, 60 * math.cos(turn), 60 * math.sin(turn)
    return [round(lightness / 100 * 65535), *(round((v + 128) / 255 * 65535) for v in (a, b))]


def _plain(name: str) -> str:
    """A name as DICOM can hold it: 64 characters, no backslash or control character."""
    kept = re.sub(r"[\\\x00-\x1f\x7f]", " ", name).strip()
    return kept[:_LONGEST_NAME].strip() or "label"
