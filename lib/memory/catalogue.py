"""SQLite files that survive: short connections, rollback journal, damaged ones put aside.

A write-ahead log needs shared memory, which network disks do not have; the rollback journal works
on any disk with locks. Connections live for one transaction, so that threads, forks and a file
that another process put aside need no thought.
"""

import logging
import re
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from lib.errors import MemoryStoreError

T = TypeVar("T")

logger = logging.getLogger(__name__)

_BUSY_TIMEOUT_S = 60.0


def fingerprint_folder(folder: Path, fingerprint: str) -> Path:
    """The subfolder of a fingerprint: its own text where that is a decent name, else a digest."""
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,79}", fingerprint):
        return folder / fingerprint
    slug = re.sub(r"[^A-Za-z0-9]+", "-", fingerprint).strip("-")[:40]
    return folder / f"{slug}-{sha256(fingerprint.encode()).hexdigest()[:16]}"


class Catalogue:
    """One SQLite file with a schema of ours.

    Args:
        path: the file; its folder is made.
        schema: SQL that makes the tables in an empty file.
        fingerprint: of what the rows were made by; a file of another one is refused.
        on_new: called in the transaction that makes the tables, to fill them with what is left of
            an earlier file.
    """

    def __init__(
        self,
        path: Path,
        schema: str,
        fingerprint: str,
        *,
        on_new: Callable[[sqlite3.Connection], None] | None = None,
    ) -> None:
        self.path = path
        self._schema = schema
        self._fingerprint = fingerprint
        self._on_new = on_new
        self.renew_if_damaged()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection in one read transaction: all its queries see the same state."""
        with self._connect("BEGIN") as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A connection in one write transaction; the only one of all processes."""
        with self._connect("BEGIN IMMEDIATE") as connection:
            yield connection

    def surviving(self, work: Callable[[], T]) -> T:
        """Do it; if the file turns out to be damaged or emptied, renew it and do it again."""
        try:
            return work()
        except sqlite3.DatabaseError:
            self.renew_if_damaged()
        try:
            return work()
        except sqlite3.DatabaseError as error:
            message = f"{self.path} cannot be used: {error}; check the disk"
            raise MemoryStoreError(message) from error

    def problems(self) -> list[str]:
        """What SQLite's own check finds wrong with the file."""
        try:
            with self.read() as connection:
                found = [row[0] for row in connection.execute("PRAGMA integrity_check(10)")]
        except sqlite3.DatabaseError as error:
            found = [str(error)]
        return [f"{self.path.name}: {text}" for text in found if text != "ok"]

    @contextmanager
    def _connect(self, begin: str) -> Iterator[sqlite3.Connection]:
        try:
            connection = sqlite3.connect(
                self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
        except sqlite3.OperationalError as error:
            if not self.path.parent.is_dir():
                raise  # deleted under our feet: `renew_if_damaged` mends that
            message = f"{self.path} cannot be opened: {error}"
            message += "; check the folder and its permissions"
            raise MemoryStoreError(message) from error
        with closing(connection):
            try:
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA foreign_keys = ON")
                connection.execute(begin)
                yield connection
                connection.execute("COMMIT")
            except sqlite3.OperationalError as error:
                _roll_back(connection)
                if "no such table" in str(error):
                    raise  # emptied under our feet: the same
                message = f"{self.path} cannot be used: {error}"
                advice = "end the process that holds it, free disk space, or make it writable"
                message += f"; {advice}"
                raise MemoryStoreError(message) from error
            except BaseException:
                _roll_back(connection)
                raise

    def renew_if_damaged(self) -> None:
        """Make what is missing; put a damaged file aside and start an empty one."""
        lock = FileLock(self.path.with_suffix(".lock"))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with lock.acquire(timeout=_BUSY_TIMEOUT_S):
                try:
                    if self.path.exists() and self._is_ready():
                        return
                except sqlite3.DatabaseError as error:
                    self._put_aside(error)
                with self.write() as connection:
                    self._make_tables(connection)
        except Timeout as error:
            message = f"{lock.lock_file} has been locked for {_BUSY_TIMEOUT_S:.0f} s"
            message += "; end the process that holds it"
            raise MemoryStoreError(message) from error
        except OSError as error:
            message = f"the bank's folder {self.path.parent} cannot be used: {error.strerror}"
            message += "; name a writable one (--conf bank DIR)"
            raise MemoryStoreError(message) from error

    def _make_tables(self, connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value)")
        for statement in filter(str.strip, self._schema.split(";")):
            connection.execute(statement)
        connection.executemany(
            "INSERT INTO meta VALUES (?, ?)",
            [
                ("fingerprint", self._fingerprint),
                ("generation", 0),
                # Generations of two files cannot be compared: a name tells them apart.
                ("incarnation", uuid.uuid4().hex),
            ],
        )
        if self._on_new is not None:
            self._on_new(connection)

    def _is_ready(self) -> bool:
        with self.read() as connection:
            check = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if check != "ok":
                raise sqlite3.DatabaseError(check)
            if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
                return False
            stored = dict(connection.execute("SELECT name, value FROM meta"))
        if stored.get("fingerprint") != self._fingerprint:
            message = f"{self.path.parent} belongs to {stored.get('fingerprint')!r}"
            advice = f"not to {self._fingerprint!r}; choose another folder"
            message += f", {advice}"
            raise MemoryStoreError(message)
        return True

    def _put_aside(self, error: sqlite3.DatabaseError) -> None:
        aside = self.path.with_name(f"{self.path.name}.damaged")
        journal = self.path.with_name(f"{self.path.name}-journal")
        self.path.replace(aside)
        # A journal left behind would be played back into the new file.
        journal.unlink(missing_ok=True)
        logger.warning("%s is damaged (%s): put aside as %s", self.path.name, error, aside.name)


def _roll_back(connection: sqlite3.Connection) -> None:
    try:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    except sqlite3.Error:
        logger.debug("roll back failed; the journal is played back at the next opening")
