"""How much memory there is for an image."""

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")  # of version 2: what a container or a service may take


def free_bytes() -> int:
    """Bytes that this process may still take without pushing others out."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        taken = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return min(free, max(0, int(limit) - taken)) if limit.isdecimal() else free
