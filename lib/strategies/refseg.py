"""Strategy `refseg`: the next image to label is the one that covers the unlabelled ones best."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from fastapi import HTTPException
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy

from lib.datastore import given_before, image_paths, leased_to_others
from lib.errors import RefSegError
from lib.retrieval.coverage import coverage_order
from lib.runtime import Runtime

logger = logging.getLogger(__name__)

SECONDS_A_CALL = 4.0  # of embedding within a request, which blocks the server's other clients


class RefSegStrategy(Strategy):
    """Greedy coverage over embeddings that are computed once and kept.

    Labelled images are the first centers, and so are images that a client was given a moment ago:
    they are about to be labelled. To ask again is to skip: a client is given its own again, the
    oldest first, when nothing else is free. Images not embedded yet wait for a later call.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__("The image that stands for most of what is not labelled yet")
        self._runtime = runtime

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Choose an image; None if none is left.

        Raises:
            HTTPException: 503 where weights or the bank's folder cannot be used.
        """
        paths = image_paths(datastore)
        chosen = self._runtime.settings
        free = set(datastore.get_unlabeled_images()) & paths.keys()
        client_id = str(request.get("client_id") or "admin")  # as the endpoint records it
        lease = chosen.lease
        free -= leased_to_others(datastore, sorted(free), client_id=client_id, seconds=lease)
        own = given_before(datastore, sorted(free), client_id=client_id, seconds=lease)
        free = free - own.keys() or {name for name in own if own[name] == min(own.values())}
        if not free:
            logger.info("no image is left to be labelled")
            return None
        try:
            known = self._runtime.pool.embeddings(paths, first=free, seconds=SECONDS_A_CALL)
        except RefSegError as error:
            raise HTTPException(503, str(error)) from error
        ids = sorted(known)
        groups = np.repeat(np.arange(len(ids)), [len(known[image_id]) for image_id in ids])
        taken = np.array([image_id not in free for image_id in ids], bool)
        order = (
            coverage_order(
                np.concatenate([known[image_id] for image_id in ids]),
                groups,
                taken[groups],
                1,
                chosen.seed,
            )
            if ids
            else []
        )
        if order:
            choice, gain = ids[order[0].group], order[0].gain
        else:  # none of the free images could be read: still let a person look at one
            choice, gain = min(free), 0.0
        waiting = len(paths) - len(ids)
        message = f"{waiting} images are not compared yet; they are soon." if waiting else ""
        logger.info("next image: %s (gain %.4f) %s", choice, gain, message)
        return {
            "id": choice,
            "gain": round(float(gain), 6),
            "embedded": len(ids),
            "images": len(paths),
            "message": message,
        }
