"""The pages' log-in: the token is typed once, then a cookie stands for it."""

import hashlib
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.types import Scope

COOKIE = "refseg_session"
PAGES = "/refseg/"
LOG_IN = "/refseg/login"
OPEN_PAGES = frozenset({LOG_IN, "/refseg/style.css"})
LONGEST_S = 12 * 3600.0
MOST = 1000


class Sessions:
    """Browsers that have shown the token; in memory, so that a restart ends all. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Nobody is logged in."""
        self._clock = clock
        self._ends: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def open(self) -> str:
        """Begin one -> what its cookie holds: a secret of its own, never the token."""
        secret = secrets.token_urlsafe(32)
        with self._lock:
            self._ends[_digest(secret)] = self._clock() + LONGEST_S
            while len(self._ends) > MOST:
                self._ends.popitem(last=False)
        return secret

    def close(self, secret: str) -> None:
        """End one, if there is one."""
        with self._lock:
            self._ends.pop(_digest(secret), None)

    def let_in(self, scope: Scope) -> bool:
        """Whether a request is for the pages, which alone take cookies, and has a live one."""
        if not is_page(scope["path"]):
            return False
        secret = cookie_parser(Headers(scope=scope).get("cookie", "")).get(COOKIE, "")
        with self._lock:
            return self._ends.get(_digest(secret), 0.0) > self._clock()


def is_page(path: str) -> bool:
    """Whether a path is one of the pages'."""
    return path.startswith(PAGES) or path == PAGES.rstrip("/")


def _digest(secret: str) -> str:
    """Looked up by digest, so that the time of a look-up tells nothing of the secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
