"""What the pages are made of: parts of the running app, and a shelf for what was made last."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from monailabel.interfaces.datastore import Datastore

from lib.infers.refseg import RefSeg
from lib.reviewing.reviewer import Reviewer
from lib.runtime import Runtime
from lib.site.serving import SiteModel
from lib.strategies.ranked import Desk

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Parts:
    """Parts of the app that answers clients at the same time; the pages change none of them.

    Attributes:
        runtime: networks, bank and pool.
        site: the models that were trained here.
        desk: who is at work on what.
        reviewer: how far masks are trusted.
        task: knows the labels.
        segment: a request to the first task that there is; the only one that is asked to work, and
            only when a button is pressed.
        answering: networks and bank of that task, None where they are not loaded.
        datastore: images and labels.
    """

    runtime: Runtime
    site: SiteModel
    desk: Desk
    reviewer: Reviewer
    task: RefSeg
    segment: Callable[[Mapping[str, Any]], tuple[str | None, dict[str, Any]]]
    answering: Callable[[], Runtime | None]
    datastore: Datastore


class Shelf(Generic[T]):
    """Keeps what was used last, up to so many bytes; thread-safe."""

    def __init__(self, most_bytes: int, size: Callable[[T], int]) -> None:
        """It is empty.

        Args:
            most_bytes: of all things together; a larger one is not kept at all.
            size: bytes of one thing.
        """
        self._most = most_bytes
        self._size = size
        self._held = 0
        self._things: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> T | None:
        """What lies there under this key."""
        with self._lock:
            if key in self._things:
                self._things.move_to_end(key)
            return self._things.get(key)

    def put(self, key: Hashable, thing: T) -> T:
        """Lay it there, and let go of what was not used for longest -> the same."""
        with self._lock:
            self._drop(key)
            if self._size(thing) <= self._most:
                self._things[key] = thing
                self._held += self._size(thing)
            while self._held > self._most:
                self._drop(next(iter(self._things)))
        return thing

    def _drop(self, key: Any) -> None:
        gone = self._things.pop(key, None)
        if gone is not None:
            self._held -= self._size(gone)


def looks(path: Path) -> tuple[str, int, int]:
    """What changes when a file or folder does."""
    found = path.stat()
    return str(path), found.st_mtime_ns, found.st_size
