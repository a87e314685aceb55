"""What the pages know of the pool: each image's state, and the map with what comes next."""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from apps.refseg.server.page_parts import Parts
from lib.campaign.atlas import Atlas, chart, survey
from lib.errors import RefSegError
from lib.memory.leases import Lease
from lib.reviewing.reviewer import Reviewed
from lib.strategies.board import read_board
from lib.strategies.proposer import Rest
from lib.studies.datastore import StudiesDatastore

logger = logging.getLogger(__name__)

State = Literal["open", "held", "flagged", "labelled"]

STRATEGY = "refseg"
NEXT = 8  # images whose turn is told
FAR = 8  # images far from everything that are shown; the map shows more
POINTS = 800  # of each group on the map: ten thousand would be a blot, and megabytes
MAP_PATIENCE_S = 4.0  # a page waits so long for its map, and is shown without it


@dataclass(frozen=True, eq=False)
class Row:
    """One image.

    Attributes:
        image_id: which.
        state: labelled, set aside, given to somebody a moment ago, or none of these.
        client: who was given it.
        judged: how far its masks are to be trusted, if they were looked at.
        away: it is in a PACS, and was not fetched yet.
    """

    image_id: str
    state: State
    client: str = ""
    judged: Reviewed | None = None
    away: bool = False


@dataclass(frozen=True, eq=False)
class Look:
    """All images at one moment.

    Attributes:
        rows: by id, sorted.
        here: ids of those that need not be fetched from a PACS, and can be given to somebody.
        ready: the networks are loaded, without which bank and pool cannot be told.
    """

    rows: Mapping[str, Row]
    here: frozenset[str]
    ready: bool

    def ids(self, *states: State) -> list[str]:
        """Those in one of these states, sorted."""
        return [image_id for image_id, row in self.rows.items() if row.state in states]


@dataclass(frozen=True, eq=False)
class Drawn:
    """The map.

    Attributes:
        svg: the picture.
        order: ids and reasons of what comes next, first first.
        far: ids and likeness of what is least like all that is labelled or comes next.
        compared: images on the map.
        explained: share of the variance that it shows, 0..1.
    """

    svg: bytes
    order: tuple[tuple[str, str], ...]
    far: tuple[tuple[str, float], ...]
    compared: int
    explained: float

    @property
    def places(self) -> dict[str, int]:
        """Id -> its place in the order, from 1."""
        return {image_id: n for n, (image_id, _) in enumerate(self.order, start=1)}


class Overlook:
    """Looks at the datastore, and rests for ten times as long: 10,000 images take a while."""

    def __init__(self, parts: Parts) -> None:
        """Nothing is looked at yet."""
        self._parts = parts
        self._lock = threading.Lock()
        self._rest = Rest()
        self._last: Look | None = None

    def look(self) -> Look:
        """All images; of a large pool as they were a moment ago."""
        with self._lock:
            if self._last is None or self._rest.due or not self._last.ready:
                with self._rest:
                    self._last = self._fresh()
            return self._last

    def _fresh(self) -> Look:
        parts, store = self._parts, self._parts.datastore
        flagged: frozenset[str] = frozenset()
        ids = sorted(store.list_images())
        here = frozenset(ids)
        if isinstance(store, StudiesDatastore):
            board = read_board(store, parts.runtime.settings.tags, look_at_disk=False)
            here, labelled, flagged = frozenset(board.paths), board.labelled, board.flagged
        else:  # of another server: the path of an image would mean to fetch it
            labelled = frozenset(ids) - frozenset(store.get_unlabeled_images())
        held = parts.desk.leases.active()
        ready = parts.runtime.ready
        judged = parts.reviewer.recall() if ready else {}
        rows = {
            image_id: Row(
                image_id,
                _state(image_id, labelled, flagged, held),
                held[image_id].client_id if image_id in held else "",
                judged.get(image_id),
                away=image_id not in here,
            )
            for image_id in ids
        }
        return Look(rows, here, ready)


def _state(
    image_id: str, labelled: frozenset[str], flagged: frozenset[str], held: Mapping[str, Lease]
) -> State:
    if image_id in labelled:
        return "labelled"
    if image_id in flagged:
        return "flagged"
    return "held" if image_id in held else "open"


@dataclass
class _Work:
    """One drawing of the map, in a thread of its own."""

    mark: object
    done: threading.Event = field(default_factory=threading.Event)


class PoolMap:
    """Draws the map anew when something has changed, and asks nobody to wait long for it.

    Nothing is computed of an image, and no image is given to anybody: the order is what a ranking
    of its own says of the embeddings that are there.
    """

    def __init__(self, parts: Parts) -> None:
        """Nothing is drawn yet."""
        self._parts = parts
        self._lock = threading.Lock()
        self._rest = Rest()
        self._mark: object = None
        self._work: _Work | None = None
        self.drawn: Drawn | None = None

    def wait(self, look: Look, seconds: float = MAP_PATIENCE_S) -> Drawn | None:
        """The map as it is now, or the last one where drawing takes long; None where none is."""
        if not look.ready:
            return self.drawn
        runtime, settings = self._parts.runtime, self._parts.runtime.settings
        risk = dict(self._parts.reviewer.risk()) if settings.examine else None
        mark = (tuple(look.rows), look.here, *map(tuple, _groups(look)), risk, len(runtime.pool))
        with self._lock:
            if mark == self._mark or (self._work is None and not self._rest.due):
                return self.drawn
            if self._work is None:
                self._work = _Work(mark)
                threading.Thread(
                    target=self._draw, args=(self._work, look, risk), name="refseg-map", daemon=True
                ).start()
            work = self._work
        work.done.wait(seconds)
        return self.drawn

    @property
    def drawing(self) -> bool:
        """Whether one is being drawn."""
        return self._work is not None

    def _draw(self, work: _Work, look: Look, risk: Mapping[str, float] | None) -> None:
        runtime = self._parts.runtime
        labelled, held, flagged = _groups(look)
        found: Drawn | None = None
        try:
            import matplotlib.figure  # noqa: F401  its seconds are no measure of how long to rest

            with self._rest:
                pool = runtime.pool.view(look.rows)
                if len(pool):
                    atlas = survey(
                        pool,
                        labelled,
                        STRATEGY,
                        NEXT,
                        seed=runtime.settings.seed,
                        held=held,
                        exclude={*flagged, *(look.rows.keys() - look.here)},
                        risk=risk,
                    )
                    found = _drawn(atlas)
        except RefSegError as error:
            logger.warning("the map of the pool cannot be drawn: %s", error)
        except Exception:
            logger.exception("the map of the pool cannot be drawn")
        finally:
            with self._lock:
                self.drawn, self._mark, self._work = found, work.mark, None
            work.done.set()


def _groups(look: Look) -> tuple[list[str], list[str], list[str]]:
    return look.ids("labelled"), look.ids("held"), look.ids("flagged")


def _drawn(atlas: Atlas) -> Drawn:
    likeness = dict(zip(atlas.ids, atlas.likeness, strict=True))
    return Drawn(
        svg=chart(atlas, most=POINTS).encode(),
        order=tuple((proposal.image_id, proposal.reason) for proposal in atlas.order),
        far=tuple((image_id, float(likeness[image_id])) for image_id in atlas.far[:FAR]),
        compared=len(atlas.ids),
        explained=atlas.explained,
    )
