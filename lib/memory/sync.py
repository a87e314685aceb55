"""Bring the catalogue to what the datastore says: look, decide in one transaction, then encode.

Locks, from outside to inside, each held by one process and thread at a time:

1. a file lock per bucket of image ids, during the encoding of one image, so that nobody encodes it
   twice; at most one is held, so there is no deadlock;
2. the catalogue's write transaction, for milliseconds: files move into place, are swept, and rows
   change inside it only. Readers wait for none of this but the commit itself.
"""

import logging
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from filelock import FileLock, Timeout

from lib.errors import MemoryStoreError, RefSegError
from lib.memory import ledger
from lib.memory.catalogue import Catalogue
from lib.memory.ledger import Sighting
from lib.memory.records import SyncReport
from lib.memory.signature import content, signature
from lib.memory.store import MemoryFiles
from lib.types import LabelledImage, Reference

logger = logging.getLogger(__name__)

Encode = Callable[[LabelledImage], Iterable[Reference]]

RETIRED_KEPT_S = 3600.0
_ATTEMPTS = 3


class _EncodingError(Exception):
    """`encode` failed, not the disk that we write to.

    Attributes:
        lasting: whether it would fail again with the same files; a lack of memory would not.
    """

    def __init__(self, sentence: str, *, lasting: bool) -> None:
        super().__init__(sentence)
        self.lasting = lasting


class Synchronizer:
    """Writes to a bank.

    Args:
        folder: of the bank's fingerprint.
        catalogue: its catalogue.
        files: its memories.
        encode: makes the references of one labelled image, lazily if it likes.
        lock_timeout_s: how long to wait for another process that encodes the same image.
        settled_s: a file that changed less than this ago is hashed whatever its times say.
    """

    def __init__(
        self,
        folder: Path,
        catalogue: Catalogue,
        files: MemoryFiles,
        encode: Encode,
        *,
        lock_timeout_s: float,
        settled_s: float,
    ) -> None:
        self._locks = folder / "locks"
        self._staging = folder / "staging"
        self._catalogue = catalogue
        self._files = files
        self._encode = encode
        self._lock_timeout_s = lock_timeout_s
        self._settled_s = settled_s

    def run(
        self, labels: Sequence[LabelledImage], *, complete: bool, again: bool = False
    ) -> SyncReport:
        """See `MemoryBank.sync`; `again` encodes all of them whatever is known."""
        wanted = {label.image_id: label for label in labels}
        signatures = {
            image_id: signature(label, self._settled_s) for image_id, label in wanted.items()
        }
        with self._catalogue.read() as connection:
            before = ledger.live_records(connection)
        stale = [
            image_id
            for image_id in wanted
            if again
            or image_id not in before
            or not signatures[image_id]
            or before[image_id].signature != signatures[image_id]
        ]
        gone = [image_id for image_id in before if complete and image_id not in wanted]
        seen = [self._look(wanted[image_id]) for image_id in stale]
        known_as: dict[str, str] = {}
        if seen or gone:
            todo = self._decide(seen, gone, known_as, again=again)
            self._encode_all(todo, again=again)
        report = self._report(wanted, before, gone, known_as, forced=again)
        if again or report.changed:
            self.sweep(0.0 if again else RETIRED_KEPT_S)
        return report

    def sweep(self, retired_kept_s: float = RETIRED_KEPT_S) -> None:
        """Delete what was retired long ago, files no row names, and what killed writers left."""
        with self._catalogue.write() as connection:
            wanted = ledger.purge(connection, time.time() - retired_kept_s)
            self._files.sweep(wanted)
        for folder in self._staging.glob("*"):
            try:
                with FileLock(self._locks / f"{folder.name}.lock").acquire(timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)
            except Timeout:
                continue  # its writer is at work

    def _decide(
        self, seen: list[Sighting], gone: list[str], known_as: dict[str, str], *, again: bool
    ) -> list[Sighting]:
        """Do in one transaction all that needs no encoding; what is left to encode."""
        with self._catalogue.write() as connection:
            for image_id in gone:
                record = ledger.live_record(connection, image_id)
                if record is not None:
                    ledger.retire(connection, record)
            if again:
                return [sighting for sighting in seen if not _failed(connection, sighting)]
            return [sighting for sighting in seen if not _settled(connection, sighting, known_as)]

    def _encode_all(self, todo: list[Sighting], *, again: bool) -> None:
        """Encode images; those that another process has in hand come last, when it may be done."""
        later = []
        for number, sighting in enumerate(todo):
            if len(todo) > 1:
                logger.info("encoding labelled image %d of %d", number + 1, len(todo))
            try:
                with self._alone_with(sighting.label.image_id, timeout_s=0) as staging:
                    self._encode_one(sighting, staging, again=again)
            except Timeout:
                later.append(sighting)
        for sighting in later:
            try:
                with self._alone_with(
                    sighting.label.image_id, timeout_s=self._lock_timeout_s
                ) as staging:
                    self._encode_one(sighting, staging, again=again)
            except Timeout as error:
                message = (
                    f"another process has been encoding {sighting.label.image_id!r} for more than "
                    f"{self._lock_timeout_s:g} s; wait for it, or end it"
                )
                raise MemoryStoreError(message) from error

    def _encode_one(self, seen: Sighting, staging: Path, *, again: bool) -> None:
        if not again:
            with self._catalogue.write() as connection:
                if _settled(connection, seen, {}):
                    return
        error: str | None = None
        lasting = True
        for _ in range(_ATTEMPTS):
            shutil.rmtree(staging, ignore_errors=True)
            error, lasting = None, True
            try:
                slices, names = self._files.stage(
                    self._references(seen.label), seen.content, staging
                )
            except _EncodingError as failure:
                slices, names = [], []
                error, lasting = str(failure), failure.lasting
            except OSError as full:
                message = f"memories cannot be written to {staging.parent}: {full.strerror}"
                message += "; free disk space or name another"
                raise MemoryStoreError(message) from full
            now = self._look(seen.label)
            settled = now.content == seen.content
            seen = now
            if settled:
                break
        else:
            # It changes faster than it can be encoded: keep the last state, and look again soon.
            lasting = False
        if not lasting:
            seen = replace(seen, signature="", content="")
        if seen.error is not None:
            slices, names, error = [], [], seen.error
        if error is not None:
            logger.warning("%s is no reference: %s", seen.label.image_id, error)
        with self._catalogue.write() as connection:
            self._files.publish(names, staging)
            ledger.insert(connection, replace(seen, error=error), slices)
        shutil.rmtree(staging, ignore_errors=True)

    def _look(self, label: LabelledImage) -> Sighting:
        """See what a labelled image is now. The signature is older than the content: safe."""
        cheap = signature(label, self._settled_s)
        try:
            return Sighting(label, cheap, content(label))
        except OSError as error:
            return Sighting(label, cheap, "", _sentence(error))

    def _references(self, label: LabelledImage) -> Iterator[Reference]:
        try:
            yield from self._encode(label)
        except RefSegError as error:
            raise _EncodingError(str(error), lasting=True) from error
        except OSError as error:
            raise _EncodingError(_sentence(error), lasting=True) from error
        except Exception as error:
            # A fault of ours, or too little memory: the other images must not suffer for it.
            logger.exception("%s could not be encoded", label.image_id)
            sentence = f"it could not be encoded ({type(error).__name__}: {error}); see the log"
            raise _EncodingError(sentence, lasting=False) from error

    @contextmanager
    def _alone_with(self, image_id: str, *, timeout_s: float) -> Iterator[Path]:
        """The staging folder of an image, for this thread of this process only."""
        bucket = sha256(image_id.encode("utf-8", "surrogateescape")).hexdigest()[:2]
        self._locks.mkdir(parents=True, exist_ok=True)
        with FileLock(self._locks / f"{bucket}.lock").acquire(timeout=timeout_s):
            yield self._staging / bucket

    def _report(
        self,
        wanted: dict[str, LabelledImage],
        before: dict[str, ledger.Record],
        gone: list[str],
        known_as: dict[str, str],
        *,
        forced: bool,
    ) -> SyncReport:
        with self._catalogue.read() as connection:
            after = ledger.live_records(connection)
            generation = ledger.generation(connection)
        held = {i for i, record in before.items() if record.error is None}
        failed = [i for i in wanted if i in after and after[i].error is not None]
        renamed = {new: old for new, old in known_as.items() if old in gone and new not in held}
        added = [i for i in wanted if i not in held and i in after and i not in failed]
        updated = [
            i
            for i in wanted
            if i in held
            and i in after
            and i not in failed
            and (forced or after[i].row != before[i].row)
        ]
        moved = set(renamed.values())
        return SyncReport(
            added=tuple(i for i in added if i not in renamed),
            removed=tuple(i for i in (*gone, *failed) if i in held and i not in moved),
            renamed=tuple((old, new) for new, old in renamed.items()),
            updated=tuple(updated),
            unchanged=tuple(i for i in wanted if i in held and i not in (*updated, *failed)),
            failed=tuple((i, after[i].error or "") for i in failed),
            generation=generation,
        )


def _sentence(error: OSError) -> str:
    name = Path(str(error.filename)).name if error.filename else "a file"
    return f"{name} cannot be read: {error.strerror or error}; restore it or submit the label again"


def _failed(connection: sqlite3.Connection, seen: Sighting) -> bool:
    """Record an image whose files cannot be read; whether that was so."""
    if seen.error is None:
        return False
    record = ledger.live_record(connection, seen.label.image_id)
    if record is not None and record.error == seen.error:
        ledger.refresh_signature(connection, record, seen)
    else:
        logger.warning("%s is no reference: %s", seen.label.image_id, seen.error)
        ledger.insert(connection, seen, ())
    return True


def _settled(connection: sqlite3.Connection, seen: Sighting, known_as: dict[str, str]) -> bool:
    """Do all for an image that needs no encoding; whether that was enough."""
    if _failed(connection, seen):
        return True
    record = ledger.live_record(connection, seen.label.image_id)
    if record is not None and record.content == seen.content:
        ledger.refresh_signature(connection, record, seen)
        return True
    adopted_from = ledger.adopt(connection, seen)
    if adopted_from is None:
        return False
    known_as[seen.label.image_id] = adopted_from
    return True
