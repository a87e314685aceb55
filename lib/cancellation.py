"""Work that nobody waits for any more: asked to stop by a flag, which it looks at now and then."""

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

_stop: ContextVar[threading.Event | None] = ContextVar("refseg_stop", default=None)


class StoppedError(Exception):
    """The work was asked to stop; nobody waits for its result."""


def stoppable(job: Callable[[], T], stop: threading.Event) -> T:
    """Run a job that `stop_if_asked` may end once the flag is set."""
    token = _stop.set(stop)
    try:
        stop_if_asked()
        return job()
    finally:
        _stop.reset(token)


def stop_if_asked() -> None:
    """End the work here if nobody waits for it; between two batches, never in one.

    Raises:
        StoppedError: the flag of `stoppable` is set.
    """
    stop = _stop.get()
    if stop is not None and stop.is_set():
        msg = "nobody waits for this any more"
        raise StoppedError(msg)
