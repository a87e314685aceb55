"""The nouns that cross folder borders: one type per concept, frozen, arrays not to be written to.

Words: *query* = image to segment; *reference* = labelled slice; *memory* = what a segmenter keeps
of one reference; *embedding* = one L2-normalised vector per slice; *label map* = integer array;
*mask* = boolean array of one label. Shapes: I, J, K voxel axes; N slices; H, W rows, columns;
L labels; R references; E embedding size; S working size of a network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.float32]
HalfArray = npt.NDArray[np.float16]
IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, order=True)
class SliceKey:
    """One slice of one image; 2D images have axis 2 and index 0."""

    image_id: str
    axis: int
    index: int


@dataclass(frozen=True, eq=False)
class Features:
    """A segmenter's encoding of one image; opaque to all but the segmenter that made it.

    Attributes:
        maps: the segmenter's feature maps of this one image, finest first, without batch axis.
        embedding: (E,) unit float32 vector pooled from the maps, or None where the segmenter
            offers none.
        owner: fingerprint of the segmenter that made it.
    """

    maps: tuple[torch.Tensor, ...]
    embedding: FloatArray | None
    owner: str


@dataclass(frozen=True, eq=False)
class Memory:
    """What a segmenter keeps of one reference slice; opaque to all but the segmenter.

    Attributes:
        image: part shared by all labels, any shape (may be empty).
        labels: (L, ...) one row per label, in the caller's label order.
    """

    image: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, eq=False)
class Prediction:
    """A segmenter's answer for one query slice.

    Attributes:
        scores: (L, S, S) float32 at the working size, log-odds of each label against background.
        presence: (L,) probability that the label is on the slice at all.
        quality: (L,) expected Dice of the label's mask, in 0..1.
    """

    scores: torch.Tensor
    presence: torch.Tensor
    quality: torch.Tensor


@dataclass(frozen=True)
class Shape:
    """How masks of a label look on a slice.

    Attributes:
        pieces: in how many pieces they come; 0: in any number, or not counted.
        closed: whether they have no holes.
        scattered: of what nearly all masks look like: enough were seen, and they come in many
            pieces, or in nets.
    """

    pieces: int = 0
    closed: bool = False
    scattered: bool = False


@dataclass(frozen=True)
class Study:
    """What the labels of a study say of how its images are to be segmented.

    Attributes:
        place: how much a reference's place counts against its looks, 1 as in training. Organs in
            scans taken alike are found by their place; a polyp may be anywhere.
        aligned: whether a reference's structures are first moved to where the query shows the
            like: a heart lies here in one patient and there in the next.
        reach: mean distance (1 - cosine) of a query to its nearest references up to which the
            above was seen to hold, farther away all is as in training; None: it holds everywhere.
        shapes: what nearly all masks of a label look like; labels not named have any shape.
    """

    place: float = 1.0
    aligned: bool = False
    reach: float | None = None
    shapes: Mapping[str, Shape] = field(default_factory=dict)

    def shapes_of(self, labels: Sequence[str]) -> list[Shape]:
        """Of these labels, in order."""
        return [self.shapes.get(label, Shape()) for label in labels]


@dataclass(frozen=True, eq=False)
class Example:
    """A labelled slice and the references that it would be segmented by, were it not labelled.

    Attributes:
        memory: of the slice; L rows.
        references: R >= 1 memories of other images, rows for the same labels.
        known: (R, L) bool, which reference was annotated for which label.
    """

    memory: Memory
    references: Sequence[Memory]
    known: torch.Tensor


@dataclass(frozen=True, eq=False)
class Reference:
    """One labelled slice as the bank holds it.

    Attributes:
        key: where it came from.
        embedding: (E,) unit float32 vector.
        present: labels with at least one pixel on the slice.
        absent: labels that were annotated in this image and are not on this slice. A label in
            neither set was not annotated and must teach nothing.
        memory: rows in the order of `labels`.
        shapes: of the labels that are present, where they were looked at.
    """

    key: SliceKey
    embedding: FloatArray
    present: frozenset[str]
    absent: frozenset[str]
    memory: Memory
    shapes: Mapping[str, Shape] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels annotated here, sorted: the row order of `memory.labels`."""
        return tuple(sorted(self.present | self.absent))


@dataclass(frozen=True)
class LabelledImage:
    """An image with its final label, as the datastore names them.

    Attributes:
        image_id: the datastore's id.
        image_path: file or DICOM folder.
        label_path: label map file.
        label_names: value in the file -> label name. Values not named here get `label_<value>`.
    """

    image_id: str
    image_path: Path
    label_path: Path
    label_names: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """A reference chosen for a query slice; similarity is a cosine, higher is nearer."""

    key: SliceKey
    similarity: float
