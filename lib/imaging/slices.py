"""Volumes as stacks of pictures, and stacks of masks as volumes."""

from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from lib.errors import RequestError
from lib.imaging.intensity import check_window, grey_range, to_grey
from lib.imaging.io import ImageVolume
from lib.types import FloatArray, IntArray

# Spacings closer than this are called equal: headers round.
_TIE = 0.01


class Slices(Sequence[FloatArray]):
    """The pictures of a volume along one axis, each made when it is asked for.

    A picture is (H, W), or (H, W, 3) for color, float32 in 0..1; the grey range is the whole
    volume's, so that neighbours look alike.
    """

    def __init__(
        self, volume: ImageVolume, axis: int, *, window: tuple[float, float] | None = None
    ) -> None:
        self._axis = _checked(axis)
        self._voxels = volume.voxels
        color = volume.voxels.ndim == 4
        if window is not None:
            window = check_window(window)
        if window is not None and not color:  # a window is of one modality's numbers
            self._grey = window
        elif volume.value_range is not None:
            self._grey = volume.value_range
        else:
            self._grey = grey_range(volume.voxels)

    def __len__(self) -> int:
        """Number of slices."""
        return self._voxels.shape[self._axis]

    @overload
    def __getitem__(self, index: int) -> FloatArray: ...
    @overload
    def __getitem__(self, index: slice) -> list[FloatArray]: ...
    def __getitem__(self, index: int | slice) -> FloatArray | list[FloatArray]:
        """Make one picture, or the list of several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        # Not np.take: it copies the whole volume where axes are turned.
        plane = self._voxels[(slice(None),) * self._axis + (range(len(self))[index],)]
        # Canonical axes grow to L, P, I: the transposed plane has the later axis as rows.
        return np.ascontiguousarray(to_grey(plane.swapaxes(0, 1), self._grey))


def through_plane_axis(volume: ImageVolume, axis: int | None = None) -> int:
    """Canonical axis across the slices: 0 sagittal, 1 coronal, 2 axial.

    It is the one given, else the only axis of one voxel, else that of the coarsest spacing, the
    later one of equals: isotropic volumes are cut axially. Pictures have axis 2 always.
    """
    if volume.kind == "picture":
        return 2
    if axis is not None:
        return _checked(axis)
    thin = [a for a, size in enumerate(volume.geometry.shape) if size == 1]
    if len(thin) == 1:
        return thin[0]
    spacing = volume.geometry.spacing_mm
    return max(a for a in range(3) if spacing[a] >= max(spacing) * (1 - _TIE))


def cut(
    volume: ImageVolume, axis: int, window: tuple[float, float] | None = None
) -> Sequence[FloatArray]:
    """Cut a volume into pictures (H, W[, 3]) in 0..1, lazily.

    Args:
        volume: of `read_image`.
        axis: canonical axis across the slices.
        window: (low, high) in the volume's numbers, shown black and white; default is the range
            that an 8-bit format names, else robust percentiles of the volume. Color ignores it.
    """
    return Slices(volume, axis, window=window)


def cut_labels(label_map: IntArray, axis: int) -> IntArray:
    """Cut a label map (I, J, K) like `cut` cuts its image -> (N, H, W), a view."""
    return label_map.transpose(_order(axis))


def assemble(masks: IntArray, axis: int) -> IntArray:
    """Stack masks (N, H, W) to a label map (I, J, K): the inverse of `cut_labels`."""
    back: npt.NDArray[np.intp] = np.argsort(_order(axis))
    return masks.transpose([int(a) for a in back])


def _order(axis: int) -> tuple[int, int, int]:
    """Volume axes of (slices, rows, columns)."""
    columns, rows = (a for a in range(3) if a != _checked(axis))
    return axis, rows, columns


def _checked(axis: int) -> int:
    if axis not in (0, 1, 2):
        msg = f"No axis {axis!r}; allowed are 0 (sagittal), 1 (coronal) and 2 (axial)."
        raise RequestError(msg)
    return axis
