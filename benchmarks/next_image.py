"""Time and memory of the next image in large pools, after each submit, beside brute force.

    python benchmarks/next_image.py --sizes 10000 100000

Vectors imitate the regions of images of a few kinds (a mixture in a space of few dimensions, plus
noise). After each submit the ranking is told of the label, and of the risk of four images more as
by the server, and asked for the next image. Brute force computes every gain again, over all targets
and all candidates, without bounds; of a large pool a part, and the rest is reckoned. Wall and CPU
seconds are both told: where other work shares the cores, the CPU's are what the ranking costs.
"""

import argparse
import json
import sys
import time
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from lib.retrieval.ranking import NAMES, PoolView, make_ranking

KINDS = 300
LATENT = 24
BLOCK = 64  # rows at once
KNOWN, MORE = 600, 4  # images of known risk at the start, and after each submit


def pool_of(images: int, slices: int, regions: int, size: int, seed: int) -> PoolView:
    """A pool of images with as many slices each, and these with as many regions."""
    generator = np.random.default_rng(seed)
    mapping = generator.standard_normal((LATENT, size)).astype(np.float32)
    kinds = generator.standard_normal((KINDS, LATENT)).astype(np.float32)
    rows = slices * regions
    kind = np.repeat(generator.integers(0, KINDS, images), rows)
    vectors = np.empty((images * rows, size), np.float32)
    for start in range(0, len(vectors), 10_000):
        part = kinds[kind[start : start + 10_000]]
        part = part + 0.5 * generator.standard_normal(part.shape, dtype=np.float32)
        own = part @ mapping
        own += generator.standard_normal(own.shape, dtype=np.float32)
        vectors[start : start + len(own)] = own / np.linalg.norm(own, axis=1, keepdims=True)
    return PoolView(
        ids=tuple(f"image {number:07d}" for number in range(images)),
        vectors=vectors,
        starts=np.arange(images + 1, dtype=np.int64) * rows,
        slices=np.tile(np.repeat(np.arange(slices), regions), images),
        regions=regions,
    )


def brute_force(pool: PoolView, labelled: list[int], width: float, seconds: float) -> float:
    """Every gain over the whole pool, once; returns the seconds that all of it takes.

    Where that would be longer than `seconds`, it is stopped there, and the rest is reckoned.
    """
    start = time.perf_counter()
    vectors, rows = pool.vectors, int(pool.starts[1])
    covered = np.zeros(len(vectors), np.float32)
    if labelled:
        own = vectors[pool.rows(np.array(labelled, dtype=np.int64))]
        for begin in range(0, len(vectors), 100_000):
            part = vectors[begin : begin + 100_000]
            covered[begin : begin + len(part)] = np.exp(((part @ own.T).max(axis=1) - 1) / width)
    before = time.perf_counter() - start
    gains = np.empty(len(pool))
    together = max(1, BLOCK // rows)
    start = time.perf_counter()
    for image in range(0, len(pool), together):
        part = vectors[image * rows : (image + together) * rows]
        kernel = (part @ vectors.T).reshape(-1, rows, len(vectors)).max(axis=1)
        kernel = np.exp((kernel - 1) / width)
        gains[image : image + len(kernel)] = np.maximum(kernel - covered, 0).sum(axis=1)
        spent = time.perf_counter() - start
        if spent > seconds:
            return before + spent * len(pool) / (image + len(kernel))
    return before + time.perf_counter() - start


def extra_mb(name: str, pool: PoolView) -> float:
    """Most memory that a ranking holds beside the vectors, over three submits; not timed."""
    tracemalloc.start()
    ranking = make_ranking(name, pool, 0)
    for _ in range(3):
        ranking.add_labelled([ranking.next()[0].image_id])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def measure(name: str, pool: PoolView, submits: int) -> dict[str, object]:
    """One ranking through so many submits."""
    generator = np.random.default_rng(1)
    order = [pool.ids[number] for number in generator.permutation(len(pool))]
    values = generator.uniform(0, 1, len(pool)).tolist()
    risk = dict(zip(order[:KNOWN], values[:KNOWN], strict=True))
    wall, cpu = time.perf_counter(), time.process_time()
    ranking = make_ranking(name, pool, 0)
    ranking.set_risk(risk)
    picked = ranking.next()[0].image_id
    first = (time.perf_counter() - wall, time.process_time() - cpu)
    walls, cpus = [], []
    for number in range(submits):
        wall, cpu = time.perf_counter(), time.process_time()
        ranking.add_labelled([picked])
        known = len(risk)
        risk |= dict(zip(order[known:][:MORE], values[known:][:MORE], strict=True))
        ranking.set_risk(risk)
        if number == submits // 2:
            ranking.remove_labelled([picked])  # a label is deleted on the way
            ranking.add_labelled([picked])
        picked = ranking.next()[0].image_id
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {
        "ranking": name,
        "images": len(pool),
        "embeddings": len(pool.vectors),
        "size": pool.vectors.shape[1],
        "first": {"wall_s": round(first[0], 3), "cpu_s": round(first[1], 3)},
        "after_a_submit_wall_ms": [round(1000 * value) for value in walls],
        "after_a_submit_cpu_ms": [round(1000 * value) for value in cpus],
        "vectors_mb": round(pool.vectors.nbytes / 2**20),
        "extra_mb": round(extra_mb(name, pool)),
    }


def main() -> None:
    """Print the table; the figures of every submit go to --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--slices", type=int, default=1, help="of each image")
    parser.add_argument("--regions", type=int, default=16, help="of each slice")
    parser.add_argument("--dimensions", type=int, default=36)
    parser.add_argument("--submits", type=int, default=50)
    parser.add_argument("--rankings", nargs="+", choices=NAMES, default=["refseg", "coverage"])
    parser.add_argument("--brute-force-seconds", type=float, default=60.0, help="0: none")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    results = []
    print("| ranking | images | first s | submit + next: median ms | most ms | cpu ms | extra MB |")
    print("|---|---|---|---|---|---|---|")
    for images in options.sizes:
        pool = pool_of(images, options.slices, options.regions, options.dimensions, seed=0)
        for name in options.rankings:
            row = measure(name, pool, options.submits)
            results.append(row)
            walls, cpus = row["after_a_submit_wall_ms"], row["after_a_submit_cpu_ms"]
            print(
                f"| {name} | {images} | {row['first']['wall_s']} (cpu {row['first']['cpu_s']}) | "
                f"{np.median(walls):.0f} | {max(walls)} | {np.median(cpus):.0f}, "
                f"most {max(cpus)} | {row['extra_mb']} |",
                flush=True,
            )
        if options.brute_force_seconds:
            wall = brute_force(pool, [0, 1, 2], 0.3, options.brute_force_seconds)
            results.append({"ranking": "brute force", "images": images, "wall_s": round(wall, 1)})
            print(f"| brute force | {images} | - | {1000 * wall:.0f} | - | - | - |", flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
