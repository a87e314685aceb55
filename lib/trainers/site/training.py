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
from lib.trainers.site.loop import BEST, CHECKPOINT, LAST
from lib.trainers.site.progress import Reached, close_progress, read_reached, write_outcome
from lib.trainers.site.validation import TEMPORARY, Validator
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
    room = site.store.folder / WORKROOM
    device = str(choose_device(settings.device))
    current = _to_be_beaten(site, device)
    fitted = fit(labelled, room, options, settings, unlabelled=unlabelled, learned=current.learned)
    job = fitted.job
    validator = Validator(job.training, job.validation, settings, room=room)
    old, new = validator.measure(current.segmenter), fitted.measured
    figures = (
        f"Dice {new.dice:.4f} against {old.dice:.4f} of {current.name}, on "
        f"{len(job.validation)} validation images"
    )
    card = None
    if new.gain_over(old) > 0:  # `beats` would refuse what few images cannot tell, and mostly helps
        final = refit(fitted, options) if options.all_images else fitted.weights
        card = _card(fitted, options, old.dice, read_reached(room))
        from_all = final != fitted.weights
        measured = load_weights(fitted.weights) if from_all else None
        card = site.store.add(load_weights(final), card, measured=measured)
        site.publish(card)
        more = "; then it learned from these, too" if from_all else ""
        message = f"Published as model {card.version}: {figures}{more}."
    else:
        message = f"Not published: {figures}; {current.name} stays in use."
    for name in (CHECKPOINT, BEST, LAST, BLENDED, UNLABELLED):
        (room / name).unlink(missing_ok=True)
    close_progress(room)
    shutil.rmtree(room / ALL, ignore_errors=True)
    shutil.rmtree(room / CASES, ignore_errors=True)  # they are patients' images
    spent = time.monotonic() - start
    epochs = card.epochs if card is not None else fitted.end.epochs
    return TrainingReport(card is not None, new.dice, old.dice, card, epochs, spent, message)


@dataclass(frozen=True, eq=False)
class _Current:
    """What is to be beaten: its name, its network, and ids of the images that this learned from."""

    name: str
    segmenter: MatchSegSegmenter
    learned: tuple[str, ...] = ()


def _to_be_beaten(site: SiteModel, device: str) -> _Current:
    """The current model, as it was before it learned from all images.

    Otherwise images that it was measured on could not serve to measure again.
    """
    try:
        card = site.store.current()
        if card is not None:
            name = f"model {card.version}"
            try:
                twin = site.store.load_measured(card, device=device)
                return _Current(name, twin, card.training)
            except ModelStoreError as error:
                logger.warning("%s It is measured as it answers, on new images alone.", error)
                return _Current(name, site.store.load(card, device=device), card.learned)
    except ModelStoreError as error:
        logger.warning("%s The new model is measured against the bundled network.", error)
    return _Current("the bundled network", MatchSegSegmenter.load_bundled(device=device))


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
        options={
            **asdict(options.plan),
            "trained_share": fitted.trained_share,
            "trained_from": fitted.trained.stem,
        },
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
