"""Volume files (NIfTI, NRRD, MetaImage, DICOM) as arrays on their own grid, and back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel
import numpy as np
import numpy.typing as npt

from lib.errors import ImageError
from lib.imaging.dicom_series import dicom_volume
from lib.imaging.geometry import Affine, Geometry
from lib.machine import free_bytes

if TYPE_CHECKING:
    import SimpleITK

# 2^31 voxels are 8 GiB as float32; more cannot be meant for an interactive server.
_MAX_VOXELS = 2**31
# Deflate cannot pack tighter than about 1 : 1032, so a header that claims more lies.
_MAX_DEFLATE = 1040
_WORKING = 12  # bytes a voxel beside the file's own: as float, oriented, and the mask

_ITK_READERS = {
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
}

_RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Volume:
    """A decoded volume.

    Attributes:
        values: (I, J, K) or (I, J, K, 3) in the file's order and dtype.
        geometry: the file's grid.
        ndim: 2 where the file holds a plane, else 3.
    """

    values: npt.NDArray[Any]
    geometry: Geometry
    ndim: int


def read_nifti(path: Path) -> Volume:
    """Read a .nii or .nii.gz file."""
    # Not memory-mapped: the file may be replaced while the array is in use.
    image = nibabel.load(path, mmap=False)
    if not isinstance(image, nibabel.Nifti1Image):  # Nifti2Image and Nifti1Pair derive from it
        msg = f"{path.name} is not a NIfTI file. Rename or convert it."
        raise ImageError(msg)
    dtype = image.get_data_dtype()
    _check_size(path, image.shape, dtype.itemsize, packed=path.suffix.lower() == ".gz")
    proxy: Any = image.dataobj
    unscaled = proxy.slope == 1 and proxy.inter == 0
    values: Any = proxy.get_unscaled() if unscaled else np.asarray(proxy, dtype=np.float32)
    if dtype.names in {("R", "G", "B"), ("R", "G", "B", "A")}:
        values = np.stack([values[name] for name in "RGB"], axis=-1)
        color = 1
    else:
        color = 0
    return _volume(path, values, image.affine, color=color)


def read_itk(path: Path) -> Volume:
    """Read a NRRD or MetaImage file, or one DICOM file."""
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    # By name: ITK's own choice fails on extensions in capitals.
    reader.SetImageIO(_ITK_READERS.get(path.suffix.lower(), "GDCMImageIO"))
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    # Detached data lie in another file, and DICOM may be packed better than deflate.
    own_data = path.suffix.lower() in {".nrrd", ".mha"}
    itemsize = _itemsize(reader.GetPixelID()) * reader.GetNumberOfComponents() if own_data else 0
    _check_size(path, reader.GetSize(), itemsize, packed=True)
    return _from_itk(path, reader.Execute())


def dicom_files(path: Path) -> list[Path]:
    """Files of the one DICOM series of a folder."""
    import SimpleITK

    series = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(path))
    if not series:
        msg = f"Folder {path.name} holds no DICOM series. Name a folder with the files of one."
        raise ImageError(msg)
    if len(series) > 1:
        msg = (
            f"Folder {path.name} holds {len(series)} DICOM series; one is allowed. "
            "Put each into a folder of its own."
        )
        raise ImageError(msg)
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(path), series[0])
    # The scan passes over files that it cannot parse: a slice would be missing without a word.
    used = {Path(name).name for name in names}
    for file in sorted(path.iterdir()):
        if file.name not in used and file.name != "DICOMDIR" and is_dicom(file):
            msg = (
                f"{file.name} in folder {path.name} is DICOM but no readable image: it is cut off, "
                "or another kind of object. Copy it anew or take it out."
            )
            raise ImageError(msg)
    return [Path(name) for name in names]


def read_dicom_folder(path: Path) -> Volume:
    """Read the one DICOM series of a folder."""
    import SimpleITK

    names = dicom_files(path)
    first = SimpleITK.ImageFileReader()
    first.SetFileName(str(names[0]))
    first.ReadImageInformation()
    _check_size(path, (*first.GetSize(), len(names)), 0, packed=True)
    found = dicom_volume(path, names)
    if found is None:
        return _from_itk(path, first.Execute())
    if found.frames is not None:
        volume = _from_itk(path, first.Execute())
        values = volume.values[:, :, list(found.frames)]
    else:
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames([str(file) for file in found.files])
        values = _from_itk(path, reader.Execute()).values
    return Volume(values, found.geometry, 3)


def is_dicom(path: Path) -> bool:
    """Whether a file carries DICOM's mark."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def write_nifti(path: Path, volume: Volume) -> None:
    """Write a label map as NIfTI; packed where the name ends in .gz."""
    values = volume.values[:, :, 0] if volume.ndim == 2 else volume.values
    affine = volume.geometry.affine_ras
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    spacing = np.array(volume.geometry.spacing_mm)
    axes = affine[:3, :3] / spacing
    # The quaternion form cannot shear; readers that prefer it must then find none.
    if np.allclose(axes.T @ axes, np.eye(3), atol=1e-4):
        image.set_qform(affine, code=1)
    nibabel.save(image, path)


def write_itk(path: Path, volume: Volume, *, compress: bool) -> None:
    """Write a label map as NRRD or MetaImage."""
    import SimpleITK

    affine = _RAS_FROM_LPS @ volume.geometry.affine_ras
    dims = 3
    values = volume.values
    # A plane stays a plane where it lies in the world's own plane; 2D headers know no other.
    if volume.ndim == 2 and not affine[2, [0, 1, 3]].any() and not affine[:2, 2].any():
        dims, values = 2, values[:, :, 0]
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(values.T))
    spacing = np.linalg.norm(affine[:dims, :dims], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:dims, :dims] / spacing).ravel().tolist())
    image.SetOrigin(affine[:dims, 3].tolist())
    _write(image, path, compress=compress)


def write_itk_picture(path: Path, values: npt.NDArray[Any], *, compress: bool) -> None:
    """Write the (W, H) label map of a picture as a 2D image without a place in space.

    It is what MONAI Label's own writer makes of a 2D mask, so that 3D Slicer lays it on the
    picture.
    """
    import SimpleITK

    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(values.T))
    _write(image, path, compress=compress)


def _write(image: "SimpleITK.Image", path: Path, *, compress: bool) -> None:
    import SimpleITK

    try:
        SimpleITK.WriteImage(image, str(path), useCompression=compress)
    except RuntimeError as error:
        # ITK's only type; what is left to fail here is the disk.
        msg = f"{path.name} cannot be written: the folder is full or read-only."
        raise OSError(msg) from error


def _from_itk(path: Path, image: "SimpleITK.Image") -> Volume:
    import SimpleITK

    dims = image.GetDimension()
    color = 1 if image.GetNumberOfComponentsPerPixel() > 1 else 0
    values = SimpleITK.GetArrayFromImage(image)
    # numpy sees ITK's axes backwards; a pixel's components stay last.
    order = (*reversed(range(dims)), *range(dims, values.ndim))
    direction = np.array(image.GetDirection()).reshape(dims, dims)
    used = min(dims, 3)
    affine = np.eye(4)
    affine[:used, :used] = (direction * np.array(image.GetSpacing()))[:used, :used]
    affine[:used, 3] = image.GetOrigin()[:used]
    return _volume(path, values.transpose(order), _RAS_FROM_LPS @ affine, color=color)


def _volume(path: Path, values: npt.NDArray[Any], affine: Affine, *, color: int) -> Volume:
    """Bring decoded values to (I, J, K[, 3]) and check what RefSeg can use."""
    spatial = values.shape[: values.ndim - color]
    ndim = 2 if len(spatial) == 2 else 3
    if len(spatial) < 2 or any(size != 1 for size in spatial[3:]):
        msg = (
            f"{path.name} has the shape {' x '.join(map(str, spatial))}; one 2D picture or one 3D "
            "volume is allowed. Save each time point or channel as a file of its own."
        )
        raise ImageError(msg)
    i, j, k = (*spatial, 1)[:3]
    shape = (i, j, k)
    values = values.reshape(shape + values.shape[len(spatial) :])
    if values.dtype.kind not in "biuf":
        msg = f"{path.name} holds values of type {values.dtype}; real numbers are allowed."
        raise ImageError(msg)
    if color and (values.shape[3] not in {3, 4} or values.dtype != np.uint8):
        msg = (
            f"{path.name} holds {values.shape[3]} numbers a voxel; one, or RGB in 8 bits, is "
            "allowed. Save each channel as a file of its own."
        )
        raise ImageError(msg)
    values = values[..., :3] if color else values
    try:
        geometry = Geometry(shape, _mend_thin_axes(affine, shape))
    except ValueError as error:
        msg = f"{path.name} has no usable place in space: {error} Mend its header."
        raise ImageError(msg) from error
    return Volume(values, geometry, ndim)


def _mend_thin_axes(affine: Affine, shape: Sequence[int]) -> Affine:
    """Give an axis of one voxel and no length the direction across the other two, 1 mm."""
    mended = np.array(affine, dtype=np.float64)
    flat = [a for a in range(3) if shape[a] == 1 and not mended[:3, a].any()]
    if len(flat) == 1:
        one, other = (mended[:3, a] for a in ((flat[0] + 1) % 3, (flat[0] + 2) % 3))
        across = np.cross(one, other)
        length = np.linalg.norm(across)
        if length > 0:
            mended[:3, flat[0]] = across / length
    return mended


def _check_size(path: Path, shape: Sequence[int], itemsize: int, *, packed: bool) -> None:
    """Refuse a header's claim before memory is taken for it.

    Args:
        path: the file.
        shape: as claimed.
        itemsize: bytes a voxel, or 0 where the file's size says nothing.
        packed: whether the data may be compressed.
    """
    if not shape or any(size < 1 for size in shape):
        msg = f"{path.name} is empty: its header says {' x '.join(map(str, shape))} voxels."
        raise ImageError(msg)
    voxels = math.prod(int(size) for size in shape)
    if voxels > _MAX_VOXELS:
        msg = (
            f"{path.name} claims {' x '.join(map(str, shape))} voxels; at most {_MAX_VOXELS} are "
            "allowed. Its header may be damaged; else crop or downsample it."
        )
        raise ImageError(msg)
    if itemsize and path.stat().st_size * (_MAX_DEFLATE if packed else 1) < voxels * itemsize:
        msg = f"{path.name} is cut off: its header claims more voxels than it holds. Copy it anew."
        raise ImageError(msg)
    needed, free = voxels * (itemsize + _WORKING), free_bytes()
    if needed > free:
        msg = (
            f"{path.name} takes {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are "
            "free. Crop or downsample it, or end other programs."
        )
        raise ImageError(msg)


def _itemsize(pixel_id: int) -> int:
    """Bytes of one component; 1, the least, where it is not a plain number."""
    import SimpleITK

    name = SimpleITK.GetPixelIDValueAsString(pixel_id)
    return next((bits // 8 for bits in (64, 32, 16) if f"{bits}-bit" in name), 1)
