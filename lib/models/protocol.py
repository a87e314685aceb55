"""What the rest of RefSeg knows of a segmenter and of an embedder: these two protocols, no more."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from lib.types import Example, Features, FloatArray, Memory, Prediction, Study

AS_TRAINED = Study()


class ReferenceSegmenter(Protocol):
    """Segments a query by reference in three steps: encode, remember, segment.

    `name` is "sam2" or "matchseg". `fingerprint` changes whenever a stored memory would no longer
    fit: weights, architecture, working size, pre-processing. `size` is the side S of the square
    working grid in pixels. All methods are thread-safe, run under inference mode, and leave no
    global state behind (no autocast, no default dtype).
    """

    name: str
    fingerprint: str
    size: int

    def encode(self, images: Sequence[FloatArray]) -> list[Features]:
        """Encode images, each (H, W) grey or (H, W, 3) RGB float32 in 0..1, of any size."""
        ...

    def remember(self, features: Features, masks: torch.Tensor) -> Memory:
        """Make the memory of one reference: masks (L, H, W) bool on the image's own grid.

        An all-false mask is a true negative: annotated, and not here. Tensors of the memory are
        on the CPU, in the dtype to be stored.
        """
        ...

    def study_of(self, examples: Iterable[Example]) -> Study:
        """What labelled slices say of how this study is to be segmented; quick, from memories.

        A segmenter that has nothing to choose answers `Study()` and looks at no example.
        """
        ...

    def looks_of(
        self, examples: Iterable[Example], study: Study, make_way: Callable[[], None]
    ) -> Study:
        """That study with what labelled slices say of how labels look; seconds, from memories.

        A segmenter that learns no looks answers the study as it is, and looks at no example.
        `make_way` is called before each step of a tenth of a second or so, to let others work.
        """
        ...

    def segment(
        self,
        query: Features,
        references: Sequence[Memory],
        known: torch.Tensor,
        study: Study = AS_TRAINED,
    ) -> Prediction:
        """Segment one query slice, all labels at once.

        Args:
            query: of `encode`.
            references: R >= 1 memories, each with L rows in the same label order.
            known: (R, L) bool; False where a reference was not annotated for a label. Its row is
                then ignored. Each label must be known to at least one reference.
            study: of `study_of`.

        The result does not depend on the order of the references.
        """
        ...


class Embedder(Protocol):
    """Turns slices into unit vectors for retrieval; the same pooling for index and query."""

    name: str
    fingerprint: str

    def embed(
        self, images: Sequence[FloatArray], features: Sequence[Features] | None = None
    ) -> FloatArray:
        """Embed images as in `ReferenceSegmenter.encode` -> (N, E) float32, L2-normalised.

        `features` are the segmenter's of the same images, if they were computed already; an
        embedder that is the segmenter's own encoder takes the vector from there.
        """
        ...

    def regions(
        self, images: Sequence[FloatArray], features: Sequence[Features] | None = None
    ) -> FloatArray:
        """What lies where in each picture -> (N, R, C), for choosing the next image.

        R is a square number of regions, row by row over the picture, or 1: `embed` of the whole.
        """
        ...
