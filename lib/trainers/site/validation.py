"""How good a network is on the cases kept for it, by the same three steps as in inference."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lib.decision import merge
from lib.evaluation.metrics import dice
from lib.models.protocol import ReferenceSegmenter
from lib.trainers.site.packing import SIDE, PackedCase, as_tensor
from lib.types import Features, FloatArray, Memory

MOST_REFERENCES = 96
MOST_MEASURED = 64
ENCODED_AT_ONCE = 8


@dataclass(frozen=True)
class Validation:
    """Mean Dice over cases and labels, 0..1, and by label."""

    dice: float
    labels: dict[str, float]


class Validator:
    """Measures networks on slices of validation cases, with training cases as references."""

    def __init__(
        self, training: Sequence[PackedCase], validation: Sequence[PackedCase], *, k: int
    ) -> None:
        """Choose the slices, the same for all that is measured.

        Args:
            training: cases whose slices are references.
            validation: cases to measure on.
            k: references for each slice.
        """
        self._references = _choose(training, MOST_REFERENCES)
        self._measured = _choose(validation, MOST_MEASURED)
        known = {name for case, _ in self._references for name in case.labels}
        shown = {
            name
            for case, row in self._measured
            for name, here in zip(case.labels, case.present[row], strict=True)
            if here
        }
        self.labels = tuple(sorted(known & shown))
        self._k = k

    def measure(self, segmenter: ReferenceSegmenter) -> Validation:
        """Mean over cases of the mean over labels; a label's Dice is over a case's slices.

        What is painted where a label was annotated as absent lowers it: Dice 0, where the case
        shows none of it.
        """
        vectors: list[FloatArray] = []
        memories: list[Memory] = []
        for start in range(0, len(self._references), ENCODED_AT_ONCE):
            chunk = self._references[start : start + ENCODED_AT_ONCE]
            for (case, row), features in zip(chunk, self._encode(segmenter, chunk), strict=True):
                memories.append(segmenter.remember(features, self._masks(case, row)))
                vectors.append(_vector(features))
        index = np.stack(vectors)
        knows = torch.tensor(
            [[n in case.labels for n in self.labels] for case, _ in self._references]
        )
        scores: dict[tuple[str, str], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for start in range(0, len(self._measured), ENCODED_AT_ONCE):
            chunk = self._measured[start : start + ENCODED_AT_ONCE]
            for (case, row), features in zip(chunk, self._encode(segmenter, chunk), strict=True):
                asked = [i for i, name in enumerate(self.labels) if name in case.labels]
                if not asked:
                    continue
                picks = self._nearest(index @ _vector(features), knows[:, asked])
                chosen = [replace(memories[i], labels=memories[i].labels[asked]) for i in picks]
                found = segmenter.segment(features, chosen, knows[picks][:, asked])
                values = torch.from_numpy(merge(found.scores, (SIDE, SIDE)))
                truth = self._masks(case, row)
                for place, i in enumerate(asked):
                    pair = (values == place + 1, truth[i])
                    scores.setdefault((case.image_id, self.labels[i]), []).append(pair)
        return _summary(scores)

    def _encode(
        self, segmenter: ReferenceSegmenter, chunk: Sequence[tuple[PackedCase, int]]
    ) -> list[Features]:
        pictures = [as_tensor(case.picture(row)).permute(1, 2, 0).numpy() for case, row in chunk]
        return segmenter.encode(pictures)

    def _masks(self, case: PackedCase, row: int) -> torch.Tensor:
        """(L, S, S) bool in the order of `labels`; all false where the case knows nothing of it."""
        drawn = torch.from_numpy(case.label_map(row))
        numbers = [
            case.labels.index(name) + 1 if name in case.labels else -1 for name in self.labels
        ]
        return drawn[None] == torch.tensor(numbers)[:, None, None]

    def _nearest(self, similarity: FloatArray, knows: torch.Tensor) -> list[int]:
        """The k nearest, and the nearest that knows a label of which none of them does."""
        order = np.argsort(-similarity, kind="stable").tolist()
        picks = [i for i in order if bool(knows[i].any())][: self._k]
        for label in range(knows.shape[1]):
            if not bool(knows[picks, label].any()):
                picks.append(next(i for i in order if bool(knows[i, label])))
        return picks


def _summary(scores: dict[tuple[str, str], list[tuple[torch.Tensor, torch.Tensor]]]) -> Validation:
    by_case: dict[str, list[float]] = {}
    by_label: dict[str, list[float]] = {}
    for (image_id, label), pairs in scores.items():
        found = torch.stack([pair[0] for pair in pairs]).numpy()
        truth = torch.stack([pair[1] for pair in pairs]).numpy()
        value = dice(found, truth)
        if not np.isnan(value):
            by_case.setdefault(image_id, []).append(value)
            by_label.setdefault(label, []).append(value)
    means = [float(np.mean(values)) for values in by_case.values()]
    return Validation(
        float(np.mean(means)) if means else 0.0,
        {name: float(np.mean(values)) for name, values in sorted(by_label.items())},
    )


def _choose(cases: Sequence[PackedCase], most: int) -> list[tuple[PackedCase, int]]:
    """About as many slices of each case, evenly spread."""
    each = max(1, most // max(1, len(cases)))
    found = []
    for case in cases:
        count = min(len(case), each)
        found += [(case, int((n + 0.5) * len(case) / count)) for n in range(count)]
    return (
        found[:most] if len(cases) <= most else [found[i * len(found) // most] for i in range(most)]
    )


def _vector(features: Features) -> FloatArray:
    assert features.embedding is not None  # the bundled network always offers one
    return features.embedding
