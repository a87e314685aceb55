"""Who is at work on which image: seen by all processes, and at an end after a while by itself."""

import json
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lib.memory.catalogue import Catalogue

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS leases (
    image_id TEXT PRIMARY KEY,
    client_id TEXT NOT NULL,
    given_at REAL NOT NULL,
    seconds REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS skips (
    image_id TEXT NOT NULL,
    client_id TEXT NOT NULL,
    skipped_at REAL NOT NULL,
    PRIMARY KEY (image_id, client_id)
);
CREATE TABLE IF NOT EXISTS offered (
    image_id TEXT PRIMARY KEY,
    labels TEXT NOT NULL,
    saved INTEGER NOT NULL
);
"""
_ACTIVE = "given_at + seconds > :now AND given_at < :now + :skew"
_SKEW_S = 300.0  # clocks of machines differ; given later than that, the clock was set back since


@dataclass(frozen=True)
class Lease:
    """An image that a client was given and may still be at work on; Unix time."""

    image_id: str
    client_id: str
    given_at: float


class Leases:
    """One SQLite file beside the banks of a datastore. Safe for threads and processes.

    Args:
        folder: of all banks of one datastore.
        clock: Unix time.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._catalogue = Catalogue(Path(folder) / "leases.sqlite", _SCHEMA, "leases")
        self._clock = clock

    def active(self) -> dict[str, Lease]:
        """Leases that have not ended, by image."""
        now = self._clock()
        rows = self._read(
            lambda c: c.execute(
                f"SELECT image_id, client_id, given_at FROM leases WHERE {_ACTIVE}",
                {"now": now, "skew": _SKEW_S},
            ).fetchall()
        )
        return {row[0]: Lease(*row) for row in rows}

    def take(self, image_id: str, client_id: str, seconds: float) -> bool:
        """Lease an image to a client; False where another has it. One's own begins anew."""
        now = self._clock()

        def work(connection: sqlite3.Connection) -> bool:
            held = connection.execute(
                "SELECT 1 FROM leases WHERE image_id = :image AND client_id != :client "
                f"AND {_ACTIVE}",
                {"image": image_id, "client": client_id, "now": now, "skew": _SKEW_S},
            ).fetchone()
            if held is None:
                connection.execute(
                    "INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?)",
                    (image_id, client_id, now, seconds),
                )
            return held is None

        return self._write(work)

    def release(self, image_ids: Iterable[str]) -> None:
        """End leases and skips: the images are labelled, or gone."""
        rows = [(image_id,) for image_id in image_ids]
        if rows:
            self._write(lambda c: c.executemany("DELETE FROM leases WHERE image_id = ?", rows))
            self._write(lambda c: c.executemany("DELETE FROM skips WHERE image_id = ?", rows))

    def skip(self, image_ids: Iterable[str], client_id: str) -> None:
        """A client does not want these images now; others may have them at once."""
        now = self._clock()
        rows = [(image_id, client_id, now) for image_id in image_ids]

        def work(connection: sqlite3.Connection) -> None:
            connection.executemany("INSERT OR REPLACE INTO skips VALUES (?, ?, ?)", rows)
            connection.executemany(
                "DELETE FROM leases WHERE image_id = ? AND client_id = ?",
                [row[:2] for row in rows],
            )

        if rows:
            self._write(work)

    def skipped(self, client_id: str) -> dict[str, float]:
        """Images that a client skipped, and when."""
        return dict(
            self._read(
                lambda c: c.execute(
                    "SELECT image_id, skipped_at FROM skips WHERE client_id = ?", (client_id,)
                ).fetchall()
            )
        )

    def offer(self, image_id: str, labels: Collection[str]) -> None:
        """Remember that an image labelled in part was given out for what it lacks."""
        row = (image_id, json.dumps(sorted(labels)))
        self._write(lambda c: c.execute("INSERT OR REPLACE INTO offered VALUES (?, ?, 0)", row))

    def looked_for(self) -> Mapping[str, frozenset[str]]:
        """The labels that were looked for on images labelled in part, which were saved since."""
        rows = self._read(
            lambda c: c.execute("SELECT image_id, labels FROM offered WHERE saved").fetchall()
        )
        return {image_id: frozenset(json.loads(text)) for image_id, text in rows}

    def saved(self, image_id: str) -> None:
        """Somebody saved an image's label: nobody is at work on it any more."""
        self.release([image_id])
        self._write(
            lambda c: c.execute("UPDATE offered SET saved = 1 WHERE image_id = ?", (image_id,))
        )

    def _read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        def work() -> T:
            with self._catalogue.read() as connection:
                return query(connection)

        return self._catalogue.surviving(work)

    def _write(self, change: Callable[[sqlite3.Connection], T]) -> T:
        def work() -> T:
            with self._catalogue.write() as connection:
                return change(connection)

        return self._catalogue.surviving(work)
