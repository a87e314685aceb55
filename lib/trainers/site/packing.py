"""Labelled slices as they are trained on: cut once, kept in memory-mapped files, read piece-wise.

A volume of any size costs the training no more memory than the slices of one episode.
"""

import hashlib
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.annotation import read_annotation
from lib.errors import LabelError, RefSegError, TrainingError
from lib.imaging.io import read_image
from lib.imaging.slices import cut, cut_labels, through_plane_axis
from lib.types import FloatArray, LabelledImage

logger = logging.getLogger(__name__)

SIDE = 320  # of a packed slice: more than the working size, so that zooming in pays
MOST_SLICES = 48  # of one image, evenly spread: neighbours hardly differ
MOST_LABELS = 255  # of one image: maps are 8-bit
UNLABELLED_SLICES = 2  # of one unlabelled image
THUMBNAIL = 24
VERSION = 1  # raised when packed files would no longer fit


@dataclass(frozen=True, eq=False)
class PackedCase:
    """The annotated slices of one image, stretched to squares.

    Attributes:
        image_id: the datastore's id.
        labels: names annotated in this image, sorted; label map value v is `labels[v - 1]`.
        images: file of (n, S, S, C) uint8, C is 1 or 3.
        maps: file of (n, S, S) uint8.
        thumbnails: (n, T) float32 unit vectors, grey, without mean.
        present: (n, L) bool, which label shows on which slice.
        digest: of all that the files were made from.
    """

    image_id: str
    labels: tuple[str, ...]
    images: Path
    maps: Path
    thumbnails: FloatArray
    present: npt.NDArray[np.bool_]
    digest: str

    def __len__(self) -> int:
        """Number of slices."""
        return len(self.thumbnails)

    def picture(self, index: int) -> npt.NDArray[np.uint8]:
        """(S, S, C) uint8, read from the file."""
        return np.array(np.load(self.images, mmap_mode="r")[index])

    def label_map(self, index: int) -> npt.NDArray[np.uint8]:
        """(S, S) uint8, read from the file."""
        return np.array(np.load(self.maps, mmap_mode="r")[index])


@dataclass(frozen=True)
class Rules:
    """How images are cut and label maps understood: the same as the bank's."""

    annotation: Literal["partial", "complete"] = "partial"
    window: tuple[float, float] | None = None
    axis: int | None = None


def pack_cases(labelled: Sequence[LabelledImage], folder: Path, rules: Rules) -> list[PackedCase]:
    """Pack labelled images; what is packed already is used as it is, what is gone is deleted.

    An image that cannot be used is logged and left out.

    Raises:
        TrainingError: the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for one in labelled:
        try:
            case = _pack(one, folder, rules)
        except TrainingError:
            raise  # the next image would not fit on the disk either
        except (RefSegError, FileNotFoundError) as error:  # deleted since the list was made
            logger.warning("%s is not trained on: %s", one.image_id, error)
            continue
        if case is None:
            logger.warning("%s is not trained on: no slice of it is annotated", one.image_id)
        else:
            cases.append(case)
    kept = {path.name for case in cases for path in (case.images, case.maps)}
    for path in folder.glob("*.npy"):
        if path.name not in kept and not path.name.endswith(".extra.npy"):
            path.unlink(missing_ok=True)
    return cases


def pack_unlabelled(paths: Sequence[Path], target: Path, rules: Rules) -> Path | None:
    """A few slices of images without labels, (n, S, S, C) uint8 in one file; None: there are none.

    Raises:
        TrainingError: the disk is full.
    """
    pictures: list[npt.NDArray[np.uint8]] = []
    for path in paths:
        try:
            image = read_image(path)
            slices = cut(image, through_plane_axis(image, rules.axis), rules.window)
            count = min(UNLABELLED_SLICES, len(slices))
            picks = [int((n + 0.5) * len(slices) / count) for n in range(count)]
            pictures += [_picture(slices[index]) for index in picks]
        except RefSegError as error:
            logger.warning("%s is left out: %s", path.name, error)
    if not pictures:
        return None
    channels = max(picture.shape[-1] for picture in pictures)
    wide = [np.broadcast_to(p, (SIDE, SIDE, channels)) for p in pictures]
    target.parent.mkdir(parents=True, exist_ok=True)
    _save(target, np.stack(wide))
    return target


def _pack(labelled: LabelledImage, folder: Path, rules: Rules) -> PackedCase | None:
    digest = _digest(labelled, rules)
    images, maps = folder / f"{digest}.image.npy", folder / f"{digest}.label.npy"
    image = read_image(labelled.image_path)
    annotation = read_annotation(labelled, image, rule=rules.annotation, axis=rules.axis)
    if not annotation.slices or not annotation.labels:
        return None
    names = tuple(sorted(annotation.labels))
    if len(names) > MOST_LABELS:
        msg = f"{len(names)} labels are more than {MOST_LABELS}, which training can tell apart."
        raise LabelError(msg)
    picks = _spread(annotation.slices, MOST_SLICES)
    if not (images.exists() and maps.exists()):
        pictures = cut(image, annotation.axis, rules.window)
        lookup = np.zeros(max(annotation.values.values(), default=0) + 1, np.uint8)
        for name, value in annotation.values.items():
            lookup[value] = names.index(name) + 1
        drawn = cut_labels(annotation.label_map, annotation.axis)
        _save(maps, np.stack([_squared(lookup[drawn[index]]) for index in picks]))
        _save(images, np.stack([_picture(pictures[index]) for index in picks]))
    stored = np.load(images, mmap_mode="r")
    values = np.load(maps, mmap_mode="r")
    numbers = np.arange(1, len(names) + 1)
    return PackedCase(
        image_id=labelled.image_id,
        labels=names,
        images=images,
        maps=maps,
        thumbnails=np.stack([thumbnail(picture) for picture in stored]),
        present=np.stack([np.isin(numbers, np.unique(plane)) for plane in values]),
        digest=digest,
    )


def thumbnail(picture: npt.NDArray[np.uint8]) -> FloatArray:
    """(S, S, C) uint8 -> (T,) float32: a small grey picture without mean, of unit length."""
    grey = torch.from_numpy(np.array(picture)).float().mean(-1)[None, None]
    small = F.adaptive_avg_pool2d(grey, THUMBNAIL).flatten()
    small = small - small.mean()
    return (small / small.norm().clamp_min(1e-6)).numpy().astype(np.float32)


def as_tensor(picture: npt.NDArray[np.uint8]) -> Tensor:
    """(S, S, C) uint8 -> (3, S, S) float in 0..1."""
    return torch.from_numpy(picture).permute(2, 0, 1).expand(3, -1, -1).float() / 255


def _picture(picture: FloatArray) -> npt.NDArray[np.uint8]:
    """(H, W[, 3]) in 0..1 -> (S, S, C) uint8."""
    image = torch.from_numpy(np.ascontiguousarray(picture, dtype=np.float32))
    image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
    side = (SIDE, SIDE)
    image = F.interpolate(image[None], size=side, mode="bilinear", antialias=True)[0]
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def _squared(label_map: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    values = torch.from_numpy(np.ascontiguousarray(label_map)).float()[None, None]
    found = F.interpolate(values, size=(SIDE, SIDE), mode="nearest-exact")[0, 0]
    return found.to(torch.uint8).numpy()


def _spread(indices: Sequence[int], count: int) -> list[int]:
    if len(indices) <= count:
        return list(indices)
    return [indices[int((n + 0.5) * len(indices) / count)] for n in range(count)]


def _digest(labelled: LabelledImage, rules: Rules) -> str:
    """Of the files' looks and of all that decides what becomes of them."""
    looks: list[object] = [VERSION, SIDE, MOST_SLICES, rules, sorted(labelled.label_names.items())]
    for path in (labelled.image_path, labelled.label_path):
        found = path.stat()
        looks += [str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    return hashlib.sha256(repr(looks).encode()).hexdigest()[:24]


def _save(path: Path, values: npt.NDArray[np.uint8]) -> None:
    """The file appears whole or not at all."""
    beside = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with beside.open("wb") as file:
            np.save(file, values)
        beside.replace(path)
    except OSError as error:
        msg = (
            f"The training's data cannot be written to {path.parent} ({error}): {values.nbytes} "
            "bytes are needed for this image alone. Make room, or name another folder "
            "(--conf site_models DIR)."
        )
        raise TrainingError(msg) from error
    finally:
        beside.unlink(missing_ok=True)
