"""Images and label maps between their files and RefSeg's one orientation.

A label map read and written back on the same grid is the same, voxel for voxel; every file leaves
on the image's own grid, whatever its orientation.
"""

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from lib.errors import ImageError, LabelError
from lib.imaging.formats import (
    ITK,
    NIFTI,
    PICTURES,
    WRITABLE,
    check_signature,
    extension_of,
)
from lib.imaging.geometry import Geometry, from_canonical, resample_nearest, to_canonical
from lib.types import FloatArray, IntArray

logger = logging.getLogger(__name__)

_MAX_LABEL = 65535

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class ImageVolume:
    """One image on the canonical grid.

    Attributes:
        voxels: (I, J, K) float32, or (I, J, K, 3) for color; finite, read-only. A picture has
            I = W, J = H and K = 1.
        geometry: grid of `voxels`.
        source: grid of the file.
        kind: "picture" has no place in space, and its pixels are not turned.
        path: where it was read from.
        value_range: what the format calls black and white, or None where it does not say.
        source_ndim: 2 where the file holds a plane, else 3.
        adjacent: False where slices were left out, so that numbers that differ by one are no
            neighbors.
    """

    voxels: FloatArray
    geometry: Geometry
    source: Geometry
    kind: Literal["picture", "volume"]
    path: Path
    value_range: tuple[float, float] | None = None
    source_ndim: int = 3
    adjacent: bool = True


@dataclass(frozen=True, eq=False)
class _Decoded:
    """A file's values on its own grid, before turning; (I, J, K[, 3]) in the file's dtype."""

    values: npt.NDArray[Any]
    geometry: Geometry
    kind: Literal["picture", "volume"]
    value_range: tuple[float, float] | None
    ndim: int


def read_image(path: Path) -> ImageVolume:
    """Read a 2D picture, a volume file or a DICOM folder.

    Raises:
        ImageError: it is none of these, damaged, 4D, empty or without a finite number.
    """
    decoded = _guarded(path, lambda: _decode(path, label=False))
    voxels = _finite(path, decoded.values)
    geometry = decoded.geometry
    if decoded.kind == "volume":
        voxels, geometry = to_canonical(voxels, geometry)
    voxels.setflags(write=False)
    return ImageVolume(
        voxels=voxels,
        geometry=geometry,
        source=decoded.geometry,
        kind=decoded.kind,
        path=path,
        value_range=decoded.value_range,
        source_ndim=decoded.ndim,
    )


def read_label_map(path: Path, image: ImageVolume) -> IntArray:
    """Read the label map of `image` -> (I, J, K) int32 on the image's canonical grid.

    A volume's label map on another grid is looked up by position, nearest voxel. A picture's must
    have the picture's size; its place in space is ignored, since pictures have none and clients
    invent different ones.

    Raises:
        LabelError: damaged, not whole numbers in 0..65535, or not of this image.
    """
    try:
        decoded = _guarded(path, lambda: _decode(path, label=True))
    except ImageError as error:
        msg = f"The label map cannot be read: {error}"
        raise LabelError(msg) from error
    labels = _label_numbers(path, decoded.values)
    source, own = image.source, decoded.geometry
    if image.kind == "picture" or (decoded.ndim == 2 and image.source_ndim == 2):
        # Two planes: 2D headers cannot say where in space they lie.
        if own.shape != source.shape:
            raise LabelError(_size_message(path, own, source))
    elif decoded.kind == "picture":
        msg = (
            f"{path.name} is a picture and its image a volume of {source.shape}. "
            "Submit a volume, e.g. .nii.gz or .nrrd."
        )
        raise LabelError(msg)
    elif not own.same_grid(source):
        moved = resample_nearest(labels, own, source)
        if labels.any() and not moved.any():
            msg = (
                f"{path.name} lies wholly outside of its image: its grid of {own.shape} voxels "
                "is elsewhere in space. Export it with the image as reference geometry."
            )
            raise LabelError(msg)
        logger.info("label map %s resampled to its image's grid", path.name)
        labels = moved
    if image.kind == "volume":
        labels, _ = to_canonical(labels, source)
    return np.ascontiguousarray(labels)


def source_label_map(label_map: IntArray, image: ImageVolume) -> IntArray:
    """Turn a label map (I, J, K) from the canonical grid to the grid of the image's file."""
    if label_map.shape != image.geometry.shape:
        msg = f"A label map of shape {image.geometry.shape} is needed, got {label_map.shape}."
        raise LabelError(msg)
    if image.kind == "picture":
        return label_map
    return from_canonical(label_map, image.source)


def write_label_map(
    path: Path, label_map: IntArray, image: ImageVolume, *, compress: bool = True
) -> None:
    """Write a label map of `image` on the grid of the image's file.

    The file appears at `path` whole or not at all. Its dtype is uint8 where that is enough, else
    uint16; a NRRD is "raw" without compression, as OHIF needs it, else "gzip".

    Args:
        path: its extension chooses the format: one of `WRITABLE`.
        label_map: (I, J, K) on the canonical grid, numbers in 0..65535.
        image: the image it belongs to.
        compress: pack the data. Names decide for NIfTI: .nii never, .nii.gz always.

    Raises:
        LabelError: wrong shape or numbers, or a format that cannot hold this image's label map.
        OSError: the disk is full or the folder cannot be written to.
    """
    extension = extension_of(path)
    if extension not in WRITABLE or (extension in PICTURES and image.kind == "volume"):
        allowed = [e for e in WRITABLE if image.kind == "picture" or e not in PICTURES]
        msg = (
            f"The label map of a {image.kind} cannot be written as {extension or path.name!r}; "
            f"allowed are {', '.join(allowed)}."
        )
        raise LabelError(msg)
    numbers = _label_numbers(path, source_label_map(label_map, image))
    values = numbers.astype(np.uint8 if numbers.max() <= 255 else np.uint16)
    # The extension stays last, since it tells the writers the format; the dot hides the file.
    beside = path.with_name(f".{uuid.uuid4().hex}{extension}")
    try:
        _encode(beside, values, image, compress=compress)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _encode(path: Path, values: npt.NDArray[Any], image: ImageVolume, *, compress: bool) -> None:
    """Write (I, J, K) numbers on the file's grid in the format of the path."""
    from lib.imaging import pictures, volumes

    extension = extension_of(path)
    if extension in PICTURES:
        pictures.write_label_picture(path, values[:, :, 0], compress=compress)
    elif image.kind == "picture":
        volumes.write_itk_picture(path, values[:, :, 0], compress=compress)
    else:
        volume = volumes.Volume(values, image.source, image.source_ndim)
        if extension in NIFTI:
            volumes.write_nifti(path, volume)
        else:
            volumes.write_itk(path, volume, compress=compress)


def _decode(path: Path, *, label: bool) -> _Decoded:
    """Read a file with the reader of its extension."""
    from lib.imaging import pictures, volumes

    extension = extension_of(path)
    if path.is_dir():
        volume = volumes.read_dicom_folder(path)
    elif not path.exists():
        msg = f"{path.name} does not exist. Check its name."
        raise ImageError(msg)
    elif not path.is_file():  # a pipe or device would be waited for without end
        msg = f"{path.name} is neither a file nor a folder. Copy the image into a file."
        raise ImageError(msg)
    else:
        dicom = check_signature(path, extension)
        if extension in PICTURES:
            return _decode_picture(path, pictures.read_label_picture if label else None)
        if extension in NIFTI:
            volume = volumes.read_nifti(path)
        elif extension in ITK or dicom:
            volume = volumes.read_itk(path)
        else:
            known = ", ".join(sorted(PICTURES | NIFTI | ITK))
            msg = f"{path.name} is no known image; allowed are {known}, DICOM files and folders."
            raise ImageError(msg)
    value_range = (0.0, 255.0) if volume.values.ndim == 4 else None
    return _Decoded(volume.values, volume.geometry, "volume", value_range, volume.ndim)


def _decode_picture(path: Path, read_labels: Callable[[Path], npt.NDArray[Any]] | None) -> _Decoded:
    from lib.imaging import pictures

    value_range = None
    if read_labels:
        values = read_labels(path)
    else:
        picture = pictures.read_picture(path)
        values, value_range = picture.values, picture.value_range
    width, height = values.shape[:2]
    values = values.reshape(width, height, 1, *values.shape[2:])
    return _Decoded(values, Geometry((width, height, 1), np.eye(4)), "picture", value_range, 2)


def _guarded(path: Path, read: Callable[[], _T]) -> _T:
    """Run a reader; whatever it raises on foreign bytes becomes one sentence."""
    try:
        return read()
    except (ImageError, LabelError):
        raise
    except MemoryError as error:
        msg = f"{path.name} is larger than the free memory. Crop or downsample it."
        raise ImageError(msg) from error
    except Exception as error:
        # Decoders raise nearly every type on damaged bytes (SyntaxError, struct.error, ...), in
        # words that help a developer and name folders of the server: for the log only.
        logger.info("cannot read %s: %s", path.name, error)
        msg = f"{path.name} cannot be read; it is damaged or cut off. Copy or export it anew."
        raise ImageError(msg) from error


def _finite(path: Path, values: npt.NDArray[Any]) -> FloatArray:
    """Values as float32; NaN and -Inf become the least finite value, Inf the greatest."""
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        if not finite.all():
            if not finite.any():
                msg = f"{path.name} holds no finite number (all NaN or Inf). Export it anew."
                raise ImageError(msg)
            low, high = values[finite].min(), values[finite].max()
            values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
        if values.dtype.itemsize > 4:
            limit = np.finfo(np.float32).max
            values = np.clip(values, -limit, limit)
    return values.astype(np.float32)


def _label_numbers(path: Path, values: npt.NDArray[Any]) -> IntArray:
    """Check that values are label numbers -> (I, J, K) int32."""
    if values.ndim != 3:
        msg = f"{path.name} has {values.shape[3:]} numbers a voxel. A label map has one."
        raise LabelError(msg)
    low, high = values.min(), values.max()
    # `not (...)` rather than `low < 0`, so that NaN is refused too.
    if not (low >= 0 and high <= _MAX_LABEL):
        msg = (
            f"{path.name} holds values {low}..{high}; labels are whole numbers in 0..{_MAX_LABEL}."
        )
        raise LabelError(msg)
    numbers = values.astype(np.int32)
    if values.dtype.kind == "f":
        numbers = np.rint(values).astype(np.int32)
        # Scaled integers come back with a rounding error of float32.
        if np.abs(numbers - values).max() > 1e-3:
            msg = f"{path.name} holds fractions; labels are whole numbers. Save it as integers."
            raise LabelError(msg)
    return numbers


def _size_message(path: Path, own: Geometry, source: Geometry) -> str:
    has, needs = (" x ".join(map(str, g.shape[:2])) for g in (own, source))
    depth = f" in {own.shape[2]} slices" if own.shape[2] > 1 else ""
    return (
        f"{path.name} is {has}{depth} pixels and its image {needs}. "
        "Submit a label map of the image's own size."
    )
