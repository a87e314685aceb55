"""What this machine has left, and what runs on it."""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

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


def end_with_parent() -> None:
    """End this process at once, wherever it is, when the one that started it is gone."""
    parent = psutil.Process().parent()
    if parent is not None:
        threading.Thread(target=_wait_and_end, args=(parent,), name="parent", daemon=True).start()


def _wait_and_end(parent: psutil.Process) -> None:
    with suppress(psutil.Error):
        while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_LOOK_S)
    os._exit(1)


def is_running(pid: int) -> bool:
    """Whether there is a process of this number."""
    return bool(psutil.pid_exists(pid))
