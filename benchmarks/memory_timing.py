"""Seconds a slice when references' memories come from the bank, against encoding them anew.

The first paper (arXiv 2408.08813) encodes the references of every query again; its times grow by
about 31 ms for each. RefSeg keeps a memory per reference. For k references and each segmenter this
measures both, from an image in memory to the scores of all labels:

    bank   encode the query, read k memories from disk, segment
    anew   encode the query and k references, make k memories, segment

Weights are random for `sam2` (time does not depend on them) and the bundled ones for `matchseg`.
Pictures and masks are random, too. Another segmenter is one more entry in `SEGMENTERS`.

    python benchmarks/memory_timing.py --threads 2 --out benchmarks/results/memory_timing.json
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lib.models.matchseg import MatchSegSegmenter
from lib.models.protocol import ReferenceSegmenter
from lib.models.sam2 import Sam2Segmenter
from lib.types import FloatArray, Memory

SEED = 0
PIXELS = 256  # side of the pictures
SEGMENTERS: dict[str, Callable[[str], ReferenceSegmenter]] = {
    "matchseg": lambda device: MatchSegSegmenter.load_bundled(device=device),
    "sam2.1-tiny 512": lambda device: Sam2Segmenter.random(
        "sam2.1-tiny", size=512, seed=SEED, device=device
    ),
    "sam2.1-tiny 1024": lambda device: Sam2Segmenter.random(
        "sam2.1-tiny", size=1024, seed=SEED, device=device
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of the table; seconds of all repeats, in the order they were measured.

    Attributes:
        segmenter: key of `SEGMENTERS`.
        k: number of references.
        bank: memories read from disk.
        anew: references encoded again.
        memory_bytes: of one reference on disk.
    """

    segmenter: str
    k: int
    bank: tuple[float, ...]
    anew: tuple[float, ...]
    memory_bytes: int

    @property
    def ratio(self) -> float:
        """How many times the bank is faster, by medians."""
        return statistics.median(self.anew) / statistics.median(self.bank)


class Bench:
    """One segmenter with a query, references, and their memories on disk."""

    def __init__(
        self, segmenter: ReferenceSegmenter, *, references: int, labels: int, folder: Path
    ) -> None:
        """Make pictures and masks, and write the memories."""
        rng = np.random.default_rng(SEED)
        self.segmenter = segmenter
        self.labels = labels
        self.query: FloatArray = rng.random((PIXELS, PIXELS), dtype=np.float32)
        self.pictures = list(rng.random((references, PIXELS, PIXELS), dtype=np.float32))
        self.masks = torch.zeros(labels, PIXELS, PIXELS, dtype=torch.bool)
        for label in range(labels):
            self.masks[label, 20 + 8 * label : 120, 40:160] = True
        self.files = [folder / f"{index}.safetensors" for index in range(references)]
        for picture, file in zip(self.pictures, self.files, strict=True):
            memory = segmenter.remember(segmenter.encode([picture])[0], self.masks)
            save_file({"image": memory.image, "labels": memory.labels.contiguous()}, file)

    def bank(self, k: int) -> None:
        """The query against k memories from disk."""
        self._segment([_read(file) for file in self.files[:k]])

    def anew(self, k: int) -> None:
        """The query against k references that are encoded again."""
        encode, remember = self.segmenter.encode, self.segmenter.remember
        features = encode(self.pictures[:k])
        self._segment([remember(one, self.masks) for one in features])

    def _segment(self, memories: Sequence[Memory]) -> None:
        query = self.segmenter.encode([self.query])[0]
        known = torch.ones(len(memories), self.labels, dtype=torch.bool)
        self.segmenter.segment(query, memories, known)


def _read(file: Path) -> Memory:
    with safe_open(file, "pt") as tensors:
        return Memory(image=tensors.get_tensor("image"), labels=tensors.get_tensor("labels"))


def seconds(run: Callable[[int], None], k: int) -> float:
    """Wall-clock time of one run."""
    start = time.perf_counter()
    run(k)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, arguments: argparse.Namespace) -> list[Row]:
    """All k of one segmenter; the two ways take turns, so that a busy machine hurts both."""
    with tempfile.TemporaryDirectory() as folder:
        segmenter = SEGMENTERS[name](arguments.device)
        bench = Bench(
            segmenter, references=max(arguments.k), labels=arguments.labels, folder=Path(folder)
        )
        bench.bank(1)  # the first pass of a process is slower than all others
        rows = []
        for k in arguments.k:
            pairs = [
                (seconds(bench.bank, k), seconds(bench.anew, k)) for _ in range(arguments.repeats)
            ]
            size = bench.files[0].stat().st_size
            bank, anew = zip(*pairs, strict=True)
            rows.append(Row(name, k, bank=bank, anew=anew, memory_bytes=size))
            print(line(rows[-1]), flush=True)
    return rows


def line(row: Row) -> str:
    """One line of the Markdown table: median (least - most)."""

    def cell(values: Sequence[float]) -> str:
        return f"{statistics.median(values):.3f} ({min(values):.3f}–{max(values):.3f})"

    kept = f"{row.memory_bytes / 2**20:.2f}"
    columns = (row.segmenter, row.k, cell(row.bank), cell(row.anew), f"{row.ratio:.1f}", kept)
    return f"| {' | '.join(map(str, columns))} |"


def main() -> None:
    """Parse the options, measure, print a Markdown table and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--segmenters", nargs="+", choices=SEGMENTERS, default=list(SEGMENTERS))
    parser.add_argument("--k", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--labels", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file, for instance in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    print("| segmenter | k | bank, s | anew, s | anew / bank | MiB a reference |")
    print("|---|---|---|---|---|---|")
    rows = [row for name in arguments.segmenters for row in measure(name, arguments)]
    if arguments.out:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        report = {
            "command": "python benchmarks/memory_timing.py " + " ".join(sys.argv[1:]),
            "commit": commit.stdout.strip(),
            "machine": platform.machine(),
            "threads": arguments.threads,
            "device": arguments.device,
            "torch": torch.__version__,
            "seed": SEED,
            "labels": arguments.labels,
            "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
