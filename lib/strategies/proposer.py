"""Proposals out of the pool's embeddings, by rankings that are kept between requests."""

import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lib.pool import Pool
from lib.retrieval.ranking import PoolView, Proposal, Ranking, make_ranking

_RANKINGS_KEPT = 6
_GROWTH = 1.1  # the view is made anew for a tenth more images, so that all of it costs little
_ENOUGH = 24  # images to choose from; where fewer are embedded, a request waits for more
_MANY = 200_000  # rows of a view that is made anew behind the requests: it takes a second
_REST = 10.0  # times what the work took: no more than a tenth of the time is spent on it

Done = Mapping[str, frozenset[str] | None]


@dataclass(frozen=True)
class Proposals:
    """An answer.

    Attributes:
        rows: proposals, best first.
        embedded: how many images were compared.
        images: how many there are.
    """

    rows: tuple[Proposal, ...]
    embedded: int
    images: int


class Rest:
    """What is done again only after ten times as long as it took: `if rest.due: with rest: ...`."""

    def __init__(self) -> None:
        self._next = self._began = 0.0

    @property
    def due(self) -> bool:
        """Whether it has rested."""
        return time.monotonic() >= self._next

    def __enter__(self) -> None:
        """Begin."""
        self._began = time.monotonic()

    def __exit__(self, *error: object) -> None:
        """End; the rest begins."""
        now = time.monotonic()
        self._next = now + _REST * (now - self._began)


@dataclass
class _Kept:
    """A ranking, and what it was told."""

    ranking: Ranking
    done: dict[str, frozenset[str] | None] = field(default_factory=dict)
    risk: Mapping[str, float] = field(default_factory=dict)


class Proposer:
    """One for all strategies of a process. Thread-safe; one request at a time is answered.

    Looking at a hundred thousand files takes seconds. So it is done again only when ten times as
    long has passed: at once for a small pool, and behind the next requests for a large one.

    Args:
        pool: of embeddings.
        seed: of all rankings.
    """

    def __init__(self, pool: Pool, *, seed: int = 0) -> None:
        self._pool = pool
        self._seed = seed
        self._lock = threading.Lock()
        self._view = PoolView.of({})
        self._seen: frozenset[str] = frozenset()  # what it shows
        self._behind = ThreadPoolExecutor(1, "refseg-view")
        self._fresh: Future[PoolView] | None = None  # being made there
        self._kept: OrderedDict[tuple[str, tuple[str, ...]], _Kept] = OrderedDict()
        self._known: frozenset[str] = frozenset()
        self._looking = Rest()
        self._viewing = Rest()

    def propose(
        self,
        name: str,
        paths: Mapping[str, Path],
        done: Done,
        *,
        exclude: Collection[str] = (),
        n: int = 1,
        labels: Sequence[str] = (),
        risk: Mapping[str, float] | None = None,
        seconds: float = 4.0,
    ) -> Proposals:
        """The n best images of a pool.

        Args:
            name: of the ranking, see `make_ranking`.
            paths: all images.
            done: images that are labelled, or about to be, and for which of `labels`; None: all.
            exclude: not to be proposed.
            n: how many.
            labels: that each image should have; empty: any will do.
            risk: see `Ranking.set_risk`.
            seconds: of embedding what is missing, within this call, where hardly any image is
                embedded yet; else one image is, and the others in the background.
        """
        with self._lock:
            self._look(paths, done.keys() | set(exclude), seconds)
            kept = self._ranking(name, tuple(labels))
            if risk is not None and risk != kept.risk:
                kept.ranking.set_risk(risk)
                kept.risk = dict(risk)
            _bring_up_to_date(kept, done)
            barred = set(exclude) | (self._seen - paths.keys())
            rows = tuple(kept.ranking.next(barred, n=n))
            return Proposals(rows, len(self._seen & paths.keys()), len(paths))

    def _look(self, paths: Mapping[str, Path], last: set[str], seconds: float) -> None:
        """Embed what is missing, and take it into view when that is worth the time."""
        if self._looking.due:
            with self._looking:
                missing = self._pool.missing(paths)
            known = frozenset(paths) - set(missing)
            if missing:
                first = paths.keys() - last
                seconds = seconds if len(known) < _ENOUGH else 0.0
                known = frozenset(self._pool.advance(paths, first=first, seconds=seconds))
            self._known = known
        if self._fresh is not None and self._fresh.done():
            made, self._fresh = self._fresh, None
            self._see(made.result())
        viewed = len(self._view)
        if self._seen == self._known or self._fresh is not None:
            return
        rows = len(self._view.vectors) / max(1, viewed) * len(self._known)
        if len(self._known) >= _GROWTH * viewed or self._viewing.due:
            if rows < _MANY:
                self._see(self._take_view(self._known))
            else:  # seconds: till then it is answered from the images that were known before
                self._fresh = self._behind.submit(self._take_view, self._known)

    def _take_view(self, known: frozenset[str]) -> PoolView:
        with self._viewing:
            return self._pool.view(known)

    def _see(self, view: PoolView) -> None:
        self._view = view
        self._seen = frozenset(view.ids)
        self._kept.clear()

    def _ranking(self, name: str, labels: tuple[str, ...]) -> _Kept:
        key = (name, labels)
        if key not in self._kept:
            ranking = make_ranking(name, self._view, self._seed, labels=labels)
            self._kept[key] = _Kept(ranking)
        self._kept.move_to_end(key)
        while len(self._kept) > _RANKINGS_KEPT:
            self._kept.popitem(last=False)
        return self._kept[key]


def _bring_up_to_date(kept: _Kept, done: Done) -> None:
    """Tell a ranking what changed since it was last asked, and no more."""
    changed = [name for name, labels in kept.done.items() if done.get(name, ()) != labels]
    if changed:
        kept.ranking.remove_labelled(changed)
    for name in changed:
        del kept.done[name]
    fresh: dict[frozenset[str] | None, list[str]] = {}
    for name, labels in done.items():
        if name not in kept.done:
            fresh.setdefault(labels, []).append(name)
    for labels, names in fresh.items():
        kept.ranking.add_labelled(sorted(names), labels)
        kept.done.update(dict.fromkeys(names, labels))
