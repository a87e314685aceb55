"""How much and how slowly a client may send."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import h11
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from apps.refseg.server.access import OPEN_PATHS
from apps.refseg.server.answers import send_problem
from apps.refseg.server.options import ServeOptions
from apps.refseg.server.page_login import OPEN_PAGES

KILOBYTE = 1 << 10
LARGEST_LOG_IN = 64 * KILOBYTE  # whoever sends it has shown no token yet; it holds one
LARGEST_QUESTION = 2048 * KILOBYTE  # a form with JSON, of which `checks` takes a megabyte
PUT_IMAGES = frozenset({"/datastore", "/datastore/image", "/datastore/label", "/session"})
POST_IMAGES = ("/infer/", "/proxy/dicom/")  # and what is below them

# The slowest of mobile networks (GPRS) sends more; who sends less wants to hold a place.
SLOWEST = 1 * KILOBYTE  # bytes a second in the mean, once a body has taken `--body-timeout`
# A browser opens six connections, 3D Slicer one. Most systems let a process open 1024 files, of
# which the studies and the bank need some.
MOST_REQUESTS = 512  # with more connections than that, requests are answered with 503
MOST_CONNECTIONS = MOST_REQUESTS + 128  # and with more than that, they are closed at once


class _EndedError(Exception):
    """The body ends here, whatever the client still sends."""


@dataclass
class _Body:
    """What is known of one request's body.

    Attributes:
        largest: bytes that it may have.
        got: bytes so far.
        waited_s: how long we have waited for them; not the time in which we did something else.
        more: whether the client has announced more.
        ended: status and sentence, if it was ended by us.
    """

    largest: int
    got: int = 0
    waited_s: float = 0.0
    more: bool = True
    ended: tuple[int, str] | None = None


class Limits:
    """Ends requests whose body is too large, comes too slowly, or stays out for too long."""

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self._app = app
        self._largest = options.max_upload
        self._pause_s = options.body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body counted, or answer with 400, 408 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if any(ord(character) < 32 or ord(character) == 127 for character in scope["path"]):
            await send_problem(send, 400, "The path holds a control character.")
            return
        if any(part in (".", "..") for part in scope["path"].replace("\\", "/").split("/")):
            await send_problem(send, 400, "The path holds '..': name what you want directly.")
            return
        body = _Body(largest=largest_body(scope["method"], scope["path"], self._largest))
        told = Headers(scope=scope).get("content-length", "")
        if told.isdecimal() and int(told) > body.largest:
            await send_problem(send, 413, self._too_much(body))
            return
        await self._app(scope, self._counted(receive, body), _answered_by_us(send, body))

    def _counted(self, receive: Receive, body: _Body) -> Receive:
        async def counted() -> Message:
            if not body.more:  # waits for the client to leave, however long that takes
                return await receive()
            start = time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), self._pause_s)
            except asyncio.TimeoutError:
                text = f"Nothing came for {self._pause_s:g} seconds, and more was announced."
                body.ended = (408, text)
                raise _EndedError from None
            body.waited_s += time.monotonic() - start
            body.got += len(message.get("body", b""))
            body.more = message["type"] == "http.request" and bool(message.get("more_body"))
            if body.more and body.waited_s > max(self._pause_s, body.got / SLOWEST):
                text = (
                    f"{body.got} bytes came in {body.waited_s:.0f} seconds, and more was "
                    f"announced; at least {SLOWEST} a second are needed."
                )
                body.ended = (408, text)
                raise _EndedError
            if body.got > body.largest:
                body.ended = (413, self._too_much(body))
                raise _EndedError
            return message

        return counted

    def _too_much(self, body: _Body) -> str:
        if body.largest < self._largest:
            return (
                f"The request has more than {body.largest} bytes, the most that is read at this "
                "address: it takes no images. Send less."
            )
        return (
            f"The request has more than {body.largest} bytes; --max-upload-mb of the server "
            "sets how many are allowed."
        )


def largest_body(method: str, path: str, upload: int) -> int:
    """How many bytes a request may have: only where images are taken, as many as an upload."""
    if path in OPEN_PATHS | OPEN_PAGES or f"{path}/".startswith("/auth/"):
        return min(LARGEST_LOG_IN, upload)
    if method == "PUT" and path.rstrip("/") in PUT_IMAGES:
        return upload
    if method == "POST" and path.startswith(POST_IMAGES):
        return upload
    return min(LARGEST_QUESTION, upload)


def _answered_by_us(send: Send, body: _Body) -> Send:
    """FastAPI calls any error while it reads a body a 400: here it is called by its name."""
    told = False

    async def answer(message: Message) -> None:
        nonlocal told
        if body.ended is None:
            await send(message)
        elif not told:
            told = True
            await send_problem(send, *body.ended, {"Connection": "close"})

    return answer


def prompt_protocol(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP/1.1, with an end for clients that do not finish what they have begun.

    uvicorn's own clock runs while a connection says nothing between two requests; a single byte
    stops it. Here each request's headers, and what a client still sends of a body once it has
    been answered, have so many seconds in all. While we read or answer, `Limits` counts.
    """

    class PromptProtocol(H11Protocol):
        _owed: Any = None  # the state of our side of HTTP in which the client has to send
        _clock: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > MOST_CONNECTIONS:
                transport.abort()
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop_clock()

        def _watch(self) -> None:
            state = self.conn.our_state
            owed = state if state in (h11.IDLE, h11.DONE) else None
            if owed is self._owed:
                return
            self._stop_clock()
            self._owed = owed
            if owed is not None and not self.transport.is_closing():
                self._clock = self.loop.call_later(seconds, self.transport.close)

        def _stop_clock(self) -> None:
            if self._clock is not None:
                self._clock.cancel()
                self._clock = None

    return PromptProtocol
