"""What each page shows: facts gathered for the templates, which only lay them out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastapi import HTTPException

from apps.refseg.server.page_masks import Mask, Masks
from apps.refseg.server.page_parts import Parts
from apps.refseg.server.page_pictures import LARGE, Numbers, Over, Pictures, Wanted
from apps.refseg.server.page_pool import Drawn, Look, Overlook, PoolMap, Row, State
from lib.errors import RefSegError
from lib.evaluation.charts import Line, curves
from lib.memory.records import BankStatus, BankVersion, LabelCount
from lib.settings import AXIS_NAMES
from lib.site.store import ModelCard, state_of
from lib.studies.datastore import StudiesDatastore
from lib.trainers.site.progress import (
    Epoch,
    Outcome,
    TrainingProgress,
    read_epochs,
    read_outcome,
    read_progress,
)
from lib.trainers.site.training import WORKROOM

AT_ONCE = 24  # images on one page of the list
SHOWN: Mapping[str, tuple[State, ...]] = {
    "todo": ("open", "held"),
    "labelled": ("labelled",),
    "flagged": ("flagged",),
    "all": ("open", "held", "flagged", "labelled"),
}
ORDERS = ("trust", "next", "name")


@dataclass(frozen=True)
class ListQuery:
    """What the list's form asks for; anything else is refused as not found."""

    show: str = "todo"
    order: str = "trust"
    find: str = ""
    page: int = 1

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> "ListQuery":
        """Of a query string.

        Raises:
            HTTPException: 404 with what is allowed.
        """
        show, order = given.get("show") or "todo", given.get("order") or "trust"
        if show not in SHOWN:
            raise HTTPException(404, f"There is no list {show!r}; there are {', '.join(SHOWN)}.")
        if order not in ORDERS:
            raise HTTPException(404, f"There is no order {order!r}; there are {', '.join(ORDERS)}.")
        page = whole("page", given.get("page") or "1")
        return cls(show, order, given.get("find", "").strip()[:255], max(1, page))


@dataclass(frozen=True, eq=False)
class Listed:
    """One page of the list: its rows, how many there are in all, and which pages there are."""

    query: ListQuery
    rows: Sequence[Row]
    total: int
    pages: int
    places: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Sheet:
    """One image.

    Attributes:
        row: its state.
        place: its place in the order of what comes next; 0: none.
        problem: why it cannot be shown; empty where it can.
        away: it is in the PACS, and was not fetched yet, which a look at it does not do.
        axis: name of the axis across the slices.
        depth: how many slices there are; 1 of a picture.
        number: of the one shown, from 0.
        label: names drawn on it.
        mask: RefSeg's own.
        current: whether the mask came from all that is labelled by now, and the networks in use.
        numbers: of all labels shown.
    """

    row: Row
    place: int
    problem: str = ""
    away: bool = False
    axis: str = ""
    depth: int = 1
    number: int = 0
    label: tuple[str, ...] = ()
    mask: Mask | None = None
    current: bool = True
    numbers: Mapping[str, int] | None = None


@dataclass(frozen=True, eq=False)
class Status:
    """Bank, models and training."""

    ready: bool
    learning: bool
    networks: tuple[str, str]
    bank: BankStatus | None
    labels: Mapping[str, LabelCount]
    models: Sequence[tuple[ModelCard, str]]
    model_problem: str
    training: TrainingProgress | None
    outcome: Outcome | None
    epochs: Sequence[Epoch]


class View:
    """Gathers the facts; each call may take a while, and runs in a thread."""

    def __init__(self, parts: Parts) -> None:
        """Nothing is looked at yet."""
        self._parts = parts
        self._overlook = Overlook(parts)
        self.map = PoolMap(parts)
        self.numbers = Numbers(parts)
        self._pictures = Pictures(parts, self.numbers)
        self._masks = Masks(parts)

    def look(self) -> Look:
        """All images."""
        return self._overlook.look()

    def drawn(self, look: Look) -> Drawn | None:
        """The map."""
        return self.map.wait(look)

    def listed(self, query: ListQuery) -> Listed:
        """One page of the list."""
        look = self.look()
        drawn = self.map.drawn
        places = drawn.places if drawn else {}
        rows = [look.rows[image_id] for image_id in look.ids(*SHOWN[query.show])]
        wanted = query.find.casefold()
        rows = [row for row in rows if wanted in row.image_id.casefold()]
        if query.order == "trust":
            rows.sort(key=lambda r: (r.judged is None, r.judged.trust if r.judged else 0.0))
        elif query.order == "next":
            rows.sort(key=lambda r: places.get(r.image_id, len(places) + 1))
        pages = max(1, -(-len(rows) // AT_ONCE))
        if query.page > pages:
            raise HTTPException(404, f"There is no page {query.page}; the last is {pages}.")
        start = (query.page - 1) * AT_ONCE
        return Listed(query, rows[start : start + AT_ONCE], len(rows), pages, places)

    def sheet(self, image_id: str, number: str) -> Sheet:
        """One image.

        Raises:
            HTTPException: 404, there is no such image or slice.
        """
        row, drawn = self._row(image_id), self.map.drawn
        place = drawn.places.get(image_id, 0) if drawn else 0
        if not self._at_hand(image_id):
            return Sheet(row, place, away=True)
        try:
            image = self._pictures.image(self._path(image_id))
            label = self._pictures.label(image_id, image)
            mask = self._masks.find(image_id, image)
        except (RefSegError, OSError) as error:
            told = str(error) if isinstance(error, RefSegError) else "its file cannot be read"
            return Sheet(row, place, problem=told)
        axis = self._pictures.axis(image)
        depth = image.voxels.shape[axis]
        shown = mask.label_map() if mask else label.label_map if label else None
        chosen = whole("slice", number) if number else self._pictures.best(image, axis, shown)
        if chosen >= depth:
            raise HTTPException(404, f"There is no slice {chosen}; the last is {depth - 1}.")
        names = tuple((label.names or {}).values()) if label else ()
        return Sheet(
            row=row,
            place=place,
            axis=AXIS_NAMES[axis] if image.kind == "volume" else "",
            depth=depth,
            number=chosen,
            label=names,
            mask=mask,
            current=mask is None or self._is_current(mask),
            numbers=self.numbers.of(*names, *(mask.values if mask else ())),
        )

    def _is_current(self, mask: Mask) -> bool:
        runtime = self._parts.answering()
        if runtime is None or not mask.bank:
            return True  # nothing speaks against it
        return runtime.bank.version == BankVersion(mask.generation, mask.bank)

    def picture(self, image_id: str, *, number: str, axis: str, over: str, large: bool) -> bytes:
        """One JPEG.

        Raises:
            HTTPException: 404, there is no such image, slice or layer.
            RefSegError: it cannot be read.
        """
        if over not in ("", "label", "mask"):
            raise HTTPException(404, f"There is no layer {over!r}; there are label and mask.")
        if axis and axis not in ("0", "1", "2"):
            raise HTTPException(404, f"There is no axis {axis!r}; there are 0, 1 and 2.")
        self._row(image_id)
        if not self._at_hand(image_id):
            raise HTTPException(404, "The image was not fetched from the PACS yet.")
        layers: dict[str, Over] = {"label": "label", "mask": "mask"}
        wanted = Wanted(
            image_id,
            self._path(image_id),
            number=whole("slice", number) if number else None,
            axis=int(axis) if axis else None,
            over=layers.get(over, ""),
            rows=LARGE if large else Wanted.rows,
        )
        mask = None
        if over == "mask":
            mask = self._masks.find(image_id, self._pictures.image(wanted.path))
        return self._pictures.jpeg(wanted, mask)

    def segment(self, image_id: str) -> None:
        """Make a mask, as a client's request would.

        Raises:
            HTTPException: 404, there is no such image; or the task's, with a sentence.
        """
        self._row(image_id)
        self._masks.make(image_id)

    def status(self) -> Status:
        """Bank, models and training."""
        runtime, store = self._parts.runtime, self._parts.site.store
        models: list[tuple[ModelCard, str]] = []
        problem = ""
        try:
            history = store.history()
            models = [(card, state_of(card.version, history)) for card in store.versions()]
        except RefSegError as error:
            problem = str(error)
        room = store.folder / WORKROOM
        return Status(
            ready=runtime.ready,
            learning=runtime.learning,
            networks=runtime.names(),
            bank=runtime.bank.status() if runtime.ready else None,
            labels=runtime.bank.labels() if runtime.ready else {},
            models=models[::-1],
            model_problem=problem,
            training=read_progress(room),
            outcome=read_outcome(room),
            epochs=read_epochs(room),
        )

    def training_chart(self) -> bytes:
        """Loss and Dice by epoch, as SVG.

        Raises:
            HTTPException: 404, nothing was trained yet.
        """
        epochs = read_epochs(self._parts.site.store.folder / WORKROOM)
        if not epochs:
            raise HTTPException(404, "No epoch was trained yet.")
        dice = Line(
            "Dice in validation",
            x=tuple(float(epoch.number) for epoch in epochs),
            y=tuple(epoch.dice for epoch in epochs),
            low=tuple(epoch.dice for epoch in epochs),
            high=tuple(epoch.dice for epoch in epochs),
        )
        text = curves(
            [dice], x_label="epoch", y_label="Dice", title="The last training", logarithmic=False
        )
        return text.encode()

    def _row(self, image_id: str) -> Row:
        row = self.look().rows.get(image_id)
        if row is None:
            raise HTTPException(404, "There is no image of this name; the list has all that are.")
        return row

    def _at_hand(self, image_id: str) -> bool:
        store = self._parts.datastore
        return not isinstance(store, StudiesDatastore) or store.at_hand(image_id)

    def _path(self, image_id: str) -> Path:
        store = self._parts.datastore
        if isinstance(store, StudiesDatastore):
            source = store.source(image_id)
            if not source:
                raise HTTPException(404, "The image was there a moment ago, and is gone.")
            return Path(source)
        return Path(store.get_image_uri(image_id))


def whole(name: str, text: str) -> int:
    """A number of an address, 0 or more.

    Raises:
        HTTPException: 404, it is none.
    """
    if not (text.isascii() and text.isdecimal()) or len(text) > 9:
        raise HTTPException(404, f"{name} {text[:20]!r} is no number.")
    return int(text)
