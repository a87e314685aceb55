"""The bank's tables, and the small steps that change them, in a transaction of the caller.

A row of `images` is live (it counts), failed (it has an error and no slices), or retired
(`removed_at` is set). Retired rows stay for a while: readers that chose a slice a moment ago still
find it, and an image that comes back, or comes back under another name, is not encoded again.
"""

import json
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lib.memory.packing import StoredSlice
from lib.memory.signature import names_text
from lib.types import LabelledImage

SCHEMA = """
CREATE TABLE IF NOT EXISTS images (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    image_id TEXT NOT NULL,
    image_path TEXT NOT NULL,
    label_path TEXT NOT NULL,
    label_names TEXT NOT NULL,
    signature TEXT NOT NULL,
    content TEXT NOT NULL,
    error TEXT,
    removed_at REAL,
    generation INTEGER NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS one_live ON images (image_id) WHERE removed_at IS NULL;
CREATE INDEX IF NOT EXISTS by_content ON images (content);
CREATE TABLE IF NOT EXISTS slices (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    image INTEGER NOT NULL REFERENCES images (id) ON DELETE CASCADE,
    spec TEXT NOT NULL,
    embedding BLOB NOT NULL,
    file TEXT NOT NULL,
    position INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS by_image ON slices (image);
CREATE INDEX IF NOT EXISTS by_file ON slices (file);
"""


@dataclass(frozen=True)
class Record:
    """A row of `images`."""

    row: int
    image_id: str
    image_path: str
    label_path: str
    label_names: str
    signature: str
    content: str
    error: str | None

    def label(self) -> LabelledImage:
        """What the row was made from."""
        return LabelledImage(
            self.image_id,
            Path(self.image_path),
            Path(self.label_path),
            {int(value): str(name) for value, name in json.loads(self.label_names)},
        )


@dataclass(frozen=True)
class Sighting:
    """A labelled image as just seen in the datastore.

    Attributes:
        label: what the datastore says.
        signature: cheap; "" equals nothing.
        content: digest; "" where it could not be read.
        error: sentence, where it could not be read.
    """

    label: LabelledImage
    signature: str
    content: str
    error: str | None = None


_COLUMNS = "id, image_id, image_path, label_path, label_names, signature, content, error"


def live_records(connection: sqlite3.Connection) -> dict[str, Record]:
    """Live and failed rows by image id."""
    rows = connection.execute(f"SELECT {_COLUMNS} FROM images WHERE removed_at IS NULL")
    return {row[1]: Record(*row) for row in rows}


def live_record(connection: sqlite3.Connection, image_id: str) -> Record | None:
    """The live or failed row of an image."""
    row = connection.execute(
        f"SELECT {_COLUMNS} FROM images WHERE removed_at IS NULL AND image_id = ?", (image_id,)
    ).fetchone()
    return None if row is None else Record(*row)


def next_generation(connection: sqlite3.Connection) -> int:
    """Count the references' generation up."""
    connection.execute("UPDATE meta SET value = value + 1 WHERE name = 'generation'")
    return generation(connection)


def generation(connection: sqlite3.Connection) -> int:
    """Of the references; grows with each change."""
    row = connection.execute("SELECT value FROM meta WHERE name = 'generation'").fetchone()
    return int(row[0])


def retire(connection: sqlite3.Connection, record: Record) -> None:
    """Take a row out of what counts. One that failed or whose file is lost has nothing to keep."""
    if record.error is None and record.content:
        connection.execute(
            "UPDATE images SET removed_at = ? WHERE id = ?", (time.time(), record.row)
        )
    else:
        connection.execute("DELETE FROM images WHERE id = ?", (record.row,))
    if record.error is None:
        next_generation(connection)


def refresh_signature(connection: sqlite3.Connection, record: Record, seen: Sighting) -> None:
    """Only the files' looks changed: remember the new ones."""
    names = names_text(seen.label.label_names)
    values = (seen.signature, str(seen.label.image_path), str(seen.label.label_path), names)
    if values != (record.signature, record.image_path, record.label_path, record.label_names):
        connection.execute(
            "UPDATE images SET signature = ?, image_path = ?, label_path = ?, label_names = ? "
            "WHERE id = ?",
            (*values, record.row),
        )


def insert(connection: sqlite3.Connection, seen: Sighting, slices: Iterable[StoredSlice]) -> None:
    """Make a live row with its slices, or a failed one, in place of what was live before."""
    before = live_record(connection, seen.label.image_id)
    if before is not None:
        retire(connection, before)
    row = connection.execute(
        "INSERT INTO images (image_id, image_path, label_path, label_names, signature, content, "
        "error, generation) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            seen.label.image_id,
            str(seen.label.image_path),
            str(seen.label.label_path),
            names_text(seen.label.label_names),
            seen.signature,
            seen.content,
            seen.error,
            next_generation(connection) if seen.error is None else 0,
        ),
    ).lastrowid
    _insert_slices(connection, row, slices)


def insert_recovered(
    connection: sqlite3.Connection, content: str, slices: Iterable[StoredSlice]
) -> None:
    """Make a retired row of which only the content is known; whoever has that content adopts it."""
    row = connection.execute(
        "INSERT INTO images (image_id, image_path, label_path, label_names, signature, content, "
        "removed_at, generation) VALUES ('', '', '', '[]', '', ?, ?, 0)",
        (content, time.time()),
    ).lastrowid
    _insert_slices(connection, row, slices)


def adopt(connection: sqlite3.Connection, seen: Sighting) -> str | None:
    """Give an image the references of equal content that the bank has already.

    Returns:
        The id under which they were known ("" of recovered ones), or None if there are none.
    """
    donor = connection.execute(
        "SELECT id, image_id, removed_at FROM images WHERE content = ? AND error IS NULL "
        "AND image_id != ? OR content = ? AND error IS NULL AND removed_at IS NOT NULL "
        "ORDER BY removed_at IS NULL, removed_at DESC LIMIT 1",
        (seen.content, seen.label.image_id, seen.content),
    ).fetchone()
    if donor is None or not seen.content:
        return None
    row, known_as, removed_at = donor
    if removed_at is None:
        # The same picture under two ids: the copy's rows name the same files.
        insert(connection, seen, ())
        copy = live_record(connection, seen.label.image_id)
        if copy is not None:
            connection.execute(
                "INSERT INTO slices (image, spec, embedding, file, position) "
                "SELECT ?, spec, embedding, file, position FROM slices WHERE image = ?",
                (copy.row, row),
            )
        return str(known_as)
    before = live_record(connection, seen.label.image_id)
    if before is not None:
        retire(connection, before)
    connection.execute(
        "UPDATE images SET image_id = ?, image_path = ?, label_path = ?, label_names = ?, "
        "signature = ?, removed_at = NULL, generation = ? WHERE id = ?",
        (
            seen.label.image_id,
            str(seen.label.image_path),
            str(seen.label.label_path),
            names_text(seen.label.label_names),
            seen.signature,
            next_generation(connection),
            row,
        ),
    )
    return str(known_as)


def disown(connection: sqlite3.Connection, file: str) -> list[Record]:
    """Forget what the images of a damaged file were made from, so that they are encoded again.

    Returns:
        Their live rows.
    """
    rows = "SELECT DISTINCT image FROM slices WHERE file = ?"
    connection.execute(
        f"DELETE FROM images WHERE removed_at IS NOT NULL AND id IN ({rows})", (file,)
    )
    connection.execute(
        f"UPDATE images SET content = '', signature = '' WHERE id IN ({rows})", (file,)
    )
    found = connection.execute(f"SELECT {_COLUMNS} FROM images WHERE id IN ({rows})", (file,))
    return [Record(*row) for row in found]


def purge(connection: sqlite3.Connection, retired_before: float) -> set[str]:
    """Delete rows retired before a time; the files that the others need."""
    connection.execute(
        "DELETE FROM images WHERE removed_at IS NOT NULL AND removed_at < ?", (retired_before,)
    )
    return files_named(connection)


def files_named(connection: sqlite3.Connection) -> set[str]:
    """All files that a row names."""
    return {row[0] for row in connection.execute("SELECT DISTINCT file FROM slices")}


def _insert_slices(
    connection: sqlite3.Connection, image: int | None, slices: Iterable[StoredSlice]
) -> None:
    connection.executemany(
        "INSERT INTO slices (image, spec, embedding, file, position) VALUES (?, ?, ?, ?, ?)",
        [
            (image, item.text(), item.embedding.tobytes(), item.file, item.position)
            for item in slices
        ],
    )
