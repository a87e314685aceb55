"""Two segmenters as one: each refers to its own memories, and their scores are averaged."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.models.protocol import AS_TRAINED, ReferenceSegmenter
from lib.types import Example, Features, FloatArray, Memory, Prediction, Study


class AveragedSegmenter:
    """`ReferenceSegmenter` of two others; slower than the two together, its memories as large.

    The log-odds are averaged, so that the surer one decides; presence and quality are, too.
    """

    def __init__(self, first: ReferenceSegmenter, second: ReferenceSegmenter) -> None:
        """Learn the shapes of both memories from a picture of nothing.

        Args:
            first: gives the embeddings, and the name.
            second: the other.
        """
        self.first = first
        self._parts = (first, second)
        self.name = first.name
        self.size = max(first.size, second.size)
        both = f"{first.fingerprint} {second.fingerprint}"
        self.fingerprint = f"average-{hashlib.sha256(both.encode()).hexdigest()[:16]}"
        nothing = np.zeros((16, 16), np.float32)
        mask = torch.zeros((1, 16, 16), dtype=torch.bool)
        probes = [part.encode([nothing])[0] for part in self._parts]
        self._maps = len(probes[0].maps)
        self._shapes = [
            (memory.image.shape, memory.labels.shape[1:], memory.labels.dtype)
            for part, probe in zip(self._parts, probes, strict=True)
            for memory in [part.remember(probe, mask)]
        ]

    def encode(self, images: Sequence[FloatArray]) -> list[Features]:
        """See `ReferenceSegmenter.encode`; the maps of both, then the second's embedding."""
        first, second = (part.encode(images) for part in self._parts)
        return [
            Features(
                (*one.maps, *other.maps, _tensor(other.embedding)), one.embedding, self.fingerprint
            )
            for one, other in zip(first, second, strict=True)
        ]

    def remember(self, features: Features, masks: Tensor) -> Memory:
        """See `ReferenceSegmenter.remember`; both memories, flat, one after the other."""
        made = [
            part.remember(own, masks)
            for part, own in zip(self._parts, self._split(features), strict=True)
        ]
        return Memory(
            image=torch.cat([memory.image.flatten().half() for memory in made]),
            labels=torch.cat([memory.labels.flatten(1).half() for memory in made], 1),
        )

    def study_of(self, examples: Iterable[Example]) -> Study:
        """See `ReferenceSegmenter.study_of`; what holds of a study, the first can tell."""
        return self.first.study_of(
            Example(
                one.image_id,
                one.labels,
                self._memory(one.memory, 0),
                [self._memory(memory, 0) for memory in one.references],
                one.known,
            )
            for one in examples
        )

    def looks_of(
        self,
        examples: Iterable[Example],  # noqa: ARG002
        study: Study,
        make_way: Callable[[], None],  # noqa: ARG002
    ) -> Study:
        """See `ReferenceSegmenter.looks_of`: none, since the two see in features of their own."""
        return study

    def segment(
        self,
        query: Features,
        references: Sequence[Memory],
        known: Tensor,
        study: Study = AS_TRAINED,
    ) -> Prediction:
        """See `ReferenceSegmenter.segment`."""
        found = [
            part.segment(own, [self._memory(memory, which) for memory in references], known, study)
            for which, (part, own) in enumerate(zip(self._parts, self._split(query), strict=True))
        ]
        side = (self.size, self.size)
        scores = [
            F.interpolate(one.scores[None].float(), size=side, mode="bilinear")[0] for one in found
        ]
        return Prediction(
            scores=torch.stack(scores).mean(0),
            presence=torch.stack([one.presence for one in found]).mean(0),
            quality=torch.stack([one.quality for one in found]).mean(0),
        )

    def _split(self, features: Features) -> tuple[Features, Features]:
        first, second = self._parts
        *maps, vector = features.maps
        other = vector.numpy() if len(vector) else None
        return (
            Features(tuple(maps[: self._maps]), features.embedding, first.fingerprint),
            Features(tuple(maps[self._maps :]), other, second.fingerprint),
        )

    def _memory(self, memory: Memory, which: int) -> Memory:
        images = [math.prod(image) for image, _, _ in self._shapes]
        labels = [math.prod(label) for _, label, _ in self._shapes]
        image, label, dtype = self._shapes[which]
        return Memory(
            image=memory.image.split(images)[which].view(image).to(dtype),
            labels=memory.labels.split(labels, 1)[which].unflatten(1, label).to(dtype),
        )


def _tensor(embedding: FloatArray | None) -> Tensor:
    return torch.from_numpy(embedding) if embedding is not None else torch.empty(0)
