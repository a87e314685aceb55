"""Which model of the site answers now: follows the store's pointer without a restart."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lib.errors import ModelStoreError, NoModelError, RefSegError
from lib.models.devices import choose_device
from lib.models.protocol import ReferenceSegmenter
from lib.runtime import ListLabels, Runtime, segmenter_of
from lib.settings import RefSegSettings
from lib.site.average import AveragedSegmenter
from lib.site.store import ModelCard, ModelStore

logger = logging.getLogger(__name__)

PATIENCE_S = 10.0  # a request waits so long for a new model before the old one answers


@dataclass(frozen=True, eq=False)
class Serving:
    """A model and the runtime that answers with it.

    Attributes:
        card: the model.
        runtime: its network and the bank of its own memories.
        waiting: the model that is being made ready meanwhile, if any.
    """

    card: ModelCard
    runtime: Runtime
    waiting: ModelCard | None = None


class _Preparation:
    """Loads one model and brings its bank up to date, in a thread of its own."""

    def __init__(self, card: ModelCard, runtime: Runtime, on_ready: Callable[[], None]) -> None:
        self.card = card
        self.runtime = runtime
        self.error: Exception | None = None
        self.done = threading.Event()
        self._on_ready = on_ready

    def start(self, list_labels: ListLabels) -> "_Preparation":
        name = f"refseg-model-{self.card.version}"
        threading.Thread(target=self._work, args=(list_labels,), name=name, daemon=True).start()
        return self

    def _work(self, list_labels: ListLabels) -> None:
        try:
            self.runtime.warm_up()
            self.runtime.sync(list_labels)
            self._on_ready()
        except RefSegError as error:
            self.error = error
            logger.error("model %d cannot be used: %s", self.card.version, error)
        except Exception as error:
            self.error = error
            logger.exception("model %d cannot be used", self.card.version)
        finally:
            self.done.set()


class SiteModel:
    """The site's current model, ready to answer; thread-safe.

    The pointer is read at every call. Whoever moves it has filled the new model's bank before
    (`publish` does), so that the next request finds all ready and only loads the network. Where
    that is not so, the model that answered so far goes on until the new one's bank is ready.
    """

    def __init__(
        self,
        store: ModelStore,
        settings: RefSegSettings,
        *,
        bank_root: Path,
        studies: str,
        list_labels: ListLabels,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Nothing is loaded or read yet.

        Args:
            store: of the studies' models.
            settings: options.
            bank_root: folder of the banks, where the settings name none.
            studies: folder or URL of the datastore.
            list_labels: the datastore's final labels, as they are now.
            patience_s: how long a request waits for a new model before the old one answers.
        """
        self._patience_s = patience_s
        self.store = store
        self._settings = settings
        self._bank_root = bank_root
        self._studies = studies
        self._list_labels = list_labels
        self._lock = threading.Lock()
        self._ready: Serving | None = None
        self._preparation: _Preparation | None = None

    def card(self) -> ModelCard | None:
        """The current model; None where there is none. Never raises: `/info` asks."""
        try:
            return self.store.current()
        except RefSegError as error:
            logger.error("the site's model cannot be told: %s", error)
            return None

    def ready(self) -> Serving | None:
        """The current model, if it is loaded; loads nothing."""
        card = self.card()
        with self._lock:
            return self._ready if self._ready is not None and self._ready.card == card else None

    def serving(self) -> Serving:
        """The model to answer a request with.

        Raises:
            NoModelError: there is none.
            ModelStoreError: the current one cannot be used.
        """
        wanted = self.store.current()
        if wanted is None:
            msg = "This site has no model of its own yet: train one (POST /train/matchseg)."
            raise NoModelError(msg)
        with self._lock:
            ready = self._ready
            if ready is not None and ready.card == wanted:
                return ready
            work = self._prepare(wanted)
        work.done.wait(self._patience_s if ready is not None else None)
        if not work.done.is_set() and ready is not None:
            logger.info(
                "model %d answers while %d is made ready", ready.card.version, work.card.version
            )
            return Serving(ready.card, ready.runtime, waiting=wanted)
        if work.error is None:
            return Serving(work.card, work.runtime)
        with self._lock:
            if self._preparation is work:
                self._preparation = None  # the next request tries again
        if ready is not None:
            return Serving(ready.card, ready.runtime, waiting=wanted)
        if isinstance(work.error, RefSegError):
            raise work.error
        msg = f"Model {wanted.version} cannot be used ({work.error}); the log tells more."
        raise ModelStoreError(msg) from work.error

    def prepare_soon(self) -> None:
        """Get the current model ready in the background, if there is one; never raises."""
        wanted = self.card()
        with self._lock:
            if wanted is not None and (self._ready is None or self._ready.card != wanted):
                self._prepare(wanted)

    def sync_soon(self) -> None:
        """Let the model in use learn new labels in the background, if there is one."""
        with self._lock:
            ready = self._ready
        if ready is not None:
            ready.runtime.sync_soon(self._list_labels)

    def publish(self, card: ModelCard) -> None:
        """Fill the bank of a stored version, then make it current: nobody waits for its memories.

        Raises:
            RefSegError: its bank cannot be made; the current model stays as it was.
        """
        runtime = self.runtime_of(card)
        runtime.sync(self._list_labels)
        self.store.note_bank(card, runtime.fingerprint)
        self.store.use(card.version)
        self.store.prune(runtime.folder)

    def rollback(self) -> ModelCard | None:
        """Go back to the previous model, its bank brought up to date first; None: to none."""
        before = self.store.previous()
        if before is not None:
            self.runtime_of(before).sync(self._list_labels)
        return self.store.rollback()

    def runtime_of(self, card: ModelCard) -> Runtime:
        """A runtime with this version's network; nothing is loaded yet."""
        return Runtime(
            self._settings,
            bank_root=self._bank_root,
            studies=self._studies,
            load_segmenter=lambda: self._load(card),
        )

    def _load(self, card: ModelCard) -> ReferenceSegmenter:
        own = self.store.load(card, device=str(choose_device(self._settings.device)))
        if not self._settings.site_average:
            return own
        return AveragedSegmenter(own, segmenter_of(self._settings, learns_looks=False))

    def _prepare(self, wanted: ModelCard) -> _Preparation:
        """Start it, or join the one under way; the lock is held."""
        current = self._preparation
        if current is None or current.card != wanted:
            runtime = self.runtime_of(wanted)
            work = _Preparation(wanted, runtime, lambda: self._take(wanted, runtime))
            self._preparation = current = work.start(self._list_labels)
        return current

    def _take(self, card: ModelCard, runtime: Runtime) -> None:
        """Answer with this model from now on."""
        try:
            self.store.note_bank(card, runtime.fingerprint)
        except RefSegError as error:  # the bank is then not deleted with its model: no more
            logger.warning("%s", error)
        with self._lock:
            self._ready = Serving(card, runtime)
        logger.info("model %d answers (Dice %.3f in validation)", card.version, card.dice)
