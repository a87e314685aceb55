"""What it takes to learn how labels look: seconds of one core, and room in the bank.

50 slices of a set's bank half are labelled. Looks are learned from nothing, as after a start, and
again when one image more is labelled, which leaves much of what is known as it was. The share of a
memory that is kept for it is told beside: what a query is (`MatchSegSegmenter.remember`).

    python benchmarks/looks_timing.py --data DIR --sets kvasir_seg,acdc,chaos_mr_t2
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.reference_segmentation import draw_slices, read_set
from lib.memory.bank import MemoryBank
from lib.models.matchseg import BundledEmbedder, MatchSegSegmenter
from lib.segmenter import ReferenceEngine
from lib.types import LabelledImage, Reference

SLICES = 50
HEAD = "| set | labels | from nothing, s | after one image more, s | KiB a slice for it |"

app = typer.Typer(add_completion=False)


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder with index.json.")],
    sets: Annotated[str, typer.Option(help="Names with commas.")] = "kvasir_seg,acdc,chaos_mr_t2",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Measure; prints a Markdown table."""
    torch.set_num_threads(1)
    print(HEAD)
    print("|---|---|---|---|---|")
    for name in sets.split(","):
        segmenter = MatchSegSegmenter.load_bundled(device="cpu")
        engine = ReferenceEngine(segmenter, BundledEmbedder(segmenter), annotation="complete")
        chosen = read_set(data, name)
        keys = sorted(draw_slices(chosen.bank, SLICES, seed=seed, empty=False))
        held = set(keys)

        def encode(labelled: LabelledImage) -> Iterator[Reference]:
            return (r for r in engine.references_of(labelled) if r.key in held)  # noqa: B023

        with tempfile.TemporaryDirectory() as folder:
            bank = MemoryBank(Path(folder), segmenter.fingerprint, encode)
            used = [one for one in chosen.bank if one.image_id in {key.image_id for key in keys}]
            bank.sync([one for one in used if one.image_id != keys[0].image_id])
            nothing = seconds(engine, bank)
            bank.sync(used)
            more = seconds(engine, bank)
        plain = MatchSegSegmenter.load_bundled(device="cpu", learns_looks=False)
        kept = size(segmenter, used[0]) - size(plain, used[0])
        print(f"| {name} | {len(chosen.names)} | {nothing:.1f} | {more:.1f} | {kept / 1024:.0f} |")


def seconds(engine: ReferenceEngine, bank: MemoryBank) -> float:
    """Of one core, without those for the weight of place."""
    engine._placed(bank)
    start = time.process_time()
    engine.study(bank)
    return time.process_time() - start


def size(segmenter: MatchSegSegmenter, labelled: LabelledImage) -> int:
    """Bytes of one reference."""
    engine = ReferenceEngine(segmenter, BundledEmbedder(segmenter), annotation="complete")
    memory = next(iter(engine.references_of(labelled))).memory
    return memory.image.nbytes + memory.labels.nbytes


if __name__ == "__main__":
    app()
