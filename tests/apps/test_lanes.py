"""Turns, limits and ends of a lane of threads."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from apps.refseg.server.lanes import ClientGoneError, Lane, LaneClosedError, LaneFullError
from lib.cancellation import StoppedError, stop_if_asked


def work(seconds: float, done: list[str], name: str) -> Callable[[], str]:
    def job() -> str:
        time.sleep(seconds)
        done.append(name)
        return name

    return job


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_clients_take_turns_whoever_came_first() -> None:
    async def scene() -> list[str]:
        lane, done = Lane("x", at_once=1, waiting=20), list[str]()
        asked = [("a", f"a{n}") for n in range(4)] + [("b", "b0"), ("c", "c0"), ("b", "b1")]
        tasks = []
        for client, name in asked:
            tasks.append(asyncio.create_task(lane.run(work(0.01, done, name), client=client)))
            await settle()
        assert await asyncio.gather(*tasks) == [name for _, name in asked]
        return done

    assert asyncio.run(scene()) == ["a0", "a1", "b0", "c0", "a2", "b1", "a3"]


def test_no_more_run_together_than_allowed() -> None:
    now, most, lock = 0, 0, threading.Lock()

    def job() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1

    async def scene() -> None:
        lane = Lane("x", at_once=3, waiting=50)
        await asyncio.gather(*(lane.run(job, client=str(n)) for n in range(12)))
        assert (lane.running, lane.waiting) == (0, 0)

    asyncio.run(scene())
    assert most == 3


def test_one_client_cannot_take_all_places() -> None:
    async def scene() -> None:
        lane, done = Lane("x", at_once=1, waiting=4), list[str]()
        greedy = [
            asyncio.create_task(lane.run(work(0.05, done, "g"), client="g")) for _ in range(5)
        ]
        await settle()
        assert lane.waiting == 2
        modest = asyncio.create_task(lane.run(work(0, done, "m"), client="m"))
        found = await asyncio.gather(*greedy, modest, return_exceptions=True)
        refused = [error for error in found if isinstance(error, LaneFullError)]
        assert len(refused) == 2
        assert all(1 <= error.retry_s <= 60 for error in refused)
        assert found[-1] == "m"

    asyncio.run(scene())


def test_a_client_that_leaves_gives_its_place_back_waiting_or_running() -> None:
    seen = list[str]()

    def long() -> None:
        try:
            while True:
                stop_if_asked()
                time.sleep(0.01)
        except StoppedError:
            seen.append("stopped")
            raise

    async def scene() -> None:
        lane, done = Lane("x", at_once=1, waiting=4), list[str]()
        leave: dict[str, asyncio.Event] = {name: asyncio.Event() for name in "ab"}

        async def gone(name: str) -> None:
            await leave[name].wait()

        first = asyncio.create_task(lane.run(long, client="a", gone=gone("a")))
        await settle()
        second = asyncio.create_task(lane.run(work(0, done, "b"), client="b", gone=gone("b")))
        third: asyncio.Task[Any] = asyncio.create_task(lane.run(work(0, done, "c"), client="c"))
        await settle()
        leave["b"].set()
        with pytest.raises(ClientGoneError):
            await second
        assert (lane.running, lane.waiting) == (1, 1)
        leave["a"].set()
        with pytest.raises(ClientGoneError):
            await first
        assert await asyncio.wait_for(third, 5) == "c"
        assert done == ["c"]

    asyncio.run(scene())
    assert seen == ["stopped"]


def test_a_lane_that_closes_sends_all_away() -> None:
    def long() -> None:
        while True:
            stop_if_asked()
            time.sleep(0.01)

    async def scene() -> None:
        lane = Lane("x", at_once=1, waiting=4)
        running = asyncio.create_task(lane.run(long, client="a"))
        await settle()
        waiting = asyncio.create_task(lane.run(long, client="b"))
        await settle()
        assert await lane.close(5)
        with pytest.raises(LaneClosedError):
            await waiting
        with pytest.raises(StoppedError):
            await running
        with pytest.raises(LaneClosedError):
            await lane.run(long, client="c")

    asyncio.run(scene())


def test_a_cancelled_request_frees_its_place_when_its_job_has_ended() -> None:
    async def scene() -> None:
        lane, done = Lane("x", at_once=1, waiting=4), list[str]()
        running = asyncio.create_task(lane.run(work(0.1, done, "a"), client="a"))
        await asyncio.sleep(0.02)
        running.cancel()
        with pytest.raises(LaneClosedError):
            await running
        assert lane.running == 1  # a thread cannot be killed: it still works
        assert await lane.run(work(0, done, "b"), client="b") == "b"
        assert done == ["a", "b"]

    asyncio.run(scene())
