"""The nouns that cross folder borders: one type per concept, frozen, arrays not to be written to.

Words: *query* = image to segment; *reference* = labelled slice; *memory* = what a segmenter keeps
of one reference; *embedding* = one L2-normalised vector per slice; *label map* = integer array;
*mask* = boolean array of one label. Shapes: I, J, K voxel axes; N slices; H, W rows, columns;
L labels; R references; E embedding size; S working size of a network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True, eq=False)
class Correction:
    """What a segmenter adds to the scores of labels, learned from a study; opaque to all others.

    score -> gain * score + weights . features + offset.

    Attributes:
        weights: (L, C).
        gain: (L,).
        offset: (L,).
    """

    weights: torch.Tensor
    gain: torch.Tensor
    offset: torch.Tensor

    def of(self, rows: Sequence[int | None]) -> "Correction":
        """Of these rows, in order; None: of a label that is not corrected."""
        picks = torch.tensor([-1 if row is None else row for row in rows], dtype=torch.long)
        none = picks < 0
        weights, gain, offset = (
            part[picks].clone() for part in (self.weights, self.gain, self.offset)
        )
        weights[none], gain[none], offset[none] = 0, 1, 0
        return Correction(weights, gain, offset)


@dataclass(frozen=True, eq=False)
class Looks:
    """How the labels of a study look, whatever its references say of a query.

    Attributes:
        labels: names, in the order of the correction's rows.
        correction: learned from all labelled images that were looked at.
        without: image id -> learned without this image, for what is to be foretold of it.
    """

    labels: tuple[str, ...]
    correction: Correction
    without: Mapping[str, Correction] = field(default_factory=dict)

    @property
    def corrected(self) -> tuple[str, ...]:
        """Labels of which there is something to be said."""
        told = self.correction.weights.any(1).tolist()
        return tuple(name for name, yes in zip(self.labels, told, strict=True) if yes)

    def of(self, labels: Sequence[str], image_id: str | None = None) -> "Looks":
        """Of these labels, in order; as if this image's labels were not known."""
        rows = [self.labels.index(name) if name in self.labels else None for name in labels]
        chosen = (
            self.correction if image_id is None else self.without.get(image_id, self.correction)
        )
        return Looks(tuple(labels), chosen.of(rows))


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
        looks: how labels look; None: nothing is to be said of it. A segmenter is given those of the
            very labels that it segments, see `of`.
    """

    place: float = 1.0
    aligned: bool = False
    reach: float | None = None
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    looks: Looks | None = None

    def of(self, labels: Sequence[str], *, without: str | None = None) -> "Study":
        """For these labels, in order; as if the labels of the image `without` taught no looks."""
        if self.looks is None:
            return self
        return replace(self, looks=self.looks.of(labels, without))

    def shapes_of(self, labels: Sequence[str]) -> list[Shape]:
        """Of these labels, in order."""
        return [self.shapes.get(label, Shape()) for label in labels]


@dataclass(frozen=True, eq=False)
class Example:
    """A labelled slice and the references that it would be segmented by, were it not labelled.

    Attributes:
        image_id: that the slice is of.
        labels: names of the L rows.
        memory: of the slice; L rows.
        references: R >= 1 memories of other images, rows for the same labels.
        known: (R, L) bool, which reference was annotated for which label.
    """

    image_id: str
    labels: tuple[str, ...]
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
