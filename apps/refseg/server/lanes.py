"""Threads for work that would block the event loop: so many at once, clients in turn."""

import asyncio
import contextvars
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from lib.cancellation import stoppable

T = TypeVar("T")
LONGEST_RETRY_S = 60


class LaneFullError(Exception):
    """No place is free and no more may wait."""

    def __init__(self, name: str, waiting: int, retry_s: int) -> None:
        self.retry_s = retry_s
        super().__init__(
            f"{waiting} requests wait for {name} already; try again in {retry_s} seconds."
        )


class LaneClosedError(Exception):
    """The server is being stopped."""


class ClientGoneError(Exception):
    """The client closed the connection before its answer was ready."""


class Lane:
    """Runs jobs in threads, `at_once` together; the others wait, one turn for each client.

    All but the jobs happens on the event loop's thread, so nothing here is locked. A place is
    taken until the job has ended, not until its client has lost interest: a client that leaves
    asks its job to stop (`lib.cancellation`), which it does at the next batch of slices.
    """

    def __init__(self, name: str, *, at_once: int, waiting: int) -> None:
        """No thread is started yet.

        Args:
            name: of the threads and of the metrics.
            at_once: jobs that run together.
            waiting: jobs that may wait; one client may take half of these places.
        """
        self.name = name
        self.running = 0
        self._at_once = at_once
        self._limit = waiting
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix=f"refseg-{name}")
        self._turns: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._stops: set[threading.Event] = set()
        self._closed = False
        self._mean_s = 1.0

    @property
    def waiting(self) -> int:
        """Jobs that wait for a place."""
        return sum(map(len, self._turns.values()))

    async def run(
        self, job: Callable[[], T], *, client: str, gone: Coroutine[Any, Any, None] | None = None
    ) -> T:
        """Run a job when it is its client's turn.

        Args:
            job: called in a thread, with the caller's context variables.
            client: whose turn it is to be.
            gone: ends when the client has closed its connection.

        Raises:
            LaneFullError: too many wait.
            LaneClosedError: the server is being stopped.
            ClientGoneError: `gone` ended first.
        """
        watch = asyncio.ensure_future(gone) if gone is not None else None
        try:
            await self._place(client, watch)
            return await self._work(job, watch)
        finally:
            if watch is not None:
                watch.cancel()

    def turn_away(self) -> None:
        """Take no more jobs and send those away that wait; those that run go on."""
        self._closed = True
        for queue in self._turns.values():
            for place in queue:
                if not place.done():
                    place.set_exception(LaneClosedError())
        self._turns.clear()

    async def close(self, patience_s: float) -> bool:
        """Ask the jobs that run to stop; whether all have, in time."""
        self.turn_away()
        for stop in self._stops:
            stop.set()
        self._pool.shutdown(wait=False)
        end = time.monotonic() + patience_s
        while self.running and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return not self.running

    async def _place(self, client: str, watch: "asyncio.Future[None] | None") -> None:
        if self._closed:
            raise LaneClosedError
        if self.running < self._at_once and not self._turns:
            self.running += 1
            return
        mine = self._turns.get(client, ())
        if self.waiting >= self._limit or len(mine) >= max(1, self._limit // 2):
            raise LaneFullError(self.name, self.waiting, self._retry_s())
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns.setdefault(client, deque()).append(place)
        try:
            await asyncio.wait(
                {place} | ({watch} if watch else set()), return_when="FIRST_COMPLETED"
            )
            if not place.done():
                raise ClientGoneError
            place.result()
        except BaseException:
            self._give_up(client, place)
            raise

    def _give_up(self, client: str, place: "asyncio.Future[None]") -> None:
        queue = self._turns.get(client)
        if queue is not None and place in queue:
            queue.remove(place)
            if not queue:
                del self._turns[client]
        elif place.done() and not place.cancelled() and place.exception() is None:
            self._leave()  # its turn came at the same moment

    async def _work(self, job: Callable[[], T], watch: "asyncio.Future[None] | None") -> T:
        loop, stop, start = asyncio.get_running_loop(), threading.Event(), time.monotonic()
        self._stops.add(stop)
        context = contextvars.copy_context()

        def ended(_: "asyncio.Future[T]") -> None:
            self._stops.discard(stop)
            self._mean_s += 0.2 * (time.monotonic() - start - self._mean_s)
            self._leave()

        try:
            work = loop.run_in_executor(self._pool, context.run, stoppable, job, stop)
        except RuntimeError as error:  # closed in between
            self._leave()
            raise LaneClosedError from error
        work.add_done_callback(ended)
        try:
            await asyncio.wait(
                {work} | ({watch} if watch else set()), return_when="FIRST_COMPLETED"
            )
            if not work.done():
                stop.set()
                await asyncio.wait({work})
                if not work.cancelled() and work.exception() is None:
                    _throw_away(work.result())
                raise ClientGoneError
            return work.result()
        except asyncio.CancelledError as error:  # the grace period of a stop is over
            stop.set()
            raise LaneClosedError from error

    def _leave(self) -> None:
        self.running -= 1
        while self._turns and self.running < self._at_once:
            client, queue = self._turns.popitem(last=False)
            place = queue.popleft()
            if queue:
                self._turns[client] = queue  # behind the others
            if not place.done():
                self.running += 1
                place.set_result(None)

    def _retry_s(self) -> int:
        expected = self._mean_s * (self.waiting + 1) / self._at_once
        return max(1, min(LONGEST_RETRY_S, round(expected)))


def _throw_away(result: Any) -> None:
    """What nobody will fetch; its background tasks delete the files that belong to it."""
    close = getattr(result, "close", None)
    if callable(close):
        close()
