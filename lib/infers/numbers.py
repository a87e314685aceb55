"""Numbers of labels: given once, kept on disk for all workers and restarts, never given again."""

import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from lib.durable import write_json

logger = logging.getLogger(__name__)

TABLE = "label_numbers.json"
LOCK_TIMEOUT_S = 5.0  # another worker holds it for the time of writing a small file


class LabelNumbers:
    """A table name -> number in a studies' bank folder; a new name gets the next number.

    OHIF asks `/info` once and reads all later results by it. So a label that turns up later, or is
    gone, must not shift the others, whichever worker answers, and whether or not it was started
    anew. Where the folder cannot be written the numbers hold for this process alone.
    """

    def __init__(self, folder: Path) -> None:
        """Nothing is read or written before the first label is to be numbered."""
        self._folder = folder
        self._numbers: dict[str, int] = {}
        self._lock = threading.Lock()

    def of(self, names: Sequence[str]) -> dict[str, int]:
        """Name -> number of these names alone, ascending. New ones are numbered as they stand."""
        with self._lock:
            if not self._numbers.keys() >= set(names):
                try:
                    self._give(names)
                except OSError as error:
                    logger.error("numbers of labels are not kept for the next start: %s", error)
                    self._numbers = _with_new(self._numbers, names)
            return dict(sorted(((n, self._numbers[n]) for n in names), key=lambda pair: pair[1]))

    def _give(self, names: Sequence[str]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / TABLE
        with FileLock(path.with_suffix(".lock"), timeout=LOCK_TIMEOUT_S):
            stored = _read(path)
            table = _with_new(stored or self._numbers, names)
            if table != stored:
                write_json(path, table)
        self._numbers = table


def _with_new(numbers: dict[str, int], names: Sequence[str]) -> dict[str, int]:
    table = dict(numbers)
    for name in names:
        table.setdefault(name, max(table.values(), default=0) + 1)
    return table


def _read(path: Path) -> dict[str, int]:
    """The table; empty if there is none, or if the file is damaged, which is put aside."""
    try:
        table = json.loads(path.read_bytes())
        if len({int(number) for number in table.values()}) == len(table):
            return {str(name): int(number) for name, number in table.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError):
        pass
    aside = path.with_suffix(".damaged")
    logger.error("%s is damaged; put aside as %s, labels are numbered anew", path, aside.name)
    path.replace(aside)
    return {}
