"""How much and how slowly a client may send."""

import asyncio
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from apps.refseg.server.answers import send_problem
from apps.refseg.server.options import ServeOptions


class _EndedError(Exception):
    """The body ends here, whatever the client still sends."""


@dataclass
class _Body:
    """What is known of one request's body.

    Attributes:
        got: bytes so far.
        more: whether the client has announced more.
        ended: status and sentence, if it was ended by us.
    """

    got: int = 0
    more: bool = True
    ended: tuple[int, str] | None = None


class Limits:
    """Ends requests whose body is too large, or whose client pauses for too long."""

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
        told = Headers(scope=scope).get("content-length", "")
        if told.isdecimal() and int(told) > self._largest:
            await send_problem(send, 413, self._too_much())
            return
        body = _Body()
        await self._app(scope, self._counted(receive, body), _answered_by_us(send, body))

    def _counted(self, receive: Receive, body: _Body) -> Receive:
        async def counted() -> Message:
            if not body.more:  # waits for the client to leave, however long that takes
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._pause_s)
            except asyncio.TimeoutError:
                text = f"Nothing came for {self._pause_s:g} seconds, and more was announced."
                body.ended = (408, text)
                raise _EndedError from None
            body.got += len(message.get("body", b""))
            body.more = message["type"] == "http.request" and bool(message.get("more_body"))
            if body.got > self._largest:
                body.ended = (413, self._too_much())
                raise _EndedError
            return message

        return counted

    def _too_much(self) -> str:
        return (
            f"The request has more than {self._largest} bytes; --max-upload-mb of the server "
            "sets how many are allowed."
        )


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
    """uvicorn's HTTP/1.1, with an end for clients that do not finish their first headers."""

    class PromptProtocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(seconds, self._close_if_silent)

        def _close_if_silent(self) -> None:
            first: Any = self.scope  # None until the headers are there, whatever its type says
            if first is None and not self.transport.is_closing():
                self.transport.close()

    return PromptProtocol
