"""The memory bank: references of all labelled slices, on disk, always as the datastore has them."""

import logging
import shutil
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch

from lib.errors import MemoryStoreError
from lib.memory import ledger
from lib.memory.catalogue import Catalogue, fingerprint_folder
from lib.memory.reading import DamagedFileError, Reader, TensorCache
from lib.memory.records import BankStatus, BankVersion, LabelCount, SyncReport
from lib.memory.signature import SETTLED_S
from lib.memory.store import MemoryFiles
from lib.memory.sync import Encode, Synchronizer
from lib.memory.view import Entry, View, embedding_matrix
from lib.retrieval.index import VectorIndex
from lib.types import FloatArray, LabelledImage, Match, Memory, Reference, Shape, SliceKey

logger = logging.getLogger(__name__)

T = TypeVar("T")


class MemoryBank:
    """References by slice; follows the datastore by `sync`, answers from any thread and process.

    One lock guards the view in memory (index and rows); it is held for a look-up, never while an
    image is encoded or a memory is read from disk. What may write when is told in `sync.py`.

    Args:
        folder: of all banks of one datastore; this one lives in a subfolder of its fingerprint.
        fingerprint: changes whenever stored references would no longer fit.
        encode: makes the references of one labelled image; may be a generator. What it raises as
            `RefSegError` or `OSError` is remembered as that image's failure until its files
            change; after any other exception it is tried again at the next `sync`.
        lock_timeout_s: how long to wait for another process that encodes the same image.
        settled_s: a file that changed less than this ago is hashed whatever its times say.
        cache: of memories kept in RAM after they were read; banks may share one.
        exact_up_to: references beyond which the index becomes approximate; None is its default.
        gpu: whether the index searches on a GPU; None if there is one.

    Raises:
        MemoryStoreError: the folder cannot be used. A damaged catalogue is no error: it is put
            aside, and comes back from the memories' own descriptions.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        encode: Encode,
        *,
        lock_timeout_s: float = 600.0,
        settled_s: float = SETTLED_S,
        cache: TensorCache | None = None,
        exact_up_to: int | None = None,
        gpu: bool | None = None,
    ) -> None:
        self._parent = Path(folder)
        self._folder = fingerprint_folder(self._parent, fingerprint)
        self._fingerprint = fingerprint
        try:
            self._files = MemoryFiles(self._folder / "memories", cache=cache or TensorCache())
        except OSError as error:
            message = f"the bank's folder {self._folder} cannot be made: {error.strerror}"
            message += "; name a writable one (--conf bank DIR)"
            raise MemoryStoreError(message) from error
        self._catalogue = Catalogue(
            self._folder / "catalogue.sqlite", ledger.SCHEMA, fingerprint, on_new=self._recover
        )
        self._synchronizer = Synchronizer(
            self._folder,
            self._catalogue,
            self._files,
            encode,
            lock_timeout_s=lock_timeout_s,
            settled_s=settled_s,
        )
        options = {} if exact_up_to is None else {"exact_up_to": exact_up_to}
        self._view = View(partial(VectorIndex, gpu=gpu, **options))
        self._lock = threading.RLock()
        self._looked_for_missing = False
        self._synchronizer.sweep()

    @property
    def folder(self) -> Path:
        """Where this fingerprint's bank lies."""
        return self._folder

    @property
    def version(self) -> BankVersion:
        """What answers now."""
        return BankVersion(self.state[1], self._fingerprint)

    @property
    def state(self) -> tuple[str, int]:
        """Changes whenever the references do, be it that the bank is built anew."""
        return self._with_view(lambda view: view.state)

    def sync(self, labels: Sequence[LabelledImage], *, complete: bool = True) -> SyncReport:
        """Make the bank hold the references of exactly these labelled images.

        Nothing but a few file stats happens when nothing changed. Each image is published as soon
        as it is encoded; an image that cannot be encoded is reported, and does not stop others.

        Args:
            labels: all labelled images of the datastore, ids unique.
            complete: False if `labels` are only some of them: then nothing is removed.

        Raises:
            MemoryStoreError: the disk cannot be written, or another process has been encoding one
                of the images for longer than `lock_timeout_s`.
        """
        if not self._looked_for_missing:
            self._looked_for_missing = True
            self._catalogue.surviving(self._disown_missing)
        return self._catalogue.surviving(lambda: self._synchronizer.run(labels, complete=complete))

    def rebuild(self, labels: Sequence[LabelledImage]) -> SyncReport:
        """Encode all these images anew, one by one; readers use the old references meanwhile."""
        return self._catalogue.surviving(
            lambda: self._synchronizer.run(labels, complete=True, again=True)
        )

    def nearest(
        self,
        embeddings: FloatArray,
        k: int,
        *,
        labels: Sequence[str],
        exclude_image: str | None = None,
        cap_per_case: int | None = None,
    ) -> list[list[Match]]:
        """The references to segment query slices by.

        For each set of references that are annotated (present or absent) for the same of the
        labels, the k most similar are taken; their union is the answer, so that every label of
        which the bank has any reference is known to k of them. Where none of the k shows a label
        that others show, the farthest of them give way to the most similar that does: a quarter of
        the k at most, at least one of two, never the nearest.

        Args:
            embeddings: (N, E) unit float32.
            k: how many; all there are, if fewer.
            labels: names to be segmented; those that the bank does not know are passed over.
            exclude_image: image whose references are not used.
            cap_per_case: at most so many of one image for the same labels.

        Returns:
            N lists, nearest first, ties by key.
        """
        return self._with_view(
            lambda view: view.nearest(
                embeddings, k, labels=labels, exclude_image=exclude_image, cap_per_case=cap_per_case
            )
        )

    def load(
        self, keys: Sequence[SliceKey], labels: Sequence[str]
    ) -> tuple[list[Memory], torch.Tensor]:
        """The memories of references, rows in the order of `labels`.

        A key that `nearest` gave is answered even if its image was removed since. A damaged file
        is put aside and its image encoded anew, once.

        Returns:
            R memories, with zero rows for labels that a reference does not know, and (R, L) bool
            that is True where it knows them.

        Raises:
            MemoryStoreError: a key is not in the bank, or its memory is lost.
        """
        memories = []
        known = torch.zeros((len(keys), len(labels)), dtype=torch.bool)
        with self._files.reading() as reader:
            for row, entry in enumerate(self._find(keys)):
                memory, flags = self._load_one(reader, entry, labels)
                memories.append(memory)
                known[row] = torch.tensor(flags, dtype=torch.bool)
        return memories, known

    def references(self, keys: Sequence[SliceKey]) -> list[Reference]:
        """References whole, memories with rows for all labels that they know."""
        found = []
        with self._files.reading() as reader:
            for entry in self._find(keys):
                stored = entry.stored
                memory, _ = self._load_one(reader, entry, stored.labels)
                known, here = frozenset(stored.labels), frozenset(stored.present)
                absent, shapes = known - here, stored.shapes
                found.append(Reference(entry.key, stored.embedding, here, absent, memory, shapes))
        return found

    def sample(self, count: int) -> list[SliceKey]:
        """References of up to `count` images, one of each: a slice that shows most labels.

        The images are drawn by their ids alone, so that most stay the same when others come.
        """
        return self._with_view(lambda view: view.sample(count))

    def spread(self, count: int) -> list[SliceKey]:
        """`count` references at most: as `sample`, then others of these images, and of empty ones.

        Of volumes the others are as many, evenly spread; slices that show nothing are among them.
        """
        return self._with_view(lambda view: view.spread(count))

    def own_slices(self, image_id: str) -> list[SliceKey]:
        """The reference slices of an image, in order."""
        return self._with_view(lambda view: view.keys_of(image_id))

    def labels(self) -> Mapping[str, LabelCount]:
        """On how many slices each label is present, and annotated but absent."""
        return MappingProxyType(self._with_view(lambda view: view.counts()))

    def shapes(self) -> Mapping[str, Sequence[Shape]]:
        """For each label what its masks look like, slice by slice."""
        return MappingProxyType(self._with_view(lambda view: view.shapes()))

    def annotated(self) -> Mapping[str, frozenset[str]]:
        """Image id -> the labels that it says anything of, present or absent."""
        return MappingProxyType(self._with_view(lambda view: view.annotated()))

    def embeddings(self, image_id: str | None = None) -> tuple[list[SliceKey], FloatArray]:
        """All keys in order, or those of one image, and their embeddings (N, E)."""

        def read(view: View) -> list[Entry]:
            if image_id is None:
                return list(view.entries())
            found = [view.find(key) for key in view.keys_of(image_id)]
            return [entry for entry in found if entry is not None]

        entries = self._with_view(read)
        return [entry.key for entry in entries], embedding_matrix(entries)

    def status(self) -> BankStatus:
        """The bank in numbers."""
        size, failed = _bytes_in(self._folder), self._failed()  # requests need not wait for these

        def read(view: View) -> BankStatus:
            return BankStatus(
                images=view.images,
                slices=len(view),
                labels=tuple(view.counts()),
                bytes=size,
                generation=view.state[1],
                failed=failed,
            )

        return self._with_view(read)

    def verify(self) -> list[str]:
        """What is wrong with the files, a sentence each; reads all of them."""
        problems = self._catalogue.problems()
        if problems:
            return problems
        with self._catalogue.read() as connection:
            named = ledger.files_named(connection)
        for file in sorted(named):
            reason = self._files.reason_damaged(file)
            if reason is not None:
                problems.append(f"{self._files.path(file).name}: {reason}")
        return problems

    def other_fingerprints(self) -> list[Path]:
        """Folders of banks that other models or options made from the same datastore."""
        return sorted(
            path.parent
            for path in self._parent.glob("*/catalogue.sqlite")
            if path.parent != self._folder
        )

    def remove_other_fingerprints(self) -> list[Path]:
        """Delete those folders; nothing but time is lost if they are needed again."""
        others = self.other_fingerprints()
        for path in others:
            shutil.rmtree(path, ignore_errors=True)
        return others

    def _failed(self) -> tuple[tuple[str, str], ...]:
        with self._catalogue.read() as connection:
            records = ledger.live_records(connection)
        return tuple((i, r.error) for i, r in sorted(records.items()) if r.error is not None)

    def _with_view(self, read: Callable[[View], T]) -> T:
        """Call with a view that is up to date."""

        def look() -> T:
            with self._lock:
                with self._catalogue.read() as connection:
                    self._view.refresh(connection)
                return read(self._view)

        return self._catalogue.surviving(look)

    def _recover(self, connection: sqlite3.Connection) -> None:
        """Fill an empty catalogue with what the memories say of themselves."""
        recovered = self._files.recoverable()
        for content, slices in recovered.items():
            ledger.insert_recovered(connection, content, slices)
        if recovered:
            logger.warning("catalogue made anew from the files of %d images", len(recovered))

    def _find(self, keys: Sequence[SliceKey]) -> list[Entry]:
        entries = self._with_view(lambda view: [view.find(key) for key in keys])
        missing = [key for key, entry in zip(keys, entries, strict=True) if entry is None]
        if missing:
            message = f"{missing[0]} is not in the bank; it was removed: ask for the nearest again"
            raise MemoryStoreError(message)
        return [entry for entry in entries if entry is not None]

    def _load_one(
        self, reader: Reader, entry: Entry, labels: Sequence[str]
    ) -> tuple[Memory, list[bool]]:
        try:
            return reader.load(entry.stored, labels)
        except DamagedFileError as error:
            self._mend(error)
        try:
            with self._files.reading() as fresh:
                return fresh.load(self._find([entry.key])[0].stored, labels)
        except DamagedFileError as error:
            message = f"the memory of {entry.key} is lost ({error}); run `bank rebuild`"
            raise MemoryStoreError(message) from error

    def _mend(self, damage: DamagedFileError) -> None:
        with self._catalogue.write() as connection:
            if self._files.reason_damaged(damage.file) is None:
                return  # another thread has mended it
            logger.warning("%s: put aside, its image is encoded again", damage)
            self._files.put_aside(damage.file)
            records = ledger.disown(connection, damage.file)
        self._synchronizer.run([record.label() for record in records], complete=False)

    def _disown_missing(self) -> None:
        """Once per process: files that somebody deleted are made again by the sync that follows."""
        with self._catalogue.write() as connection:
            missing = ledger.files_named(connection) - set(self._files.names())
            if missing:
                logger.warning("%d files of memories are missing", len(missing))
                for file in missing:
                    ledger.disown(connection, file)


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # swept, or a journal that just went
            total += path.stat().st_size if path.is_file() else 0
    return total
