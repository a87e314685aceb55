"""Segments an image and looks for everything that speaks for the masks, without the truth."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from lib.annotation import read_annotation
from lib.confidence.evidence import Evidence, EvidenceTally
from lib.decision import Decision, merge
from lib.imaging.io import ImageVolume, read_image
from lib.imaging.slices import cut, cut_labels
from lib.memory.bank import MemoryBank
from lib.segmenter import ReferenceEngine
from lib.types import Features, IntArray, LabelledImage, Match, Memory, SliceKey, Study

Mask = npt.NDArray[np.bool_]

REVERSED_SLICES = 2  # of the query, those with the largest masks
REVERSED_REFERENCES = 2  # each is segmented back by each of those slices
_REFERENCES_KEPT = 32


@dataclass(frozen=True, eq=False)
class Examination:
    """What was found.

    Attributes:
        masks: (N, H, W) int32 of the slices looked at, 0 or the label's place in `labels` + 1.
        slices: their numbers.
        labels: what was looked for.
        evidence: for each label.
    """

    masks: IntArray
    slices: tuple[int, ...]
    labels: tuple[str, ...]
    evidence: Mapping[str, Evidence]


@dataclass(frozen=True, eq=False)
class _Looked:
    """One slice of the query."""

    index: int
    features: Features
    matches: tuple[Match, ...]
    side: int  # of the scores
    presence: tuple[float, ...]
    quality: tuple[float, ...]
    similarity: tuple[float, ...]
    halves: frozenset[int]  # labels, by place, that both halves of the references knew


class Examiner:
    """Examines images by one engine. Not thread-safe.

    Args:
        engine: networks.
        axis: canonical axis to cut along, None: the coarsest.
        window: intensity window.
        annotation: rule by which the references' label maps are read.
        k: references for each slice.
        cap_per_case: at most so many of one case; 0: no limit.
        batch: slices encoded at once.
    """

    def __init__(
        self,
        engine: ReferenceEngine,
        *,
        axis: int | None = None,
        window: tuple[float, float] | None = None,
        annotation: str = "partial",
        k: int = 8,
        cap_per_case: int = 0,
        batch: int = 8,
    ) -> None:
        self._engine = engine
        self._axis = axis
        self._window = window
        self._rule = annotation
        self._k = k
        self._cap = cap_per_case or None
        self._batch = batch
        self._kept: OrderedDict[tuple[SliceKey, str], tuple[Features, dict[str, Mask]]] = (
            OrderedDict()
        )

    def examine(
        self,
        image: ImageVolume,
        bank: MemoryBank,
        known_images: Mapping[str, LabelledImage],
        *,
        axis: int,
        slices: Sequence[int],
        labels: Sequence[str],
        exclude_image: str | None = None,
    ) -> Examination:
        """Segment some slices of an image and look for what speaks for the masks.

        Args:
            image: as read.
            bank: in step with the datastore.
            known_images: labelled images by id; those not here are not segmented back.
            axis: canonical axis to cut along.
            slices: numbers of the slices to look at.
            labels: what to look for; names that the bank does not know are left out.
            exclude_image: whose references are not used: the image itself, to leave it out.
        """
        known = bank.labels()
        names = tuple(name for name in labels if name in known)
        pictures = cut(image, axis, self._window)
        height, width = pictures[0].shape[:2]
        looked: list[_Looked] = []
        study = self._engine.study(bank)
        told = study.of(names, without=exclude_image)
        shapes = study.shapes_of(names)
        decisions = [  # and two halves; of a few slices, so each is judged by itself
            Decision(len(names), len(slices), shapes, adjacent=False) for _ in range(3)
        ]
        for start in range(0, len(slices) if names else 0, self._batch):
            chunk = slices[start : start + self._batch]
            images = [pictures[index] for index in chunk]
            features = self._engine.segmenter.encode(images)
            embeddings = self._engine.embedder.embed(images, features)
            groups = bank.nearest(
                embeddings,
                self._k,
                labels=names,
                exclude_image=exclude_image,
                cap_per_case=self._cap,
            )
            for index, feature, matches in zip(chunk, features, groups, strict=True):
                if matches:
                    looked.append(self._look(bank, index, feature, matches, names, told, decisions))
        masks = (
            np.stack([decisions[0].draw(i, (height, width)) for i in slices])
            if slices
            else (np.zeros((0, height, width), np.int32))
        )
        tally = EvidenceTally()
        self._count(looked, names, decisions, tally)
        by_number = dict(zip(slices, masks, strict=True))
        self._reverse(looked, by_number, names, known_images, study, tally)
        return Examination(masks, tuple(slices), names, {name: tally.of(name) for name in names})

    def _look(
        self,
        bank: MemoryBank,
        index: int,
        features: Features,
        matches: Sequence[Match],
        names: tuple[str, ...],
        study: Study,
        decisions: Sequence[Decision],
    ) -> _Looked:
        memories, known = bank.load([match.key for match in matches], names)
        everyone = list(range(len(matches)))
        side = 1
        presence, quality = [0.0] * len(names), [0.0] * len(names)
        asked: list[set[int]] = []
        for decision, voters in zip(
            decisions, (everyone, everyone[::2], everyone[1::2]), strict=True
        ):
            rows = torch.nonzero(known[voters].any(0)).flatten() if voters else torch.zeros(0)
            asked.append({int(row) for row in rows})
            if not len(rows):
                continue
            chosen = [replace(memories[v], labels=memories[v].labels[rows]) for v in voters]
            prediction = self._engine.segmenter.segment(
                features,
                chosen,
                known[voters][:, rows],
                study.of([names[row] for row in rows.tolist()]),
            )
            decision.add(index, prediction.scores, rows.tolist())
            if decision is decisions[0]:
                side = prediction.scores.shape[-1]
                for place, row in enumerate(rows.tolist()):
                    presence[row] = float(prediction.presence[place])
                    quality[row] = float(prediction.quality[place])
        similarity = [
            max((m.similarity for m, yes in zip(matches, column, strict=True) if yes), default=0.0)
            for column in known.T.tolist()
        ]
        return _Looked(
            index,
            features,
            tuple(matches),
            side,
            tuple(presence),
            tuple(quality),
            tuple(similarity),
            frozenset(asked[1] & asked[2]),
        )

    def _count(
        self,
        looked: Sequence[_Looked],
        names: tuple[str, ...],
        decisions: Sequence[Decision],
        tally: EvidenceTally,
    ) -> None:
        """Signs of the query alone, at the working size."""
        halves = np.zeros((3, len(names)))  # both, one, the other
        for one in looked:
            drawn = [decision.draw(one.index, (one.side, one.side)) for decision in decisions]
            for row, name in enumerate(names):
                mask, left, right = (d == row + 1 for d in drawn)
                if row in one.halves:
                    both = float((left & right).sum())
                    halves[:, row] += both, float(left.sum()), float(right.sum())
                tally.add(
                    name,
                    area=int(mask.sum()),
                    similarity=one.similarity[row],
                    presence=one.presence[row],
                    quality=one.quality[row],
                )
        for row, (name, sharpness) in enumerate(zip(names, decisions[0].sharpness(), strict=True)):
            tally.set(name, "sharpness", sharpness)
            both, one_half, other_half = halves[:, row]
            if one_half + other_half:
                tally.set(name, "agreement", 2 * both / (one_half + other_half))

    def _reverse(
        self,
        looked: Sequence[_Looked],
        masks: Mapping[int, IntArray],
        names: tuple[str, ...],
        known_images: Mapping[str, LabelledImage],
        study: Study,
        tally: EvidenceTally,
    ) -> None:
        """Segment references back by the prediction, as if it were the truth, and all that is."""
        study = replace(study, looks=None)
        largest = sorted(looked, key=lambda one: -int((masks[one.index] > 0).sum()))
        found: dict[str, list[float]] = {name: [] for name in names}
        for one in largest[:REVERSED_SLICES]:
            drawn = torch.from_numpy(masks[one.index])
            present = [row for row in range(len(names)) if bool((drawn == row + 1).any())]
            if not present:
                continue
            stack = torch.stack([drawn == row + 1 for row in present])
            memory = self._engine.segmenter.remember(one.features, stack)
            usable = [m.key for m in one.matches if m.key.image_id in known_images]
            for key in usable[:REVERSED_REFERENCES]:
                shown = [names[row] for row in present]
                self._one_back(memory, key, shown, known_images, study, found)
        for name, values in found.items():
            if values:
                tally.set(name, "reverse", float(np.mean(values)))

    def _one_back(
        self,
        memory: Memory,
        key: SliceKey,
        names: Sequence[str],
        known_images: Mapping[str, LabelledImage],
        study: Study,
        found: dict[str, list[float]],
    ) -> None:
        features, truth = self._reference(key, known_images[key.image_id])
        known = torch.ones((1, len(names)), dtype=torch.bool)
        prediction = self._engine.segmenter.segment(features, [memory], known, study)
        shape = next(iter(truth.values())).shape if truth else (1, 1)
        values = merge(prediction.scores, (shape[0], shape[1]))
        for row, name in enumerate(names):
            if name in truth and truth[name].any():
                mask = values == row + 1
                both = float((mask & truth[name]).sum())
                found[name].append(2 * both / float(mask.sum() + truth[name].sum()))

    def _reference(
        self, key: SliceKey, labelled: LabelledImage
    ) -> tuple[Features, dict[str, Mask]]:
        """A reference's picture encoded, and its true masks; kept for the next time."""
        looks = labelled.label_path.stat().st_mtime_ns
        mark = (key, f"{labelled.label_path} {looks}")
        if mark not in self._kept:
            image = read_image(labelled.image_path)
            rule = "complete" if self._rule == "complete" else "partial"
            annotation = read_annotation(labelled, image, rule=rule, axis=self._axis)  # type: ignore[arg-type]
            truth = cut_labels(annotation.label_map, key.axis)[key.index]
            (features,) = self._engine.segmenter.encode(
                [cut(image, key.axis, self._window)[key.index]]
            )
            masks = {name: truth == value for name, value in annotation.values.items()}
            self._kept[mark] = (features, masks)
        self._kept.move_to_end(mark)
        while len(self._kept) > _REFERENCES_KEPT:
            self._kept.popitem(last=False)
        return self._kept[mark]
