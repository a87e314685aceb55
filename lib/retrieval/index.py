"""Nearest vectors by inner product: exact up to a size, approximate beyond; FAISS lives only here.

The approximate index is an inverted file (IVF, flat codes) and not HNSW: an annotator deletes and
overwrites, and FAISS's HNSW cannot remove; IVF also searches a subset of ids without a detour. Its
number of probed lists is not guessed but measured on the stored vectors until recall is reached,
each asked for neighbors from other groups: in its own volume a slice finds twins in any index.
`benchmarks/index_recall.py` prints recall and time.
"""

import logging
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from lib.types import FloatArray

IdArray = npt.NDArray[np.int64]

logger = logging.getLogger(__name__)

EXACT_UP_TO = 100_000
RECALL_TARGET = 0.998  # of stored vectors; of new ones, which lie less well, .99 is wanted
RECALL_K = 16
_GROWTH_BEFORE_RETRAINING = 2.0
_TRAINING_VECTORS_PER_LIST = 64
_CALIBRATION_QUERIES = 1024
_CALIBRATION_GROUP = 1000


class VectorIndex:
    """Unit float32 vectors under int64 ids; inner product, higher is nearer.

    Thread-safe. Vectors of one index have one size, taken from the first that is added.

    Args:
        exact_up_to: number of vectors beyond which the index becomes approximate by itself.
        gpu: True searches on FAISS's first GPU, False never does; None takes one if FAISS has one.
            Searches within a subset of ids stay on the CPU, where FAISS supports them.
    """

    def __init__(self, *, exact_up_to: int = EXACT_UP_TO, gpu: bool | None = None) -> None:
        self._exact_up_to = exact_up_to
        self._use_gpu = gpu
        self._lock = threading.RLock()
        self._index: Any = None
        self._gpu_copy: Any = None
        self._subset: tuple[bytes, Any] | None = None
        self._sorted: IdArray | None = None
        self._ids: set[int] = set()
        self._groups: dict[int, int] = {}
        self._trained_on = 0

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def size(self) -> int:
        """Entries of one vector; 0 while the index has never held any."""
        return 0 if self._index is None else int(self._index.d)

    @property
    def approximate(self) -> bool:
        """Whether searches may miss a neighbour."""
        return self._trained_on > 0

    def describe(self) -> str:
        """What kind of index answers, for logs and reports."""
        if not self.approximate:
            return "exact inner product"
        return f"IVF, {self._index.nprobe} of {self._index.nlist} lists probed"

    def add(self, ids: IdArray, vectors: FloatArray, groups: IdArray | None = None) -> None:
        """Add vectors (N, E) under new ids (N,).

        `groups` (N,) says which vectors belong together (slices of an image). It matters only to
        how carefully an approximate index searches; None is each for itself.
        """
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors.ndim != 2 or len(ids) != len(vectors):
            message = f"{len(ids)} ids for vectors of shape {vectors.shape}; give (N,) and (N, E)"
            raise ValueError(message)
        if not len(ids):
            return
        with self._lock:
            fresh = set(ids.tolist())
            if len(fresh) != len(ids) or not fresh.isdisjoint(self._ids):
                message = "an id is already in the index; remove it first"
                raise ValueError(message)
            if self._index is None:
                self._index = _exact(vectors.shape[1])
            if vectors.shape[1] != self._index.d:
                message = f"vectors of {vectors.shape[1]} entries in an index of {self._index.d}"
                raise ValueError(message)
            self._index.add_with_ids(vectors, ids)
            self._ids |= fresh
            # Own groups count downwards from -1, where no image is.
            own = -1 - ids if groups is None else groups
            self._groups.update(zip(ids.tolist(), own.tolist(), strict=True))
            self._forget_derived()
            self._grow()

    def remove(self, ids: IdArray) -> None:
        """Remove ids; those that are not there are ignored."""
        with self._lock:
            gone = self._ids.intersection(np.asarray(ids, dtype=np.int64).tolist())
            if not gone:
                return
            # An array selector is the only kind that an IVF with a hashed direct map can remove.
            self._index.remove_ids(_faiss().IDSelectorArray(np.array(sorted(gone), dtype=np.int64)))
            self._ids -= gone
            for number in gone:
                del self._groups[number]
            self._forget_derived()
            if self.approximate and len(self._ids) < self._exact_up_to // 2:
                ids_left, vectors = self._everything()
                self._index = _exact(self.size)
                self._index.add_with_ids(vectors, ids_left)
                self._trained_on = 0

    def vectors(self, ids: IdArray) -> FloatArray:
        """The vectors (N, E) of ids (N,) that are all in the index."""
        with self._lock:
            wanted = np.ascontiguousarray(ids, dtype=np.int64)
            if not len(wanted):
                return np.zeros((0, self.size), dtype=np.float32)
            return np.asarray(self._index.reconstruct_batch(wanted), dtype=np.float32)

    def search(
        self, queries: FloatArray, k: int, *, within: IdArray | None = None
    ) -> tuple[FloatArray, IdArray]:
        """The k nearest of each query (Q, E), of all ids or `within` some.

        Returns:
            Similarities (Q, K), highest first, and ids (Q, K); equal similarities by rising id.
            K = min(k, candidates). Where an approximate index finds fewer, -inf and -1 fill up.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        with self._lock:
            candidates = len(self._ids)
            if within is not None:
                within = np.intersect1d(within, self._sorted_ids())
                candidates = len(within)
                if candidates == len(self._ids):
                    within = None
            k = min(k, candidates)
            if k <= 0 or not len(queries):
                empty = (len(queries), max(k, 0))
                return np.zeros(empty, dtype=np.float32), np.zeros(empty, dtype=np.int64)
            similarities, ids = self._search(queries, k, within)
        similarities = np.where(ids < 0, -np.inf, similarities).astype(np.float32)
        order = np.lexsort((ids, -similarities), axis=1)
        return np.take_along_axis(similarities, order, 1), np.take_along_axis(ids, order, 1)

    def _search(
        self, queries: FloatArray, k: int, within: IdArray | None
    ) -> tuple[FloatArray, IdArray]:
        if within is None:
            similarities, ids = self._device_index().search(queries, k)
            return similarities, ids
        if not self.approximate or len(within) <= self._exact_up_to // 8:
            similarities, positions = self._gathered(within).search(queries, k)
            return similarities, within[positions]
        bits = np.zeros(int(within[-1]) // 8 + 1, dtype=np.uint8)
        np.bitwise_or.at(bits, within >> 3, (1 << (within & 7)).astype(np.uint8))
        selector = _faiss().IDSelectorBitmap(bits)
        parameters = _faiss().SearchParametersIVF(sel=selector, nprobe=self._index.nprobe)
        similarities, ids = self._index.search(queries, k, params=parameters)
        return similarities, ids

    def _gathered(self, within: IdArray) -> Any:
        """An exact index of some ids by position: FAISS's selectors do without BLAS, 3x slower.

        The last one is kept if it is large: the slices of one image ask for the same candidates.
        """
        key = within.tobytes()
        if self._subset is not None and self._subset[0] == key:
            return self._subset[1]
        subset = _faiss().IndexFlatIP(self.size)
        subset.add(self.vectors(within))
        if len(within) > len(self._ids) // 2:
            self._subset = (key, subset)
        return subset

    def _device_index(self) -> Any:
        """The index on a GPU if that is wanted and possible, else the CPU's."""
        faiss = _faiss()
        gpus = getattr(faiss, "get_num_gpus", lambda: 0)()
        if self._use_gpu is False or not gpus:
            return self._index
        if self._gpu_copy is None:
            # The CPU's stays the truth: GPU indexes can neither remove nor select.
            ids, vectors = self._everything()
            copy = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), self.size)
            self._gpu_copy = faiss.IndexIDMap2(copy)
            self._gpu_copy.add_with_ids(vectors, ids)
        return self._gpu_copy

    def _everything(self) -> tuple[IdArray, FloatArray]:
        ids = self._sorted_ids()
        return ids, self.vectors(ids)

    def _sorted_ids(self) -> IdArray:
        if self._sorted is None:
            self._sorted = np.array(sorted(self._ids), dtype=np.int64)
        return self._sorted

    def _forget_derived(self) -> None:
        self._gpu_copy = self._subset = self._sorted = None

    def _grow(self) -> None:
        count = len(self._ids)
        if count <= self._exact_up_to or count < self._trained_on * _GROWTH_BEFORE_RETRAINING:
            return
        ids, vectors = self._everything()
        groups = np.array([self._groups[number] for number in ids.tolist()], dtype=np.int64)
        self._index = _inverted(ids, vectors, groups)
        self._trained_on = count
        logger.info("index of %d vectors: %s", count, self.describe())


def _faiss() -> Any:
    """Imported on first use: a server without references starts without it."""
    import faiss

    return faiss


def _exact(size: int) -> Any:
    return _faiss().IndexIDMap2(_faiss().IndexFlatIP(size))


def _inverted(ids: IdArray, vectors: FloatArray, groups: IdArray) -> Any:
    """An IVF over all vectors that probes as many lists as the recall that is wanted takes."""
    faiss = _faiss()
    count, size = vectors.shape
    lists = max(1, min(int(2 * np.sqrt(count)), count // 40, 4096))
    generator = np.random.default_rng(0)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(size), size, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter = 8
    training = min(count, lists * _TRAINING_VECTORS_PER_LIST)
    index.cp.max_points_per_centroid = _TRAINING_VECTORS_PER_LIST
    index.train(vectors[np.sort(generator.choice(count, training, replace=False))])
    index.add(vectors)  # by position, for the calibration

    sample = generator.choice(count, min(count, _CALIBRATION_QUERIES), replace=False)
    largest = int(np.unique(groups, return_counts=True)[1].max())
    k = min(count, RECALL_K + min(largest, _CALIBRATION_GROUP))
    exact = faiss.IndexFlatIP(size)
    exact.add(vectors)
    truth = _outside(exact.search(vectors[sample], k)[1], groups, groups[sample])
    if not any(truth):  # all are of one group: then each stands for itself
        groups = np.arange(count)
        truth = _outside(exact.search(vectors[sample], k)[1], groups, groups[sample])
    index.nprobe = min(4, lists)
    while index.nprobe < lists:
        found = _outside(index.search(vectors[sample], k)[1], groups, groups[sample])
        hits = sum(len(a & b) for a, b in zip(truth, found, strict=True))
        if hits >= RECALL_TARGET * sum(map(len, truth)):
            break
        index.nprobe = min(lists, int(np.ceil(index.nprobe * 1.4)))
    # Images yet to come are farther from the lists' centers than the stored ones are: at 100,000
    # vectors .998 of these is .987 of those.
    index.nprobe = min(lists, int(np.ceil(index.nprobe * 1.4)))

    index.reset()
    index.set_direct_map_type(faiss.DirectMap.Hashtable)
    index.add_with_ids(vectors, ids)
    return index


def _outside(found: IdArray, groups: IdArray, own: IdArray) -> list[set[int]]:
    """Of positions (Q, K), nearest first, the first that are not of the query's group (Q,)."""
    answers = []
    for row, group in zip(found, own, strict=True):
        row = row[row >= 0]
        answers.append(set(row[groups[row] != group][:RECALL_K].tolist()))
    return answers
