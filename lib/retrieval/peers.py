"""Simple rankings to compare with: first by name, random, and random among likely foreground."""

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import numpy.typing as npt

from lib.retrieval.poolview import PoolView, Proposal


class FixedOrder:
    """A ranking that was settled when it was made: what is left comes in the order given.

    Args:
        pool: the images.
        order: (M,) positions in `pool.ids`, first to be labelled first.
        reason: of every proposal.
        labels: names that an image must be annotated for to be done; empty: any label will do.
    """

    def __init__(
        self,
        pool: PoolView,
        order: npt.NDArray[np.int64],
        reason: str,
        *,
        labels: Iterable[str] = (),
    ) -> None:
        self._pool = pool
        self._order = [pool.ids[number] for number in order]
        self._reason = reason
        self._wanted = frozenset(labels)
        self._done: set[str] = set()

    def add_labelled(self, ids: Iterable[str], labels: Iterable[str] | None = None) -> None:
        """See `Ranking`."""
        if labels is None or self._wanted <= set(labels):
            self._done.update(ids)

    def remove_labelled(self, ids: Iterable[str]) -> None:
        """See `Ranking`."""
        self._done.difference_update(ids)

    def set_risk(self, risk: Mapping[str, float]) -> None:
        """See `Ranking`; risk does not matter here."""

    def next(self, exclude: Collection[str] = (), n: int = 1) -> list[Proposal]:
        """See `Ranking`."""
        barred = self._done | set(exclude)
        left = [name for name in self._order if name not in barred][:n]
        return [Proposal(name, 0.0, self._reason, self._middle(name)) for name in left]

    def _middle(self, image_id: str) -> tuple[int, ...]:
        """No slice is better than another to these: the one in the middle."""
        number = int(np.searchsorted(np.array(self._pool.ids), image_id))
        own = self._pool.slices[self._pool.starts[number] : self._pool.starts[number + 1]]
        return (int(own[len(own) // 2]),)


def first(pool: PoolView, labels: Iterable[str] = ()) -> FixedOrder:
    """By name."""
    return FixedOrder(pool, np.arange(len(pool)), "the next by name", labels=labels)


def random(pool: PoolView, seed: int, labels: Iterable[str] = ()) -> FixedOrder:
    """In an order drawn by the seed."""
    order = np.random.default_rng(seed).permutation(len(pool))
    return FixedOrder(pool, order, "drawn at random", labels=labels)


def foreground_random(
    pool: PoolView, seed: int, foreground: Mapping[str, float], labels: Iterable[str] = ()
) -> FixedOrder:
    """At random, likelier the more foreground an image is thought to have.

    Args:
        pool: the images.
        seed: of the draw.
        foreground: image id -> weight >= 0; images not named have the mean of the others, those
            of weight 0 come last.
        labels: see `FixedOrder`.
    """
    mean = float(np.mean(list(foreground.values()))) if foreground else 1.0
    weights = np.array([max(0.0, foreground.get(name, mean)) for name in pool.ids])
    # The order of u ** (1 / w) is a weighted draw without replacement (Efraimidis, Spirakis 2006).
    uniform = np.random.default_rng(seed).random(len(weights))
    with np.errstate(divide="ignore"):
        keys = np.where(weights > 0, np.log(uniform) / weights, -np.inf)
    order = np.lexsort((uniform, -keys))
    return FixedOrder(pool, order, "drawn at random among likely foreground", labels=labels)
