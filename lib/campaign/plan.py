"""What a campaign is: strategies, numbers of labels, repetitions, and what it is scored on."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from lib.errors import RequestError
from lib.retrieval.ranking import NAMES
from lib.types import LabelledImage

VERSION = 3  # counted up whenever the figures of a campaign would come out otherwise


@dataclass(frozen=True)
class Plan:
    """One campaign.

    Attributes:
        strategies: names of `lib.retrieval.ranking`.
        budgets: numbers of labelled images, rising.
        seeds: how many times each strategy is played, with seeds 0, 1, ...
        targets: ids of the images that are scored as long as they are not labelled.
        labels: names that are scored.
        slices: at most so many slices of a target are scored, evenly spread; 0: all.
        tolerance_mm: of the surface Dice.
        source: digest of all else that the figures depend on: files, networks, options.
    """

    strategies: tuple[str, ...]
    budgets: tuple[int, ...]
    seeds: int
    targets: tuple[str, ...]
    labels: tuple[str, ...]
    slices: int
    tolerance_mm: float
    source: str

    @property
    def protocol(self) -> str:
        """Digest of what one line's figures depend on.

        Other strategies, budgets and seeds do not change it: a campaign that is asked for more
        keeps what it has.
        """
        parts = (
            VERSION,
            self.targets,
            self.labels,
            self.slices,
            self.tolerance_mm,
            self.source,
        )
        return sha256(repr(parts).encode()).hexdigest()[:16]


def check_strategies(names: Sequence[str]) -> tuple[str, ...]:
    """Known names, each once.

    Raises:
        RequestError: one is unknown, or there are none.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        msg = f"strategy {', '.join(unknown) or 'missing'}: choose of {', '.join(NAMES)}."
        raise RequestError(msg)
    return tuple(dict.fromkeys(names))


def check_budgets(wanted: Sequence[int], images: int) -> tuple[int, ...]:
    """Rising numbers of labels that leave at least one image to score.

    Raises:
        RequestError: none is left, or one is below 1.
    """
    if not wanted or min(wanted) < 1:
        msg = f"budgets {list(wanted)}: give numbers of labelled images from 1, such as 1,2,5,10."
        raise RequestError(msg)
    fitting = tuple(sorted({number for number in wanted if number < images}))
    if not fitting:
        msg = f"{images} labelled images are too few: the smallest budget is {min(wanted)}, and "
        msg += "at least one image must be left to be scored."
        raise RequestError(msg)
    return fitting


def draw_targets(images: Sequence[str], limit: int, *, seed: int = 0) -> tuple[str, ...]:
    """The images to score: all, or `limit` drawn once, the same for all strategies and seeds."""
    ids = sorted(images)
    if limit <= 0 or limit >= len(ids):
        return tuple(ids)
    chosen = np.random.default_rng(seed).choice(len(ids), limit, replace=False)
    return tuple(ids[row] for row in sorted(chosen))


def source_of(labelled: Collection[LabelledImage], *settings: object) -> str:
    """Digest of files, as size and time tell, and of settings."""
    parts: list[object] = list(settings)
    for one in labelled:
        looks = [(path.stat().st_size, path.stat().st_mtime_ns) for path in _files(one)]
        parts.append((one.image_id, looks, sorted(one.label_names.items())))
    return sha256(repr(parts).encode()).hexdigest()[:16]


def _files(one: LabelledImage) -> list[Path]:
    folder = one.image_path
    images = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    return [*images, one.label_path]
