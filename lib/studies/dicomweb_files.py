"""Series of a PACS on this machine's disk: a folder each, whole or not there at all."""

import logging
import shutil
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from lib.durable import make_folder
from lib.errors import PacsError, RefSegError
from lib.studies.dicomweb import Pacs, SeriesRow

logger = logging.getLogger(__name__)


class Locks:
    """A lock for each name."""

    def __init__(self) -> None:
        self._made: dict[str, threading.Lock] = {}

    def of(self, name: str) -> threading.Lock:
        """The same for the same name."""
        return self._made.setdefault(name, threading.Lock())


class FetchedSeries:
    """Fetches series when they are needed, and some before.

    Args:
        pacs: where they are.
        folder: where they are put.
    """

    def __init__(self, pacs: Pacs, folder: Path) -> None:
        self._pacs = pacs
        self._root = folder
        self._fetching = Locks()  # one each: a long fetch keeps nobody from other series
        self._thread: threading.Thread | None = None
        make_folder(folder)

    def folder(self, series: str) -> Path:
        """Where a series is, or would be."""
        return self._root / series

    def at_hand(self, series: str) -> bool:
        """Whether it was fetched."""
        return self.folder(series).is_dir()

    def bring(self, row: SeriesRow) -> None:
        """Fetch a series that is not here, or has grown since.

        Raises:
            PacsError: it is not here, and cannot be fetched.
        """
        if self._is_whole(row):
            return
        with self._fetching.of(row.series):
            if not self._is_whole(row):  # else somebody else has fetched it meanwhile
                self._fetch(row)

    def _is_whole(self, row: SeriesRow) -> bool:
        there = self._count(row.series)
        return there > 0 and (row.instances is None or there == row.instances)

    def _count(self, series: str) -> int:
        try:
            return sum(1 for _ in self.folder(series).iterdir())
        except FileNotFoundError:
            return 0

    def _fetch(self, row: SeriesRow) -> None:
        folder = self.folder(row.series)
        there = self._count(row.series)
        beside = folder.with_name(f".{uuid.uuid4().hex}")
        before = folder.with_name(f"{beside.name}.before")
        beside.mkdir()
        start = time.perf_counter()
        try:
            self._pacs.fetch(row, beside)
            if there:
                folder.replace(before)
            beside.replace(folder)
        except PacsError:
            if not there:
                raise
            logger.warning("series %s has changed, and cannot be fetched anew", row.series)
            return
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            shutil.rmtree(before, ignore_errors=True)
        logger.info("fetched series %s in %.1f s", row.series, time.perf_counter() - start)

    def bring_soon(self, rows: Sequence[SeriesRow]) -> None:
        """Fetch them in the background; no more than one thread does so."""
        if rows and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(
                target=self.bring_quietly, args=(rows,), name="refseg-fetch", daemon=True
            )
            self._thread.start()

    def bring_quietly(self, rows: Sequence[SeriesRow]) -> None:
        """Fetch those that can be fetched; the others are told of in the log."""
        for row in rows:
            try:
                self.bring(row)
            except (RefSegError, OSError) as error:
                logger.warning("series %s is fetched later: %s", row.series, error)
