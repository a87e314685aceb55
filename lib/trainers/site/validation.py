"""How good a network is on the cases kept for it: by the engine and the bank that answer, too."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lib.evaluation.metrics import dice
from lib.imaging.geometry import Geometry
from lib.imaging.io import ImageVolume
from lib.imaging.slices import cut_labels
from lib.memory.bank import MemoryBank
from lib.models.build import build_embedder
from lib.models.matchseg import BundledEmbedder
from lib.models.protocol import Embedder, ReferenceSegmenter
from lib.segmentation import Options
from lib.segmenter import ReferenceEngine
from lib.settings import RefSegSettings
from lib.trainers.site.packing import PackedCase, as_tensor
from lib.types import FloatArray, LabelledImage, Reference, SliceKey

logger = logging.getLogger(__name__)

MOST_REFERENCES = 64
MOST_MEASURED = 64
OF_ONE_CASE, LEAST_GAIN = 0.2, 0.02  # of Dice, that tells one network from another
AXIS = 2  # packed slices are stacked along it
TEMPORARY = "validation-"  # what a killed measurement leaves begins so
CHATTY = ("lib.memory", "lib.models.build")  # a client shows the last twenty lines of a training


@dataclass(frozen=True)
class Validation:
    """How good a network is on the cases kept.

    Attributes:
        cases: Dice of each case, mean over its labels, 0..1, in the order of the cases; NaN where
            nothing was to be found, and nothing was.
        labels: Dice of each label, mean over the cases.
    """

    cases: tuple[float, ...]
    labels: dict[str, float]

    @property
    def dice(self) -> float:
        """Mean over the cases where there was something to be found, or something was found."""
        found = [value for value in self.cases if not np.isnan(value)]
        return float(np.mean(found)) if found else 0.0

    def beats(self, other: "Validation") -> bool:
        """Whether it is clearly better than another network on the same cases.

        By more than two standard errors of what it gains case by case, and by more than what single
        cases tell: 0.2 of Dice of one, 0.1 of two, never less than 0.02.
        """
        gains = self._gains(other)
        if not len(gains):
            return False
        error = gains.std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        return bool(gains.mean() > max(2 * error, OF_ONE_CASE / len(gains), LEAST_GAIN))

    def gain_over(self, other: "Validation") -> float:
        """What it gains over another network on the same cases, mean Dice; 0 without any case."""
        gains = self._gains(other)
        return float(gains.mean()) if len(gains) else 0.0

    def _gains(self, other: "Validation") -> FloatArray:
        pairs = np.array([self.cases, other.cases])
        pairs = np.nan_to_num(pairs[:, ~np.isnan(pairs).all(0)], nan=1.0)  # rightly nothing
        gains: FloatArray = pairs[0] - pairs[1]
        return gains


class Validator:
    """Measures networks on slices of validation cases, with training cases as references."""

    def __init__(
        self,
        training: Sequence[PackedCase],
        validation: Sequence[PackedCase],
        settings: RefSegSettings,
        *,
        room: Path,
    ) -> None:
        """Choose the slices, the same for all that is measured.

        Args:
            training: cases whose slices are references.
            validation: cases to measure on.
            settings: options of retrieval.
            room: folder in which the references' memories lie for the time of a measurement.
        """
        self._references = _choose(training, MOST_REFERENCES)
        self._measured = _choose(validation, MOST_MEASURED)
        self._settings = settings
        self._room = room
        self._embedder: Embedder | None = None

    def measure(self, segmenter: ReferenceSegmenter) -> Validation:
        """Mean over cases of the mean over labels; a label's Dice is over a case's slices.

        What is painted where a label was annotated as absent lowers it: Dice 0, where the case
        shows none of it.
        """
        chosen = self._settings
        embedder = self._embedder_for(segmenter)
        engine = ReferenceEngine(segmenter, embedder, axis=AXIS, batch=chosen.batch)
        options = Options(k=chosen.k, cap_per_case=chosen.cap_per_case, own_labels=False)
        by_case: list[float] = []
        by_label: dict[str, list[float]] = {}
        with _quiet(), tempfile.TemporaryDirectory(dir=self._room, prefix=TEMPORARY) as folder:
            bank = self._bank(Path(folder), segmenter, embedder)
            known = bank.labels().keys()
            for case, rows in self._measured:
                names = [name for name in case.labels if name in known]
                if not names:
                    continue
                found = engine.segment(volume_of(case, rows), bank, labels=names, options=options)
                planes = cut_labels(found.label_map, AXIS)
                truth = np.stack([case.label_map(row) for row in rows])
                values = []
                for number, name in enumerate(found.labels, start=1):
                    value = dice(planes == number, truth == case.labels.index(name) + 1)
                    if not np.isnan(value):
                        values.append(value)
                        by_label.setdefault(name, []).append(value)
                by_case.append(float(np.mean(values)) if values else float("nan"))
        return Validation(
            tuple(by_case),
            {name: float(np.mean(values)) for name, values in sorted(by_label.items())},
        )

    def _embedder_for(self, segmenter: ReferenceSegmenter) -> Embedder:
        """The one of the settings; loaded once, unless it is the network's own encoder."""
        chosen = self._settings
        if self._embedder is not None:
            return self._embedder
        with _quiet():
            made = build_embedder(
                chosen.embedder, segmenter, weights=chosen.weights, device=chosen.device
            )
        if not isinstance(made, BundledEmbedder):
            self._embedder = made
        return made

    def _bank(self, folder: Path, segmenter: ReferenceSegmenter, embedder: Embedder) -> MemoryBank:
        rows = {case.image_id: (case, rows) for case, rows in self._references}

        def encode(labelled: LabelledImage) -> Iterator[Reference]:
            case, chosen = rows[labelled.image_id]
            for start in range(0, len(chosen), self._settings.batch):
                part = chosen[start : start + self._settings.batch]
                yield from _references(case, part, segmenter, embedder)

        bank = MemoryBank(folder, "validation", encode)
        bank.sync(
            [
                LabelledImage(
                    case.image_id, case.images, case.maps, dict(enumerate(case.labels, 1))
                )
                for case, _ in self._references
            ]
        )
        return bank


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing but warnings from those who speak at every measurement."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.WARNING)
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def _references(
    case: PackedCase, rows: Sequence[int], segmenter: ReferenceSegmenter, embedder: Embedder
) -> Iterator[Reference]:
    pictures = [as_tensor(case.picture(row)).permute(1, 2, 0).numpy() for row in rows]
    features = segmenter.encode(pictures)
    numbers = torch.arange(1, len(case.labels) + 1)[:, None, None]
    for row, one, vector in zip(rows, features, embedder.embed(pictures, features), strict=True):
        masks = torch.from_numpy(case.label_map(row))[None] == numbers
        here = masks.flatten(1).any(1).tolist()
        present = frozenset(name for name, yes in zip(case.labels, here, strict=True) if yes)
        yield Reference(
            key=SliceKey(case.image_id, AXIS, row),
            embedding=vector,
            present=present,
            absent=frozenset(case.labels) - present,
            memory=segmenter.remember(one, masks),
        )


def volume_of(case: PackedCase, rows: Sequence[int]) -> ImageVolume:
    """Packed slices as one volume; pictures have rows first, volumes columns."""
    stack = np.stack([case.picture(row) for row in rows], axis=2).astype(np.float32)
    stack = stack.swapaxes(0, 1)  # (I, J, K, C)
    voxels = np.ascontiguousarray(stack if stack.shape[-1] == 3 else stack[..., 0])
    geometry = Geometry(
        (voxels.shape[0], voxels.shape[1], voxels.shape[2]), np.diag([-1.0, -1.0, -1.0, 1.0])
    )
    return ImageVolume(
        voxels, geometry, geometry, "volume", case.images, value_range=(0.0, 255.0), adjacent=False
    )


def _choose(cases: Sequence[PackedCase], most: int) -> list[tuple[PackedCase, list[int]]]:
    """About as many slices of each case, evenly spread, `most` in all."""
    each = max(1, most // max(1, len(cases)))
    step = max(1.0, len(cases) / most)
    kept = [cases[int(n * step)] for n in range(min(len(cases), most))]
    found = []
    for case in kept:
        count = min(len(case), each)
        found.append((case, [int((n + 0.5) * len(case) / count) for n in range(count)]))
    return found
