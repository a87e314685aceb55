"""One process's working set: networks, bank and pool, built when first needed and kept in step."""

import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lib.errors import RefSegError
from lib.imaging.io import read_image
from lib.machine import start_thread
from lib.memory.bank import MemoryBank
from lib.memory.packing import LAYOUT
from lib.memory.pool import EmbeddingPool
from lib.memory.reading import TensorCache
from lib.memory.records import SyncReport
from lib.models.protocol import ReferenceSegmenter
from lib.pool import Pool
from lib.segmentation import Options
from lib.segmenter import Progress, ReferenceEngine
from lib.settings import RefSegSettings
from lib.types import HalfArray, LabelledImage, Reference

logger = logging.getLogger(__name__)

ListLabels = Callable[[], Sequence[LabelledImage]]
LOG_EVERY_SECONDS = 5.0
PATIENCE = 0.5  # seconds that each step of learning waits for requests: it has to end some day
_MEMORIES = TensorCache()  # of all banks of the process: a site's model has one of its own


class Runtime:
    """Builds networks, bank and pool once, on first use, and brings the bank up to date.

    Locks, in the order in which they are taken: `_sync_lock` (one sync at a time; a request that
    needs the bank waits here for one that runs in the background), `_build_lock` (building).
    """

    def __init__(
        self,
        settings: RefSegSettings,
        *,
        bank_root: Path,
        studies: str,
        load_segmenter: Callable[[], ReferenceSegmenter] | None = None,
    ) -> None:
        """Nothing is loaded and nothing is written yet.

        Args:
            settings: options.
            bank_root: folder of the banks, where the settings name none.
            studies: folder or URL of the datastore; each has a bank of its own.
            load_segmenter: loads the segmenter in place of the one that the settings choose, such
                as a model of the site's own.
        """
        self.settings = settings
        self._load_segmenter = load_segmenter
        self.folder = (settings.bank or bank_root) / studies_name(studies)
        self._sync_lock = threading.RLock()
        self._build_lock = threading.RLock()
        self._engine: ReferenceEngine | None = None
        self._plans: tuple[str, str] | None = None
        self._bank: MemoryBank | None = None
        self._worker_lock = threading.Lock()
        self._worker: threading.Thread | None = None
        self._waiting: ListLabels | None = None
        self._cold = False
        self.pool = Pool(self._open_pool, self.embed_file)

    @property
    def options(self) -> Options:
        """The settings' defaults for a request."""
        chosen = self.settings
        return Options(
            k=chosen.k,
            cap_per_case=chosen.cap_per_case,
            own_labels=chosen.own_labels,
            every_slice=chosen.every_slice,
        )

    @property
    def ready(self) -> bool:
        """Whether the networks are loaded; takes no lock, so that it never waits."""
        return self._engine is not None

    @property
    def engine(self) -> ReferenceEngine:
        """The networks, loaded on first use.

        Raises:
            WeightsError: the chosen networks' weights are not there; the message says what to do.
        """
        with self._build_lock:
            if self._engine is None:
                from lib.models.build import build_embedder

                chosen, start = self.settings, time.perf_counter()
                load = self._load_segmenter
                segmenter = load() if load is not None else segmenter_of(chosen)
                embedder = build_embedder(
                    chosen.embedder,
                    segmenter,
                    weights=chosen.weights,
                    device=chosen.device,
                )
                self._engine = ReferenceEngine(
                    segmenter,
                    embedder,
                    annotation=chosen.annotation,
                    window=chosen.window,
                    axis=chosen.axis_index,
                    batch=chosen.batch,
                    make_way=partial(self.pool.wait_until_idle, PATIENCE),
                )
                seconds = time.perf_counter() - start
                logger.info("loaded %s and %s in %.1f s", segmenter.name, embedder.name, seconds)
            return self._engine

    def names(self) -> tuple[str, str]:
        """Segmenter and embedder in use, or that will be: known without loading, never raises."""
        engine, chosen = self._engine, self.settings
        if engine is not None:
            return engine.segmenter.name, engine.embedder.name
        if self._plans is None:
            from lib.models.build import plan_embedder, plan_segmenter

            try:
                segmenter = plan_segmenter(
                    chosen.segmenter,
                    weights=chosen.weights,
                    device=chosen.device,
                    sam2_variant=chosen.sam2_variant,
                    sam2_version=chosen.sam2_version,
                )
                embedder = plan_embedder(chosen.embedder, weights=chosen.weights)
            except RefSegError as error:
                logger.error("no segmenter can be chosen: %s", error)
                self._plans = (chosen.segmenter, chosen.embedder)
            else:
                self._plans = (segmenter.name, embedder.name)
        return self._plans

    def known_labels(self) -> tuple[str, ...]:
        """Labels by option, else those in the bank; neither waits for networks nor raises."""
        if self.settings.labels:
            return self.settings.labels
        try:
            return tuple(sorted(self._bank.labels())) if self._bank is not None else ()
        except RefSegError as error:
            logger.error("the bank's labels cannot be told: %s", error)
            return ()

    def annotated(self) -> Mapping[str, frozenset[str]]:
        """Image id -> labels that its references know; nothing while the bank is not open yet."""
        return self._bank.annotated() if self._bank is not None else {}

    @property
    def fingerprint(self) -> str:
        """Of everything that a stored reference depends on, but the label and the image."""
        engine, chosen = self.engine, self.settings
        parts = (
            engine.segmenter.fingerprint,
            engine.embedder.fingerprint,
            chosen.annotation,
            chosen.window,
            chosen.axis,
            LAYOUT,
        )
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
        return f"{engine.segmenter.name}-{engine.embedder.name}-{digest}"

    @property
    def bank(self) -> MemoryBank:
        """The memory bank, opened on first use."""
        with self._build_lock:
            if self._bank is None:
                self._bank = MemoryBank(
                    self.folder, self.fingerprint, self._references_of, cache=_MEMORIES
                )
            return self._bank

    def use_bank(self, folder: Path) -> None:
        """Use the bank in this folder as it is, whatever datastore it was made from."""
        self.folder = folder

    def _open_pool(self) -> EmbeddingPool:
        return EmbeddingPool(self.folder, self.fingerprint)

    def embed_file(self, path: Path) -> tuple[HalfArray, list[int]]:
        """What the pool keeps of an image: a row (C,) a region, and the number of its slice.

        Raises:
            ImageError: it cannot be read.
        """
        regions, numbers = self.engine.regions_of(read_image(path))
        rows = regions.reshape(-1, regions.shape[-1]).astype(np.float16)
        return rows, [number for number in numbers for _ in range(regions.shape[1])]

    def sync(self, list_labels: ListLabels) -> tuple[list[LabelledImage], SyncReport]:
        """Bring the bank up to date with the datastore; waits for one that runs already.

        Returns:
            the labelled images as listed, and what was done.
        """
        with self._sync_lock:
            labels = list(list_labels())
            report = self.bank.sync(labels)
        for image_id, reason in report.failed:
            logger.warning("label of %s teaches nothing: %s", image_id, reason)
        if report.changed:
            logger.info(
                "bank: %d added, %d updated, %d renamed, %d removed (generation %d)",
                *map(len, (report.added, report.updated, report.renamed, report.removed)),
                report.generation,
            )
        return labels, report

    def sync_soon(self, list_labels: ListLabels, *, warm: bool = False) -> None:
        """Sync in the background and return at once; never raises.

        One thread works for all: a call that comes while it works makes it look once more.

        Args:
            list_labels: the datastore's labels as they are then.
            warm: run the networks once, too.
        """
        with self._worker_lock:
            self._waiting = list_labels
            self._cold = self._cold or warm
            if self._worker is None:
                self._worker = start_thread(self._work, "refseg-sync")

    @property
    def learning(self) -> bool:
        """Whether a sync of `sync_soon` is still to be done or under way."""
        with self._worker_lock:
            return self._worker is not None

    def warm_up(self) -> None:
        """Load the networks and run them once, so that the first request need not wait."""
        engine = self.engine
        engine.segmenter.encode([np.zeros((engine.segmenter.size, engine.segmenter.size), "f4")])

    def _work(self) -> None:
        while True:
            with self._worker_lock:
                list_labels, self._waiting = self._waiting, None
                cold, self._cold = self._cold, False
                if list_labels is None:
                    self._worker = None
                    return
            try:
                if cold:
                    self.warm_up()
                self.sync(list_labels)
                self.engine.study(self.bank, wait=False)  # ahead of the request that follows
            except RefSegError as error:
                logger.error("the bank could not be brought up to date: %s", error)
            except Exception:
                logger.exception("the bank could not be brought up to date")

    def _references_of(self, labelled: LabelledImage) -> Iterator[Reference]:
        progress = progress_logger(f"learning {labelled.image_id}")
        return self.engine.references_of(labelled, on_progress=progress)


def segmenter_of(settings: RefSegSettings, *, learns_looks: bool = True) -> ReferenceSegmenter:
    """Load the segmenter that the settings choose; `learns_looks`: see `MatchSegSegmenter`.

    Raises:
        WeightsError: its weights are not there; the message says what to do.
    """
    from lib.models.build import build_segmenter

    return build_segmenter(
        settings.segmenter,
        weights=settings.weights,
        device=settings.device,
        sam2_variant=settings.sam2_variant,
        sam2_version=settings.sam2_version,
        sam2_size=int(settings.sam2_size),
        learns_looks=learns_looks,
    )


def progress_logger(what: str) -> Progress:
    """A callback that logs "what: 40 of 120 slices" every few seconds, and nothing if quick."""
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LOG_EVERY_SECONDS and done < total:
            last = now
            logger.info("%s: %d of %d slices", what, done, total)

    return report


def studies_name(studies: str) -> str:
    """A folder name for a datastore: its last part, made harmless, and a digest of the whole."""
    last = studies.rstrip("/").rsplit("/", 1)[-1]
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.")[:40]
    return f"{slug or 'studies'}-{hashlib.sha256(studies.encode()).hexdigest()[:8]}"
