"""Trainer `matchseg`: a request becomes checked options, a training the platform's answer."""

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import HTTPException
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask

from lib.errors import RefSegError, RequestError
from lib.machine import end_with, let_others_first
from lib.request_options import number, truth, whole
from lib.settings import RefSegSettings
from lib.site.serving import SiteModel
from lib.studies.datastore import image_paths, labelled_images
from lib.trainers.site.fitting import SCRATCH_RATE, TrainOptions
from lib.trainers.site.loop import SitePlan
from lib.trainers.site.progress import read_progress
from lib.trainers.site.training import WORKROOM, train_model

logger = logging.getLogger(__name__)

STARTS = ("bundled", "scratch")
OWN_PROCESS = "monailabel.interfaces.utils.app"  # what the platform runs there


class MatchSegTrainer(TrainTask):  # type: ignore[misc]  # MONAI Label is untyped
    """Trains the site's own model on the datastore's final labels.

    MONAI Label calls it in a process of its own, which builds the whole app again: all that it
    says to the server, it says by files.
    """

    def __init__(
        self, site: SiteModel, settings: RefSegSettings, *, server: str | None = None
    ) -> None:
        """Nothing is loaded here.

        Args:
            site: the site's models.
            settings: of the app.
            server: `identity` of the process that started this one, if one did. It is not looked
                up: it may be gone already, and on Windows a launcher is between the two.
        """
        super().__init__("Trains the site's own network on the labels submitted here")
        self._site = site
        self._settings = settings
        self._server = server

    def config(self) -> dict[str, Any]:
        """Options as 3D Slicer and OHIF show them: numbers, ticks, lists to choose from."""
        plan = SitePlan()
        return {
            "max_epochs": plan.epochs,
            "minutes": int(plan.minutes),
            "early_stop_patience": plan.patience,
            "val_split": 0.2,
            "start": list(STARTS),
            "unlabelled_images": True,
            "multi_gpu": True,
            "resume": True,
            "all_images": False,
            "rollback": False,
        }

    def stats(self) -> dict[str, Any]:
        """The last training in the fields that clients read; {} before the first. Never raises."""
        told = read_progress(self._site.store.folder / WORKROOM)
        if told is None:
            return {}
        found: dict[str, Any] = {
            "epoch": told.epoch,
            "total_epochs": told.total_epochs,
            "best_metric": told.best,
            "total_time": "" if told.running else _clock(told.seconds),
        }
        card = self._site.card()
        if card is not None:
            found["model"] = {"version": card.version, "dice": card.dice, "date": card.date}
        return found

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train, or roll back.

        Raises:
            HTTPException: 422 with a sentence; the platform shows it in the task's last lines.
        """
        if _in_own_process():
            let_others_first()  # whose annotators wait for the server
            if self._server is not None:  # no training without it, however it ended
                end_with(self._server)
        try:
            return run_request(request, self._site, self._settings, datastore)
        except RefSegError as error:
            logger.error("%s", error)
            raise HTTPException(422, str(error)) from None


def run_request(
    request: Mapping[str, Any], site: SiteModel, settings: RefSegSettings, datastore: Datastore
) -> dict[str, Any]:
    """Train, or roll back, and tell how it went.

    Raises:
        RefSegError: an option is not allowed, or it cannot be done; the message says what to do.
    """
    if truth(request, "rollback", False):
        return _rollback(site)
    options = parse_options(request)
    labelled = labelled_images(datastore, settings.tags)
    names = {one.image_id for one in labelled}
    # of a remote store every image would have to be fetched first
    near = options.unlabelled and isinstance(datastore, LocalDatastore)
    paths = image_paths(datastore) if near else {}
    others = [path for key, path in paths.items() if key not in names]
    report = train_model(site, settings, labelled, options, unlabelled=others)
    return {
        "message": report.message,
        "published": report.published,
        "model": report.card.version if report.card else None,
        "dice": round(report.dice, 4),
        "dice_before": round(report.dice_before, 4),
        "epochs": report.epochs,
        "total_time": _clock(report.seconds),
    }


def _rollback(site: SiteModel) -> dict[str, Any]:
    left = site.store.current()
    card = site.rollback()
    now = f"model {card.version} is in use" if card else "this site has no model of its own"
    message = f"Rolled back from model {left.version if left else '-'}: {now}."
    logger.info("%s", message)
    return {"message": message, "model": card.version if card else None}


def parse_options(request: Mapping[str, Any]) -> TrainOptions:
    """Check every value that is used; keys of the platform are let pass.

    Raises:
        RequestError: a value is not allowed; the message says what is.
    """
    # Choices go out as lists and come back as lists, the chosen one first.
    request = {k: v[0] if isinstance(v, list) and v else v for k, v in request.items()}
    start = request.get("start") or STARTS[0]
    if start not in STARTS:
        msg = f"start {start!r} is not allowed; allowed are {', '.join(STARTS)}."
        raise RequestError(msg)
    usual = asdict(SitePlan())
    rate = usual["rate"] if start == "bundled" else SCRATCH_RATE
    encoder_rate = usual["encoder_rate"] if start == "bundled" else SCRATCH_RATE
    regions = number(request, "regions", usual["regions"], 0, 1)
    plan = SitePlan(
        epochs=whole(request, "max_epochs", usual["epochs"], 1, 10_000),
        steps=whole(request, "steps_per_epoch", usual["steps"], 1, 100_000),
        minutes=number(request, "minutes", usual["minutes"], 0, 100_000),
        patience=whole(request, "early_stop_patience", usual["patience"], 0, 10_000),
        size=_size(request),
        images=whole(request, "images", usual["images"], 3, 64),
        rate=number(request, "rate", rate, 1e-7, 1),
        encoder_rate=number(request, "encoder_rate", encoder_rate, 0, 1),
        regions=regions,
        seed=whole(request, "seed", usual["seed"], 0, 2**31 - 1),
    )
    return TrainOptions(
        plan=plan,
        start="bundled" if start == "bundled" else "scratch",
        share=number(request, "val_split", 0.2, 0.05, 0.5),
        unlabelled=truth(request, "unlabelled_images", True),
        several_gpus=truth(request, "multi_gpu", True),
        resume=truth(request, "resume", True),
        all_images=truth(request, "all_images", False),
    )


def _in_own_process() -> bool:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec is not None and spec.name == OWN_PROCESS


def _size(request: Mapping[str, Any]) -> int:
    size = whole(request, "size", SitePlan().size, 0, 1024)
    if size % 32:
        msg = f"size {size} is not allowed; it is a multiple of 32, or 0 for the network's own."
        raise RequestError(msg)
    return size


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds))
