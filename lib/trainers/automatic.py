"""Trainings that start by themselves when enough labels are new, as if a client had asked."""

import logging
import threading
from collections.abc import Callable

from monailabel.utils.async_tasks.task import AsyncTask

from lib.site.store import ModelStore
from lib.trainers.site.progress import read_progress
from lib.trainers.site.split import FEWEST_CASES
from lib.trainers.site.training import WORKROOM

logger = logging.getLogger(__name__)

TRAINER = "matchseg"


class AutomaticTraining:
    """Starts the trainer when so many images were labelled since the last training.

    It is a training like any other: clients show it, and may stop it. A training that failed is
    tried again when as many labels more are there, not at each label.

    Args:
        store: of the site's models; the last training's own file tells how many images it had.
        after: labelled images more than the last training had; 0: never.
        count_labelled: how many images are labelled now.
    """

    def __init__(self, store: ModelStore, after: int, count_labelled: Callable[[], int]) -> None:
        self._room = store.folder / WORKROOM
        self._after = after
        self._count = count_labelled
        self._lock = threading.Lock()
        self._asked = 0  # labelled images when a training was last started here

    def label_saved(self) -> None:
        """Look whether it is time; returns at once. Never raises."""
        if self._after:
            threading.Thread(target=self._look, name="refseg-training", daemon=True).start()

    def _look(self) -> None:
        try:
            with self._lock:
                told = read_progress(self._room)
                if told is not None and told.running:
                    return
                had = max(self._asked, told.images if told is not None else 0)
                labelled = self._count()
                if labelled < max(had + self._after, FEWEST_CASES):
                    return
                task, reason = AsyncTask.run("train", request={"model": TRAINER})
                if task is None:  # one is running that has not told of itself yet
                    logger.info("no training is started now: %s", reason)
                    return
                self._asked = labelled
                logger.info("%d images are labelled: a training starts by itself", labelled)
        except Exception:
            logger.exception("no training could be started")
