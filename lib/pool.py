"""The pool: embeddings of all images of a datastore, computed bit by bit, out of the way."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lib.errors import ImageError
from lib.machine import start_thread
from lib.memory.pool import EmbeddingPool
from lib.retrieval.poolview import PoolView
from lib.retrieval.regions import RegionBasis
from lib.types import FloatArray, HalfArray

logger = logging.getLogger(__name__)

_SAMPLE = 1000  # images read at once, and those that the axes are taken from


class Pool:
    """Computes what is missing: some within a call, the rest in a thread that makes way.

    Args:
        open_pool: opens what is stored; called once, when it is first needed.
        embed: path of an image -> (n, C) rows of a slice or of its regions, and of each row its
            slice's number.
    """

    def __init__(
        self,
        open_pool: Callable[[], EmbeddingPool],
        embed: Callable[[Path], tuple[HalfArray, Sequence[int]]],
    ) -> None:
        self._open_pool = open_pool
        self._embed_file = embed
        self._opened: EmbeddingPool | None = None
        self._open_lock = threading.Lock()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._unreadable: dict[str, tuple[str, int]] = {}
        self._requests = 0
        self._idle = threading.Event()
        self._idle.set()

    @property
    def _stored(self) -> EmbeddingPool:
        with self._open_lock:
            if self._opened is None:
                self._opened = self._open_pool()
            return self._opened

    def __len__(self) -> int:
        return len(self._stored)

    def embeddings(
        self, paths: Mapping[str, Path], *, first: Collection[str] = (), seconds: float
    ) -> dict[str, FloatArray]:
        """Embeddings of the datastore's images, computed once and kept.

        Args:
            paths: image id -> file, of all images.
            first: ids to compute before the others.
            seconds: how long to compute within this call, see `advance`.

        Returns:
            id -> (M, E) of the images that are embedded by now.
        """
        ids = sorted(self.advance(paths, first=first, seconds=seconds))
        rows, owners = self._stored.gather(ids)
        return _by_image(ids, owners, rows)

    def advance(
        self, paths: Mapping[str, Path], *, first: Collection[str] = (), seconds: float
    ) -> set[str]:
        """Compute some of what is missing; the ids of what is embedded by now.

        What is missing is computed for so long, one image at least, and then in the background.
        So is the reading of files that changed their name or time alone, to find out just that.

        Args:
            paths: image id -> file, of all images.
            first: ids to compute before the others.
            seconds: how long to compute within this call.
        """
        deadline = time.monotonic() + seconds
        known = self._stored.known(paths)
        missing = sorted(paths.keys() - known, key=lambda name: (name not in first, name))
        busied = False
        late = {}
        for image_id in missing:
            path = paths[image_id]
            if self._is_unreadable(image_id, path):
                continue
            if busied and time.monotonic() >= deadline:
                late[image_id] = path
                continue
            busied = True
            if self.embed(image_id, path):
                known.add(image_id)
        if late:
            self._embed_soon(late)
        return known

    def missing(self, paths: Mapping[str, Path]) -> list[str]:
        """Ids without embeddings, sorted; those that could not be read are among them."""
        return sorted(paths.keys() - self._stored.known(paths))

    def unembedded(self, paths: Mapping[str, Path]) -> list[str]:
        """Ids that must be computed, sorted; reads the bytes of files that only look new."""
        return [i for i in self.missing(paths) if self._stored.get(i, paths[i]) is None]

    def view(self, ids: Collection[str]) -> PoolView:
        """What is stored of images, for a ranking: unit vectors of their regions."""
        names = sorted(ids)
        numbers = self._stored.slice_numbers()
        known = [name for name in names if numbers.get(name)]
        if not known:
            return PoolView.of({})
        regions = numbers[known[0]].count(numbers[known[0]][0])
        basis = self._basis(known, regions)
        if basis is None:  # all of them are gone meanwhile
            return PoolView.of({})
        vectors: dict[str, FloatArray] = {}
        for start in range(0, len(known), _SAMPLE):  # what is stored is wider than what is seen
            part = known[start : start + _SAMPLE]
            rows, owners = self._stored.gather(part)
            if not len(rows):
                continue
            vectors |= _by_image(part, owners, basis.apply(rows))
        return PoolView.of(vectors, numbers, regions=regions)

    def _basis(self, ids: Sequence[str], regions: int) -> RegionBasis | None:
        count = min(len(ids), _SAMPLE)
        draw = np.random.default_rng(0).choice(len(ids), count, replace=False)
        rows, _ = self._stored.gather([ids[number] for number in sorted(draw)])
        return RegionBasis.of(rows, regions) if len(rows) else None

    def _is_unreadable(self, image_id: str, path: Path) -> bool:
        return self._unreadable.get(image_id) == _mark(path)

    def embed(self, image_id: str, path: Path) -> bool:
        """Compute one image's embeddings, if the pool does not know its bytes by another name.

        Returns:
            False where it cannot be read.
        """
        if self._is_unreadable(image_id, path):
            return False
        mark = _mark(path)
        try:
            if self._stored.get(image_id, path) is None:
                vectors, numbers = self._embed_file(path)
                self._stored.put(image_id, path, vectors, numbers=numbers)
        except (ImageError, OSError) as error:
            logger.warning("%s is not compared with the others: %s", image_id, error)
            self._unreadable[image_id] = mark
            return False
        return True

    def _embed_soon(self, paths: Mapping[str, Path]) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = start_thread(partial(self._embed_all, paths), "refseg-pool")

    def _embed_all(self, paths: Mapping[str, Path]) -> None:
        try:
            for image_id, path in paths.items():
                self._idle.wait()  # a person who waits for a mask comes first
                self.embed(image_id, path)
        except Exception:
            logger.exception("the comparison of unlabelled images ended early")
        finally:
            with self._lock:
                self._thread = None

    def keep(self, image_id: str, path: Path, vectors: HalfArray, numbers: Sequence[int]) -> None:
        """Store what another process computed.

        Raises:
            OSError: the image is not there any more.
        """
        self._stored.put(image_id, path, vectors, numbers=numbers)

    def wait_until_idle(self, seconds: float | None = None) -> None:
        """Return when no request is being answered, or after so long; for background work."""
        self._idle.wait(seconds)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While a request is answered, background work on the pool pauses between images."""
        with self._lock:
            self._requests += 1
            self._idle.clear()
        try:
            yield
        finally:
            with self._lock:
                self._requests -= 1
                if not self._requests:
                    self._idle.set()


def _by_image(
    ids: Sequence[str], owners: npt.NDArray[np.int64], rows: FloatArray
) -> dict[str, FloatArray]:
    """Rows by the image that each is of; owners, positions in `ids`, ascend."""
    present, starts = np.unique(owners, return_index=True)
    parts = np.split(rows, starts[1:])
    return {ids[owner]: part for owner, part in zip(present, parts, strict=False)}


def _mark(path: Path) -> tuple[str, int]:
    """What changes when a file that could not be read is mended."""
    return str(path), path.stat().st_mtime_ns if path.exists() else 0
