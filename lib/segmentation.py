"""The answer for one image: label map, references used, confidence, time; and how it is told."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from lib.annotation import Annotation
from lib.confidence.calibration import Calibration
from lib.confidence.evidence import Evidence, EvidenceTally
from lib.types import IntArray, Match, Prediction, SliceKey, Study


@dataclass(frozen=True)
class Options:
    """How one image is segmented; the same names as in `RefSegSettings`.

    Attributes:
        k: references for each slice.
        cap_per_case: at most so many references of one case; 0: no limit.
        own_labels: the image's own labelled slices are references and come back unchanged.
        every_slice: segment all slices, also those whose two neighbors agree.
    """

    k: int = 8
    cap_per_case: int = 0
    own_labels: bool = True
    every_slice: bool = False


@dataclass(frozen=True)
class UsedReference:
    """A reference that voted for a label: its highest similarity, and for how many slices."""

    key: SliceKey
    similarity: float
    slices: int


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A segmented image.

    Attributes:
        label_map: (I, J, K) int32 on the canonical grid; value v is `labels[v - 1]`.
        labels: the labels that references knew, in the order asked for.
        references: for each label the references used, nearest first.
        seconds: time by stage.
        slices: number of slices.
        own_slices: slices that the user had labelled, given back as they were.
        between: slices that were taken from their two neighbors, which agree.
        message: what a person should know; empty when all is as expected.
        evidence: what speaks for each label's mask, own slices left out.
        own_share: of each label's area, what the annotator drew.
        study: what the bank's labels said of how to segment.
    """

    label_map: IntArray
    labels: tuple[str, ...]
    references: Mapping[str, tuple[UsedReference, ...]]
    seconds: Mapping[str, float]
    slices: int
    own_slices: int
    between: int = 0
    message: str = ""
    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    own_share: Mapping[str, float] = field(default_factory=dict)
    study: Study = field(default_factory=Study)

    @property
    def confidence(self) -> dict[str, float]:
        """Expected Dice of each label, as is believed before any label taught what signs are worth.

        Of an empty mask the probability that empty is right; own slices count as certain.
        """
        return Calibration().expect(self.evidence, self.own_share)


class Tally:
    """Sums over slices from which evidence and used references are told."""

    def __init__(self) -> None:
        self._area: dict[str, int] = defaultdict(int)
        self._signs: dict[int, dict[str, tuple[float, float, float]]] = {}
        self._own: dict[str, int] = defaultdict(int)
        self._evidence = EvidenceTally()
        self._used: dict[str, dict[SliceKey, tuple[float, int]]] = defaultdict(dict)

    def add(
        self,
        index: int,
        prediction: Prediction,
        names: Sequence[str],
        matches: Sequence[Match],
        known: torch.Tensor,
    ) -> None:
        """Note who voted on slice `index`, and how far each label is believed there.

        Args:
            index: of the slice.
            prediction: of the labels `names`.
            names: labels that were decided on this slice.
            matches: the references.
            known: (R, L) bool, which reference knew which label.
        """
        signs = self._signs[index] = {}
        for row, name in enumerate(names):
            voters = [match for match, knows in zip(matches, known[:, row], strict=True) if knows]
            for match in voters:
                best, count = self._used[name].get(match.key, (-1.0, 0))
                self._used[name][match.key] = (max(best, match.similarity), count + 1)
            similarity = max(0.0, max(match.similarity for match in voters))
            presence, quality = float(prediction.presence[row]), float(prediction.quality[row])
            signs[name] = (similarity, presence, quality)

    def count(self, index: int, values: IntArray, names: Sequence[str]) -> None:
        """Count what was painted by the signs of slice `index`.

        Args:
            index: as it was added.
            values: (H, W), 0 or the label's place in names + 1.
            names: of the labels.
        """
        areas = np.bincount(values.ravel(), minlength=len(names) + 1)[1:]
        for name, (similarity, presence, quality) in self._signs.get(index, {}).items():
            area = int(areas[names.index(name)])
            self._area[name] += area
            self._evidence.add(
                name, area=area, similarity=similarity, presence=presence, quality=quality
            )

    def sharpen(self, names: Sequence[str], sharpness: Sequence[float]) -> None:
        """Note how sharp each label's mask is: `Decision.sharpness`."""
        for name, value in zip(names, sharpness, strict=True):
            self._evidence.set(name, "sharpness", value)

    def add_own(self, annotation: Annotation, names: Sequence[str]) -> None:
        """Count the annotator's own slices, of which nothing is in doubt."""
        for name in annotation.values.keys() & set(names):
            area = int((annotation.label_map == annotation.values[name]).sum())
            self._area[name] += area
            self._own[name] += area

    def evidence(self, label: str) -> Evidence:
        """What speaks for the label's mask, on the slices that were segmented."""
        return self._evidence.of(label)

    def own_share(self, label: str) -> float:
        """Of the label's area, what the annotator drew."""
        return self._own[label] / self._area[label] if self._area[label] else 0.0

    def references(self, label: str) -> tuple[UsedReference, ...]:
        """The references that voted for a label, nearest first."""
        rows = [UsedReference(key, *value) for key, value in self._used[label].items()]
        return tuple(sorted(rows, key=lambda row: (-row.similarity, row.key)))


class Stopwatch:
    """Seconds by stage; `with watch("encode"): ...` adds to that stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def message_for(names: Sequence[str], unknown: Sequence[str]) -> str:
    """What a person should know of labels that were found references for, and of those not."""
    if not names and not unknown:
        return "No labelled image yet: label this one first and submit it; the next are segmented."
    if not names:
        return f"No reference for {', '.join(unknown)} yet: label it on one image and submit it."
    if unknown:
        return f"No reference for {', '.join(unknown)} yet; segmented: {', '.join(names)}."
    return ""
