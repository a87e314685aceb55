"""What this machine has left, and what runs on it."""

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

_CGROUP = Path("/sys/fs/cgroup")  # of version 2: what a container or a service may take
_BEHIND = 10  # steps of nice: a ninth of the time that others get, while they want it
_LOOK_S = 1.0  # between two looks at a process


def free_bytes() -> int:
    """Bytes that this process may still take without pushing others out."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        taken = int((_CGROUP / "memory.current").read_text())
        rows = (_CGROUP / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return free
    if not limit.isdecimal():  # "max"
        return free
    # files that were read count as taken, and are let go as soon as memory is wanted
    parts = dict(row.split() for row in rows if len(row.split()) == 2)
    cached = int(parts.get("inactive_file", 0)) + int(parts.get("active_file", 0))
    return min(free, max(0, int(limit) - taken + cached))


def let_others_first() -> None:
    """Ask for less of the processor than others get, for all threads that are started from now on.

    Where the machine does not allow that, all stays as it was.
    """
    process = psutil.Process()
    windows = getattr(psutil, "BELOW_NORMAL_PRIORITY_CLASS", None)
    with suppress(psutil.Error, OSError):
        process.nice(min(19, process.nice() + _BEHIND) if windows is None else windows)


def start_thread(work: Callable[[], None], name: str) -> threading.Thread | None:
    """Work in the background from now on; None, and a line in the log, if there are too many."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        logger.exception("%s cannot be started now", name)
        return None
    return thread


def identity() -> str:
    """Of this process, among all that there have been on this machine."""
    return _identity(os.getpid())


@cache  # told once: it is reckoned by the clock, which may be set meanwhile
def _identity(pid: int) -> str:
    return f"{pid}:{psutil.Process(pid).create_time():.0f}"


def is_alive(who: str) -> bool:
    """Whether the process of this `identity` is there."""
    return _process_of(who) is not None


def end_with(who: str) -> None:
    """End this process at once, wherever it is, when the process of this `identity` is gone."""
    threading.Thread(target=_watch, args=(who,), name="end-with", daemon=True).start()


def _watch(who: str) -> None:
    other = _process_of(who)
    while other is not None and other.is_running() and not _is_zombie(other):
        time.sleep(_LOOK_S)
    logger.warning("the process that this one works for is gone, so it ends")
    os._exit(1)


def _process_of(who: str) -> psutil.Process | None:
    pid, _, created = who.partition(":")
    try:
        process = psutil.Process(int(pid))
        # clocks are set; that a number is used again within a minute is unlikely
        same = abs(process.create_time() - float(created)) < 60
    except (psutil.Error, ValueError):
        return None
    return process if same and not _is_zombie(process) else None


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError):  # not told is not gone
        return False
