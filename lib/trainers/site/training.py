"""From labelled images to a published model: pack, split, train, measure against the current."""

import hashlib
import logging
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from filelock import FileLock, Timeout

from lib.durable import write_json
from lib.errors import ModelStoreError, TrainingError
from lib.machine import identity
from lib.models.devices import choose_device
from lib.models.matchseg import BUNDLED, MatchSegSegmenter, load_weights
from lib.models.network import NetworkConfig
from lib.settings import RefSegSettings
from lib.site.serving import SiteModel
from lib.site.store import ModelCard
from lib.trainers.site.blending import BLENDED, blend
from lib.trainers.site.distributed import devices_for, run_on
from lib.trainers.site.loop import BEST, CHECKPOINT, LOG, SiteJob, SitePlan, train_site
from lib.trainers.site.packing import PackedCase, Rules, pack_cases, pack_unlabelled
from lib.trainers.site.split import FEWEST_CASES, split
from lib.trainers.site.validation import TEMPORARY, Validation, Validator
from lib.types import LabelledImage

logger = logging.getLogger(__name__)

LOCK = ".lock"
WORKROOM = "training"  # folder beside the versions: data, checkpoint, progress
OUTCOME = "outcome.json"  # in it: what the last training came to, in a sentence
CASES, UNLABELLED = "cases", "unlabelled.npy"  # in it, while a training is not over
SCRATCH_RATE = 1e-3  # of all layers, where nothing was learned before
MOST_UNLABELLED = 64


@dataclass(frozen=True)
class TrainOptions:
    """How to train; see `SitePlan` for the loop's own.

    Attributes:
        plan: of the loop.
        start: "bundled" weights, or "scratch".
        share: of the cases that are kept to measure on.
        unlabelled: whether region tasks use images without labels, too.
        several_gpus: whether to use all GPUs there are.
        resume: whether to go on with a training that was stopped.
    """

    plan: SitePlan = field(default_factory=SitePlan)
    start: Literal["bundled", "scratch"] = "bundled"
    share: float = 0.2
    unlabelled: bool = True
    several_gpus: bool = True
    resume: bool = True


@dataclass(frozen=True)
class Fitted:
    """What a training came to.

    Attributes:
        weights: of the best epoch, or between these and those it started with.
        trained_share: of the trained weights in them, 0..1.
        training: cases learned from.
        validation: cases measured on.
        measured: how good the weights are on these.
        epochs: done.
        seconds: spent.
    """

    weights: Path
    trained_share: float
    training: tuple[PackedCase, ...]
    validation: tuple[PackedCase, ...]
    measured: Validation
    epochs: int
    seconds: float


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
        _tell(room, "", failed=False)
        try:
            report = _train(site, settings, labelled, options, unlabelled)
        except Exception as error:
            _tell(room, str(error) or type(error).__name__, failed=True)
            raise
        _tell(room, report.message, failed=False)
    logger.info("%s", report.message)
    return report


def _train(
    site: SiteModel,
    settings: RefSegSettings,
    labelled: Sequence[LabelledImage],
    options: TrainOptions,
    unlabelled: Sequence[Path],
) -> TrainingReport:
    store = site.store
    room = store.folder / WORKROOM
    in_use = site.card()
    learned = in_use.training if in_use is not None else ()
    fitted = fit(labelled, room, options, settings, unlabelled=unlabelled, learned=learned)
    validator = Validator(fitted.training, fitted.validation, settings, room=room)
    device = str(choose_device(settings.device))
    current, before = _current(site, device)
    old, new = validator.measure(before), fitted.measured
    what = f"model {current.version}" if current else "the bundled network"
    figures = (
        f"Dice {new.dice:.4f} against {old.dice:.4f} of {what}, on "
        f"{len(fitted.validation)} validation images"
    )
    card = None
    if new.gain_over(old) > 0:  # `beats` would refuse what few images cannot tell, and mostly helps
        net = load_weights(fitted.weights)
        card = store.add(net, _card(fitted, options, new.dice, old.dice))
        site.publish(card)
        message = f"Published as model {card.version}: {figures}."
    else:
        message = f"Not published: {figures}; {what} stays in use."
    for name in (CHECKPOINT, BEST, BLENDED, UNLABELLED):
        (room / name).unlink(missing_ok=True)
    shutil.rmtree(room / CASES, ignore_errors=True)  # they are patients' images
    return TrainingReport(
        card is not None, new.dice, old.dice, card, fitted.epochs, fitted.seconds, message
    )


def _tell(room: Path, message: str, *, failed: bool) -> None:
    """Note how it ended, or, without a message, that this process trains."""
    try:
        write_json(room / OUTCOME, {"message": message, "failed": failed, "process": identity()})
    except OSError as error:
        logger.warning("it cannot be noted how the training goes: %s", error)


def fit(
    labelled: Sequence[LabelledImage],
    room: Path,
    options: TrainOptions,
    settings: RefSegSettings,
    *,
    unlabelled: Sequence[Path] = (),
    learned: Collection[str] = (),
) -> Fitted:
    """Train without publishing; goes on where an earlier call in this folder was stopped.

    Args:
        labelled: images with their labels.
        room: folder for data, checkpoint and weights.
        options: how to train.
        settings: how images are cut, and the device.
        unlabelled: images for region tasks.
        learned: ids of images that the model to be beaten learned from: they are not measured on.

    Raises:
        TrainingError: see `train_model`.
    """
    start = time.monotonic()
    if len(labelled) < FEWEST_CASES:
        msg = (
            f"{len(labelled)} images are labelled; training needs {FEWEST_CASES} at least (three "
            "to learn from, one to measure by). Label and submit more."
        )
        raise TrainingError(msg)
    device = choose_device(settings.device)
    rules = Rules(settings.annotation, settings.window, settings.axis_index)
    _make(room)
    logger.info("reading %d labelled images", len(labelled))
    cases = pack_cases(labelled, room / CASES, rules)
    chosen = split(cases, share=options.share, seed=options.plan.seed, learned=learned)
    training = tuple(cases[i] for i in chosen.training)
    validation = tuple(cases[i] for i in chosen.validation)
    if not any(case.present.any() for case in training):
        msg = "No label is drawn on any of the images to learn from; label what is to be found."
        raise TrainingError(msg)
    extra = None
    if options.unlabelled and unlabelled and options.plan.regions > 0:
        picks = np.random.default_rng(options.plan.seed).permutation(len(unlabelled))
        some = [sorted(unlabelled)[i] for i in picks[:MOST_UNLABELLED]]
        extra = pack_unlabelled(some, room / UNLABELLED, rules)
    if not options.resume:
        (room / CHECKPOINT).unlink(missing_ok=True)
    config = load_weights(BUNDLED).config
    job = SiteJob(
        folder=room,
        start=BUNDLED if options.start == "bundled" else None,
        config=config,
        training=training,
        validation=validation,
        unlabelled=extra,
        plan=options.plan,
        settings=settings,
        mark=_mark(options, config, training, validation),
        process=identity(),
    )
    slices = sum(map(len, training))
    logger.info(
        "learning from %d slices of %d images, measuring on %d images, labels: %s",
        slices,
        len(training),
        len(validation),
        ", ".join(sorted({name for case in cases for name in case.labels})),
    )
    run_on(devices_for(device, several=options.several_gpus), train_site, job)
    if not (room / BEST).exists():
        msg = "Training ended before its first epoch did; give it more minutes."
        raise TrainingError(msg)
    epochs = max(0, len((room / LOG).read_text(encoding="utf-8").splitlines()) - 1)
    validator = Validator(training, validation, settings, room=room)
    best = blend(job.start, room / BEST, validator, device=str(device))
    return Fitted(
        best.weights,
        best.trained_share,
        training,
        validation,
        best.measured,
        epochs,
        time.monotonic() - start,
    )


def _current(site: SiteModel, device: str) -> tuple[ModelCard | None, MatchSegSegmenter]:
    """What answers now and is to be beaten."""
    try:
        card = site.store.current()
        if card is not None:
            return card, site.store.load(card, device=device)
    except ModelStoreError as error:
        logger.warning("%s The new model is measured against the bundled network.", error)
    return None, MatchSegSegmenter.load_bundled(device=device)


def _card(fitted: Fitted, options: TrainOptions, dice: float, before: float) -> ModelCard:
    return ModelCard(
        dice=round(dice, 6),
        dice_before=round(before, 6),
        start=options.start,
        labels=tuple(sorted({name for case in fitted.training for name in case.labels})),
        training=tuple(case.image_id for case in fitted.training),
        validation=tuple(case.image_id for case in fitted.validation),
        epochs=fitted.epochs,
        seconds=round(fitted.seconds, 1),
        options={**asdict(options.plan), "trained_share": fitted.trained_share},
    )


def _mark(
    options: TrainOptions,
    config: NetworkConfig,
    training: Sequence[PackedCase],
    validation: Sequence[PackedCase],
) -> str:
    """Of all but how long: a stopped training may be given more time."""
    plan = {
        key: value
        for key, value in asdict(options.plan).items()
        if key not in ("epochs", "minutes", "patience")
    }
    start = hashlib.sha256(BUNDLED.read_bytes()).hexdigest() if options.start == "bundled" else ""
    parts = (
        plan,
        options.start,
        start,
        config,
        [case.digest for case in training],
        [case.digest for case in validation],
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _make(room: Path) -> None:
    try:
        room.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"{room} cannot be made ({error}); name another folder (--conf site_models DIR)."
        raise TrainingError(msg) from error


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
    _make(room)
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
