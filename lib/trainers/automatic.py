"""Trainings that start by themselves when enough labels are new, as if a client had asked."""

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache

from filelock import FileLock
from monailabel.utils.async_tasks.task import AsyncTask
from monailabel.utils.async_tasks.utils import processes

from lib.durable import write_json
from lib.machine import free_bytes, identity, is_alive, start_thread
from lib.site.store import ModelStore
from lib.trainers.site.progress import read_outcome, read_progress
from lib.trainers.site.split import FEWEST_CASES
from lib.trainers.site.training import WORKROOM, is_training

logger = logging.getLogger(__name__)

TRAINER = "matchseg"
STARTED, STARTING = "started.json", "starting.lock"
UNDER_WAY = ("SUBMITTED", "RUNNING")
NEEDED = 5 * 2**29  # bytes of memory: a training takes 1.5 GiB, and the server some for requests
THREAD = "refseg-training"
LOOK_S = 1.0  # between two looks at a training
ENDING_S = 60.0  # a training that was ended with its server has none any more by then


@dataclass(frozen=True)
class _Start:
    """The last training that started by itself, as it is noted in the folder of trainings.

    Attributes:
        images: how many were labelled.
        server: `identity` of the process that started it.
        over: it has ended, and not with that process.
        taken_up: it had ended with an earlier server, and was started once more.
        mark: of this start alone.
    """

    images: int = 0
    server: str = ""
    over: bool = True
    taken_up: bool = False
    mark: str = ""


class AutomaticTraining:
    """Starts the trainer when a label is saved and so many images more are labelled than last time.

    It is a training like any other: clients show it, and may stop it. One that failed or was
    stopped is tried again when as many images more are labelled, not at each label; one that ended
    with its server once more with the next label, and no second time, or a training that takes the
    server down would do so for ever. While one runs no other starts, on whatever server of the
    folder, and when it has ended well, the labels saved meanwhile are counted; nor does one start
    where memory is short.

    Args:
        store: of the site's models; files of the last training tell how many images it had.
        after: labelled images more than then; 0: never.
        count_labelled: how many images are labelled now.
    """

    def __init__(self, store: ModelStore, after: int, count_labelled: Callable[[], int]) -> None:
        self._room = store.folder / WORKROOM
        self._after = after
        self._count = count_labelled
        self._waiting = threading.Event()  # a look that has not counted yet
        self._following = threading.Lock()  # held by who waits for the end of a training

    def label_saved(self) -> None:
        """Look whether it is time; returns at once. Never raises."""
        if self._after and not self._waiting.is_set():
            self._waiting.set()
            if start_thread(self._look, THREAD) is None:
                self._waiting.clear()

    def _look(self) -> None:
        try:
            self._room.mkdir(parents=True, exist_ok=True)
            with FileLock(self._room / STARTING):
                self._waiting.clear()
                self._start_if_due(self._count())
        except OSError as error:
            logger.warning(
                "no training can start by itself: %s cannot be written (%s); name another folder "
                "(site_models), or none is wanted (train_after=0)",
                self._room,
                error,
            )
        except Exception:
            logger.exception("no training could be started")
        finally:
            self._waiting.clear()

    def _start_if_due(self, labelled: int) -> None:
        last, told = self._noted(), read_progress(self._room)
        had = max(last.images, told.images if told is not None else 0)
        due = labelled >= had + self._after
        cut_short = not (last.over or last.taken_up or is_alive(last.server))
        if labelled < max(self._after, FEWEST_CASES) or not (due or cut_short):
            return
        if is_training(self._room):
            logger.info("a training is due; it starts when the one that runs has ended")
            start_thread(self._look_after, THREAD)
            return
        if free_bytes() < NEEDED:
            logger.warning(
                "a training is due, and there are %.1f GiB of memory left for it; it starts with a "
                "label that finds %.1f",
                free_bytes() / 2**30,
                NEEDED / 2**30,
            )
            return
        start = _Start(labelled, identity(), over=False, taken_up=not due, mark=uuid.uuid4().hex)
        write_json(self._room / STARTED, asdict(start))  # first: or each label would start one
        request = {"model": TRAINER, "multi_gpu": False}  # whoever asks may have all GPUs
        task, reason = AsyncTask.run("train", request=request)
        if task is None:  # one is starting
            write_json(self._room / STARTED, asdict(last))
            logger.info("no training is started now: %s", reason)
            return
        logger.info("%d images are labelled: a training starts by itself", labelled)
        _stop_at_exit()
        start_thread(lambda: self._watch(task, start), THREAD)

    def _look_after(self) -> None:
        """Look again when the training that runs is over, unless it failed or was stopped."""
        if not self._following.acquire(blocking=False):
            return
        try:
            while is_training(self._room) or processes("train"):  # which ends a little later
                time.sleep(LOOK_S)
        finally:
            self._following.release()
        ended = read_outcome(self._room)
        if ended is not None and ended.done:
            self._look()
        else:
            logger.info("the training was ended, so no other follows it before the next label")

    def _watch(self, task: Mapping[str, str], start: _Start) -> None:
        """Note the end of a training, unless the server ends with it."""
        try:
            while task["status"] in UNDER_WAY:
                time.sleep(LOOK_S)
            if task["status"] != "DONE":
                time.sleep(ENDING_S)
            with FileLock(self._room / STARTING):
                if self._noted() == start:
                    write_json(self._room / STARTED, asdict(start) | {"over": True})
        except Exception:
            logger.exception("the end of a training cannot be noted")

    def _noted(self) -> _Start:
        try:
            told = json.loads((self._room / STARTED).read_text(encoding="utf-8"))
            return _Start(
                images=int(told["images"]),
                server=str(told.get("server", "")),
                over=bool(told.get("over", True)),
                taken_up=bool(told.get("taken_up", False)),
                mark=str(told.get("mark", "")),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return _Start()


@cache  # once for the process, however many trainings there are
def _stop_at_exit() -> None:
    """End the training when the interpreter ends, which would wait for it, an hour maybe.

    Private to the standard library, since nothing public runs before that wait.
    """
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        register(lambda: AsyncTask.stop("train"))
