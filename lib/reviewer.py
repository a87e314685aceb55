"""How far each mask is to be trusted: learned on the user's labels, told for all other images."""

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lib.annotation import Annotation, read_annotation
from lib.confidence.calibration import Calibration, Sample
from lib.confidence.evidence import Evidence
from lib.confidence.store import ConfidenceStore, Estimate
from lib.errors import RefSegError
from lib.evaluation.metrics import dice
from lib.evaluation.pictures import Panel, data_address
from lib.examiner import Examination, Examiner
from lib.imaging.io import ImageVolume, read_image
from lib.imaging.slices import cut, cut_labels, through_plane_axis
from lib.memory.signature import content, signature
from lib.runtime import Runtime
from lib.types import LabelledImage

logger = logging.getLogger(__name__)

MOST_SAMPLES = 60  # labelled images left out in turn; more teach the curve little
SLICES = 8  # of a volume that are looked at
_ORDER_SEED = 0


@dataclass(frozen=True, eq=False)
class Reviewed:
    """One image's masks and how far they are trusted.

    Attributes:
        image_id: which.
        confidence: expected Dice by label; of an empty mask the probability that empty is right.
        areas: pixels found, by label, on the slices looked at.
        signs: what speaks for each label's mask, by the names of `Evidence`.
        worst: the label trusted least; "" without any.
        message: why there is nothing, where there is nothing.
        picture_slice: the slice with most of it.
        thumbnail: that slice with its masks as a `data:` address, if it was asked for.
    """

    image_id: str
    confidence: Mapping[str, float]
    areas: Mapping[str, int] = field(default_factory=dict)
    signs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    worst: str = ""
    message: str = ""
    picture_slice: int = 0
    thumbnail: str = ""

    @property
    def trust(self) -> float:
        """Confidence of the label trusted least, by which images are listed; 0 without any."""
        return self.confidence.get(self.worst, 0.0)


class Reviewer:
    """Calibrates on labelled images and judges the others, for one runtime.

    Thread-safe: one image is examined at a time.
    """

    def __init__(self, runtime: Runtime) -> None:
        """Nothing is opened or loaded yet."""
        self._runtime = runtime
        self._lock = threading.Lock()
        self._opened: tuple[ConfidenceStore, Examiner] | None = None
        self._open_lock = threading.Lock()
        self._worker: threading.Thread | None = None
        self._risk: dict[str, float] = {}
        self._calibration: Calibration | None = None
        self._recall_lock = threading.Lock()
        self._recalled: tuple[Calibration | None, dict[str, int], dict[str, Reviewed]]
        self._recalled = None, {}, {}
        self._contents: dict[str, tuple[str, str]] = {}  # id -> looks of its files, digest

    @property
    def _parts(self) -> tuple[ConfidenceStore, Examiner]:
        with self._open_lock:
            if self._opened is None:
                runtime, chosen = self._runtime, self._runtime.settings
                examiner = Examiner(
                    runtime.engine,
                    axis=chosen.axis_index,
                    window=chosen.window,
                    annotation=chosen.annotation,
                    k=chosen.k,
                    cap_per_case=chosen.cap_per_case,
                    batch=chosen.batch,
                )
                store = ConfidenceStore(runtime.folder, runtime.fingerprint)
                self._opened = store, examiner
            return self._opened

    # -- learning what the signs are worth -----------------------------------------------------

    def calibration(self) -> Calibration:
        """As learned so far; without any sample it is what is believed beforehand."""
        if self._calibration is None:
            self._calibration = Calibration(self._parts[0].samples())
        return self._calibration

    def confidence(
        self, evidence: Mapping[str, Evidence], own_share: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Expected Dice of each label's mask, 0..1; 0 of what was not found; quick.

        Args:
            evidence: for each label, of the slices that were segmented.
            own_share: of each label's area what the annotator drew, of which nothing is in doubt.
        """
        calibration, own = self.calibration(), own_share or {}
        told = {}
        for label, one in evidence.items():
            share = own.get(label, 0.0)
            expected = calibration.confidence(label, one) if one.area else 0.0
            told[label] = round(share + (1 - share) * expected, 4)
        return told

    def calibrate(
        self,
        labelled: Sequence[LabelledImage],
        *,
        on_image: Callable[[int, int], None] | None = None,
        most: int = MOST_SAMPLES,
        images: int | None = None,
    ) -> Calibration:
        """Leave labelled images out in turn, and learn how good their masks become.

        Only what is new or changed is done, and all again whenever there are twice as many labels:
        a mask by one reference says little of masks by twenty. What is gone is forgotten.

        Args:
            labelled: all labelled images, the bank being in step with them.
            on_image: called with images done and to be done.
            most: at most so many are left out, drawn by a fixed seed.
            images: do no more than so many now.
        """
        store, _ = self._parts
        chosen = _draw(labelled, most) if len(labelled) > 1 else []
        by_id = {one.image_id: one for one in labelled}
        marks = store.marks()
        store.forget(
            [image_id for image_id in marks if image_id not in {c.image_id for c in chosen}]
        )
        todo = []
        for one in chosen:
            try:
                mark = f"{self._content(one)} {len(labelled).bit_length()}"
            except OSError:
                continue
            if marks.get(one.image_id) != mark:
                todo.append((one, mark))
        todo = todo[: len(todo) if images is None else images]
        self._calibration = None  # what is gone was forgotten
        for number, (one, mark) in enumerate(todo):
            try:
                samples = self.leave_out(one, by_id)
            except (RefSegError, OSError) as error:
                logger.warning("label of %s teaches no confidence: %s", one.image_id, error)
                samples = []
            store.put_samples(one.image_id, mark, samples)
            self._calibration = None
            if on_image is not None:
                on_image(number + 1, len(todo))
        return self.calibration()

    def _content(self, one: LabelledImage) -> str:
        """Digest of image and label; files that look as before are not read again."""
        looks = signature(one)
        known = self._contents.get(one.image_id)
        if not looks or known is None or known[0] != looks:
            self._contents[one.image_id] = known = (looks, content(one))
        return known[1]

    def leave_out(self, one: LabelledImage, by_id: Mapping[str, LabelledImage]) -> list[Sample]:
        """Segment a labelled image by all others, and compare.

        Args:
            one: the image; it need not be in the bank.
            by_id: all labelled images.
        """
        chosen = self._runtime.settings
        image = read_image(one.image_path)
        annotation = read_annotation(one, image, rule=chosen.annotation, axis=chosen.axis_index)
        slices = _spread(annotation.slices, SLICES)
        if not slices:
            return []
        others = {image_id: other for image_id, other in by_id.items() if image_id != one.image_id}
        with self._lock:
            found = self._parts[1].examine(
                image,
                self._runtime.bank,
                others,
                axis=annotation.axis,
                slices=slices,
                labels=sorted(annotation.labels),
                exclude_image=one.image_id,
            )
        return samples_of(found, annotation)

    # -- judging the others --------------------------------------------------------------------

    def review(
        self,
        image_id: str,
        path: Path,
        labelled: Sequence[LabelledImage],
        calibration: Calibration,
        *,
        thumbnail: int = 0,
    ) -> Reviewed:
        """Segment an image without a label, and say how far the masks are to be trusted.

        Args:
            image_id: its id.
            path: its file or folder.
            labelled: all labelled images, the bank being in step with them.
            calibration: of `calibrate`.
            thumbnail: rows of the picture; 0: none.
        """
        store, _ = self._parts
        try:
            image = read_image(path)
            found = self._examine(image, labelled, without=image_id)
        except (RefSegError, OSError) as error:
            return Reviewed(image_id, {}, message=str(error))
        if not found.labels:
            return Reviewed(image_id, {}, message="there are no references yet")
        generation = self._runtime.bank.version.generation
        store.put_estimate(Estimate(image_id, generation, found.evidence))
        confidence = {n: calibration.confidence(n, e) for n, e in found.evidence.items()}
        areas = {name: found.evidence[name].area for name in found.labels}
        place = int((found.masks > 0).sum(axis=(1, 2)).argmax())
        return Reviewed(
            image_id,
            confidence,
            areas=areas,
            signs={name: found.evidence[name].signs() for name in found.labels},
            worst=_worst(confidence, areas),
            picture_slice=found.slices[place],
            thumbnail=self._thumbnail(image, found, place, thumbnail) if thumbnail else "",
        )

    def _thumbnail(self, image: ImageVolume, found: Examination, place: int, rows: int) -> str:
        chosen = self._runtime.settings
        axis = through_plane_axis(image, chosen.axis_index)
        picture = cut(image, axis, chosen.window)[found.slices[place]]
        return data_address(Panel("", picture, found.masks[place]), rows)

    def _examine(
        self, image: ImageVolume, labelled: Sequence[LabelledImage], *, without: str
    ) -> Examination:
        runtime = self._runtime
        axis = through_plane_axis(image, runtime.settings.axis_index)
        depth = image.voxels.shape[axis]
        slices = _spread(tuple(range(depth)), SLICES)
        wanted = runtime.settings.labels or tuple(sorted(runtime.bank.labels()))
        with self._lock:
            return self._parts[1].examine(
                image,
                runtime.bank,
                {one.image_id: one for one in labelled if one.image_id != without},
                axis=axis,
                slices=slices,
                labels=wanted,
                exclude_image=without,
            )

    # -- what the strategies ask -----------------------------------------------------------------

    def risk(self) -> Mapping[str, float]:
        """1 - expected Dice of the images that were looked at, by id; never waits for networks."""
        return self._risk

    def work_soon(
        self,
        list_labels: Callable[[], Sequence[LabelledImage]],
        open_images: Mapping[str, Path],
        *,
        images: int,
    ) -> None:
        """Calibrate and judge a few images in the background; requests come first.

        Args:
            list_labels: the labelled images as they are then.
            open_images: images without labels; those looked at longest ago come first.
            images: how many at most, of either kind.
        """
        with self._open_lock:
            if images <= 0 or (self._worker is not None and self._worker.is_alive()):
                return
            self._worker = threading.Thread(
                target=self._work,
                args=(list_labels, dict(open_images), images),
                name="refseg-review",
                daemon=True,
            )
            self._worker.start()

    def _work(
        self,
        list_labels: Callable[[], Sequence[LabelledImage]],
        open_images: Mapping[str, Path],
        images: int,
    ) -> None:
        try:
            labelled, _ = self._runtime.sync(list_labels)
            if not labelled:
                return
            for _ in range(images):
                self._runtime.pool.wait_until_idle()
                self.calibrate(labelled, images=1)
            calibration = self.calibration()
            store, _ = self._parts
            generation = self._runtime.bank.version.generation
            seen = store.estimates()
            order = np.random.default_rng(_ORDER_SEED).permutation(sorted(open_images)).tolist()
            ages = {i: seen[i].generation if i in seen else -1 for i in order}
            stale = [i for i in order if ages[i] != generation]
            for image_id in sorted(stale, key=lambda i: ages[i])[:images]:
                self._runtime.pool.wait_until_idle()
                self.review(image_id, open_images[image_id], labelled, calibration)
            self._risk = self.read_risk(open_images)
        except RefSegError as error:
            logger.warning("masks cannot be judged: %s", error)
        except Exception:
            logger.exception("masks could not be judged")

    def recall(self) -> dict[str, Reviewed]:
        """What was found of each image that was looked at, by id; no image is looked at."""
        calibration, store = self.calibration(), self._parts[0]
        with self._recall_lock:
            by, known, found = self._recalled
            if by is not calibration:
                known, found = {}, {}
            now = store.generations()
            fresh = {i for i, generation in now.items() if known.get(i) != generation}
            found = {i: one for i, one in found.items() if i in now and i not in fresh}
            for image_id, estimate in store.estimates(fresh).items() if fresh else ():
                evidence = estimate.evidence
                confidence = {n: calibration.confidence(n, e) for n, e in evidence.items()}
                areas = {name: one.area for name, one in evidence.items()}
                worst = _worst(confidence, areas)
                found[image_id] = Reviewed(image_id, confidence, areas=areas, worst=worst)
            self._recalled = calibration, now, found
            return found

    def read_risk(self, image_ids: Collection[str]) -> dict[str, float]:
        """1 - expected Dice, mean over the labels, of the images that were looked at."""
        calibration = self.calibration()
        risk = {}
        for image_id, estimate in self._parts[0].estimates().items():
            values = [calibration.confidence(n, e) for n, e in estimate.evidence.items()]
            if values and image_id in image_ids:
                risk[image_id] = 1 - float(np.mean(values))
        return risk


def _worst(confidence: Mapping[str, float], areas: Mapping[str, int]) -> str:
    """The label trusted least; one that is rightly absent is not the worst mask of an image."""
    shown = [name for name in confidence if areas[name]] or list(confidence)
    return min(shown, key=lambda name: (confidence[name], name), default="")


def samples_of(found: Examination, annotation: Annotation) -> list[Sample]:
    """What an examination of a labelled image teaches, for each label that it was looked for."""
    truth = cut_labels(annotation.label_map, annotation.axis)[list(found.slices)]
    samples = []
    for row, name in enumerate(found.labels):
        here = truth == annotation.values.get(name, -1)
        value = dice(found.masks == row + 1, here)
        right = 1.0 if np.isnan(value) else value  # empty, and rightly so
        samples.append(Sample(name, found.evidence[name], right, bool(here.any())))
    return samples


def _draw(labelled: Sequence[LabelledImage], most: int) -> list[LabelledImage]:
    """Always the same of the same images, and mostly the same of a few more."""
    rng = np.random.default_rng(_ORDER_SEED)
    rows = sorted(labelled, key=lambda one: one.image_id)
    if len(rows) <= most:
        return rows
    return [rows[n] for n in sorted(rng.choice(len(rows), most, replace=False))]


def _spread(numbers: Sequence[int], most: int) -> tuple[int, ...]:
    """So many of them, evenly."""
    count = min(most, len(numbers))
    return tuple(numbers[int((n + 0.5) * len(numbers) / count)] for n in range(count))
