"""`/refseg/`: the pool, the work list, one image with its mask, the bank and the models, as pages.

No script, nothing from elsewhere, nothing that a look at them would change: a mask is made when
its button is pressed, and then in the lane of all segmentations.
"""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

from fastapi import APIRouter, Form, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from monailabel.interfaces.utils.app import app_instance

from apps.refseg.server.access import Tokens
from apps.refseg.server.answers import request_id, translated
from apps.refseg.server.lanes import Lane
from apps.refseg.server.page_login import COOKIE, LOG_IN, LONGEST_S, PAGES, Sessions
from apps.refseg.server.page_view import ListQuery, View
from apps.refseg.server.platform import Lanes, until_gone
from lib.campaign.report import templates

T = TypeVar("T")

FOLDER = Path(__file__).parent / "templates"
POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {"Content-Security-Policy": POLICY, "X-Frame-Options": "DENY"}
BLANK = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="160" height="110" viewBox="0 0 160 110">'
    '<rect width="160" height="110" fill="#e7ebee"/><text x="80" y="60" text-anchor="middle" '
    'font-family="sans-serif" font-size="14" fill="#1d2329">no picture</text></svg>'
)
CHART_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}


def page_routes(
    lanes: Lanes, *, tokens: Tokens, sessions: Sessions, secure: bool = False
) -> APIRouter:
    """The pages.

    Args:
        lanes: where their work is done; the event loop only passes it on.
        tokens: any of them lets in; none: there is no log-in.
        sessions: of the browsers that are logged in.
        secure: the server speaks TLS, so that its cookie must never go without.
    """
    router = APIRouter(prefix=PAGES.rstrip("/"), include_in_schema=False)
    view = _lazily(lambda: View(app_instance().parts()))

    async def done(request: Request, lane: Lane, work: Callable[[View], T]) -> T:
        client = request.client.host if request.client else ""
        gone = until_gone(request)
        try:
            return await lane.run(lambda: work(view()), client=f"{client} pages", gone=gone)
        except Exception as error:
            raise translated(error) from error

    def shown(name: str, code: int = 200, **facts: object) -> HTMLResponse:
        text = _page(name).render(page=name, log_in=bool(tokens), **facts)
        return HTMLResponse(text.encode("utf-8", "replace"), code, HEADERS)  # names may be no text

    def refused(error: HTTPException) -> HTMLResponse:
        page = shown("problem.html", error.status_code, told=error, mark=request_id.get())
        page.headers.update(dict(error.headers or {}))
        return page

    async def page(
        request: Request, name: str, gather: Callable[[View], dict[str, Any]]
    ) -> Response:
        """A page of facts; templates are filled in the thread, too."""
        try:
            return await done(request, lanes.page, lambda v: shown(name, **gather(v)))
        except HTTPException as error:
            return refused(error)

    async def file(
        request: Request, kind: str, make: Callable[[View], bytes], headers: dict[str, str]
    ) -> Response:
        try:
            return Response(await done(request, lanes.page, make), 200, headers, kind)
        except HTTPException as error:
            return refused(error)

    @router.get("/")
    async def overview(request: Request) -> Response:
        return await page(request, "overview.html", _overview)

    @router.get("/images")
    async def images(request: Request) -> Response:
        given = dict(request.query_params)
        return await page(
            request, "images.html", lambda v: {"listed": v.listed(ListQuery.parse(given))}
        )

    @router.get("/image")
    async def image(request: Request, image: str = "", slice: str = "") -> Response:  # noqa: A002
        return await page(
            request,
            "image.html",
            lambda v: {"sheet": v.sheet(image, slice), "known": v.look().rows},
        )

    @router.post("/image")
    async def segment(request: Request, image: str = Form("")) -> Response:
        try:
            await done(request, lanes.infer, lambda v: v.segment(image))
        except HTTPException as error:
            return refused(error)
        return RedirectResponse(address("image", image=image), 303, HEADERS)

    @router.get("/status")
    async def status(request: Request, follow: str = "") -> Response:
        return await page(
            request, "status.html", lambda v: {"status": v.status(), "follow": follow == "1"}
        )

    @router.get("/picture")
    async def picture(
        request: Request,
        image: str = "",
        slice: str = "",  # noqa: A002
        axis: str = "",
        over: str = "",
        large: str = "",
    ) -> Response:
        def make(v: View) -> bytes:
            return v.picture(image, number=slice, axis=axis, over=over, large=large == "1")

        answer = await file(request, "image/jpeg", make, HEADERS)
        if answer.status_code != 200:  # who sees a page sees that, too, and the page says why
            return Response(BLANK, answer.status_code, HEADERS, "image/svg+xml")
        return answer

    @router.get("/map.svg")
    async def pool_map(request: Request) -> Response:
        def make(v: View) -> bytes:
            if v.map.drawn is None:
                raise HTTPException(404, "There is no map yet.")
            return v.map.drawn.svg

        return await file(request, "image/svg+xml", make, CHART_HEADERS)

    @router.get("/training.svg")
    async def training(request: Request) -> Response:
        return await file(request, "image/svg+xml", View.training_chart, CHART_HEADERS)

    @router.get("/style.css")
    async def style() -> Response:
        return Response(_style(), 200, {"Cache-Control": "max-age=300"}, "text/css")

    @router.get(LOG_IN.removeprefix("/refseg"))
    async def log_in() -> Response:
        return shown("login.html", wrong=False)

    @router.post(LOG_IN.removeprefix("/refseg"))
    async def log_in_with(token: str = Form("")) -> Response:
        if not tokens.accept(token.strip()):
            return shown("login.html", 401, wrong=True)
        answer = RedirectResponse(PAGES, 303, HEADERS)
        answer.set_cookie(
            COOKIE,
            sessions.open(),
            max_age=int(LONGEST_S),
            path=PAGES,
            httponly=True,
            samesite="strict",
            secure=secure,
        )
        return answer

    @router.post("/logout")
    async def log_out(request: Request) -> Response:
        sessions.close(request.cookies.get(COOKIE, ""))
        answer = RedirectResponse(LOG_IN, 303, HEADERS)
        answer.delete_cookie(COOKIE, path=PAGES)
        return answer

    @router.get("/{rest:path}")
    async def nothing(rest: str) -> Response:
        del rest
        return refused(HTTPException(404, "There is no such page."))

    return router


def address(name: str, **query: object) -> str:
    """A page or picture of ours; what is empty is left out."""
    given = {key: value for key, value in query.items() if value not in ("", None)}
    return f"{PAGES}{name}{'?' if given else ''}{urlencode(given)}"


def _overview(view: View) -> dict[str, Any]:
    look = view.look()
    return {"look": look, "drawn": view.drawn(look), "drawing": view.map.drawing}


def _lazily(make: Callable[[], T]) -> Callable[[], T]:
    """The app is made after the routes are."""
    return lru_cache(maxsize=1)(make)


@lru_cache(maxsize=1)
def _templates() -> Any:
    found = templates(FOLDER)
    found.globals["address"] = address
    found.globals["color_name"] = color_name
    found.globals["style_mark"] = hashlib.sha256(_style()).hexdigest()[:8]  # browsers keep it
    return found


def _page(name: str) -> Any:
    return _templates().get_template(name)


@lru_cache(maxsize=1)
def _style() -> bytes:
    return (FOLDER / "style.css").read_bytes()


def color_name(number: int) -> str:
    """The class by which the style sheet gives a label its color."""
    return f"label{(number - 1) % 8 + 1}"
