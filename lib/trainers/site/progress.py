"""What a training tells of itself, in files that other processes read."""

import csv
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.durable import write_json
from lib.errors import TrainingError
from lib.machine import identity, is_alive

logger = logging.getLogger(__name__)

PROGRESS, LOG = "progress.json", "log.csv"
OUTCOME = "outcome.json"  # what the last training came to, in a sentence


@dataclass(frozen=True)
class Reached:
    """How far a training went, or is.

    Attributes:
        epochs: done.
        best: best mean Dice in validation, 0..1.
        best_epoch: when that was; 0: nothing was measured yet.
        seconds: spent.
    """

    epochs: int
    best: float
    best_epoch: int
    seconds: float


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
        measures: whether some images are kept to measure on; at last it learns from these, too.
    """

    epoch: int
    total_epochs: int
    best: float
    best_epoch: int
    seconds: float
    images: int
    running: bool
    measures: bool


@dataclass(frozen=True)
class Outcome:
    """How the last training ended.

    Attributes:
        message: in a sentence; empty while it runs.
        failed: it ended by an error.
        running: it has not ended: images are read, epochs trained, or networks measured.
        process: `identity` of the one that trains or trained.
        done: it came to its own end, whatever that was worth.
    """

    message: str
    failed: bool
    running: bool
    process: str
    done: bool


@dataclass(frozen=True)
class Epoch:
    """One line of a training's log; `dice` in validation, 0..1."""

    number: int
    loss: float
    dice: float
    seconds: float


def write_progress(
    folder: Path, now: Reached, *, total: int, images: int, process: str, measures: bool
) -> None:
    """Tell how far it is, in the fields that clients read.

    Args:
        folder: of the training.
        now: how far it is.
        total: epochs at most, of all that belongs to it.
        images: labelled images that it has.
        process: `identity` of the one that trains.
        measures: see `TrainingProgress`.

    Raises:
        OSError: the disk is full.
    """
    told = {
        "epoch": now.epochs,
        "total_epochs": total,
        "best_metric": round(now.best, 4),
        "best_epoch": now.best_epoch,
        "seconds": round(now.seconds, 1),
        "images": images,
        "process": process,
        "measures": measures,
    }
    write_json(folder / PROGRESS, told)


def write_outcome(folder: Path, message: str, *, failed: bool) -> None:
    """Note how it ended, or, without a message, that this process trains. Never raises."""
    try:
        write_json(folder / OUTCOME, {"message": message, "failed": failed, "process": identity()})
    except OSError as error:
        logger.warning("it cannot be noted how the training goes: %s", error)


def log_epoch(folder: Path, epoch: Epoch) -> None:
    """Add a line to the log.

    Raises:
        OSError: the disk is full.
    """
    path = folder / LOG
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["epoch", "loss", "dice", "seconds"])
        row = [epoch.number, f"{epoch.loss:.4f}", f"{epoch.dice:.4f}", f"{epoch.seconds:.0f}"]
        writer.writerow(row)


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
            running=_runs(str(told.get("process", "")), read_outcome(folder)),
            measures=bool(told.get("measures", True)),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the training's progress cannot be told: %s", error)
        return None


def read_reached(folder: Path) -> Reached:
    """How far the training in a folder went.

    Raises:
        TrainingError: its file cannot be read.
    """
    told = read_progress(folder)
    if told is None:
        msg = f"{folder / PROGRESS} cannot be read, so the training cannot go on; start it again."
        raise TrainingError(msg)
    return Reached(told.epoch, told.best, told.best_epoch, told.seconds)


def close_progress(folder: Path) -> None:
    """Say that no more epochs follow. Never raises."""
    try:
        told = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        write_json(folder / PROGRESS, {**told, "total_epochs": told["epoch"]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the end of the training cannot be told: %s", error)


def read_outcome(folder: Path) -> Outcome | None:
    """How the last training ended, or that it runs; None before the first. Never raises."""
    try:
        told = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
        message, failed = str(told["message"]), bool(told["failed"])
        process = str(told.get("process", ""))
        running = not message and is_alive(process)
        done = bool(message) and not failed
        if not message and not running:
            message = "The last training was ended before it was done."
        return Outcome(message, failed, running, process, done)
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
