"""Episodes from a site's cases: like slices of other cases as references, labels varied as tasks.

Each episode is made from its own number, so that a training that was stopped goes on with exactly
the episodes that would have come.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lib.trainers.pretraining.episodes import Episode, EpisodeMaker
from lib.trainers.pretraining.tasks import Task, TaskSource
from lib.trainers.site.packing import PackedCase, as_tensor
from lib.types import FloatArray

MOST_LABELS = 3
MAIN = "site"  # family of the tasks made of labels
REGIONS_SEEN = 4  # pictures that one region task chooses from


@dataclass(frozen=True)
class EpisodePlan:
    """Sizes and shares of an episode.

    Attributes:
        size: working size in pixels.
        images: slices at most.
        queries: how many of them are queries; all are references of each other.
        most_supports: references of a query at most.
        regions: share of tasks that are a picture's own regions, which need no labels.
        seed: of everything.
    """

    size: int
    images: int = 8
    queries: int = 4
    most_supports: int = 7
    regions: float = 0.1
    seed: int = 0


class SiteEpisodes:
    """Makes the n-th episode, always the same for the same n and seed."""

    def __init__(
        self, cases: Sequence[PackedCase], plan: EpisodePlan, *, unlabelled: Path | None = None
    ) -> None:
        """Keep thumbnails only; slices are read when an episode is made.

        Args:
            cases: to learn from.
            plan: sizes and shares.
            unlabelled: file of `pack_unlabelled`, for region tasks.
        """
        self._cases = cases
        self._plan = plan
        self._unlabelled = unlabelled
        self._slices = [(c, i) for c, case in enumerate(cases) for i in range(len(case))]
        self._vectors: FloatArray = np.concatenate([case.thumbnails for case in cases])
        self._shows = _shows(cases)

    def make(self, number: int) -> Episode:
        """The n-th episode."""
        rng = np.random.default_rng((self._plan.seed, number))
        seed = int(rng.integers(2**31))
        task = None
        if rng.random() >= self._plan.regions:
            task = self._labelled(rng)
        if task is None:
            task = self._regions(rng, seed)
        maker = EpisodeMaker(size=self._plan.size, seed=seed, one_place=1.0)
        return maker.make(task, most_supports=self._plan.most_supports, queries=self._plan.queries)

    def _labelled(self, rng: np.random.Generator) -> Task | None:
        """Some labels of a slice, and like slices whose annotators knew these labels, too."""
        names = sorted(self._shows)
        wanted = names[int(rng.integers(len(names)))]
        anchor = int(rng.choice(self._shows[wanted]))
        case, _ = self._slices[anchor]
        known = [name for name in self._cases[case].labels if name != wanted]
        rng.shuffle(known)
        chosen = [wanted, *known[: int(rng.integers(MOST_LABELS))]]
        candidates = self._knowing(chosen)
        if len({self._slices[i][0] for i in candidates}) < 2 and len(candidates) < 2:
            return None
        picks = self._pick(rng, anchor, candidates)
        if len(picks) < 2:
            return None
        merged = [wanted]
        if len(chosen) > 1 and rng.random() < 0.15:  # a union is a label, too
            merged, chosen = chosen, [wanted]
        images, maps = [], []
        for index in picks:
            owner, row = self._slices[index]
            images.append(as_tensor(self._cases[owner].picture(row)))
            maps.append(self._drawn(owner, row, chosen, merged))
        labels = torch.from_numpy(np.stack(maps)).long()
        if len(chosen) == 1 and rng.random() < 0.05:
            labels = 1 - labels
        stacked = torch.stack(images)
        color = bool((stacked[:, 0] - stacked[:, 1]).abs().max() > 0.02)
        return Task(stacked, labels, 0.3 + 0.7 * float(rng.random()), color, MAIN)

    def _drawn(
        self, owner: int, row: int, chosen: Sequence[str], merged: Sequence[str]
    ) -> npt.NDArray[np.uint8]:
        case = self._cases[owner]
        lookup = np.zeros(len(case.labels) + 1, np.uint8)
        for name in merged:
            lookup[case.labels.index(name) + 1] = 1
        for value, name in enumerate(chosen, start=1):
            lookup[case.labels.index(name) + 1] = value
        found: npt.NDArray[np.uint8] = lookup[case.label_map(row)]
        return found

    def _knowing(self, names: Sequence[str]) -> npt.NDArray[np.intp]:
        """Slices of the cases in which all these labels were annotated."""
        wanted = set(names)
        knows = [wanted <= set(case.labels) for case in self._cases]
        return np.array([i for i, (c, _) in enumerate(self._slices) if knows[c]], np.intp)

    def _pick(
        self, rng: np.random.Generator, anchor: int, candidates: npt.NDArray[np.intp]
    ) -> list[int]:
        """The anchor first, then slices most like it, or any; of all cases alike, if they last."""
        owners = np.array([self._slices[i][0] for i in candidates])
        rank = rng.random(len(candidates))
        if rng.random() < 0.7:  # by similarity, as inference draws them
            rank = self._vectors[candidates] @ self._vectors[anchor] + 0.15 * rank
        cap = -(-self._plan.images // len(set(owners.tolist())))
        taken = {self._slices[anchor][0]: 1}
        picks = [anchor]
        for position in np.argsort(-rank, kind="stable"):
            owner = int(owners[position])
            if len(picks) == self._plan.images:
                break
            if int(candidates[position]) != anchor and taken.get(owner, 0) < cap:
                taken[owner] = taken.get(owner, 0) + 1
                picks.append(int(candidates[position]))
        return picks

    def _regions(self, rng: np.random.Generator, seed: int) -> Task:
        """A picture's own regions, warped and re-toned: costs no label."""
        pictures = self._unlabelled_pictures(rng)
        if not pictures:
            picks = rng.choice(len(self._slices), size=min(REGIONS_SEEN, len(self._slices)))
            pictures = [self._cases[c].picture(i) for c, i in (self._slices[p] for p in picks)]
        source = TaskSource(_Pictures(pictures), size=self._plan.size, seed=seed)  # type: ignore[arg-type]
        return source.draw(self._plan.images, synthetic=0.0, regions=1.0)

    def _unlabelled_pictures(self, rng: np.random.Generator) -> list[npt.NDArray[np.uint8]]:
        if self._unlabelled is None:
            return []
        stored = np.load(self._unlabelled, mmap_mode="r")
        return [
            np.array(stored[i]) for i in rng.choice(len(stored), min(REGIONS_SEEN, len(stored)))
        ]


def _shows(cases: Sequence[PackedCase]) -> dict[str, npt.NDArray[np.intp]]:
    """Label -> positions of the slices that show it, of all cases' slices in order."""
    found: dict[str, list[int]] = {}
    position = 0
    for case in cases:
        for row in case.present:
            for name, shown in zip(case.labels, row, strict=True):
                if shown:
                    found.setdefault(name, []).append(position)
            position += 1
    return {name: np.array(rows, np.intp) for name, rows in found.items()}


@dataclass(frozen=True)
class _PictureSet:
    """What `TaskSource` asks of a set."""

    name: str
    labels: tuple[int, ...]
    train: tuple[str, ...]


class _Pictures:
    """A few pictures in the shape of a pack, which is where `TaskSource` draws regions from."""

    def __init__(self, pictures: Sequence[npt.NDArray[np.uint8]]) -> None:
        self._pictures = pictures
        self.sets = (_PictureSet("site", (), tuple(str(i) for i in range(len(pictures)))),)

    def read(
        self, name: str, split: str, key: str
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Picture (H, W) or (H, W, 3), and an empty label map."""
        del name, split
        picture = self._pictures[int(key)]
        return picture[..., 0] if picture.shape[-1] == 1 else picture, np.zeros(
            picture.shape[:2], np.uint8
        )
