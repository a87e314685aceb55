"""Who may come in: the host and origin that a request names, and the token that it carries."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable
from urllib.parse import urlsplit

from fastapi import APIRouter, Form
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from apps.refseg.server.answers import send_problem
from apps.refseg.server.options import LOOPBACK, ServeOptions
from apps.refseg.server.page_login import LOG_IN, OPEN_PAGES, Sessions, is_page

OPEN_PATHS = frozenset({"/healthz", "/readyz"})  # say nothing of the studies
LOG_IN_PATHS = frozenset({"/auth/", "/auth/token"})  # 3D Slicer asks these before it has a token
CHALLENGE = 'Bearer realm="RefSeg", Basic realm="RefSeg: any name, the token as password"'


class Tokens:
    """The tokens that let in; as digests, so that a comparison takes the same time for all."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._digests = [_digest(token) for token in tokens]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, token: str) -> bool:
        """Whether it is one of them; each is compared, in constant time."""
        found = [hmac.compare_digest(_digest(token), digest) for digest in self._digests]
        return any(found)

    def accept_header(self, value: str) -> bool:
        """Bearer as of programs, or Basic as of browsers, with the token as the password."""
        scheme, _, rest = value.strip().partition(" ")
        if scheme.lower() == "bearer":
            return self.accept(rest.strip())
        if scheme.lower() == "basic":
            try:
                decoded = base64.b64decode(rest.strip(), validate=True).decode()
            except (binascii.Error, ValueError):
                return False
            return self.accept(decoded.partition(":")[2])
        return False


class Guard:
    """Refuses what comes from elsewhere or without a token, before anything of it is read."""

    def __init__(
        self, app: ASGIApp, options: ServeOptions, sessions: Sessions | None = None
    ) -> None:
        """Nothing is asked yet.

        Args:
            app: what is guarded.
            options: see there.
            sessions: of browsers that have logged in to our pages; None: there are no pages.
        """
        self._app = app
        self._sessions = sessions or Sessions()
        self._tokens = Tokens(options.tokens)
        self._origins = frozenset(origin.rstrip("/").lower() for origin in options.cors_origins)
        hosts = frozenset(host.lower() for host in options.allowed_hosts)
        if options.is_local:
            hosts |= {*LOOPBACK, options.host.lower()}
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let it pass, or answer with 400, 401 or 403."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = _name(headers.get("host", ""))
        if self._hosts and host not in self._hosts:
            text = f"The server is not called {host[:80]!r}; --allowed-host adds a name."
            await send_problem(send, 400, text)
        elif not self._same_origin(headers):
            text = "A page of another origin may not call this server; --cors-origin adds one."
            await send_problem(send, 403, text)
        elif not self._needs_token(scope) or self._sessions.let_in(scope):
            await self._app(scope, receive, send)
        elif is_page(scope["path"]) and "authorization" not in headers:
            await RedirectResponse(LOG_IN, 303)(scope, receive, send)
        elif not self._tokens.accept_header(headers.get("authorization", "")):
            text = "A token is needed: Authorization: Bearer TOKEN (docs/security.md)."
            await send_problem(send, 401, text, {"WWW-Authenticate": CHALLENGE})
        else:
            await self._app(scope, receive, send)

    def _same_origin(self, headers: Headers) -> bool:
        """Browsers name the origin of a page that calls; other clients name none."""
        origin = headers.get("origin")
        if origin is None or origin.lower() in self._origins:
            return True
        return bool(urlsplit(origin).netloc) and (
            urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
        )

    def _needs_token(self, scope: Scope) -> bool:
        if not self._tokens or scope["path"] in OPEN_PATHS | LOG_IN_PATHS | OPEN_PAGES:
            return False
        # a browser asks without credentials whether it may call; CORS answers that
        return not (scope["method"] == "OPTIONS" and self._origins)


def log_in_routes(tokens: Tokens) -> APIRouter:
    """What MONAI Label's client asks for its log-in: any user name, the token as the password."""
    router = APIRouter(include_in_schema=False)

    @router.get("/auth/")
    async def enabled() -> dict[str, object]:
        return {"enabled": True, "client_id": "refseg", "realm": ""}

    @router.post("/auth/token")
    async def log_in(password: str = Form(""), username: str = Form("")) -> JSONResponse:
        del username
        if not tokens.accept(password):
            text = "The password is not the server's token."
            return JSONResponse({"detail": text}, 401, {"WWW-Authenticate": "Bearer"})
        return JSONResponse({"access_token": password, "token_type": "Bearer"})

    @router.get("/auth/token/valid")
    async def valid() -> dict[str, object]:
        return {"username": "refseg", "roles": []}

    return router


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _name(host: str) -> str:
    """`Host` without its port; an IPv6 address without its brackets."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host
