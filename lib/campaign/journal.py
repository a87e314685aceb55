"""What was measured, line by line on disk: an interrupted campaign goes on where it ended."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lib.campaign.scoring import CaseScore, LabelScore

logger = logging.getLogger(__name__)

Place = tuple[str, int, int]


@dataclass(frozen=True)
class Seconds:
    """Time of one line.

    Attributes:
        choosing: all its next images, one by one.
        learning: bringing the bank up to date.
        segmenting: all its targets, remembered answers included.
        slices: slices that were segmented.
        answered: of these, slices whose answer was not remembered.
        network: time of the network for those.
    """

    choosing: float
    learning: float
    segmenting: float
    slices: int
    answered: int
    network: float


@dataclass(frozen=True)
class Outcome:
    """One strategy, seed and budget: which images were labelled, and how the others fared."""

    strategy: str
    seed: int
    budget: int
    picked: tuple[str, ...]
    reasons: tuple[str, ...]
    cases: tuple[CaseScore, ...]
    seconds: Seconds

    @property
    def place(self) -> Place:
        """Which line this is."""
        return self.strategy, self.seed, self.budget


class Journal:
    """Outcomes in a JSON Lines file; each is on the disk before the next is begun.

    Lines of another protocol (other targets, files, networks) are kept and passed over. A last
    line that was cut short by an interruption is no line.

    Args:
        path: of the file; made when the first line is added.
        protocol: of the plan.
    """

    def __init__(self, path: Path, protocol: str) -> None:
        self._path = path
        self._protocol = protocol
        self._outcomes: dict[Place, Outcome] = {}
        self.passed_over = 0
        if path.is_file():
            self._read()

    @property
    def outcomes(self) -> Mapping[Place, Outcome]:
        """All lines of this protocol."""
        return self._outcomes

    def add(self, outcome: Outcome) -> None:
        """Append a line and wait until it is on the disk."""
        row = {"protocol": self._protocol, **asdict(outcome)}
        line = json.dumps(row, separators=(",", ":")) + "\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self._outcomes[outcome.place] = outcome

    def _read(self) -> None:
        data = self._path.read_bytes()
        whole, _, cut = data.rpartition(b"\n")
        if cut:
            logger.warning("%s: the last line was cut short; it is measured again", self._path.name)
            os.truncate(self._path, len(data) - len(cut))
        for line in whole.splitlines():
            try:
                row = json.loads(line)
                protocol, outcome = row["protocol"], _outcome(row)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                logger.warning("%s: a line is damaged (%s)", self._path.name, error)
                continue
            if protocol == self._protocol:
                self._outcomes[outcome.place] = outcome
            else:
                self.passed_over += 1


def _outcome(row: Mapping[str, Any]) -> Outcome:
    cases = tuple(
        CaseScore(
            case["image_id"],
            {name: LabelScore(**score) for name, score in case["labels"].items()},
        )
        for case in row["cases"]
    )
    return Outcome(
        strategy=row["strategy"],
        seed=row["seed"],
        budget=row["budget"],
        picked=tuple(row["picked"]),
        reasons=tuple(row["reasons"]),
        cases=cases,
        seconds=Seconds(**row["seconds"]),
    )
