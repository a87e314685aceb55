"""RefSeg on MONAI Label: `monailabel start_server --app apps/refseg --studies DIR`.

Run as a script, this file is RefSeg's command line: `python apps/refseg/main.py --help`.
"""

import sys
from pathlib import Path

# First, and for good: MONAI Label puts this folder on the path for the time of loading only, and
# makes an empty `lib` in it, which must not win over the real one.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":  # no server, so none of MONAI Label's imports
    from apps.refseg.cli import main

    sys.exit(main())

import logging
import os
from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException
from monailabel.config import settings as platform
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.batch_infer import BatchInferTask
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.tasks.activelearning.random import Random
from starlette.status import HTTP_503_SERVICE_UNAVAILABLE

from apps.refseg.server.page_parts import Parts
from lib.errors import RefSegError
from lib.infers.batch import RefSegBatch
from lib.infers.matchseg import MatchSeg
from lib.infers.refseg import RefSeg
from lib.machine import identity
from lib.reviewing.reviewer import Reviewer
from lib.runtime import Runtime
from lib.settings import from_conf
from lib.site.serving import SiteModel
from lib.site.store import ModelStore
from lib.strategies.ranked import PEERS, Desk, RankedStrategy
from lib.studies.datastore import StudiesDatastore, label_names, labelled_images
from lib.studies.dicomweb_store import open_dicomweb
from lib.trainers.automatic import AutomaticTraining
from lib.trainers.matchseg import MatchSegTrainer
from lib.types import LabelledImage

logger = logging.getLogger(__name__)

VERSION = "0.1.0"
SERVER = "_REFSEG_SERVER"  # in the environment of a training: whose it is


class RefSegApp(MONAILabelApp):  # type: ignore[misc]  # MONAI Label looks for this direct base
    """Builds the parts and wires them to MONAI Label; all else is in `lib`."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        """Load no network: that happens in the background, or when it is first needed."""
        self._settings = from_conf(conf or {})
        rooms = Path(app_dir) / "model"
        self._runtime = Runtime(self._settings, bank_root=rooms / "bank", studies=studies)
        self._site = SiteModel(
            ModelStore.of(self._settings, rooms / "site", studies),
            self._settings,
            bank_root=rooms / "bank",
            studies=studies,
            list_labels=self._labelled,
        )
        self._training = AutomaticTraining(
            self._site.store, self._settings.train_after, self._count_labelled
        )
        self._desk = Desk(self._runtime)
        self._reviewer = Reviewer(self._runtime)
        super().__init__(
            app_dir,
            studies,
            conf,
            name="RefSeg",
            description="Label a few, the others are segmented by reference to them",
            version=VERSION,
        )

    def parts(self) -> Parts:
        """What the pages of `serve` look at."""
        return Parts(
            runtime=self._runtime,
            site=self._site,
            desk=self._desk,
            reviewer=self._reviewer,
            task=self._task,
            segment=self._segment,
            answering=self._answering,
            datastore=self.datastore(),
        )

    def init_datastore(self) -> Datastore:
        """A folder with more kinds of files than the platform's default, a PACS, or a remote store.

        A PACS needs none of the tools that the platform would download.
        """
        if self.studies.startswith(("http://", "https://")):
            if platform.MONAI_LABEL_DATASTORE.lower() in ("xnat", "dsa"):
                return super().init_datastore()
            return open_dicomweb(
                self.studies,
                self._runtime.folder,
                ahead=self._settings.fetch_ahead,
                keep=self._settings.history,
            )
        copies = self._runtime.folder / "copies"
        return StudiesDatastore(self.studies, copies=copies, keep=self._settings.history)

    def init_infers(self) -> dict[str, InferTask]:
        """One task, whatever the networks, and one for the site's own model.

        3D Slicer runs the first that there is unless told otherwise, so the site's model comes
        first: it is hidden until one is there, and the first one is published only if its training
        was better than the bundled network. Nobody has compared it with SAM 2.
        """
        self._task = RefSeg(
            self._runtime,
            self._labelled,
            lambda found: self._reviewer.confidence(found.evidence, found.own_share),
        )
        own = MatchSeg(self._site, self._task, self._runtime, self._labelled)
        if self._runtime.names()[0] == "matchseg":
            return {"matchseg": own, "refseg": self._task}
        return {"refseg": self._task, "matchseg": own}

    def init_trainers(self) -> dict[str, TrainTask]:
        """Clients show the progress of the first."""
        server = os.environ.get(SERVER)
        return {"matchseg": MatchSegTrainer(self._site, self._settings, server=server)}

    def init_strategies(self) -> dict[str, Strategy]:
        """3D Slicer takes the first as its default; OHIF always asks for `random`."""
        names = ("refseg", "coverage", "uncertainty", "random", "first", *PEERS)
        desk, reviewer, images = self._desk, self._reviewer, self._settings.examine

        def judge(left: Mapping[str, Path]) -> Mapping[str, float]:
            reviewer.work_soon(self._labelled, left, images=images)
            return reviewer.risk()

        served: dict[str, Strategy] = {
            name: RankedStrategy(name, desk, judge=judge if images else None) for name in names
        }
        if self._settings.ohif:
            served["random"] = served["refseg"]
        return {**served, "monailabel_random": Random()}

    def init_batch_infer(self) -> BatchInferTask:
        """The platform's, made to run without a GPU."""
        return RefSegBatch()

    def on_init_complete(self) -> None:
        """Take up what changed while the server was down, behind its first answers."""
        super().on_init_complete()
        os.environ[SERVER] = identity()  # the platform starts trainings with it
        if self._settings.warm_up:
            self._runtime.sync_soon(self._labelled, warm=True)
            self._site.prepare_soon()

    def on_save_label(self, image_id: str, label_id: str) -> dict[str, Any]:
        """Start learning a new label; the next request waits for it. Never raises: it is stored."""
        super().on_save_label(image_id, label_id)
        names: list[str] = []
        try:
            for tag in self._settings.tags:
                info = self.datastore().get_label_info(label_id, tag)
                names += label_names(info).values()
        except Exception:
            logger.exception("the names of the label of %s cannot be told yet", image_id)
        try:
            self._desk.leases.saved(image_id)
        except RefSegError as error:  # such as a full disk
            logger.warning("the lease of %s ends later by itself: %s", image_id, error)
        except Exception:
            logger.exception("the lease of %s ends later by itself", image_id)
        self._runtime.sync_soon(self._labelled)
        self._site.sync_soon()
        self._task.announce(image_id, names)
        self._training.label_saved()
        return {"refseg": "being learned; the next segmentation refers to it"}

    def _segment(self, request: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """As 3D Slicer has it, unless told otherwise: by the first task that there is.

        Where the site's model is no good, `refseg` answers and says so.
        """
        first = next(task for task in self._infers.values() if task.is_valid())
        try:
            answer: tuple[str | None, dict[str, Any]] = first(request)
        except HTTPException as error:
            if first is self._task or error.status_code != HTTP_503_SERVICE_UNAVAILABLE:
                raise
            file, params = self._task(request)
            return file, {**params, "warnings": [str(error.detail), *params.get("warnings", [])]}
        return answer

    def _answering(self) -> Runtime | None:
        """Of the task that `_segment` asks first; None where its network is not loaded."""
        first = next(task for task in self._infers.values() if task.is_valid())
        if first is self._task:
            return self._runtime if self._runtime.ready else None
        serving = self._site.ready()
        return serving.runtime if serving is not None else None

    def _count_labelled(self) -> int:
        """How many images are labelled, by the table alone: no image is looked for or fetched."""
        list_labelled = self.datastore().get_labeled_images
        return len({image for tag in self._settings.tags for image in list_labelled(tag)})

    def _labelled(self) -> list[LabelledImage]:
        return labelled_images(self.datastore(), self._settings.tags)
