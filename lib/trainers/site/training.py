"""From labelled images to a published model: train, measure against the current one, publish."""

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from lib.errors import ModelStoreError, TrainingError
from lib.models.devices import choose_device
from lib.models.matchseg import MatchSegSegmenter, load_weights
from lib.settings import RefSegSettings
from lib.site.serving import SiteModel
from lib.site.store import ModelCard
from lib.trainers.site.blending import BLENDED
from lib.trainers.site.fitting import (
    ALL,
    CASES,
    UNLABELLED,
    Fitted,
    TrainOptions,
    fit,
    make_room,
    refit,
)
from lib.trainers.site.loop import BEST, CHECKPOINT, SiteJob
from lib.trainers.site.progress import Reached, close_progress, read_reached, write_outcome
from lib.trainers.site.validation import TEMPORARY, Validation, Validator
from lib.types import LabelledImage

logger = logging.getLogger(__name__)

LOCK = ".lock"
WORKROOM = "training"  # folder beside the versions: data, checkpoint, progress


@dataclass(frozen=True)
class TrainingReport:
    """How a training ended.

    Attributes:
        published: whether the new model is the current one now.
        dice: of the new model on the validation cases.
        dice_before: of the one it was measured against.
        card: of the new model, if it was published.
        epochs: done.
        seconds: spent.
        message: the same in a sentence.
    """

    published: bool
    dice: float
    dice_before: float
    card: ModelCard | None
    epochs: int
    seconds: float
    message: str


def train_model(
    site: SiteModel,
    settings: RefSegSettings,
    labelled: Sequence[LabelledImage],
    options: TrainOptions,
    *,
    unlabelled: Sequence[Path] = (),
) -> TrainingReport:
    """Train the site's model and publish it if it beats the current one.

    Raises:
        TrainingError: there are too few labels, the disk or the GPU is full, or another training
            runs.
        ModelStoreError: the new model cannot be stored.
    """
    room = site.store.folder / WORKROOM
    with _alone(room):
        write_outcome(room, "", failed=False)
        try:
            report = _train(site, settings, labelled, options, unlabelled)
        except Exception as error:
            write_outcome(room, str(error) or type(error).__name__, failed=True)
            raise
        write_outcome(room, report.message, failed=False)
    logger.info("%s", report.message)
    return report


def _train(
    site: SiteModel,
    settings: RefSegSettings,
    labelled: Sequence[LabelledImage],
    options: TrainOptions,
    unlabelled: Sequence[Path],
) -> TrainingReport:
    start = time.monotonic()
    store = site.store
    room = store.folder / WORKROOM
    in_use = site.card()
    learned = in_use.training if in_use is not None else ()
    fitted = fit(labelled, room, options, settings, unlabelled=unlabelled, learned=learned)
    what, old = _measure_current(site, fitted.job)
    new = fitted.measured
    figures = (
        f"Dice {new.dice:.4f} against {old.dice:.4f} of {what}, on "
        f"{len(fitted.job.validation)} validation images"
    )
    card, end = None, fitted.end
    if new.gain_over(old) > 0:  # `beats` would refuse what few images cannot tell, and mostly helps
        final = load_weights(refit(fitted, options))
        end = read_reached(room)
        card = _card(fitted, options, old.dice, end)
        card = store.add(final, card, measured=load_weights(fitted.weights))
        site.publish(card)
        message = f"Published as model {card.version}: {figures}; then it learned from these, too."
    else:
        message = f"Not published: {figures}; {what} stays in use."
    for name in (CHECKPOINT, BEST, BLENDED, UNLABELLED):
        (room / name).unlink(missing_ok=True)
    close_progress(room)
    shutil.rmtree(room / ALL, ignore_errors=True)
    shutil.rmtree(room / CASES, ignore_errors=True)  # they are patients' images
    spent = time.monotonic() - start
    return TrainingReport(card is not None, new.dice, old.dice, card, end.epochs, spent, message)


def _measure_current(site: SiteModel, job: SiteJob) -> tuple[str, Validation]:
    """What is to be beaten, on the cases kept, as it was before it learned from all images.

    Otherwise images that it was measured on could not serve to measure again.
    """
    device = str(choose_device(job.settings.device))
    what, segmenter = "the bundled network", None
    try:
        card = site.store.current()
        if card is not None:
            what, segmenter = f"model {card.version}", _as_measured(site, card, device)
    except ModelStoreError as error:
        logger.warning("%s The new model is measured against the bundled network.", error)
        what = "the bundled network"
    if segmenter is None:
        segmenter = MatchSegSegmenter.load_bundled(device=device)
    validator = Validator(job.training, job.validation, job.settings, room=job.folder)
    found = validator.measure(segmenter)
    if torch.cuda.is_available():  # room for the training that may follow
        del segmenter
        torch.cuda.empty_cache()
    return what, found


def _as_measured(site: SiteModel, card: ModelCard, device: str) -> MatchSegSegmenter:
    try:
        return site.store.load_measured(card, device=device)
    except ModelStoreError as error:
        logger.warning("%s It is measured as it answers, which flatters it.", error)
        return site.store.load(card, device=device)


def _card(fitted: Fitted, options: TrainOptions, before: float, end: Reached) -> ModelCard:
    job = fitted.job
    return ModelCard(
        dice=round(fitted.measured.dice, 6),
        dice_before=round(before, 6),
        start=options.start,
        labels=tuple(sorted({name for case in job.training for name in case.labels})),
        training=tuple(case.image_id for case in job.training),
        validation=tuple(case.image_id for case in job.validation),
        epochs=end.epochs,
        seconds=round(end.seconds, 1),
        options={**asdict(options.plan), "trained_share": fitted.trained_share},
    )


def is_training(room: Path) -> bool:
    """Whether a process holds the folder of a training; one that was killed does not."""
    if not (room / LOCK).exists():
        return False
    try:
        with FileLock(room / LOCK, timeout=0.2):  # others that ask hold it for a moment
            return False
    except Timeout:
        return True


@contextmanager
def _alone(room: Path) -> Iterator[None]:
    """One training at a time; the lock of one that was killed is free again."""
    make_room(room)
    lock = FileLock(room / LOCK, timeout=1)  # `is_training` holds it for a moment
    try:
        lock.acquire()
    except Timeout as error:
        msg = "Another training of this studies folder runs; stop it or wait for its end."
        raise TrainingError(msg) from error
    except OSError as error:
        msg = f"{room} cannot be written ({error}); name another folder (--conf site_models DIR)."
        raise TrainingError(msg) from error
    try:
        for left in [*room.rglob(".*.part"), *room.glob("*.part")]:  # of one that was killed
            left.unlink(missing_ok=True)
        for left in room.glob(f"{TEMPORARY}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        lock.release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
