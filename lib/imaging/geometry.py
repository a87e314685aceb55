"""Where a voxel lies in the patient: grids, and the way from a file's axes to RefSeg's and back.

Points are in millimetres, RAS+ (nibabel's convention; ITK and DICOM are LPS). RefSeg's own axis
order is `CANONICAL`: axes grow to Left, Posterior and Inferior, so that a transposed slice is the
picture a radiologist sees (axial: rows run to posterior, columns to the patient's left).
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from nibabel import orientations

CANONICAL = ("L", "P", "I")

Affine = npt.NDArray[np.float64]
Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Geometry:
    """A voxel grid in space.

    Attributes:
        shape: (I, J, K) voxels.
        affine_ras: (4, 4) float64, read-only; voxel index (i, j, k, 1) -> point in mm, RAS+.
    """

    shape: Shape
    affine_ras: Affine

    def __post_init__(self) -> None:
        affine = np.array(self.affine_ras, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            msg = f"An affine must be 4 x 4 finite numbers, got {affine.tolist()}."
            raise ValueError(msg)
        # A relative measure: a determinant alone would refuse grids of very small voxels.
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        if not lengths.all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
            msg = f"An affine must span three directions, got {affine[:3, :3].tolist()}."
            raise ValueError(msg)
        affine.setflags(write=False)
        object.__setattr__(self, "affine_ras", affine)
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxels along each axis."""
        i, j, k = np.linalg.norm(self.affine_ras[:3, :3], axis=0)
        return float(i), float(j), float(k)

    @property
    def axcodes(self) -> tuple[str, str, str]:
        """Nearest anatomical direction that each axis grows to, e.g. ("L", "P", "I")."""
        i, j, k = orientations.ornt2axcodes(orientations.io_orientation(self.affine_ras))
        return i, j, k

    def same_grid(self, other: "Geometry", atol: float = 1e-3) -> bool:
        """Whether every voxel of `other` lies where ours does, to `atol` of a voxel.

        Measured at the eight corners: an affine's error grows linearly, so it is largest there,
        and comparing matrix entries would judge large and small volumes by different rules.
        """
        if self.shape != other.shape:
            return False
        corners = np.array(
            [(*c, 1.0) for c in itertools.product(*((0, n - 1) for n in self.shape))]
        )
        there = np.linalg.inv(self.affine_ras) @ other.affine_ras @ corners.T
        return bool(np.abs(there - corners.T).max() <= atol)


def to_canonical(array: npt.NDArray[Any], geometry: Geometry) -> tuple[npt.NDArray[Any], Geometry]:
    """Turn an array on `geometry` to the canonical axes.

    Args:
        array: (I, J, K, ...) on the file's grid; only its first three axes are moved.
        geometry: the file's grid.

    Returns:
        A view of the array, and the canonical grid it lies on: the same points, other indices.
    """
    turn = _turn(geometry)
    turned = orientations.apply_orientation(array, turn)
    affine = geometry.affine_ras @ orientations.inv_ornt_aff(turn, geometry.shape)
    i, j, k = turned.shape[:3]
    return turned, Geometry((i, j, k), affine)


def from_canonical(array: npt.NDArray[Any], geometry: Geometry) -> npt.NDArray[Any]:
    """Turn a canonical array back to the file's grid `geometry`: the inverse of `to_canonical`."""
    turn = _turn(geometry)
    back = orientations.ornt_transform(
        orientations.axcodes2ornt(CANONICAL), orientations.io_orientation(geometry.affine_ras)
    )
    expected = tuple(
        geometry.shape[int(np.flatnonzero(turn[:, 0] == axis)[0])] for axis in range(3)
    )
    if array.shape[:3] != expected:
        msg = f"A canonical array of shape {expected} is needed, got {array.shape[:3]}."
        raise ValueError(msg)
    turned: npt.NDArray[Any] = orientations.apply_orientation(array, back)
    return turned


def resample_nearest(
    values: npt.NDArray[Any], source: Geometry, target: Geometry
) -> npt.NDArray[Any]:
    """Look up the nearest voxel of `values` at every point of `target`; 0 outside of `source`.

    Args:
        values: (I, J, K) on `source`.
        source: grid of the values.
        target: grid asked for.

    Returns:
        Array of the target's shape and the values' dtype.
    """
    step = np.linalg.inv(source.affine_ras) @ target.affine_ras
    i, j = np.meshgrid(np.arange(target.shape[0]), np.arange(target.shape[1]), indexing="ij")
    plane = np.stack([i, j, np.zeros_like(i), np.ones_like(i)]).astype(np.float64)
    start = np.tensordot(step[:3], plane, axes=1)  # (3, I, J)
    limits = np.array(source.shape)[:, None, None]
    found = np.zeros(target.shape, dtype=values.dtype)
    # Plane by plane: the coordinates of a whole volume would take 24 bytes a voxel.
    for k in range(target.shape[2]):
        index = np.floor(start + k * step[:3, 2, None, None] + 0.5)
        inside = ((index >= 0) & (index < limits)).all(axis=0)
        picked = index[:, inside].astype(np.intp)
        found[:, :, k][inside] = values[picked[0], picked[1], picked[2]]
    return found


def _turn(geometry: Geometry) -> npt.NDArray[np.float64]:
    """nibabel's orientation transform from the grid's axes to the canonical ones."""
    turn: npt.NDArray[np.float64] = orientations.ornt_transform(
        orientations.io_orientation(geometry.affine_ras), orientations.axcodes2ornt(CANONICAL)
    )
    return turn
