"""Batch inference that one bad image does not end, and that needs no GPU."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from fastapi import HTTPException
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.batch_infer import BatchInferTask

logger = logging.getLogger(__name__)


class RefSegBatch(BatchInferTask):  # type: ignore[misc]  # MONAI Label is untyped
    """MONAI Label's batch inference, which divides by the number of GPUs by default."""

    def __call__(
        self,
        request: Mapping[str, Any],
        datastore: Datastore,
        infer: Callable[..., dict[str, Any]],
    ) -> dict[str, Any]:
        """Run over the images asked for; what cannot be segmented is logged and left out."""

        def infer_or_log(one: dict[str, Any], store: Datastore) -> dict[str, Any]:
            try:
                return infer(one, store)
            except HTTPException as error:
                logger.warning("batch: %s is left out: %s", one.get("_image_id"), error.detail)
                return {}

        wanted = {**request, "multi_gpu": request.get("multi_gpu", True) and has_cuda()}
        found: dict[str, Any] = super().__call__(wanted, datastore, infer_or_log)
        return found


def has_cuda() -> bool:
    """Whether the platform's default, one worker a GPU, has any to count."""
    return torch.cuda.device_count() > 0
