"""What was measured on labelled images and estimated of the others, beside the bank."""

import json
import sqlite3
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from lib.confidence.calibration import Sample
from lib.confidence.evidence import Evidence
from lib.memory.catalogue import Catalogue, fingerprint_folder

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS samples (
    image_id TEXT PRIMARY KEY,
    mark TEXT NOT NULL,
    rows TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS estimates (
    image_id TEXT PRIMARY KEY,
    generation INTEGER NOT NULL,
    rows TEXT NOT NULL
);
"""


@dataclass(frozen=True)
class Estimate:
    """What was seen when an image without a label was segmented.

    Attributes:
        image_id: which.
        generation: of the bank that segmented it.
        evidence: for each label.
    """

    image_id: str
    generation: int
    evidence: Mapping[str, Evidence]


class ConfidenceStore:
    """One SQLite file in the bank's folder; safe for threads and processes.

    Args:
        folder: of all banks of one datastore.
        fingerprint: of the bank; evidence of other networks is no evidence.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        path = fingerprint_folder(Path(folder), fingerprint) / "confidence.sqlite"
        self._catalogue = Catalogue(path, _SCHEMA, fingerprint)

    def marks(self) -> dict[str, str]:
        """What the samples of each image were made from."""
        return dict(self._all("SELECT image_id, mark FROM samples"))

    def put_samples(self, image_id: str, mark: str, samples: Collection[Sample]) -> None:
        """Keep what an image taught, in place of what it taught before."""
        rows = [
            {
                "label": sample.label,
                "dice": sample.dice,
                "present": sample.present,
                **_as_json(sample.evidence),
            }
            for sample in samples
        ]
        self._write(
            "INSERT OR REPLACE INTO samples VALUES (?, ?, ?)", (image_id, mark, json.dumps(rows))
        )

    def samples(self) -> list[Sample]:
        """Of all images, in the order of their ids."""
        found = []
        for (text,) in self._all("SELECT rows FROM samples ORDER BY image_id"):
            for row in json.loads(text):
                label, dice, present = row.pop("label"), row.pop("dice"), row.pop("present")
                found.append(Sample(label, Evidence(**row), dice, present))
        return found

    def images(self) -> int:
        """How many images the samples come from."""
        ((count,),) = self._all("SELECT COUNT(*) FROM samples WHERE rows != '[]'")
        return int(count)

    def put_estimate(self, estimate: Estimate) -> None:
        """Keep an estimate, in place of the image's last."""
        rows = {label: _as_json(evidence) for label, evidence in estimate.evidence.items()}
        self._write(
            "INSERT OR REPLACE INTO estimates VALUES (?, ?, ?)",
            (estimate.image_id, estimate.generation, json.dumps(rows)),
        )

    def generations(self) -> dict[str, int]:
        """Of the banks that looked at the images last: quick, and changed with each estimate."""
        return dict(self._all("SELECT image_id, generation FROM estimates"))

    def estimates(self, only: Collection[str] | None = None) -> dict[str, Estimate]:
        """Of all images, or only of these."""
        found = {}
        for image_id, generation, text in self._all("SELECT * FROM estimates"):
            if only is not None and image_id not in only:
                continue
            evidence = {label: Evidence(**row) for label, row in json.loads(text).items()}
            found[image_id] = Estimate(image_id, generation, evidence)
        return found

    def forget(self, image_ids: Collection[str]) -> None:
        """Drop the samples of images whose labels are gone."""
        for image_id in image_ids:
            self._write("DELETE FROM samples WHERE image_id = ?", (image_id,))

    def _all(self, query: str) -> list[Any]:
        def read(connection: sqlite3.Connection) -> list[Any]:
            return connection.execute(query).fetchall()

        return self._do(self._catalogue.read, read)

    def _write(self, statement: str, values: tuple[object, ...]) -> None:
        self._do(self._catalogue.write, lambda c: c.execute(statement, values))

    def _do(self, connect: Callable[..., Any], work: Callable[[sqlite3.Connection], T]) -> T:
        def once() -> T:
            with connect() as connection:
                return work(connection)

        return self._catalogue.surviving(once)


def _as_json(evidence: Evidence) -> dict[str, float]:
    """Without the signs that were not looked for: JSON has no NaN."""
    kept = evidence.signs()
    return {name: value for name, value in asdict(evidence).items() if name in kept} | {
        "area": evidence.area
    }
