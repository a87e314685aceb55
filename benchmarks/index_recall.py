"""Recall and time of the bank's index, exact and approximate, and of HNSW for comparison.

    python benchmarks/index_recall.py --sizes 20000 100000 200000

Vectors imitate slices of volumes: each volume is a walk in a space of few dimensions, so that
neighboring slices are alike, mapped into E dimensions, plus noise; queries are slices of volumes
that are not in the index. Real embeddings (N, E) of a .npy file are used with --embeddings.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import faiss
import numpy as np

from lib.retrieval.index import RECALL_K, VectorIndex
from lib.types import FloatArray

SLICES_PER_VOLUME = 40
LATENT = 24


class Row(NamedTuple):
    """One line of the table."""

    index: str
    count: int
    build_s: float
    recall: float
    one_ms: float
    batch_ms: float
    detail: str


def volumes(count: int, size: int, seed: int) -> FloatArray:
    """(count, size) unit vectors of slices, always mapped into `size` dimensions alike."""
    mapping = np.random.default_rng(0).standard_normal((LATENT, size))
    generator = np.random.default_rng(seed)
    starts = generator.standard_normal((count // SLICES_PER_VOLUME + 1, 1, LATENT))
    steps = 0.15 * generator.standard_normal((len(starts), SLICES_PER_VOLUME, LATENT))
    walks = (starts + np.cumsum(steps, axis=1)).reshape(-1, LATENT)[:count]
    vectors = walks @ mapping + 0.5 * generator.standard_normal((count, size))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32)


def measure(
    name: str,
    count: int,
    queries: FloatArray,
    truth: np.ndarray,
    build: Callable[[], tuple[Callable[[FloatArray], np.ndarray], str]],
) -> Row:
    """Build an index, then time and judge its answers."""
    started = time.perf_counter()
    search, detail = build()
    built = time.perf_counter() - started
    started = time.perf_counter()
    found = search(queries)
    batch = (time.perf_counter() - started) / len(queries)
    started = time.perf_counter()
    for query in queries[:50]:
        search(query[None])
    one = (time.perf_counter() - started) / len(queries[:50])
    hits = sum(len(set(a) & set(b)) for a, b in zip(truth.tolist(), found.tolist(), strict=True))
    return Row(name, count, built, hits / truth.size, one * 1e3, batch * 1e3, detail)


def ours(vectors: FloatArray, exact_up_to: int) -> tuple[Callable[[FloatArray], np.ndarray], str]:
    """The bank's index; approximate if there are more vectors than `exact_up_to`."""
    index = VectorIndex(exact_up_to=exact_up_to, gpu=False)
    positions = np.arange(len(vectors))
    index.add(positions, vectors, positions // SLICES_PER_VOLUME)
    return lambda queries: index.search(queries, RECALL_K)[1], index.describe()


def hnsw(vectors: FloatArray) -> tuple[Callable[[FloatArray], np.ndarray], str]:
    """FAISS's graph index, which the bank does not use."""
    index = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = 80, 128
    index.add(vectors)
    return lambda queries: index.search(queries, RECALL_K)[1], "M=32, ef=128; cannot remove"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000, 100_000, 200_000])
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--embeddings", type=Path, help=".npy (N, E); a tenth become queries")
    parser.add_argument("--hnsw", action="store_true", help="also HNSW (slow to build)")
    options = parser.parse_args()
    threads = faiss.omp_get_max_threads()
    print(
        f"k = {RECALL_K}, E = {options.dimensions}, {threads} thread(s), faiss {faiss.__version__}"
    )
    print("| index | vectors | build s | recall | ms a query alone | in a batch | detail |")
    print("|---|---|---|---|---|---|---|")
    for count in options.sizes:
        if options.embeddings:
            held = np.load(options.embeddings).astype(np.float32)
            held = held[np.random.default_rng(0).permutation(len(held))]
            count = min(count, len(held) * 9 // 10)
            vectors, queries = held[:count], held[count : count + options.queries]
        else:
            vectors = volumes(count, options.dimensions, seed=1)
            queries = volumes(options.queries, options.dimensions, seed=2)
        exact = faiss.IndexFlatIP(vectors.shape[1])
        exact.add(vectors)
        truth = exact.search(queries, RECALL_K)[1]
        del exact
        builders = {
            "exact": lambda v=vectors: ours(v, len(v)),
            "approximate": lambda v=vectors: ours(v, len(v) - 1),
        }
        if options.hnsw:
            builders["HNSW"] = lambda v=vectors: hnsw(v)
        for name, build in builders.items():
            row = measure(name, count, queries, truth, build)
            print(
                f"| {row.index} | {row.count} | {row.build_s:.1f} | {row.recall:.4f} | "
                f"{row.one_ms:.2f} | {row.batch_ms:.2f} | {row.detail} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
