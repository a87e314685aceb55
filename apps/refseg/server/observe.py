"""The outermost layer: each request has an id, a line in the log, a place in the metrics."""

import logging
import time
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apps.refseg.server.answers import CLIENT_GONE, new_id, request_id, send_problem
from apps.refseg.server.lanes import Lane
from apps.refseg.server.platform import Lanes

logger = logging.getLogger(__name__)

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
QUIET = frozenset({"/healthz", "/readyz", "/metrics"})  # asked for every few seconds, by machines
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
SAFE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"referrer-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


class Metrics:
    """What Prometheus may ask for; no name of an image or a label in it."""

    def __init__(self, lanes: Lanes) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.requests = Counter(
            "refseg_requests",
            "Requests answered",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "refseg_request_seconds",
            "Time from a request's headers to the end of its answer",
            ("method", "route"),
            buckets=SECONDS,
            registry=self.registry,
        )
        running = Gauge("refseg_lane_running", "Jobs that run", ("lane",), registry=self.registry)
        waiting = Gauge(
            "refseg_lane_waiting", "Jobs that wait for a place", ("lane",), registry=self.registry
        )
        for lane in lanes.all():
            running.labels(lane.name).set_function(_reader(lane, "running"))
            waiting.labels(lane.name).set_function(_reader(lane, "waiting"))


class Observe:
    """Numbers requests, counts and logs them, and answers what no other layer has caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        mark = new_id()
        token = request_id.set(mark)
        start, status = time.perf_counter(), 0

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", ()))
                names = {name.lower() for name, _ in headers}
                headers += [pair for pair in SAFE_HEADERS if pair[0] not in names]
                message = {**message, "headers": [*headers, (b"x-request-id", mark.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, marked)
        except Exception:
            logger.exception("request %s failed", mark)
            if not status:
                text = f"RefSeg failed; the server's log tells more at {mark}."
                await send_problem(marked, 500, text)
        finally:
            self._note(scope, status or CLIENT_GONE, time.perf_counter() - start)
            request_id.reset(token)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "") or "other"
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._metrics.requests.labels(method, route, str(status)).inc()
        self._metrics.seconds.labels(method, route).observe(seconds)
        level = logging.DEBUG if scope["path"] in QUIET else logging.INFO
        logger.log(level, "%s %s %d in %.3f s", method, route, status, seconds)


def _reader(lane: Lane, what: str) -> Callable[[], float]:
    return lambda: float(getattr(lane, what))
