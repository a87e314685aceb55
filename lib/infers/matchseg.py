"""Infer task `matchseg`: `refseg`'s path with the network that this site trained."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from lib.errors import NoModelError, RefSegError
from lib.infers.refseg import RefSeg
from lib.runtime import ListLabels, Runtime
from lib.site.serving import SiteModel

logger = logging.getLogger(__name__)


class MatchSeg(InferTask):  # type: ignore[misc]  # MONAI Label is untyped
    """Segments by the datastore's labelled images, with the site's current model.

    Which model that is, is looked up at every request: a new one needs no restart.
    """

    def __init__(
        self, site: SiteModel, refseg: RefSeg, runtime: Runtime, list_labels: ListLabels
    ) -> None:
        """Nothing is loaded here.

        Args:
            site: the site's models.
            refseg: task of the same datastore, whose labels and options these are, too.
            runtime: of that task; its work behind requests waits for these, too.
            list_labels: the datastore's final labels, as they are now.
        """
        super().__init__(
            InferType.SEGMENTATION,
            {},
            3,
            "Segments by reference, with the network trained on this site's labels",
            refseg.config(),
        )
        self._site = site
        self._refseg = refseg
        self._main = runtime
        self._list_labels = list_labels
        self._task: tuple[Runtime, RefSeg] | None = None

    def is_valid(self) -> bool:
        """Whether this site has a model: `/info` hides the task until then."""
        return self._site.card() is not None

    def info(self) -> dict[str, Any]:
        """What `/info` shows; never waits, but gets a new model ready behind it."""
        self._site.prepare_soon()
        found: dict[str, Any] = {**self._refseg.info(), "description": self.description}
        card = self._site.card()
        if card is not None:
            found["segmenter"] = f"matchseg, model {card.version}"
            found["model"] = {"version": card.version, "date": card.date, "dice": card.dice}
        return found

    def __call__(self, request: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Answer one request with the current model.

        Raises:
            HTTPException: as `RefSeg`; 404 where there is no model yet, 503 where it is no good.
        """
        try:
            serving = self._site.serving()
        except NoModelError as error:
            raise HTTPException(404, str(error)) from error
        except RefSegError as error:
            raise HTTPException(503, str(error)) from error
        task = self._task
        if task is None or task[0] is not serving.runtime:
            task = (serving.runtime, RefSeg(serving.runtime, self._list_labels))
            self._task = task
        with self._main.pool.busy():
            file, params = task[1](request)
        params["model"] = {"version": serving.card.version, "dice": serving.card.dice}
        if serving.waiting is not None:
            params["warnings"] = [
                *params.get("warnings", []),
                f"Model {serving.waiting.version} is being made ready; "
                f"model {serving.card.version} answered.",
            ]
        return file, params
