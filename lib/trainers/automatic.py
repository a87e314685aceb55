"""Trainings that start by themselves when enough labels are new, as if a client had asked."""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping

from monailabel.utils.async_tasks.task import AsyncTask

from lib.durable import write_json
from lib.site.store import ModelStore
from lib.trainers.site.progress import read_progress
from lib.trainers.site.split import FEWEST_CASES
from lib.trainers.site.training import WORKROOM, is_training

logger = logging.getLogger(__name__)

TRAINER = "matchseg"
STARTED = "started.json"  # labelled images when a training last started by itself; whether it ended
UNDER_WAY = ("SUBMITTED", "RUNNING")
LOOK_S = 1.0  # between two looks at a training
ENDING_S = 10.0  # a server that stops a training since it ends itself is gone by then


class AutomaticTraining:
    """Starts the trainer when a label is saved and so many images more are labelled than last time.

    It is a training like any other: clients show it, and may stop it. One that failed or was
    stopped is tried again when as many labels more are there, not at each label; one that ended
    with its server, with the next label. While one runs no other starts.

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
                _behind(self._look)
            except RuntimeError:
                logger.exception("it cannot be looked whether a training is due")

    def _look(self) -> None:
        try:
            with self._lock:
                labelled = self._count()
                if labelled < max(self._after, FEWEST_CASES):
                    return
                if labelled < self._had() + self._after and not self._cut_short():
                    return
                if is_training(self._room):
                    logger.info("a training is due; it starts with the first label after this one")
                    return
                task, reason = AsyncTask.run("train", request={"model": TRAINER})
                if task is None:  # one is starting
                    logger.info("no training is started now: %s", reason)
                    return
                self._room.mkdir(parents=True, exist_ok=True)
                self._note(labelled, over=False)
                logger.info("%d images are labelled: a training starts by itself", labelled)
                _behind(lambda: self._watch(task, labelled))
        except Exception:
            logger.exception("no training could be started")

    def _watch(self, task: Mapping[str, str], labelled: int) -> None:
        """Note the end of a training, unless the server ends before."""
        try:
            while task["status"] in UNDER_WAY:
                time.sleep(LOOK_S)
            if task["status"] == "STOPPED":  # by a client, unless the server is ending
                time.sleep(ENDING_S)
            self._note(labelled, over=True)
        except Exception:
            logger.exception("the end of a training cannot be noted")

    def _note(self, labelled: int, *, over: bool) -> None:
        write_json(self._room / STARTED, {"images": labelled, "over": over})

    def _had(self) -> int:
        """How many images were labelled when the last training started."""
        told = read_progress(self._room)
        return max(told.images if told is not None else 0, int(self._started().get("images", 0)))

    def _cut_short(self) -> bool:
        """Whether the last one that started by itself ended with an earlier server."""
        mine, _ = AsyncTask.status("train")
        return mine is None and not self._started().get("over", True)

    def _started(self) -> dict[str, int | bool]:
        try:
            told = json.loads((self._room / STARTED).read_text(encoding="utf-8"))
            return {"images": int(told["images"]), "over": bool(told.get("over", True))}
        except (OSError, ValueError, KeyError, TypeError):
            return {}


def _behind(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="refseg-training", daemon=True).start()
