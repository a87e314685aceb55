"""CT series of patients who do not exist: a trunk with a liver and a spleen, in noise."""

import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import FileDataset

from lib.imaging.dicom_seg import write_seg
from lib.imaging.geometry import to_canonical
from lib.imaging.io import ImageVolume, read_image, write_label_map
from tests.dicom_series import write_series

SHAPE = (96, 80, 10)  # columns, rows, slices
SPACING_MM = (3.0, 3.0, 8.0)
NAMES = {1: "liver", 2: "spleen"}
_AIR = 1024


def organs(seed: int) -> npt.NDArray[np.uint8]:
    """(columns, rows, slices) of label numbers; each patient has another anatomy."""
    shift = np.random.default_rng(seed).uniform(-4, 4, 6)
    labels = np.zeros(SHAPE, np.uint8)
    labels[_ellipsoid((32 + shift[0], 36 + shift[1], 4.5), (17 + shift[2], 15, 5.2))] = 1
    labels[_ellipsoid((69 + shift[3], 44 + shift[4], 5.5), (9, 11 + shift[5] / 2, 4.2))] = 2
    return labels


def bone() -> npt.NDArray[np.bool_]:
    """(columns, rows, slices): a vertebra, the same in all."""
    return _ellipsoid((48, 62, 4.5), (6, 6, 99))


def write_patient(folder: Path, seed: int, *, study: str = "") -> str:
    """Write one patient's series; tell its UID."""
    rng = np.random.default_rng(100 + seed)
    labels = organs(seed)
    values = np.where(_ellipsoid((48, 40, 4.5), (44, 35, 99)), 30.0, -1000.0)
    values[labels == 1] = 110
    values[labels == 2] = 180
    values[bone()] = 600
    values += rng.normal(0, 12, SHAPE)

    def hounsfield(image: FileDataset, index: int) -> None:
        image.RescaleIntercept, image.WindowCenter, image.WindowWidth = -_AIR, 60, 400
        # from the head down, as scanners number; OHIF's export turns other series upside down
        image.InstanceNumber = SHAPE[2] - index
        image.ImagePositionPatient = [-144, -120, -300 + index * SPACING_MM[2]]
        image.StudyDate, image.StudyTime = f"202601{seed + 1:02d}", "101500"
        image.StudyDescription, image.SeriesDescription = "Abdomen", "portal venous"
        image.PatientID, image.PatientBirthDate, image.PatientSex = f"P{seed}", "19700101", "O"
        image.AccessionNumber, image.StudyID, image.SeriesNumber = str(seed), "1", 2

    return write_series(
        folder,
        np.clip(values + _AIR, 0, 4095).astype(np.uint16),
        spacing_mm=SPACING_MM,
        modality="CT",
        patient=f"Phantom^{seed}",
        study=study,
        edit=hounsfield,
    )


def draw_elsewhere(patient: Path, labels: npt.NDArray[np.uint8], folder: Path) -> None:
    """Write a SEG of a patient's series that comes into the PACS without the server."""
    folder.mkdir(exist_ok=True)
    turned, image = _as_read(patient, labels)
    write_seg(folder / f"{time.time_ns()}.dcm", turned, image, NAMES)


def draw_on_grid(patient: Path, labels: npt.NDArray[np.uint8], file: Path) -> None:
    """Write a label map on the grid of a patient's series, as a client submits it."""
    write_label_map(file, *_as_read(patient, labels))


def _as_read(
    patient: Path, labels: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.int32], ImageVolume]:
    image = read_image(patient)
    turned, _ = to_canonical(labels.astype(np.int32), image.source)
    return np.ascontiguousarray(turned), image


def _ellipsoid(
    center: tuple[float, float, float], radii: tuple[float, float, float]
) -> npt.NDArray[np.bool_]:
    x, y, z = (
        ((g - c) / r) ** 2
        for g, c, r in zip(np.ogrid[tuple(map(slice, SHAPE))], center, radii, strict=True)
    )
    inside: npt.NDArray[np.bool_] = x + y + z < 1
    return inside
