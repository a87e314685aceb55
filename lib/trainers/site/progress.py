"""What a training has told of itself so far, read from its files by another process."""

import csv
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.machine import is_alive
from lib.trainers.site.loop import LOG, PROGRESS
from lib.trainers.site.training import OUTCOME

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingProgress:
    """The last training of a site, over or not.

    Attributes:
        epoch: epochs done.
        total_epochs: at most so many.
        best: best mean Dice in validation, 0..1.
        best_epoch: when that was.
        seconds: of training.
        images: labelled images that it has, to learn from and to measure on.
        running: it is the one that runs now; its epochs may be over, and networks be measured.
    """

    epoch: int
    total_epochs: int
    best: float
    best_epoch: int
    seconds: float
    images: int
    running: bool


@dataclass(frozen=True)
class Outcome:
    """How the last training ended.

    Attributes:
        message: in a sentence; empty while it runs.
        failed: it ended by an error.
        running: it has not ended: images are read, epochs trained, or networks measured.
        process: `identity` of the one that trains or trained.
    """

    message: str
    failed: bool
    running: bool
    process: str


@dataclass(frozen=True)
class Epoch:
    """One line of a training's log; `dice` in validation, 0..1."""

    number: int
    loss: float
    dice: float
    seconds: float


def read_progress(folder: Path) -> TrainingProgress | None:
    """What is told in the folder of a training; None before the first. Never raises."""
    path = folder / PROGRESS
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return TrainingProgress(
            epoch=int(told["epoch"]),
            total_epochs=int(told["total_epochs"]),
            best=float(told["best_metric"]),
            best_epoch=int(told.get("best_epoch", 0)),
            seconds=float(told["seconds"]),
            images=int(told.get("images", 0)),
            running=_runs(str(told["process"]), read_outcome(folder)),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the training's progress cannot be told: %s", error)
        return None


def read_outcome(folder: Path) -> Outcome | None:
    """How the last training ended, or that it runs; None before the first. Never raises."""
    try:
        told = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
        message, failed = str(told["message"]), bool(told["failed"])
        process = str(told["process"])
        running = not message and is_alive(process)
        if not message and not running:
            message = "The last training was ended before it was done."
        return Outcome(message, failed, running, process)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("how the training ended cannot be told: %s", error)
        return None


def read_epochs(folder: Path) -> list[Epoch]:
    """The lines of a training's log that can be read, oldest first. Never raises."""
    found = []
    try:
        with (folder / LOG).open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                epoch = _epoch(row)
                if epoch is not None:
                    found.append(epoch)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        logger.warning("the training's log cannot be read: %s", error)
    return found


def _runs(process: str, outcome: Outcome | None) -> bool:
    """Not while a later training reads its images: these figures are of the one before."""
    return outcome is not None and outcome.running and outcome.process == process


def _epoch(row: dict[str, Any]) -> Epoch | None:
    try:
        return Epoch(
            int(row["epoch"]), float(row["loss"]), float(row["dice"]), float(row["seconds"])
        )
    except (KeyError, TypeError, ValueError):  # half a line, of a process that was killed
        return None
