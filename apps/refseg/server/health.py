"""Whether the server lives, whether it can work, and its figures for Prometheus."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from apps.refseg.server.observe import Metrics

LOOK_TIMEOUT_S = 3.0  # a network share that is gone answers much later, or never


def health_routes(metrics: Metrics, *, studies: str, stopping: Callable[[], bool]) -> APIRouter:
    """`/healthz`, `/readyz` and `/metrics`; none is in the OpenAPI description, as of the platform.

    Args:
        metrics: what `/metrics` shows.
        studies: folder or URL.
        stopping: whether the server has been asked to stop.
    """
    router = APIRouter(include_in_schema=False)

    @router.get("/healthz")
    async def alive() -> dict[str, str]:
        return {"status": "alive"}

    @router.get("/readyz")
    async def ready() -> JSONResponse:
        problem = "the server is being stopped" if stopping() else await _look(studies)
        if problem:
            return JSONResponse({"status": "not ready", "why": problem}, 503, {"Retry-After": "5"})
        return JSONResponse({"status": "ready"})

    @router.get("/metrics")
    async def figures() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


async def _look(studies: str) -> str:
    """What keeps the studies from being served; nothing of a URL, which clients will be told."""
    if studies.startswith(("http://", "https://")):
        return ""
    look = asyncio.to_thread(_look_at_folder, Path(studies))
    try:
        return await asyncio.wait_for(look, LOOK_TIMEOUT_S)
    except asyncio.TimeoutError:
        return "the studies folder does not answer"


def _look_at_folder(folder: Path) -> str:
    try:
        next(os.scandir(folder), None)
    except OSError as error:
        return f"the studies folder cannot be read ({type(error).__name__})"
    return ""
