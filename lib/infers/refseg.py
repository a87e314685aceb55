"""Infer task `refseg`: a request becomes a checked `SegmentRequest`, a segmentation a file."""

import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import HTTPException
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from lib.cancellation import StoppedError, stop_if_asked
from lib.errors import ImageError, LabelError, RefSegError, RequestError
from lib.imaging.formats import PICTURES, WRITABLE, extension_of
from lib.imaging.io import ImageVolume, read_image, write_label_map
from lib.infers.numbers import LabelNumbers
from lib.infers.provenance import provenance_of
from lib.infers.request import SegmentRequest, chosen_labels
from lib.runtime import ListLabels, Runtime, progress_logger
from lib.segmentation import Segmentation
from lib.segmenter import Progress
from lib.studies.datastore import find_by_path

logger = logging.getLogger(__name__)

MAX_REFERENCES = 16  # named in the answer for each label
NOTHING = {"background": 0}  # 3D Slicer drops this name; an empty dict it would take for "all"


class RefSeg(InferTask):  # type: ignore[misc]  # MONAI Label is untyped
    """Segments an image by the labelled images of the datastore."""

    def __init__(
        self,
        runtime: Runtime,
        list_labels: ListLabels,
        confidence: Callable[[Segmentation], Mapping[str, float]] | None = None,
    ) -> None:
        """Nothing is loaded here.

        Args:
            runtime: networks and bank.
            list_labels: the datastore's final labels, as they are now.
            confidence: how far each mask is trusted; None: as the segmentation says itself.
        """
        self._confidence = confidence or (lambda found: found.confidence)
        defaults = runtime.options
        super().__init__(
            InferType.SEGMENTATION,
            {},
            3,
            "Segments by reference to the images that are labelled already",
            {
                "k": defaults.k,
                "cap_per_case": defaults.cap_per_case,
                "own_labels": defaults.own_labels,
                "every_slice": defaults.every_slice,
            },
        )
        self._runtime = runtime
        self._list_labels = list_labels
        self._numbers = LabelNumbers(runtime.folder)
        self._announced: dict[str, tuple[str, ...]] = {}

    def is_valid(self) -> bool:
        """Always: what is missing is said in the answer to a request."""
        return True

    def info(self) -> dict[str, Any]:
        """What `/info` shows; asked for at every request, so it never waits and never raises."""
        found: dict[str, Any] = super().info()
        if not self._runtime.learning:  # what was announced is in the bank, or teaches nothing
            self._announced = {}
        known = self._runtime.known_labels()
        if not self._runtime.settings.labels:
            announced = [name for names in list(self._announced.values()) for name in names]
            known = tuple(dict.fromkeys((*known, *announced)))
        found["labels"] = self._numbers.of(known)
        found["segmenter"], found["embedder"] = self._runtime.names()
        return found

    def announce(self, image_id: str, names: Iterable[str]) -> None:
        """Name an image's labels that are being learned, so that `/info` has them at once.

        They take the place of what was announced of this image before, and are named until all
        that `Runtime.sync_soon` was asked for is done: ask it first.

        3D Slicer asks `/info` when a label is saved, and segments the next image by itself only if
        a task has one of the labels named there.
        """
        self._announced = {**self._announced, image_id: tuple(names)}

    def __call__(self, request: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Answer one request with a file and what is to be known of it.

        Raises:
            HTTPException: 404, 422 or 503 with a sentence that a person can act upon.
        """
        if not request.get("image"):
            raise HTTPException(404, "The image is not in the datastore. Look at GET /datastore/.")
        try:
            with self._runtime.pool.busy():
                return self._answer(SegmentRequest.parse(request, self._runtime.settings))
        except (RequestError, ImageError, LabelError) as error:
            raise HTTPException(422, str(error)) from error
        except RefSegError as error:  # weights or bank: the server's owner has to mend it
            raise HTTPException(503, str(error)) from error
        except (HTTPException, StoppedError):
            raise
        except Exception as error:
            mark = uuid.uuid4().hex[:8]
            logger.exception("request %s failed", mark)
            msg = f"RefSeg failed ({type(error).__name__}); the server's log tells more at {mark}."
            raise HTTPException(500, msg) from error

    def _answer(self, wanted: SegmentRequest) -> tuple[str | None, dict[str, Any]]:
        start = time.perf_counter()
        image = read_image(wanted.path)
        extension = _result_extension(wanted, image)
        read = time.perf_counter()
        labelled, report = self._runtime.sync(self._list_labels)
        synced = time.perf_counter()
        numbers = self._numbers.of(self._runtime.known_labels())
        names = chosen_labels(wanted.prompt, numbers)
        own = find_by_path(labelled, str(wanted.path))
        if own is not None and own.image_id in dict(report.failed):
            own = None  # its label cannot be used, which `warnings` tell; the image can
        try:
            found = self._runtime.engine.segment(
                image,
                self._runtime.bank,
                labels=names,
                options=wanted.options,
                own=own,
                on_progress=_unless_stopped(progress_logger(f"segmenting {wanted.path.name}")),
                wait=False,
            )
        except LabelError:
            if own is None or own.label_path.exists():
                raise
            return self._answer(wanted)  # another client deleted its label in between
        values = {name: value for value, name in enumerate(found.labels, start=1)}
        if wanted.info_numbers:
            values = {name: numbers[name] for name in found.labels}
        if max(values.values(), default=0) > wanted.largest:
            msg = f"{len(values)} labels do not fit result_dtype; ask for uint16 or fewer labels."
            raise RequestError(msg)
        written = time.perf_counter()
        file = _write(found, values, image, extension, wanted.compress) if wanted.write else None
        end = time.perf_counter()
        seconds = {"read": read - start, "sync": synced - read, **found.seconds}
        seconds |= {"write": end - written, "total": end - start}
        params = self._params(found, values, seconds)
        params["provenance"] = provenance_of(self._runtime, wanted.options, found.study)
        params["warnings"] = [
            f"The label of {image_id} is not used: {why}" for image_id, why in report.failed
        ]
        logger.info(
            "segmented %d slices by %s: %d labels, %d own slices, %d between two, %.2f s%s",
            found.slices,
            params["segmenter"],
            len(found.labels),
            found.own_slices,
            found.between,
            end - start,
            f" ({found.message})" if found.message else "",
        )
        return file, params

    def _params(
        self, found: Segmentation, values: Mapping[str, int], seconds: Mapping[str, float]
    ) -> dict[str, Any]:
        """The answer's JSON."""
        engine, bank = self._runtime.engine, self._runtime.bank
        version = bank.version
        return {
            "label_names": dict(values) or NOTHING,
            "confidence": dict(self._confidence(found)),
            "references": {
                name: [
                    {
                        "image": used.key.image_id,
                        "axis": used.key.axis,
                        "slice": used.key.index,
                        "similarity": round(used.similarity, 4),
                        "slices": used.slices,
                    }
                    for used in rows[:MAX_REFERENCES]
                ]
                for name, rows in found.references.items()
            },
            "slices": found.slices,
            "own_slices": found.own_slices,
            "slices_between": found.between,
            "latencies": {stage: round(value, 4) for stage, value in seconds.items()},
            "segmenter": engine.segmenter.name,
            "embedder": engine.embedder.name,
            "bank": {"generation": version.generation, "fingerprint": version.fingerprint},
            "message": found.message,
        }


def _unless_stopped(report: Progress) -> Progress:
    """As `report`, and the end of the work where nobody waits for it any more."""

    def check(done: int, total: int) -> None:
        stop_if_asked()
        report(done, total)

    return check


def _write(
    found: Segmentation,
    values: Mapping[str, int],
    image: ImageVolume,
    extension: str,
    compress: bool,
) -> str:
    """Write to a temporary file, which the endpoint deletes once it is sent."""
    lookup = np.array([0, *(values[name] for name in found.labels)], np.int32)
    with tempfile.NamedTemporaryFile(prefix="refseg-", suffix=extension, delete=False) as file:
        path = Path(file.name)
    write_label_map(path, lookup[found.label_map], image, compress=compress)
    return str(path)


def _result_extension(wanted: SegmentRequest, image: ImageVolume) -> str:
    """The extension asked for, or one like the image's own that loses nothing."""
    allowed = [e for e in WRITABLE if image.kind == "picture" or e not in PICTURES]
    if wanted.extension:
        if wanted.extension not in allowed:
            msg = (
                f"result_extension {wanted.extension!r} is not possible for a {image.kind}; "
                f"allowed are {', '.join(allowed)}."
            )
            raise RequestError(msg)
        return wanted.extension
    own = extension_of(image.path)
    if own in allowed:
        return own
    return ".png" if image.kind == "picture" else ".nii.gz"
