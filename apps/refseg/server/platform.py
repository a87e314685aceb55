"""MONAI Label's application with its own functions, run in threads instead of on the event loop.

Its endpoints are `async def`, yet never wait: each would hold up all other requests. Here each
route is made anew from the same function, path and options, and the function is called in a lane
of threads, after the request was checked. Answers and OpenAPI stay what they were.
"""

import asyncio
import functools
import inspect
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from monailabel.config import settings as platform_settings
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.async_tasks.utils import background_processes, stop_background_task
from starlette.background import BackgroundTasks
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response
from starlette.routing import Mount

from apps.refseg.server.answers import http_problem, invalid_request, translated
from apps.refseg.server.checks import check_arguments, client_of, not_served, with_argument
from apps.refseg.server.lanes import Lane
from apps.refseg.server.options import ServeOptions
from apps.refseg.server.temporary import note_temporary_files, remove
from lib.studies.datastore import extensions

logger = logging.getLogger(__name__)

STOP_PATIENCE_S = 10.0  # a job ends with its batch of slices
OURS = "refseg_request"  # the argument by which a route's function is given its request


@dataclass(frozen=True)
class Lanes:
    """Who may hold up whom: segmentations wait for segmentations, next samples for each other.

    Attributes:
        infer: the networks' work, bounded by the server's owner.
        sample: one at a time, so that no two clients are given the same image.
        tasks: starts of training, scoring and batches, whose platform code is not made for threads.
        general: all else, which is quick.
        page: our own pages, which read images to draw them.
    """

    infer: Lane
    sample: Lane
    tasks: Lane
    general: Lane
    page: Lane

    @classmethod
    def of(cls, options: ServeOptions) -> "Lanes":
        """The lanes of one server."""
        return cls(
            infer=Lane("infer", at_once=options.infer_at_once, waiting=options.infer_queue),
            sample=Lane("sample", at_once=1, waiting=256),
            tasks=Lane("tasks", at_once=1, waiting=16),
            general=Lane("general", at_once=16, waiting=1024),
            page=Lane("page", at_once=3, waiting=256),
        )

    def all(self) -> tuple[Lane, ...]:
        """In no order."""
        return self.infer, self.sample, self.tasks, self.general, self.page

    def for_route(self, path: str, methods: "set[str]") -> Lane:
        """The lane of a route."""
        if path.startswith("/infer"):
            return self.infer
        if path.startswith("/activelearning"):
            return self.sample
        if path.startswith(("/train", "/batch", "/scoring")) and "POST" in methods:
            return self.tasks
        return self.general


def build(lanes: Lanes, more: Sequence[APIRouter] = ()) -> FastAPI:
    """MONAI Label's application, off the event loop.

    Args:
        lanes: where its functions run.
        more: routes of ours, which come first.
    """
    from monailabel import app as platform

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        async with platform.lifespan(app):
            yield
            await _end(lanes)

    app = FastAPI(
        title=platform.app.title,
        openapi_url=platform.app.openapi_url,
        docs_url=None,
        redoc_url="/docs",
        lifespan=lifespan,
        exception_handlers={
            StarletteHTTPException: http_problem,
            RequestValidationError: invalid_request,
        },
    )
    for router in more:
        app.include_router(router)
    for mount in platform.app.routes:
        if isinstance(mount, Mount):
            app.router.routes.append(mount)
    for route in _routes(platform):
        app.router.routes.append(_off_loop(route, lanes))
    return app


async def _end(lanes: Lanes) -> None:
    """Leave nothing behind: no training without its server, no half-done segmentation."""
    for method in list(background_processes):
        stop_background_task(method)
    ended = await asyncio.gather(*(lane.close(STOP_PATIENCE_S) for lane in lanes.all()))
    if not all(ended):
        logger.warning("stopped while work was still being done; nothing of it was stored")


def _routes(platform: Any) -> list[APIRoute]:
    """The platform's routes in its order, those of its routers with their full paths."""
    routers = (
        platform.info,
        platform.model,
        platform.infer,
        platform.wsi_infer,
        platform.batch_infer,
        platform.train,
        platform.activelearning,
        platform.scoring,
        platform.datastore,
        platform.logs,
        platform.ohif,
        platform.proxy,
        platform.session,
    )
    found = [route for module in routers for route in module.router.routes]
    found += platform.app.routes
    skipped = (
        ("/reload", "/proxy/") if "://" in platform_settings.MONAI_LABEL_STUDIES else ("/reload",)
    )
    routes = [route for route in found if isinstance(route, APIRoute)]
    return [route for route in routes if not route.path.startswith(skipped)]  # see `pacs_proxy`


def _off_loop(route: APIRoute, lanes: Lanes) -> APIRoute:
    return APIRoute(
        route.path,
        _in_lane(route, lanes.for_route(route.path, route.methods or set())),
        name=route.name,
        methods=route.methods,
        tags=route.tags,
        summary=route.summary,
        description=route.description,
        responses=route.responses,
        deprecated=route.deprecated,
        include_in_schema=route.include_in_schema,
    )


def _in_lane(route: APIRoute, lane: Lane) -> Callable[..., Coroutine[Any, Any, Any]]:
    endpoint = route.endpoint
    told = inspect.signature(endpoint).parameters.values()
    its_own = [argument.name for argument in told if argument.annotation is Request]

    @functools.wraps(endpoint)
    async def call(**given: Any) -> Any:
        request: Request = given.pop(OURS)
        given |= dict.fromkeys(its_own, request)  # FastAPI fills in one such argument, not two
        background = given.get("background_tasks")
        if isinstance(background, BackgroundTasks):  # routes that take uploads have one
            background.add_task(remove, note_temporary_files())
        try:
            address = request.client.host if request.client else ""
            # not in the lane: what is wrong is told at once, however many wait there
            client = await run_in_threadpool(_checked, route.path, given, address)
            if isinstance(given.get("request"), Request):
                await request.body()  # kept by the request, so that the function need not wait
            return await lane.run(
                functools.partial(_answer, endpoint, given, infer=route.path.startswith("/infer")),
                client=client,
                gone=until_gone(request),
            )
        except Exception as error:
            if isinstance(background, BackgroundTasks):
                await background()  # FastAPI does it after a success only
            raise translated(error) from error

    call.__signature__ = with_argument(endpoint, OURS, Request)  # type: ignore[attr-defined]
    return call


def _checked(path: str, given: Mapping[str, Any], address: str) -> str:
    """Who asks, if the request may be answered; in a thread, since archives may be long."""
    nothing = not_served(path, given, platform_settings.MONAI_LABEL_STUDIES)
    if nothing:
        raise HTTPException(404, nothing)
    check_arguments(path, given, served_endings)
    return client_of(given, address)


def _answer(
    endpoint: Callable[..., Coroutine[Any, Any, Any]], given: Mapping[str, Any], *, infer: bool
) -> Any:
    """Call a function of the platform, in a thread, and make its answer there, too."""
    image = given.get("image")
    if infer and isinstance(image, str) and image and Path(image).exists():
        given = {**given, "image": _file_of(image)}
    result = _run_to_end(endpoint(**given))
    return result if isinstance(result, Response) else JSONResponse(jsonable_encoder(result))


def _file_of(image_id: str) -> str:
    """The platform takes an id for a file of that name in the server's own working folder."""
    datastore = app_instance().datastore()
    if image_id not in datastore.list_images():
        raise HTTPException(404, "The image is not in the datastore. Look at GET /datastore/.")
    return str(datastore.get_image_uri(image_id))


def _run_to_end(coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    msg = f"{coroutine} waits for something, which it must not do in a thread"
    raise RuntimeError(msg)


async def until_gone(request: Request) -> None:
    """Wait until the client closes its connection; the body has been read by now."""
    while (await request.receive())["type"] != "http.disconnect":
        await asyncio.sleep(0)


def served_endings() -> list[str]:
    """Extensions of images and labels that the datastore takes, lower case."""
    return sorted({pattern.replace("*", "").lower() for pattern in extensions()})
