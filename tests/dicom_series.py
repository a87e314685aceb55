"""A small DICOM series, one file a slice."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid


def write_series(
    folder: Path, voxels: npt.NDArray[np.uint16], *, spacing_mm: tuple[float, float, float]
) -> None:
    """Write voxels (columns, rows, slices) as axial MR slices at the origin."""
    folder.mkdir(parents=True)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for index in range(voxels.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / f"IM{index:04d}"
        image = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        image.SOPClassUID = meta.MediaStorageSOPClassUID
        image.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
        image.StudyInstanceUID, image.SeriesInstanceUID = study, series
        image.FrameOfReferenceUID = frame
        image.Modality, image.PatientID, image.InstanceNumber = "MR", "phantom", index + 1
        image.ImagePositionPatient = [0, 0, index * spacing_mm[2]]
        image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        image.PixelSpacing = [spacing_mm[1], spacing_mm[0]]
        image.SliceThickness = spacing_mm[2]
        pixels = np.ascontiguousarray(voxels[:, :, index].T)
        image.Rows, image.Columns = pixels.shape
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated = image.BitsStored = 16
        image.HighBit, image.PixelRepresentation = 15, 0
        image.PixelData = pixels.tobytes()
        image.is_little_endian, image.is_implicit_VR = True, False
        image.save_as(path, write_like_original=False)
