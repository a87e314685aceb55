"""The server's temporary files: in a folder of its own, and each request's removed with its end.

The platform copies uploads, images of patients, to the folder for temporary files. It removes them
by tasks that FastAPI runs after a success only, and it names some of them after the copy, which
a full disk may cut short. So what a request makes is noted by Python's own audit events.
"""

import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

if sys.platform != "win32":  # where a folder cannot be locked: nothing is swept there
    import fcntl

logger = logging.getLogger(__name__)

PREFIX = "refseg-serve-"  # other parts of the app make folders that begin with refseg-
MADE = frozenset({"tempfile.mkstemp", "tempfile.mkdtemp"})

_of_request: ContextVar[list[str] | None] = ContextVar("refseg_temporary", default=None)


class TemporaryFolder:
    """Where all temporary files of this process go, until `close`; nobody else may look inside.

    It is locked as long as the process lives, however that ends. So the next server knows which
    folders nobody owns any more, and systemd's cleaner of old files leaves this one alone.
    """

    def __init__(self) -> None:
        """Sweep what dead servers left, and make one."""
        base = Path(tempfile.gettempdir())
        _sweep(base)
        self._lock: int | None = None
        self.path = self._make(base)
        tempfile.tempdir = str(self.path)

    def close(self) -> None:
        """Remove it with all that is in it; a second time does nothing."""
        if tempfile.tempdir == str(self.path):
            tempfile.tempdir = None
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _make(self, base: Path) -> Path:
        while True:
            path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))  # mode 0700
            self._lock = _lock(path)
            if sys.platform == "win32" or (self._lock is not None and path.exists()):
                return path  # else another server that starts just now took it for a leftover


def note_temporary_files() -> list[str]:
    """The temporary files and folders that this request makes from now on, by their paths."""
    made: list[str] = []
    _of_request.set(made)
    return made


def remove(made: Iterable[str]) -> None:
    """Remove what was noted and is still there, if it is in the folder for temporary files."""
    room = Path(tempfile.gettempdir())
    for path in map(Path, made):
        if path.parent != room:
            continue  # such as a file beside the one that it is about to replace
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event in MADE:
        made = _of_request.get()
        if made is not None:
            made.append(str(arguments[0]))


sys.addaudithook(_note)  # once, with the module: a hook cannot be taken away


def _sweep(base: Path) -> None:
    """Remove the folders of this user's servers that are no more: kill -9 leaves them."""
    for path in base.glob(f"{PREFIX}*"):
        lock = _lock(path)
        if lock is not None:
            logger.info("removing the temporary files of a server that is gone: %s", path)
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _lock(path: Path) -> int | None:
    """An open handle of a folder of this user that only this process has locked, or None."""
    if sys.platform == "win32":
        return None
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    if os.fstat(handle).st_uid == os.geteuid():
        with contextlib.suppress(OSError):  # another server's
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
    os.close(handle)
    return None
