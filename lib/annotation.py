"""What a label map says, slice by slice: the partial-label rule, and giving own slices back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lib.errors import LabelError
from lib.imaging.io import ImageVolume, read_label_map
from lib.imaging.slices import through_plane_axis
from lib.types import IntArray, LabelledImage

MOST_LABELS = 200  # of one image: more than atlases of the brain have, fewer than a grey picture


@dataclass(frozen=True, eq=False)
class Annotation:
    """A label map and what it speaks of.

    Attributes:
        label_map: (I, J, K) int32, canonical.
        values: name -> value in `label_map`, of the labels that are drawn anywhere.
        labels: names annotated on `slices`: drawn, or said to be absent.
        axis: the canonical axis that was cut along.
        slices: indices of the annotated slices, ascending.
    """

    label_map: IntArray
    values: Mapping[str, int]
    labels: frozenset[str]
    axis: int
    slices: tuple[int, ...]


def read_annotation(
    labelled: LabelledImage,
    image: ImageVolume,
    *,
    rule: Literal["partial", "complete"] = "partial",
    axis: int | None = None,
) -> Annotation:
    """Read a label map and decide which slices and labels it speaks of.

    By `partial` (docs/architecture.md, "Partial labels") a slice speaks if something is drawn on
    it, of the labels that the volume uses anywhere. By `complete` every slice speaks of every
    named label. A map that is empty altogether says "none of the named labels", by either rule.

    Raises:
        LabelError: not the label map of this image, or one of more labels than can be learned.
    """
    label_map = read_label_map(labelled.label_path, image)
    axis = through_plane_axis(image, axis)
    drawn = _numbers_in(label_map)
    if len(drawn) > MOST_LABELS:  # every later segmentation would have to decide between them
        msg = (
            f"{labelled.label_path.name} holds {len(drawn)} labels; at most {MOST_LABELS} "
            "are learned. Was an image submitted in place of its label map?"
        )
        raise LabelError(msg)
    values: dict[str, int] = {}
    for value in drawn:
        number = values.setdefault(labelled.label_names.get(value, f"label_{value}"), value)
        if number != value:  # two segments of one name are one label
            label_map[label_map == value] = number
    labels = frozenset(values)
    if rule == "complete" or not drawn:
        labels |= frozenset(labelled.label_names.values())
        slices = tuple(range(label_map.shape[axis])) if labels else ()
    else:
        others = tuple(other for other in range(3) if other != axis)
        slices = tuple(np.flatnonzero((label_map != 0).any(others)).tolist())
    return Annotation(label_map, values, labels, axis, slices)


def _numbers_in(label_map: IntArray) -> list[int]:
    """Numbers drawn anywhere, rising; counted by planes, for sorting a volume takes minutes."""
    found: set[int] = set()
    for plane in label_map:
        found.update(np.flatnonzero(np.bincount(plane.ravel())).tolist())
    return sorted(found - {0})


def put_back(result: IntArray, annotation: Annotation, names: Sequence[str]) -> IntArray:
    """Put the annotator's own slices into a result, voxel for voxel.

    On an annotated slice the annotator's word is final for the labels he annotated; a result for
    other labels stays where he drew nothing.

    Args:
        result: (I, J, K); value v is `names[v - 1]`.
        annotation: of the same image.
        names: labels of the result.
    """
    result = result.copy()
    spot = tuple(list(annotation.slices) if a == annotation.axis else slice(None) for a in range(3))
    own = annotation.label_map[spot]
    part = result[spot]
    part[own != 0] = 0
    for value, name in enumerate(names, start=1):
        if name in annotation.labels:
            part[part == value] = 0
            if name in annotation.values:
                part[own == annotation.values[name]] = value
    result[spot] = part
    return result
