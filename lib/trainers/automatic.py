"""Trainings that start by themselves when enough labels are new, as if a client had asked."""

import json
import logging
import threading
from collections.abc import Callable

from monailabel.utils.async_tasks.task import AsyncTask

from lib.durable import write_json
from lib.site.store import ModelStore
from lib.trainers.site.progress import read_progress
from lib.trainers.site.split import FEWEST_CASES
from lib.trainers.site.training import WORKROOM, is_training

logger = logging.getLogger(__name__)

TRAINER = "matchseg"
STARTED = "started.json"  # labelled images when a training last started by itself


class AutomaticTraining:
    """Starts the trainer when a label is saved and so many images more are labelled than last time.

    It is a training like any other: clients show it, and may stop it. One that failed is tried
    again when as many labels more are there, not at each label. While one runs no other starts.

    Args:
        store: of the site's models; files of the last training tell how many images it had.
        after: labelled images more than then; 0: never.
        count_labelled: how many images are labelled now.
    """

    def __init__(self, store: ModelStore, after: int, count_labelled: Callable[[], int]) -> None:
        self._room = store.folder / WORKROOM
        self._after = after
        self._count = count_labelled
        self._lock = threading.Lock()

    def label_saved(self) -> None:
        """Look whether it is time; returns at once. Never raises."""
        if self._after:
            try:
                threading.Thread(target=self._look, name="refseg-training", daemon=True).start()
            except RuntimeError:
                logger.exception("it cannot be looked whether a training is due")

    def _look(self) -> None:
        try:
            with self._lock:
                labelled = self._count()
                if labelled < max(self._had() + self._after, FEWEST_CASES):
                    return
                if is_training(self._room):
                    logger.info("a training is due; it starts with the first label after this one")
                    return
                task, reason = AsyncTask.run("train", request={"model": TRAINER})
                if task is None:  # one is starting
                    logger.info("no training is started now: %s", reason)
                    return
                self._room.mkdir(parents=True, exist_ok=True)
                write_json(self._room / STARTED, {"images": labelled})
                logger.info("%d images are labelled: a training starts by itself", labelled)
        except Exception:
            logger.exception("no training could be started")

    def _had(self) -> int:
        """How many images were labelled when the last training started."""
        told = read_progress(self._room)
        had = told.images if told is not None else 0
        try:
            started = json.loads((self._room / STARTED).read_text(encoding="utf-8"))
            return max(had, int(started["images"]))
        except (OSError, ValueError, KeyError, TypeError):
            return had
