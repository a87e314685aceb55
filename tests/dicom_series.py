"""A small DICOM series, one file a slice, or one file with all slices as frames."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

Edit = Callable[[FileDataset, int], None]


def write_series(
    folder: Path,
    voxels: npt.NDArray[np.uint16],
    *,
    spacing_mm: tuple[float, float, float],
    modality: str = "MR",
    patient: str = "phantom",
    study: str = "",
    edit: Edit | None = None,
) -> str:
    """Write voxels (columns, rows, slices) as axial slices at the origin; tell the series' UID.

    Args:
        folder: to be made.
        voxels: one slice a file.
        spacing_mm: of columns, rows and slices.
        modality: MR or CT.
        patient: id and name.
        study: UID; empty: a new one.
        edit: changes each file's data set before it is written.
    """
    folder.mkdir(parents=True)
    study, series, frame = study or generate_uid(), generate_uid(), generate_uid()
    for index in range(voxels.shape[2]):
        image = _image(MRImageStorage if modality == "MR" else CTImageStorage, patient)
        image.StudyInstanceUID, image.SeriesInstanceUID = study, series
        image.FrameOfReferenceUID = frame
        image.Modality, image.InstanceNumber = modality, index + 1
        image.ImagePositionPatient = [0, 0, index * spacing_mm[2]]
        image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        image.PixelSpacing = [spacing_mm[1], spacing_mm[0]]
        image.SliceThickness = spacing_mm[2]
        image.RescaleIntercept, image.RescaleSlope = 0, 1
        _put_pixels(image, np.ascontiguousarray(voxels[:, :, index].T))
        if edit is not None:
            edit(image, index)
        image.save_as(folder / f"IM{index:04d}", write_like_original=False)
    return str(series)


def write_multiframe(
    folder: Path,
    voxels: npt.NDArray[np.uint16],
    *,
    spacing_mm: tuple[float, float, float],
    order: list[int] | None = None,
) -> str:
    """Write voxels (columns, rows, slices) as one enhanced MR object; tell the series' UID.

    Args:
        folder: to be made.
        voxels: all frames.
        spacing_mm: of columns, rows and slices.
        order: in which slices follow each other in the file.
    """
    folder.mkdir(parents=True)
    image = _image(EnhancedMRImageStorage, "phantom")
    image.StudyInstanceUID, image.SeriesInstanceUID = generate_uid(), generate_uid()
    image.FrameOfReferenceUID, image.Modality, image.InstanceNumber = generate_uid(), "MR", 1
    order = order or list(range(voxels.shape[2]))
    measures, turned = Dataset(), Dataset()
    measures.PixelSpacing = [spacing_mm[1], spacing_mm[0]]
    measures.SliceThickness = spacing_mm[2]
    turned.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared = Dataset()
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PlaneOrientationSequence = Sequence([turned])
    image.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for index in order:
        place, group = Dataset(), Dataset()
        place.ImagePositionPatient = [0, 0, index * spacing_mm[2]]
        group.PlanePositionSequence = Sequence([place])
        frames.append(group)
    image.PerFrameFunctionalGroupsSequence = Sequence(frames)
    image.NumberOfFrames = len(order)
    _put_pixels(image, np.ascontiguousarray(voxels[:, :, order].T))
    image.save_as(folder / "IM0000", write_like_original=False)
    return str(image.SeriesInstanceUID)


def _image(kind: UID, patient: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = kind
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    image.SOPClassUID, image.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    image.PatientID = image.PatientName = patient
    image.is_little_endian, image.is_implicit_VR = True, False
    return image


def _put_pixels(image: FileDataset, pixels: npt.NDArray[np.uint16]) -> None:
    image.Rows, image.Columns = pixels.shape[-2:]
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated = image.BitsStored = 16
    image.HighBit, image.PixelRepresentation = 15, 0
    image.PixelData = pixels.tobytes()
