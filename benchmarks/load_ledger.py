"""What clients wrote and what they were told: which label may an image have at a given time?"""

import math
import threading
from dataclasses import dataclass

NOTHING = ""  # the digest of an image without a label


@dataclass
class Write:
    """A label submitted or deleted.

    Attributes:
        digest: of the file; NOTHING if it was deleted.
        start: when the request was sent, s.
        end: when it was answered; infinite before.
        acknowledged: whether the answer was a success. One that failed may have been done or not.
    """

    digest: str
    start: float
    end: float = math.inf
    acknowledged: bool = False


class Ledger:
    """All writes of all clients, which may write to the same image at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._writes: dict[str, list[Write]] = {}

    def begin(self, image: str, digest: str, now: float) -> Write:
        """Before the request is sent."""
        write = Write(digest, now)
        with self._lock:
            self._writes.setdefault(image, []).append(write)
        return write

    def end(self, image: str, write: Write, now: float, *, done: bool | None) -> None:
        """After it was answered: done, refused (it changed nothing), or None: nobody knows."""
        with self._lock:
            if done is False:
                self._writes[image].remove(write)
            elif done:
                write.end, write.acknowledged = now, True

    def possible(self, image: str, start: float, end: float) -> set[str]:
        """Digests that the label may have in one look at it between two times.

        A write is surely gone once another one, sent after this one was answered, was answered
        itself before the look began.
        """
        with self._lock:
            writes = [Write(NOTHING, -math.inf, -math.inf), *self._writes.get(image, ())]
            over = max(
                (write.start for write in writes if write.acknowledged and write.end < start),
                default=-math.inf,
            )
            return {write.digest for write in writes if write.start < end and write.end >= over}

    def labelled(self) -> list[str]:
        """Images whose newest write is a label."""
        with self._lock:
            return [image for image, writes in self._writes.items() if writes and writes[-1].digest]

    def acknowledged(self, image: str) -> set[str]:
        """All labels of an image that were acknowledged."""
        with self._lock:
            writes = self._writes.get(image, ())
            return {write.digest for write in writes if write.acknowledged and write.digest}
