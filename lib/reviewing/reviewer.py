"""How far each mask is to be trusted: learned on the user's labels, told for all other images."""

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lib.confidence.calibration import Calibration
from lib.confidence.store import Estimate
from lib.errors import RefSegError
from lib.evaluation.pictures import Panel, data_address
from lib.imaging.io import ImageVolume, read_image
from lib.imaging.slices import cut, through_plane_axis
from lib.reviewing.calibrator import ORDER_SEED, SLICES, Calibrator, spread
from lib.reviewing.examiner import Examination
from lib.runtime import Runtime
from lib.types import LabelledImage

logger = logging.getLogger(__name__)


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


class Reviewer(Calibrator):
    """Calibrates on labelled images and judges the others."""

    def __init__(self, runtime: Runtime) -> None:
        """Nothing is opened or loaded yet."""
        super().__init__(runtime)
        self._worker: threading.Thread | None = None
        self._risk: dict[str, float] = {}
        self._recall_lock = threading.Lock()
        self._recalled: tuple[Calibration | None, dict[str, int], dict[str, Reviewed]]
        self._recalled = None, {}, {}

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
            worst=_worst(confidence, areas, calibration),
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
        slices = spread(tuple(range(depth)), SLICES)
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
            order = np.random.default_rng(ORDER_SEED).permutation(sorted(open_images)).tolist()
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
                worst = _worst(confidence, areas, calibration)
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


def _worst(
    confidence: Mapping[str, float], areas: Mapping[str, int], calibration: Calibration
) -> str:
    """The label trusted least, found or not: one that was missed makes an image a bad one.

    Before any label was left out nobody knows how often one is absent, and the network's doubts of
    all labels that are rightly absent would come before poor masks: then an empty mask counts only
    where it is likelier wrong than right.
    """
    learned = bool(calibration.samples)
    counted = [n for n in confidence if areas[n] or learned or confidence[n] < 0.5]
    return min(counted or confidence, key=lambda name: (confidence[name], name), default="")
