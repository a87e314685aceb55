"""Embeddings of images that nobody has labelled yet, kept so that each is computed once.

One SQLite file: a hundred thousand images are rows of some hundred bytes to kilobytes, which a
folder of files would serve more slowly and no more safely.
"""

import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from lib.memory.catalogue import Catalogue, fingerprint_folder
from lib.memory.signature import file_digest, file_signature
from lib.types import FloatArray

T = TypeVar("T")

LAYOUT = "regions-1"  # counted up when rows of the same network would not go with those stored
_SCHEMA = """
CREATE TABLE IF NOT EXISTS embeddings (
    image_id TEXT PRIMARY KEY,
    path TEXT NOT NULL,
    signature TEXT NOT NULL,
    content TEXT NOT NULL,
    slices INTEGER NOT NULL,
    size INTEGER NOT NULL,
    dtype TEXT NOT NULL,
    data BLOB NOT NULL,
    numbers TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS by_content ON embeddings (content);
"""
_AT_ONCE = 500


class EmbeddingPool:
    """Rows (n, C) per image file, of its slices or of their regions; for threads and processes.

    A row counts as long as its file looks the same (size, times, inode) or, failing that, has the
    same bytes. A damaged file is put aside and starts empty.

    Args:
        folder: of all banks of one datastore; the pool lies in its fingerprint's subfolder.
        fingerprint: changes whenever stored embeddings would no longer fit.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        path = fingerprint_folder(Path(folder), fingerprint) / "regions.sqlite"
        self._catalogue = Catalogue(path, _SCHEMA, fingerprint)

    def get(self, image_id: str, path: Path) -> FloatArray | None:
        """The embeddings (n, E) float32 of an image, or None if they must be computed."""
        looks = _looks(path)
        if looks is None:
            return None
        columns = "signature, content, slices, size, dtype, data, numbers"
        row = self._read(
            lambda c: c.execute(
                f"SELECT {columns} FROM embeddings WHERE image_id = ?", (image_id,)
            ).fetchone()
        )
        if row is not None and looks and row[0] == looks:
            return _array(*row[2:6])
        content = file_digest(path)
        if row is None or row[1] != content:
            # Renamed, or another image took its place: the same bytes are known under any id.
            row = self._read(
                lambda c: c.execute(
                    f"SELECT {columns} FROM embeddings WHERE content = ? LIMIT 1", (content,)
                ).fetchone()
            )
            if row is None:
                return None
        self._write(
            lambda c: c.execute(
                "INSERT OR REPLACE INTO embeddings VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (image_id, str(path), looks, *row[1:]),
            )
        )
        return _array(*row[2:6])

    def put(
        self,
        image_id: str,
        path: Path,
        array: npt.NDArray[np.float32] | npt.NDArray[np.float16],
        *,
        numbers: Sequence[int] = (),
    ) -> None:
        """Keep the embeddings (n, E) of an image as it is now, as float16 or float32 as given.

        Args:
            image_id: its id.
            path: its file or folder.
            array: rows of a slice side by side.
            numbers: of each row the slice's number in its volume; 0, 1, ... where none are given.

        Raises:
            OSError: the image is not there any more.
        """
        if array.ndim != 2 or array.dtype not in (np.float16, np.float32):
            message = f"embeddings of shape {array.shape} and type {array.dtype}"
            message += "; give (n, E) float16 or float32"
            raise ValueError(message)
        values = (
            image_id,
            str(path),
            file_signature(path),
            file_digest(path),
            *array.shape,
            array.dtype.name,
            np.ascontiguousarray(array).tobytes(),
            json.dumps([int(number) for number in numbers or range(len(array))]),
        )
        self._write(
            lambda c: c.execute(
                "INSERT OR REPLACE INTO embeddings VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values
            )
        )

    def known(self, paths: Mapping[str, Path] | Iterable[tuple[str, Path]]) -> set[str]:
        """The ids of which `get` would answer without reading the image.

        Args:
            paths: image id -> file or folder, as a mapping or in pairs.
        """
        stored = dict(self._read(lambda c: _all(c, "SELECT image_id, signature FROM embeddings")))
        return {
            image_id
            for image_id, path in dict(paths).items()
            if stored.get(image_id) and stored[image_id] == _looks(path)
        }

    def gather(self, image_ids: Sequence[str]) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        """The stored embeddings of many images in one go, without looking at the files.

        Args:
            image_ids: of `known`; those that are not stored are passed over.

        Returns:
            (N, E) float32, and (N,) the position in `image_ids` of each row.
        """
        number = {image_id: position for position, image_id in enumerate(image_ids)}

        def read(connection: sqlite3.Connection) -> list[tuple[int, FloatArray]]:
            found = []
            for start in range(0, len(image_ids), _AT_ONCE):
                part = image_ids[start : start + _AT_ONCE]
                marks = ", ".join("?" * len(part))
                for image_id, *row in connection.execute(
                    "SELECT image_id, slices, size, dtype, data FROM embeddings "
                    f"WHERE image_id IN ({marks})",
                    part,
                ):
                    found.append((number[image_id], _array(*row)))
            return found

        found = sorted(self._read(read), key=lambda item: item[0])
        if not found:
            return np.zeros((0, 0), dtype=np.float32), np.zeros(0, dtype=np.int64)
        groups = np.concatenate([np.full(len(a), position) for position, a in found])
        return np.concatenate([a for _, a in found]), groups.astype(np.int64)

    def slice_numbers(self) -> dict[str, tuple[int, ...]]:
        """The numbers of the embedded slices in their volumes, of every image stored."""
        rows = self._read(lambda c: _all(c, "SELECT image_id, numbers FROM embeddings"))
        return {image_id: tuple(json.loads(text)) for image_id, text in rows}

    def forget(self, image_ids: Sequence[str]) -> None:
        """Drop the embeddings of images."""
        self._write(
            lambda c: c.executemany(
                "DELETE FROM embeddings WHERE image_id = ?", [(i,) for i in image_ids]
            )
        )

    def __len__(self) -> int:
        return int(self._read(lambda c: c.execute("SELECT COUNT(*) FROM embeddings").fetchone())[0])

    def _read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        def work() -> T:
            with self._catalogue.read() as connection:
                return query(connection)

        return self._catalogue.surviving(work)

    def _write(self, change: Callable[[sqlite3.Connection], object]) -> None:
        def work() -> None:
            with self._catalogue.write() as connection:
                change(connection)

        self._catalogue.surviving(work)


def _looks(path: Path) -> str | None:
    """Signature of a file, "" if it is too fresh to tell, None if it is not there."""
    try:
        return file_signature(path)
    except OSError:
        return None


def _all(connection: sqlite3.Connection, query: str) -> list[tuple[str, str]]:
    return connection.execute(query).fetchall()


def _array(slices: int, size: int, dtype: str, data: bytes) -> FloatArray:
    return np.frombuffer(data, dtype=dtype).reshape(slices, size).astype(np.float32)
