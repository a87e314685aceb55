"""Which files of a folder make one DICOM volume, in which order, and where its voxels lie.

Pixels are decoded by ITK, which takes any pile of slices for a box: it does not see that a gantry
was tilted, a slice lacks or lies there twice. So the place of each slice is read here, and what
makes no grid is refused.
"""

import filecmp
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset

from lib.errors import ImageError
from lib.imaging.geometry import Affine, Geometry

logger = logging.getLogger(__name__)

# Of the distance between two slices: scanners round positions, and tables creep.
_UNEVEN = 0.1
_SAME_PLACE_MM = 1e-3
_SAME_DIRECTION = 1e-3
_STEEPEST = 0.5  # cosine between the way from slice to slice and their normal: 60 degrees

_RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class DicomVolume:
    """Files and frames of a volume, in the order of its third axis.

    Attributes:
        files: one of each slice, or the one file that holds all as frames.
        frames: None, or the numbers of the frames in the file, from 0.
        geometry: of the volume; slices ascend along the normal, as ITK and OHIF order them.
    """

    files: tuple[Path, ...]
    frames: tuple[int, ...] | None
    geometry: Geometry


@dataclass(frozen=True, eq=False)
class _Slice:
    """One slice's header: place of the first pixel, directions of a row and of a column, mm."""

    name: str
    position: Vector
    row: Vector
    column: Vector
    spacing: tuple[float, float]
    size: tuple[int, int]

    @property
    def normal(self) -> Vector:
        return np.cross(self.row, self.column)


def dicom_volume(folder: Path, files: Sequence[Path]) -> DicomVolume | None:
    """The volume that the files of one series make, or None for a single plane.

    Args:
        folder: for messages.
        files: of one series, all readable.

    Raises:
        ImageError: they make no grid: the sentence says which slice is in the way.
    """
    headers = _without_copies(folder, files)
    if len(headers) == 1:
        file, header = headers[0]
        count = int(header.get("NumberOfFrames") or 1)
        if count == 1:
            return None
        frames = [_frame(file, header, number) for number in range(count)]
        order, geometry = _grid(folder, frames)
        return DicomVolume((file,), tuple(order), geometry)
    for file, header in headers:
        if int(header.get("NumberOfFrames") or 1) > 1:
            msg = (
                f"{file.name} in folder {folder.name} holds many slices and is not the only file; "
                "one such file, or one file a slice, is allowed. Put each into a folder of its own."
            )
            raise ImageError(msg)
    slices = [_slice(file.name, header, [header]) for file, header in headers]
    order, geometry = _grid(folder, slices)
    return DicomVolume(tuple(headers[k][0] for k in order), None, geometry)


def read_header(file: Path) -> Dataset:
    """A DICOM file without its pixels."""
    return pydicom.dcmread(file, stop_before_pixels=True)


def _without_copies(folder: Path, files: Sequence[Path]) -> list[tuple[Path, Dataset]]:
    """Headers; a file that was copied twice counts once."""
    kept: list[tuple[Path, Dataset]] = []
    first: dict[str, Path] = {}
    for file in files:
        header = read_header(file)
        other = first.setdefault(str(header.get("SOPInstanceUID")), file)
        if other != file and filecmp.cmp(other, file, shallow=False):
            logger.info("%s in %s is a copy of %s", file.name, folder.name, other.name)
        else:
            kept.append((file, header))
    return kept


def _frame(file: Path, header: Dataset, number: int) -> _Slice:
    """A frame's header: its own functional groups, else those shared by all, else the file's."""
    own = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = header.get("SharedFunctionalGroupsSequence") or []
    groups = [*own[number : number + 1], *shared[:1]]
    inner = [
        group[name][0]
        for name in ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
        for group in groups
        if group.get(name)
    ]
    return _slice(f"frame {number + 1} of {file.name}", header, [*inner, header])


def _slice(name: str, header: Dataset, groups: Sequence[Dataset]) -> _Slice:
    position = _numbers(name, groups, "ImagePositionPatient", 3, "where it lies")
    turned = _numbers(name, groups, "ImageOrientationPatient", 6, "which way it faces")
    spacing = _numbers(name, groups, "PixelSpacing", 2, "how large its pixels are")
    if min(spacing) <= 0:
        msg = f"{name} has a Pixel Spacing of {spacing.tolist()}; it is above 0. Mend its header."
        raise ImageError(msg)
    row, column = turned[:3], turned[3:]
    lengths = np.array([np.linalg.norm(row), np.linalg.norm(column)])
    if np.abs(lengths - 1).max() > 0.01 or abs(float(row @ column)) > 0.01:
        msg = (
            f"{name} has an Image Orientation of {turned.tolist()}, which is no pair of directions "
            "at a right angle. Mend its header."
        )
        raise ImageError(msg)
    return _Slice(
        name,
        position,
        row / lengths[0],
        column / lengths[1],
        (float(spacing[1]), float(spacing[0])),  # DICOM tells the distance of rows first
        (int(header.Columns), int(header.Rows)),
    )


def _numbers(
    name: str, groups: Sequence[Dataset], keyword: str, count: int, what: str
) -> npt.NDArray[np.float64]:
    values = next((group.get(keyword) for group in groups if group.get(keyword)), None)
    found = np.array([] if values is None else [float(value) for value in values])
    if found.shape != (count,) or not np.isfinite(found).all():
        msg = (
            f"{name} does not say {what} ({keyword} is missing or damaged), so the series makes no "
            "volume. Export it anew, or as NIfTI."
        )
        raise ImageError(msg)
    return found


def _grid(folder: Path, slices: Sequence[_Slice]) -> tuple[list[int], Geometry]:
    """Order along the normal, and the grid; a shear where the gantry was tilted."""
    first = slices[0]
    for other in slices:
        if other.size != first.size:
            sizes = " and ".join(f"{s.size[0]} x {s.size[1]} ({s.name})" for s in (first, other))
            msg = f"{folder.name} cannot be read as one volume: slices have {sizes} pixels."
            raise ImageError(msg)
        turn = max(np.abs(other.row - first.row).max(), np.abs(other.column - first.column).max())
        if turn > _SAME_DIRECTION:
            msg = (
                f"{folder.name} cannot be read as one volume: {first.name} and {other.name} face "
                "different ways. Take scouts out, and put each direction into its own folder."
            )
            raise ImageError(msg)
        if not np.allclose(other.spacing, first.spacing, rtol=1e-3):
            msg = (
                f"{folder.name} cannot be read as one volume: pixels of {first.name} and "
                f"{other.name} have different sizes, {first.spacing} and {other.spacing} mm."
            )
            raise ImageError(msg)
    along = np.array([part.position @ first.normal for part in slices])
    order = [int(k) for k in np.argsort(along, kind="stable")]
    places = np.array([slices[k].position for k in order])
    step = _step(folder, [slices[k].name for k in order], places, first.normal)
    affine = np.eye(4)
    affine[:3, 0] = first.row * first.spacing[0]
    affine[:3, 1] = first.column * first.spacing[1]
    affine[:3, 2] = step
    affine[:3, 3] = places[0]
    shape = (*first.size, len(slices))
    return order, Geometry(shape, _ras(affine))


def _step(folder: Path, names: Sequence[str], places: Vector, normal: Vector) -> Vector:
    """The way from each slice to the next, which is the same for all."""
    if len(places) == 1:
        return normal
    gaps = np.diff(places @ normal)
    nearest = int(gaps.argmin())
    if gaps[nearest] < _SAME_PLACE_MM:
        msg = (
            f"{folder.name} cannot be read as one volume: {names[nearest]} and "
            f"{names[nearest + 1]} lie at the same place. Put time points, echoes and "
            "reconstructions into folders of their own."
        )
        raise ImageError(msg)
    step: Vector = (places[-1] - places[0]) / (len(places) - 1)
    length = float(np.linalg.norm(step))
    if abs(float(step @ normal)) < _STEEPEST * length:
        msg = (
            f"{folder.name} cannot be read as one volume: its slices are shifted sideways by more "
            "than they are apart."
        )
        raise ImageError(msg)
    even = places[0] + np.arange(len(places))[:, None] * step
    if np.linalg.norm(places - even, axis=1).max() > _UNEVEN * length:
        at = int(np.abs(gaps - np.median(gaps)).argmax())
        msg = (
            f"{folder.name} cannot be read as one volume: its slices are {np.median(gaps):.4g} mm "
            f"apart, but {names[at]} and {names[at + 1]} {gaps[at]:.4g} mm. Is a slice missing? "
            "Fetch the series anew."
        )
        raise ImageError(msg)
    return step


def _ras(affine_lps: Affine) -> Affine:
    return np.asarray(_RAS_FROM_LPS @ affine_lps, dtype=np.float64)
