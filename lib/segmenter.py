"""The engine: volume -> slices -> references -> label map, and label map -> references.

It knows pictures, memories and matches, and nothing of servers or datastores.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lib.annotation import Annotation, put_back, read_annotation
from lib.contours import Contours
from lib.decision import Decision
from lib.errors import RefSegError, RequestError
from lib.examples import examples_of
from lib.imaging.io import ImageVolume, read_image
from lib.imaging.pieces import shape_of, usual_shape
from lib.imaging.slices import assemble, cut, cut_labels, through_plane_axis
from lib.machine import start_thread
from lib.memory.bank import MemoryBank
from lib.models.protocol import Embedder, ReferenceSegmenter
from lib.segmentation import Options, Segmentation, Stopwatch, Tally, message_for
from lib.types import (
    Features,
    FloatArray,
    LabelledImage,
    Match,
    Reference,
    SliceKey,
    Study,
)

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
_State = tuple[Path, tuple[str, int]]  # of which bank, and of which references
THIN_MM = 2.0  # of slices; between two that are not thin there may be what neither of them shows
POOL_SLICES = 5  # slices that stand for one image in the pool: ends say little, so inner ones


@dataclass(frozen=True, eq=False)
class _OwnSlices:
    """The labelled slices of the image to be segmented; none, if it has or may use none.

    Attributes:
        image_id: whose references `MemoryBank.nearest` must leave out, since they are here.
        labels: names that these slices know, of those to be found.
        keys: the slices.
        embeddings: (M, E) unit float32.
    """

    image_id: str | None
    labels: tuple[str, ...]
    keys: tuple[SliceKey, ...]
    embeddings: FloatArray

    def nearest(self, queries: FloatArray, k: int) -> list[list[Match]]:
        if not self.keys:
            return [[] for _ in queries]
        similarity = queries @ self.embeddings.T  # (N, M)
        order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        return [
            [Match(self.keys[column], float(row[column])) for column in columns]
            for row, columns in zip(similarity, order, strict=True)
        ]


class ReferenceEngine:
    """Makes references of labelled images and segments images by them.

    Thread-safe, since the networks are: they lock one batch of slices at a time, so that a request
    never waits for a whole volume of somebody else's.
    """

    def __init__(
        self,
        segmenter: ReferenceSegmenter,
        embedder: Embedder,
        *,
        annotation: Literal["partial", "complete"] = "partial",
        window: tuple[float, float] | None = None,
        axis: int | None = None,
        batch: int = 8,
        make_way: Callable[[], None] = lambda: None,
    ) -> None:
        """Wrap the networks.

        Args:
            segmenter: segments by reference.
            embedder: tells what is similar.
            annotation: rule by which label maps are read.
            window: intensity window of volumes; None: by percentiles.
            axis: canonical axis to cut along; None: the coarsest.
            batch: slices encoded at once.
            make_way: called between the steps in which looks are learned; returns when nobody
                waits for a mask, or has waited for long.
        """
        self.segmenter = segmenter
        self.embedder = embedder
        self._annotation = annotation
        self._window = window
        self._axis = axis
        self._batch = batch
        self._make_way = make_way
        self._placing, self._study_lock = threading.Lock(), threading.Lock()
        self._place: tuple[_State, Study] | None = None
        self._studied: tuple[_State, Study] | None = None
        self._learning = threading.Lock()  # held by who learns a study behind the requests

    # -- labelled image -> references ---------------------------------------------------------

    def references_of(
        self, labelled: LabelledImage, *, on_progress: Progress | None = None
    ) -> Iterator[Reference]:
        """Make the references of one labelled image: one for each annotated slice.

        Raises:
            ImageError: the image cannot be read.
            LabelError: the label map does not fit the image.
        """
        image = read_image(labelled.image_path)
        annotation = read_annotation(labelled, image, rule=self._annotation, axis=self._axis)
        pictures = cut(image, annotation.axis, self._window)
        maps = cut_labels(annotation.label_map, annotation.axis)  # (N, H, W)
        names = tuple(sorted(annotation.labels))
        numbers = torch.tensor([annotation.values.get(name, -1) for name in names])
        for chunk in _chunks(annotation.slices, self._batch):
            images = [pictures[index] for index in chunk]
            features, embeddings = self._encode_and_embed(images)
            for index, feature, embedding in zip(chunk, features, embeddings, strict=True):
                drawn = torch.from_numpy(np.ascontiguousarray(maps[index]))
                masks = drawn == numbers[:, None, None]  # (L, H, W)
                memory = self.segmenter.remember(feature, masks)
                here = masks.flatten(1).any(1).tolist()
                present = frozenset(name for name, yes in zip(names, here, strict=True) if yes)
                yield Reference(
                    key=SliceKey(labelled.image_id, annotation.axis, index),
                    embedding=embedding,
                    present=present,
                    absent=annotation.labels - present,
                    memory=memory,
                    shapes={
                        name: shape_of(mask)
                        for name, mask in zip(names, masks.numpy(), strict=True)
                        if name in present
                    },
                )
            if on_progress is not None:
                on_progress(annotation.slices.index(chunk[-1]) + 1, len(annotation.slices))

    def regions_of(self, image: ImageVolume) -> tuple[FloatArray, list[int]]:
        """Regions of a few inner slices, evenly spread -> (M, R, C) and the slices' numbers.

        M <= POOL_SLICES.
        """
        pictures = cut(image, through_plane_axis(image, self._axis), self._window)
        count = min(POOL_SLICES, len(pictures))
        indices = [int((n + 0.5) * len(pictures) / count) for n in range(count)]
        chosen = [pictures[index] for index in indices]
        return self.embedder.regions(chosen, self.segmenter.encode(chosen)), indices

    def study(self, bank: MemoryBank, *, wait: bool = True) -> Study:
        """What the bank's labels say of how to segment; learned anew when they have changed.

        Args:
            bank: of the study.
            wait: for how labels look, which takes seconds. If not, what was known of that a moment
                ago is good enough, or nothing, and it is learned behind the answer: somebody who
                has just submitted a label wants the next mask.
        """
        known = self._studied
        if known is not None and known[0] == (bank.folder, bank.state):
            return known[1]
        if wait:
            return self._learned(bank)
        self._study_soon(bank)
        placed = self._placed(bank)
        if known is None or known[0][0] != bank.folder or known[1].looks is None:
            return placed
        return replace(placed, looks=known[1].looks, reach=placed.reach or known[1].reach)

    def _placed(self, bank: MemoryBank) -> Study:
        """All but how labels look."""
        with self._placing:
            now = bank.folder, bank.state
            if self._place is None or self._place[0] != now:
                learned = replace(
                    self.segmenter.study_of(examples_of(bank)),
                    shapes={name: usual_shape(seen) for name, seen in bank.shapes().items()},
                )
                self._place = now, learned
                logger.info(
                    "the labels say: place counts %g times as much%s",
                    learned.place,
                    ", after references are aligned" if learned.aligned else "",
                )
            return self._place[1]

    def _learned(self, bank: MemoryBank) -> Study:
        """All of it."""
        with self._study_lock:
            now = bank.folder, bank.state
            if self._studied is None or self._studied[0] != now:
                learned = self.segmenter.looks_of(
                    examples_of(bank), self._placed(bank), self._make_way
                )
                self._studied = now, learned
                if learned.looks is not None:
                    told = ", ".join(learned.looks.corrected)
                    logger.info("the labels say how these look: %s", told)
            return self._studied[1]

    def _study_soon(self, bank: MemoryBank) -> None:
        """Learn in the background; one thread is enough for all."""

        def learn() -> None:
            try:
                while not self._is_learned(bank):  # labels may be submitted meanwhile
                    self._learned(bank)
            except RefSegError as error:  # the next request tries again
                logger.warning("what the labels say cannot be learned now: %s", error)
                return
            except Exception:
                logger.exception("what the labels say cannot be learned")
                return
            finally:
                self._learning.release()
            if not self._is_learned(bank):  # submitted after the last look
                self._study_soon(bank)

        if self._learning.acquire(blocking=False) and start_thread(learn, "refseg-study") is None:
            self._learning.release()

    def _is_learned(self, bank: MemoryBank) -> bool:
        known = self._studied
        return known is not None and known[0] == (bank.folder, bank.state)

    # -- image -> segmentation ----------------------------------------------------------------

    def segment(
        self,
        image: ImageVolume,
        bank: MemoryBank,
        *,
        labels: Sequence[str] = (),
        options: Options | None = None,
        own: LabelledImage | None = None,
        on_progress: Progress | None = None,
        wait: bool = True,
    ) -> Segmentation:
        """Segment an image by the bank's references.

        Args:
            image: as read.
            bank: in step with the datastore.
            labels: names to find, in the order of their values; empty: all that the bank knows.
            options: see `Options`.
            own: the image's own final label, if it has one. Its annotated slices come back as they
                are, or, with `own_labels=False`, are kept from being references.
            on_progress: called with (slices done, slices in all).
            wait: see `study`.
        """
        options = options or Options()
        if any(count > 1 for count in map(list(labels).count, labels)):
            msg = f"a label is asked for twice: {', '.join(labels)}; name each once."
            raise RequestError(msg)
        known = set(bank.labels())
        names = tuple(name for name in (labels or sorted(known)) if name in known)
        unknown = tuple(name for name in labels if name not in known)
        axis = through_plane_axis(image, self._axis)
        pictures = cut(image, axis, self._window)
        watch = Stopwatch()
        tally = Tally()
        height, width = pictures[0].shape[:2]
        result = np.zeros((len(pictures), height, width), np.int32)
        annotation = (
            read_annotation(own, image, rule=self._annotation, axis=self._axis)
            if own is not None and options.own_labels
            else None
        )
        todo: Sequence[int] = range(len(pictures)) if names else ()
        if annotation is not None and annotation.axis == axis and annotation.labels >= set(names):
            todo = [index for index in todo if index not in set(annotation.slices)]
        own_slices = _own_slices(bank, own, names, annotation)
        contours = _contours(annotation, image, axis, names)
        with watch("study"):
            study = self.study(bank, wait=wait) if todo else Study()
            hidden = own.image_id if own is not None and not options.own_labels else None
            told = study.of(names, without=hidden)
        decision = Decision(len(names), len(todo), study.shapes_of(names), adjacent=image.adjacent)
        done = 0
        thin = image.kind == "volume" and image.geometry.spacing_mm[axis] <= THIN_MM
        sparing = thin and image.adjacent and not options.every_slice
        for part in _rounds(todo, decision) if sparing else (todo,):
            for chunk in _chunks(part, self._batch):
                images = [pictures[index] for index in chunk]
                with watch("encode"):
                    features, embeddings = self._encode_and_embed(images)
                with watch("retrieve"):
                    groups = self._matches(bank, embeddings, names, options, own_slices)
                for row, index in enumerate(chunk):
                    self._segment_slice(
                        bank, features[row], groups[row], names, index, told, contours, decision,
                        tally, watch,
                    )  # fmt: skip
                done += len(chunk)
                if on_progress is not None:
                    on_progress(done + len(decision.bridged), len(todo))
        if on_progress is not None and decision.bridged:
            on_progress(len(todo), len(todo))
        with watch("merge"):
            for index in todo:
                result[index] = decision.draw(index, (height, width))
                segmented = index - 1 if index in decision.bridged else index
                tally.count(segmented, result[index], names)
            tally.sharpen(names, decision.sharpness())
            label_map = assemble(result, axis)
            if annotation is not None:
                label_map = put_back(label_map, annotation, names)
                tally.add_own(annotation, names)
        return Segmentation(
            label_map=label_map,
            labels=names,
            references={name: tally.references(name) for name in names},
            seconds=watch.seconds,
            slices=len(pictures),
            own_slices=len(annotation.slices) if annotation is not None else 0,
            between=len(decision.bridged),
            message=message_for(names, unknown),
            evidence={name: tally.evidence(name) for name in names},
            own_share={name: tally.own_share(name) for name in names},
            study=study,
        )

    def _encode_and_embed(self, images: Sequence[FloatArray]) -> tuple[list[Features], FloatArray]:
        """Encode and embed a batch; each slice is encoded once."""
        features = self.segmenter.encode(images)
        return features, self.embedder.embed(images, features)

    def _matches(
        self,
        bank: MemoryBank,
        embeddings: FloatArray,
        names: Sequence[str],
        options: Options,
        own: _OwnSlices,
    ) -> list[list[Match]]:
        """The references of each slice: the image's own first, then the most similar of others."""
        cap = options.cap_per_case or None
        first = own.nearest(embeddings, options.k)
        left = options.k - len(first[0])
        rest = [name for name in names if name not in own.labels]
        wanted = [(names, left)] if not own.keys else [(own.labels, left), (rest, options.k)]
        found: list[dict[SliceKey, Match]] = [{m.key: m for m in matches} for matches in first]
        for labels, k in wanted:
            if labels and k > 0:
                others = bank.nearest(
                    embeddings, k, labels=labels, exclude_image=own.image_id, cap_per_case=cap
                )
                for row, matches in zip(found, others, strict=True):
                    row.update((match.key, match) for match in matches)
        return [list(row.values()) for row in found]

    def _segment_slice(
        self,
        bank: MemoryBank,
        features: Features,
        matches: Sequence[Match],
        names: tuple[str, ...],
        index: int,
        study: Study,
        contours: Contours | None,
        decision: Decision,
        tally: Tally,
        watch: Stopwatch,
    ) -> None:
        """Score one slice for the decision over the whole image."""
        if not matches:
            return
        with watch("load"):
            memories, known = bank.load([match.key for match in matches], names)
        asked = known.any(0)  # a label that none of these references knows stays undecided here
        rows = torch.nonzero(asked).flatten()
        with watch("segment"):
            if not bool(asked.all()):
                memories = [replace(memory, labels=memory.labels[rows]) for memory in memories]
                known = known[:, rows]
                study = study.of([names[row] for row in rows.tolist()])
            prediction = self.segmenter.segment(features, memories, known, study)
        with watch("merge"):
            scores = prediction.scores
            if contours is not None:
                scores = scores + contours.scores(index, scores.shape[-1])[rows]
            decision.add(index, scores, rows.tolist())
            tally.add(index, prediction, [names[row] for row in rows], matches, known)


def _own_slices(
    bank: MemoryBank,
    own: LabelledImage | None,
    names: Sequence[str],
    annotation: Annotation | None,
) -> _OwnSlices:
    nothing = np.zeros((0, 0), np.float32)
    if own is None or annotation is None or not annotation.labels & set(names):
        return _OwnSlices(own.image_id if own else None, (), (), nothing)
    keys, embeddings = bank.embeddings(own.image_id)
    labels = tuple(name for name in names if name in annotation.labels) if keys else ()
    return _OwnSlices(own.image_id, labels, tuple(keys), embeddings)


def _contours(
    annotation: Annotation | None, image: ImageVolume, axis: int, names: Sequence[str]
) -> Contours | None:
    """What the annotated slices say of those between, if there are any between."""
    if annotation is None or annotation.axis != axis or not image.adjacent:
        return None
    if len(annotation.slices) < 2:
        return None
    spacing = image.geometry.spacing_mm
    across = [size for place, size in enumerate(spacing) if place != axis]
    return Contours(
        cut_labels(annotation.label_map, axis),
        annotation.slices,
        [annotation.values.get(name, -1) if name in annotation.labels else None for name in names],
        slice_mm=spacing[axis],
        pixel_mm=(across[0] * across[1]) ** 0.5,
    )


def _rounds(todo: Sequence[int], decision: Decision) -> Iterator[Sequence[int]]:
    """Every other slice, then those between of which the neighbors do not agree."""
    asked, between = set(todo), set[int]()
    for index in todo:
        if {index - 1, index + 1} <= asked and index - 1 not in between:
            between.add(index)
    yield [index for index in todo if index not in between]
    yield [index for index in sorted(between) if not decision.bridge(index)]


def _chunks(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
