"""The pages' pictures: slices as small JPEGs with outlined labels, made when they are asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from apps.refseg.server.page_masks import Mask
from apps.refseg.server.page_parts import Parts, Shelf, looks
from lib.evaluation.pictures import COLORS, Panel, jpeg
from lib.imaging.io import ImageVolume, read_image, read_label_map
from lib.imaging.slices import Slices, cut_labels, through_plane_axis
from lib.studies.datastore import labelled_image
from lib.types import IntArray

Over = Literal["", "label", "mask"]

JPEG_BYTES = 32 << 20
VOLUME_BYTES = 256 << 20
SMALL, LARGE = 130, 420  # rows


@dataclass(frozen=True)
class Wanted:
    """A picture that a page names.

    Attributes:
        image_id: of an image that is there.
        path: its file or folder.
        number: of the slice; None: the one that shows most.
        axis: across the slices; None: the usual one.
        over: what is outlined on it: nothing, the label that was submitted, or RefSeg's mask.
        rows: of the picture.
    """

    image_id: str
    path: Path
    number: int | None = None
    axis: int | None = None
    over: Over = ""
    rows: int = SMALL


@dataclass(frozen=True, eq=False)
class Opened:
    """An image as read, or a label map on its grid, and its values' names."""

    image: ImageVolume
    label_map: IntArray | None = None
    names: Mapping[int, str] | None = None

    @property
    def bytes(self) -> int:
        """In memory."""
        return self.image.voxels.nbytes + (0 if self.label_map is None else self.label_map.nbytes)


class Numbers:
    """Each label's number and color, the same in all pictures: those of `/info`."""

    def __init__(self, parts: Parts) -> None:
        """Nothing is asked for yet."""
        self._parts = parts

    def of(self, *names: str) -> dict[str, int]:
        """All that are known, then those named here that are not."""
        told = self._parts.task.info()["labels"]
        found = {name: number for name, number in told.items() if number > 0}
        for name in sorted({*names} - found.keys()):
            found[name] = max(found.values(), default=0) + 1
        return found

    @staticmethod
    def color(number: int) -> str:
        """As in the pictures."""
        return COLORS[(number - 1) % len(COLORS)]


class Pictures:
    """Makes them and keeps the last; the studies folder is not written to."""

    def __init__(self, parts: Parts, numbers: Numbers) -> None:
        """Nothing is read yet."""
        self._parts = parts
        self._numbers = numbers
        self._jpegs: Shelf[bytes] = Shelf(JPEG_BYTES, len)
        self._opened: Shelf[Opened] = Shelf(VOLUME_BYTES, lambda opened: opened.bytes)

    def jpeg(self, wanted: Wanted, mask: Mask | None = None) -> bytes:
        """One picture.

        Args:
            wanted: which.
            mask: RefSeg's, if it is to be outlined.

        Raises:
            ImageError: the image cannot be read.
            LabelError: its label cannot.
        """
        label = self._label_path(wanted.image_id) if wanted.over == "label" else None
        numbers = self._numbers.of(*(mask.values if mask else ()))
        key = (
            wanted,
            looks(wanted.path),
            looks(label) if label else None,
            mask.mark if mask else None,
            tuple(numbers.items()) if wanted.over else (),
        )
        known = self._jpegs.get(key)
        return known if known is not None else self._jpegs.put(key, self._draw(wanted, mask))

    def image(self, path: Path) -> ImageVolume:
        """An image as read; the last few stay in memory, for who looks through their slices."""
        key = looks(path)
        opened = self._opened.get(key) or self._opened.put(key, Opened(read_image(path)))
        return opened.image

    def label(self, image_id: str, image: ImageVolume) -> Opened | None:
        """The label that was submitted, on its image's grid; None without one."""
        labelled = labelled_image(
            self._parts.datastore, image_id, self._parts.runtime.settings.tags
        )
        if labelled is None:
            return None
        key = (looks(image.path), looks(labelled.label_path), tuple(labelled.label_names.items()))
        known = self._opened.get(key)
        if known is None:
            values = read_label_map(labelled.label_path, image)
            names = {int(v): f"label_{v}" for v in np.unique(values) if v} | dict(
                labelled.label_names
            )
            known = self._opened.put(key, Opened(image, values, names))
        return known

    def axis(self, image: ImageVolume) -> int:
        """The usual axis across an image's slices."""
        return through_plane_axis(image, self._parts.runtime.settings.axis_index)

    def best(self, image: ImageVolume, axis: int, label_map: IntArray | None) -> int:
        """The slice with most drawn on it; the middle one where nothing is."""
        if label_map is not None and label_map.any():
            return int((cut_labels(label_map, axis) > 0).sum(axis=(1, 2)).argmax())
        return image.voxels.shape[axis] // 2

    def _label_path(self, image_id: str) -> Path | None:
        store, tags = self._parts.datastore, self._parts.runtime.settings.tags
        present = store.get_labels_by_image_id(image_id)
        tag = next((tag for tag in tags if tag in present), None)
        return Path(store.get_label_uri(present[tag], tag)) if tag else None

    def _draw(self, wanted: Wanted, mask: Mask | None) -> bytes:
        image = self.image(wanted.path)
        axis = self.axis(image) if wanted.axis is None or image.kind == "picture" else wanted.axis
        label_map: IntArray | None = None
        names: Mapping[int, str] = {}
        if wanted.over == "mask" and mask is not None and mask.shape == image.voxels.shape[:3]:
            label_map, names = mask.label_map(), {v: name for name, v in mask.values.items()}
        elif wanted.over == "label":
            label = self.label(wanted.image_id, image)
            if label is not None:
                label_map, names = label.label_map, label.names or {}
        depth = image.voxels.shape[axis]
        number = self.best(image, axis, label_map) if wanted.number is None else wanted.number
        number = min(max(number, 0), depth - 1)
        picture = Slices(image, axis, window=self._parts.runtime.settings.window)[number]
        labels = None
        if label_map is not None:
            labels = self._renumbered(cut_labels(label_map, axis)[number], names)
        return jpeg(Panel("", picture, labels), wanted.rows, numbered=bool(wanted.over))

    def _renumbered(self, values: IntArray, names: Mapping[int, str]) -> IntArray:
        """(H, W) with the numbers that labels have on the pages."""
        numbers = self._numbers.of(*names.values())
        lookup = np.zeros(max(int(values.max()), *names, 0) + 1, np.int32)
        for value, name in names.items():
            lookup[value] = numbers[name]
        return lookup[values]
