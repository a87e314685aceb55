"""MONAI Label's table of images and labels, `datastore_v2.json`, made safe to be shared.

The platform rewrites it in place from what it has in memory: a crash leaves half of it, and two
processes lose each other's entries. Here it is read anew under a lock between processes before it
is changed, and appears whole or not at all.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from monailabel.datastore.local import LocalDatastore, LocalDatastoreModel

from lib.durable import publish, stage
from lib.errors import RefSegError

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 120.0  # another process scans a large folder


class TableStore(LocalDatastore):  # type: ignore[misc]  # MONAI Label is untyped
    """One lock in the process, then one file lock between processes.

    Whoever changes the table holds both, and has read it since. No method holds them while it
    waits for anything else.
    """

    def __init__(
        self, folder: str, *, extensions: list[str], auto_reload: bool, read_only: bool
    ) -> None:
        self.lock = threading.RLock()
        self._holding = False
        self._looking = False
        self._seen: tuple[int, int, int] | None = None
        self._complained = False
        super().__init__(
            folder, extensions=extensions, auto_reload=auto_reload, read_only=read_only
        )

    def names_now(self) -> list[str]:
        """Ids of the images as known now; takes no lock, so that a line of the log can ask."""
        return list(self._datastore.objects)

    def _finish_interrupted(self) -> None:
        """What a crash has left half done; called with the table held."""

    @contextmanager
    def _table(self) -> Iterator[None]:
        """The table, read anew, and nobody else's until the end of the block."""
        with self.lock:
            if self._holding:
                yield
                return
            with self._file_lock():
                self._holding = True
                try:
                    self._read_table()
                    self._finish_interrupted()
                    yield
                finally:
                    self._holding = False

    @contextmanager
    def _file_lock(self) -> Iterator[None]:
        lock = FileLock(self._lock_file, timeout=LOCK_TIMEOUT_S)
        try:
            lock.acquire()
        except Timeout as error:  # an OSError, too; to write without the lock would lose entries
            msg = (
                f"Another process has held the table of the studies for {LOCK_TIMEOUT_S:g} s: "
                "nothing was stored. Try again in a minute."
            )
            raise RefSegError(msg) from error
        except OSError as error:  # a read-only folder: nobody can write, so nobody need wait
            self._complain(error)
            yield
            return
        try:
            yield
        finally:
            lock.release()

    def _read_table(self) -> None:
        path = Path(self._datastore_config_path)
        try:
            status = path.stat()
        except FileNotFoundError:
            return
        seen = (status.st_mtime_ns, status.st_ino, status.st_size)
        if seen == self._seen:
            return
        try:
            model = LocalDatastoreModel.model_validate(json.loads(path.read_bytes()))
        except (ValueError, RecursionError):
            self._seen = seen  # where it cannot be put aside, it is read once
            self._put_aside(path)
            return
        model.base_path = self._datastore_path
        self._datastore, self._seen, self._config_ts = model, seen, status.st_mtime

    def _put_aside(self, path: Path) -> None:
        """A damaged table gives way to what is known in memory; at a start that is nothing yet."""
        aside = path.with_name(f"{path.stem}.damaged-{time.time_ns()}.json")
        try:
            path.replace(aside)
            logger.error("%s is damaged: put aside as %s, made anew", path.name, aside.name)
            if self._datastore.objects:
                with self._staged_table(undo=lambda: None):
                    pass
        except OSError as error:
            self._complain(error)

    @contextmanager
    def _staged_table(self, *, undo: Callable[[], object]) -> Iterator[None]:
        """Change files in the block, with the table that tells of them ready to take its place.

        All that needs room on the disk is done before the block: a full disk changes nothing.

        Args:
            undo: takes back what was changed in memory, if the block cannot be done.
        """
        path = Path(self._datastore_config_path)
        try:
            told = self._datastore.model_dump(exclude={"base_path"})
            data = json.dumps(told, indent=2, default=str).encode()
            staged = stage(path, lambda file: file.write(data))
        except BaseException:
            undo()
            raise
        try:
            yield
        except BaseException:
            undo()
            staged.unlink(missing_ok=True)
            raise
        publish(staged, path)
        status = path.stat()
        self._seen = (status.st_mtime_ns, status.st_ino, status.st_size)
        self._config_ts = status.st_mtime

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:  # noqa: ARG002
        """The platform's name for: read the table if someone else has changed it."""
        with self._or_later(), self._table():
            pass

    def _update_datastore_file(self, lock: bool = True) -> None:  # noqa: ARG002
        """The platform's name for: write the table."""
        if self._holding:
            try:
                with self._staged_table(undo=lambda: None):
                    return
            except OSError as error:
                if not self._looking:
                    raise
                self._complain(error)  # what was seen is known in memory
                return
        with self.lock, self._file_lock(), self._staged_table(undo=lambda: None):
            pass

    def _reconcile_datastore(self) -> None:
        """Look at the disk; what cannot be written then is known in memory alone."""
        with self._or_later(), self._table():
            self._looking = True
            try:
                super()._reconcile_datastore()
            except OSError as error:
                self._complain(error)
                self._seen = None  # memory may be half changed: the table is as it was
                self._read_table()
            finally:
                self._looking = False

    @contextmanager
    def _or_later(self) -> Iterator[None]:
        """To look can wait, and the platform's watcher would end with an error: a line instead."""
        try:
            yield
        except RefSegError as error:
            logger.warning("the studies folder is looked at later: %s", error)

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            logger.error(
                "the studies folder cannot be written, so labels cannot be saved: %s", error
            )
            self._complained = True
