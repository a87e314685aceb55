"""What a ranking of images sees and says: ids, vectors and slice numbers; no files, no networks."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lib.types import FloatArray

PLACE_AXES = 4  # the last numbers of a region's vector tell its place


@dataclass(frozen=True, eq=False)
class PoolView:
    """The embeddings of a pool of images, rows of one image side by side, images sorted by id.

    Attributes:
        ids: M image ids, sorted.
        vectors: (N, E) unit float32, one row per slice, or one for each of its regions.
        starts: (M + 1,) image m has the rows `starts[m]:starts[m + 1]`, at least one.
        slices: (N,) the number of each row's slice in its volume.
        regions: rows per slice.
    """

    ids: tuple[str, ...]
    vectors: FloatArray
    starts: npt.NDArray[np.int64]
    slices: npt.NDArray[np.int64]
    regions: int

    @classmethod
    def of(
        cls,
        embeddings: Mapping[str, FloatArray],
        slices: Mapping[str, Sequence[int]] | None = None,
        *,
        regions: int = 1,
    ) -> "PoolView":
        """Lay out the embeddings (n, E) of each image.

        Args:
            embeddings: image id -> (n, E) unit vectors; images without rows are left out.
            slices: image id -> n slice numbers; 0, 1, ... of an image that is not in it.
            regions: rows per slice, a divisor of each n.
        """
        ids = tuple(sorted(name for name, rows in embeddings.items() if len(rows)))
        counts = [len(embeddings[name]) for name in ids]
        known = slices or {}
        numbers = [known.get(name, range(len(embeddings[name]))) for name in ids]
        for name, count, own in zip(ids, counts, numbers, strict=True):
            if len(own) != count:
                msg = f"image {name!r}: {count} embeddings, {len(own)} slice numbers; give one each"
                raise ValueError(msg)
        vectors = (
            np.concatenate([embeddings[name] for name in ids])
            if ids
            else np.zeros((0, 0), np.float32)
        )
        return cls(
            ids=ids,
            vectors=np.ascontiguousarray(vectors, dtype=np.float32),
            starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            slices=np.array([n for own in numbers for n in own], dtype=np.int64),
            regions=regions,
        )

    def whole(self) -> "PoolView":
        """The same with one row per slice, the mean of what is in its regions.

        For what compares pictures. Where regions lie is the same in all of them, and left out.
        """
        if self.regions == 1:
            return self
        content = self.vectors[:, :-PLACE_AXES]
        means = content.reshape(-1, self.regions, content.shape[1]).mean(axis=1)
        lengths = np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
        return PoolView(
            ids=self.ids,
            vectors=(means / lengths).astype(np.float32),
            starts=self.starts // self.regions,
            slices=self.slices[:: self.regions],
            regions=1,
        )

    def part(self, ids: Collection[str]) -> "PoolView":
        """The same of some images only; ids that are not there are passed over."""
        wanted = set(ids)
        kept = np.array([m for m, name in enumerate(self.ids) if name in wanted], dtype=np.int64)
        rows = self.rows(kept)
        return PoolView(
            ids=tuple(self.ids[m] for m in kept),
            vectors=self.vectors[rows],
            starts=np.concatenate([[0], np.cumsum(np.diff(self.starts)[kept])]).astype(np.int64),
            slices=self.slices[rows],
            regions=self.regions,
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def owners(self) -> npt.NDArray[np.int64]:
        """(N,) the image of each row, as its position in `ids`."""
        return np.repeat(np.arange(len(self.ids)), np.diff(self.starts))

    def rows(self, images: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """All rows of images (positions in `ids`), in their order."""
        counts = self.starts[images + 1] - self.starts[images]
        ends = np.cumsum(counts)
        total = int(ends[-1]) if len(ends) else 0
        shift = np.repeat(self.starts[images] - (ends - counts), counts)
        return np.arange(total, dtype=np.int64) + shift


@dataclass(frozen=True)
class Proposal:
    """An image to label next.

    Attributes:
        image_id: which.
        score: by which it won; comparable within one answer, not between rankings.
        reason: a sentence's worth of why, for a person.
        slices: the slices most worth labelling, best first, for who labels sparsely.
    """

    image_id: str
    score: float
    reason: str
    slices: tuple[int, ...]


class Ranking(Protocol):
    """Orders the unlabelled images of one pool and is kept in step with what gets labelled.

    Not thread-safe. Ids that are not in the pool are passed over everywhere. The answers are a
    function of pool, seed, labelled images and risk alone, however these came to be.
    """

    def add_labelled(self, ids: Iterable[str], labels: Iterable[str] | None = None) -> None:
        """Images are labelled now, or about to be.

        Args:
            ids: which; they are not proposed any more.
            labels: names that were annotated in these images, of the `labels` that the ranking
                was made for: where some are missing, the images stay in the race for those. None:
                all of them.
        """
        ...

    def remove_labelled(self, ids: Iterable[str]) -> None:
        """Images have no label any more; they come back into the race."""
        ...

    def set_risk(self, risk: Mapping[str, float]) -> None:
        """What is known of 1 - expected Dice of images, 0..1; replaces what was known before.

        Rankings that do not look at risk ignore it; the others estimate it for images not named,
        from their distance to the labelled ones.
        """
        ...

    def next(self, exclude: Collection[str] = (), n: int = 1) -> list[Proposal]:
        """The n best images, in the order in which to label them; fewer, if fewer are left.

        Args:
            exclude: ids not to be proposed this time.
            n: how many. The second is chosen as if the first were labelled already.
        """
        ...
