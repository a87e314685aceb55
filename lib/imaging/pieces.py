"""In how many pieces a structure comes, and whether it has holes: seen on labels, kept in masks."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from lib.types import Shape

Mask = npt.NDArray[np.bool_]

CRUMB = 0.05  # of a mask's area, in the smallest pieces: slips of the pen
PINHOLE = 0.01  # of a mask's area; less is no hole
THIN = 0.02  # of a mask's area, in the largest square that fits: vessels, fibres
ENOUGH = 5  # slices that show a label; fewer say nothing of its shape
NEARLY_ALL = 0.95  # of the slices
MOST_PIECES = 3  # more than these are not counted: cells, lesions, glands
_TOUCHING = np.ones((3, 3), bool)  # corners touch, too


def shape_of(mask: Mask) -> Shape:
    """Of one mask (H, W) with at least one pixel; crumbs and pinholes are passed over.

    Of many small things, and of a net of thin lines, which breaks where it is faint, the pieces
    are not counted.
    """
    from scipy import ndimage

    window = np.pad(mask[_box(mask)], 1)
    named, _ = ndimage.label(window, _TOUCHING)
    areas = np.sort(np.bincount(named.ravel())[1:])[::-1]
    needed = int(np.searchsorted(areas.cumsum(), (1 - CRUMB) * areas.sum())) + 1
    widest = int(ndimage.distance_transform_cdt(window, "chessboard").max())  # half a square's side
    thin = (2 * widest - 1) ** 2 < THIN * areas.sum()
    holes = int(ndimage.binary_fill_holes(window).sum()) - int(window.sum())
    return Shape(
        pieces=0 if thin else needed,
        closed=bool(holes <= PINHOLE * areas.sum()),
    )


def usual_shape(seen: Iterable[Shape]) -> Shape:
    """What nearly all masks of a label have in common."""
    shapes = list(seen)
    if len(shapes) < ENOUGH:
        return Shape()
    needed = NEARLY_ALL * len(shapes)
    counts = np.array([shape.pieces for shape in shapes])
    few = [n for n in range(1, MOST_PIECES + 1) if ((counts <= n) & (counts > 0)).sum() >= needed]
    pieces = min(few, default=0)
    closed = sum(shape.closed for shape in shapes) >= needed
    return Shape(pieces, closed=closed, scattered=not pieces)


def tidy(values: npt.NDArray[np.int32], shapes: Iterable[Shape]) -> None:
    """Give each label of a slice its usual shape, in place.

    Of too many pieces the largest stay; holes in what has none are filled where nothing else is.

    Args:
        values: (H, W), 0 or the label's place in `shapes` + 1.
        shapes: of each label.
    """
    from scipy import ndimage

    for value, shape in enumerate(shapes, start=1):
        if shape == Shape():
            continue
        mask = values == value
        if not mask.any():
            continue
        place = _box(mask)
        mask, around = mask[place], values[place]
        if shape.pieces:
            named, count = ndimage.label(mask, _TOUCHING)
            if count > shape.pieces:
                areas = np.bincount(named.ravel())
                areas[0] = 0
                kept = np.argsort(-areas, kind="stable")[: shape.pieces]
                around[mask & ~np.isin(named, kept)] = 0
                mask = around == value
        if shape.closed:
            around[ndimage.binary_fill_holes(mask) & (around == 0)] = value


def _box(mask: Mask) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
