"""What the signs of a good mask are worth: learned on the user's labels, each left out in turn."""

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lib.annotation import Annotation, read_annotation
from lib.confidence.calibration import Calibration, Sample
from lib.confidence.evidence import Evidence
from lib.confidence.store import ConfidenceStore
from lib.errors import RefSegError
from lib.evaluation.metrics import dice
from lib.imaging.io import read_image
from lib.imaging.slices import cut_labels
from lib.memory.signature import content, signature
from lib.reviewing.examiner import Examination, Examiner
from lib.runtime import Runtime
from lib.types import LabelledImage

logger = logging.getLogger(__name__)

MOST_SAMPLES = 60  # labelled images left out in turn; more teach the curve little
SLICES = 8  # of a volume that are looked at
ORDER_SEED = 0


class Calibrator:
    """Learns on labelled images how far masks are to be trusted, for one runtime.

    Thread-safe: one image is examined at a time.
    """

    def __init__(self, runtime: Runtime) -> None:
        """Nothing is opened or loaded yet."""
        self._runtime = runtime
        self._lock = threading.Lock()
        self._opened: tuple[ConfidenceStore, Examiner] | None = None
        self._open_lock = threading.Lock()
        self._calibration: Calibration | None = None
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

    def calibration(self) -> Calibration:
        """As learned so far; without any sample it is what is believed beforehand."""
        if self._calibration is None:
            store = self._parts[0]
            self._calibration = Calibration(store.samples(), store.images())
        return self._calibration

    def confidence(
        self, evidence: Mapping[str, Evidence], own_share: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Expected Dice of each label's mask, 0..1; quick, for no image is looked at.

        Of an empty mask it is the probability that empty is right.

        Args:
            evidence: for each label, of the slices that were segmented.
            own_share: of each label's area what the annotator drew, of which nothing is in doubt.
        """
        return self.calibration().expect(evidence, own_share or {})

    def calibrate(
        self,
        labelled: Sequence[LabelledImage],
        *,
        on_image: Callable[[int, int], None] | None = None,
        most: int = MOST_SAMPLES,
        images: int | None = None,
    ) -> Calibration:
        """Leave labelled images out in turn, and learn how good their masks become.

        What is new or changed is done first, then what was measured when there were half as many
        labels, or twice as many: a mask by one reference says little of masks by twenty. What was
        measured before teaches on until all that is drawn now has been measured, so that a
        calibration does not suffer from being made a few images at a time.

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
        store.forget(marks.keys() - (by_id.keys() if chosen else set()))
        todo = self._to_do(chosen, marks, len(labelled))
        now = todo[: len(todo) if images is None else images]
        self._calibration = None  # what is gone was forgotten
        for number, (one, mark) in enumerate(now):
            try:
                samples = self.leave_out(one, by_id)
            except (RefSegError, OSError) as error:
                logger.warning("label of %s teaches no confidence: %s", one.image_id, error)
                samples = []
            store.put_samples(one.image_id, mark, samples)
            self._calibration = None
            if on_image is not None:
                on_image(number + 1, len(now))
        if len(now) == len(todo):  # until then those teach on whose place others took
            store.forget(marks.keys() & by_id.keys() - {one.image_id for one in chosen})
            self._calibration = None
        return self.calibration()

    def _to_do(
        self, chosen: Sequence[LabelledImage], marks: Mapping[str, str], labels: int
    ) -> list[tuple[LabelledImage, str]]:
        """Images to be left out, with the marks of what their samples will be made from.

        A mark ends with the number of labels there were, for that need not be the same.
        """
        settings = self._runtime.settings
        new, outgrown = [], []
        for one in chosen:
            try:
                made_from = f"{self._content(one)} {settings.k} {settings.cap_per_case}"
            except OSError:
                continue
            before, _, then = marks.get(one.image_id, "").rpartition(" ")
            if before != made_from:
                new.append((one, f"{made_from} {labels}"))
            elif labels >= 2 * int(then) or 2 * labels <= int(then):
                outgrown.append((one, f"{made_from} {labels}"))
        return new + outgrown

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
        slices = spread(annotation.slices, SLICES)
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
    """Always the same of the same images; one label more takes the place of one at most."""
    drawn = sorted(labelled, key=lambda one: (_lot(one.image_id), one.image_id))[:most]
    return sorted(drawn, key=lambda one: one.image_id)


def _lot(image_id: str) -> bytes:
    """An image's place in the draw: its own, whatever other images there are."""
    return hashlib.blake2b(f"{ORDER_SEED} {image_id}".encode(), digest_size=8).digest()


def spread(numbers: Sequence[int], most: int) -> tuple[int, ...]:
    """So many of them, evenly."""
    count = min(most, len(numbers))
    return tuple(numbers[int((n + 0.5) * len(numbers) / count)] for n in range(count))
