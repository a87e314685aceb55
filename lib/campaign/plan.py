"""What a campaign is: strategies, numbers of labels, repetitions, and what it is scored on."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from lib.durable import digest_of
from lib.errors import RequestError
from lib.retrieval.ranking import NAMES
from lib.types import LabelledImage

VERSION = 7  # counted up whenever the figures of a campaign would come out otherwise
_OF_PARTS = 1  # so that a part and a strategy of the same seed are drawn apart


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
        part: share of the images that each repetition may label, drawn by its seed.
        tolerance_mm: of the surface Dice.
        source: digest of all else that the figures depend on: files, networks, options.
    """

    strategies: tuple[str, ...]
    budgets: tuple[int, ...]
    seeds: int
    targets: tuple[str, ...]
    labels: tuple[str, ...]
    slices: int
    part: float
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
            self.part,
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


def check_budgets(wanted: Sequence[int], images: int, part: float = 1.0) -> tuple[int, ...]:
    """Rising numbers of labels that a repetition has, and that leave at least one image to score.

    Raises:
        RequestError: none is left, or one is below 1.
    """
    if not wanted or min(wanted) < 1:
        msg = f"budgets {list(wanted)}: give numbers of labelled images from 1, such as 1,2,5,10."
        raise RequestError(msg)
    most = min(images - 1, size_of_part(images, part))
    fitting = tuple(sorted({number for number in wanted if number <= most}))
    if not fitting:
        msg = f"{images} labelled images are too few: the smallest budget is {min(wanted)}, and "
        msg += f"a repetition may label {most}, so that at least one is left to be scored."
        raise RequestError(msg)
    return fitting


def size_of_part(images: int, part: float) -> int:
    """How many of so many images a repetition may label: all, or their share, one at least."""
    return max(1, round(part * images))


def draw_part(images: Sequence[str], part: float, seed: int) -> tuple[str, ...]:
    """The images that a repetition may label, the same for all strategies.

    A strategy that owes nothing to chance has one path through one pool, and luck with its first
    image would be told as skill: each repetition has a pool of its own.
    """
    ids = sorted(images)
    count = size_of_part(len(ids), part)
    chosen = np.random.default_rng((seed, _OF_PARTS)).choice(len(ids), count, replace=False)
    return tuple(ids[row] for row in sorted(chosen))


def draw_targets(images: Sequence[str], limit: int, *, seed: int = 0) -> tuple[str, ...]:
    """The images to score: all, or `limit` drawn once, the same for all strategies and seeds."""
    ids = sorted(images)
    if limit <= 0 or limit >= len(ids):
        return tuple(ids)
    chosen = np.random.default_rng(seed).choice(len(ids), limit, replace=False)
    return tuple(ids[row] for row in sorted(chosen))


def source_of(labelled: Collection[LabelledImage], *settings: object) -> str:
    """Digest of what the files hold, so that a copied folder goes on, and of settings."""
    parts: list[object] = list(settings)
    for one in labelled:
        content = [digest_of(path) for path in _files(one)]
        parts.append((one.image_id, content, sorted(one.label_names.items())))
    return sha256(repr(parts).encode()).hexdigest()[:16]


def _files(one: LabelledImage) -> list[Path]:
    folder = one.image_path
    images = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    return [*images, one.label_path]
