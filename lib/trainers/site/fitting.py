"""From labelled images to weights: pack, split, train, measure; then learn from all of them."""

import hashlib
import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from lib.errors import TrainingError
from lib.machine import identity
from lib.models.devices import choose_device
from lib.models.matchseg import BUNDLED, MatchSegSegmenter, load_weights
from lib.models.network import NetworkConfig
from lib.settings import RefSegSettings
from lib.trainers.site.blending import blend, mix
from lib.trainers.site.distributed import devices_for, run_on
from lib.trainers.site.loop import BEST, CHECKPOINT, LAST, SiteJob, SitePlan, train_site
from lib.trainers.site.packing import PackedCase, Rules, pack_cases, pack_unlabelled
from lib.trainers.site.progress import Reached, read_reached
from lib.trainers.site.split import FEWEST_CASES, split
from lib.trainers.site.validation import Validation, Validator
from lib.types import LabelledImage

logger = logging.getLogger(__name__)

CASES, UNLABELLED = "cases", "unlabelled.npy"  # in the folder, while a training is not over
ALL, FINAL = "all", "final.safetensors"  # of the second training, in a folder of its own
SCRATCH_RATE = 1e-3  # of all layers, where nothing was learned before
MOST_UNLABELLED = 64
SPOILED = 0.05  # of Dice lost on images that it has even learned from: chance takes less


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
        all_images: whether `refit` follows, for which half of the time is left.
    """

    plan: SitePlan = field(default_factory=SitePlan)
    start: Literal["bundled", "scratch"] = "bundled"
    share: float = 0.2
    unlabelled: bool = True
    several_gpus: bool = True
    resume: bool = True
    all_images: bool = False


@dataclass(frozen=True)
class Fitted:
    """What a training came to.

    Attributes:
        weights: of the last epoch, or the best, on the way back to those it started with.
        trained: weights before the way back.
        trained_share: of the trained weights in them, 0..1.
        job: what it had to learn from, and to measure on; in half of the time, if `refit` follows.
        measured: how good the weights are on the latter.
        end: how far it went.
    """

    weights: Path
    trained: Path
    trained_share: float
    job: SiteJob
    measured: Validation
    end: Reached


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
        learned: ids of images that the network to be beaten learned from: they are not measured on.

    Raises:
        TrainingError: see `train_model`.
    """
    if len(labelled) < FEWEST_CASES:
        msg = (
            f"{len(labelled)} images are labelled; training needs {FEWEST_CASES} at least (three "
            "to learn from, one to measure by). Label and submit more."
        )
        raise TrainingError(msg)
    device = choose_device(settings.device)
    rules = Rules(settings.annotation, settings.window, settings.axis_index)
    make_room(room)
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
    plan = options.plan
    half = replace(plan, epochs=math.ceil(plan.epochs / 2), minutes=plan.minutes / 2)
    both = half.epochs + _second_epochs(plan, half.epochs)
    job = SiteJob(
        folder=room,
        start=BUNDLED if options.start == "bundled" else None,
        config=config,
        training=training,
        validation=validation,
        unlabelled=extra,
        plan=half if options.all_images else plan,
        settings=settings,
        mark=_mark(options, config, training, validation),
        process=identity(),
        total=both if options.all_images else plan.epochs,
        schedule=(0, 0.5) if options.all_images else (0, 1),
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
    validator = Validator(training, validation, settings, room=room)
    kept = blend(
        job.start,
        room / LAST,
        room / BEST,
        validator,
        learned=len(training),
        device=str(device),
    )
    end = read_reached(room)
    return Fitted(kept.weights, kept.trained, kept.trained_share, job, kept.measured, end)


def refit(fitted: Fitted, options: TrainOptions) -> Path:
    """Go on from there with all cases, then back towards the start as far as the first went.

    Labels are few, and a fifth of them is much to do without. It takes at most as many epochs as
    the first training took in all, within its half of the minutes; the first one's rate has fallen
    to half, and now falls to its end. What it comes to cannot be measured, but for whether it is
    spoiled.

    Args:
        fitted: the training with cases kept to measure on.
        options: the same as for that.

    Returns:
        weights: of a file of their own, or those of `fitted`, if learning from all spoiled them.

    Raises:
        TrainingError: the disk or the GPU is full.
    """
    first = fitted.job
    room = first.folder / ALL
    make_room(room)
    if not options.resume:
        (room / CHECKPOINT).unlink(missing_ok=True)
    epochs = min(fitted.end.epochs, _second_epochs(options.plan, first.plan.epochs))
    job = replace(
        first,
        folder=room,
        start=fitted.trained,
        training=(*first.training, *first.validation),
        validation=(),
        plan=replace(first.plan, epochs=epochs, patience=0),
        mark=_digest(first.mark, epochs, _sha256(fitted.trained)),  # it goes on from these
        total=fitted.end.epochs + epochs,
        earlier=fitted.end,
        told=first.folder,
        schedule=(0.5, 1),
    )
    logger.info("learning from all %d images", len(job.training))
    device = choose_device(first.settings.device)
    run_on(devices_for(device, several=options.several_gpus), train_site, job)
    final = mix(first.start, room / LAST, fitted.trained_share, room / FINAL)
    validator = Validator(first.training, first.validation, first.settings, room=first.folder)
    found = validator.measure(MatchSegSegmenter.load(final, device=str(device)))
    if found.gain_over(fitted.measured) < -SPOILED:
        logger.warning("learning from all images spoiled it, so what was measured is kept")
        return fitted.weights
    return final


def _second_epochs(plan: SitePlan, first: int) -> int:
    return max(1, plan.epochs - first)


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
    start = _sha256(BUNDLED) if options.start == "bundled" else ""
    parts = (
        plan,
        options.start,
        options.all_images,
        start,
        config,
        [case.digest for case in training],
        [case.digest for case in validation],
    )
    return _digest(*parts)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def make_room(room: Path) -> None:
    """Make the folder that a training works in.

    Raises:
        TrainingError: it cannot be made.
    """
    try:
        room.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"{room} cannot be made ({error}); name another folder (--conf site_models DIR)."
        raise TrainingError(msg) from error
