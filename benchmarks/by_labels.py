"""Segmentation by reference by the number of labelled slices: 1, 2, 5, 10, 20, 50.

    python benchmarks/by_labels.py --data DIR --out benchmarks/results/by_labels.jsonl

For each set, number and draw the bank's slices are drawn as by `reference_segmentation.py`; the
same target cases, drawn once, are segmented each time with sixteen references (all there are, where
fewer). A finished (set, draw, number) is one line, appended at
once and not measured again, so stop it when you like. The table is filled by `tables.py`.
"""

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from reference_segmentation import make_bank, measure, read_set, true_map

from lib.models.matchseg import BundledEmbedder, MatchSegSegmenter
from lib.segmenter import ReferenceEngine
from lib.types import IntArray, LabelledImage

K = 16
FEW, MANY = 5, 50  # the aim is told by these

app = typer.Typer(add_completion=False)


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder with index.json.")],
    out: Annotated[Path, typer.Option(help="File of results, added to.")],
    sets: Annotated[str, typer.Option(help="Names with commas.")] = "acdc,busi,chaos_mr_t2,glas",
    labels: Annotated[str, typer.Option(help="Numbers of labelled slices.")] = "1,2,5,10,20,50",
    draws: Annotated[int, typer.Option(help="Of the labelled slices, from seed 0.")] = 3,
    slices: Annotated[int, typer.Option(help="Target cases of about so many; 0: all.")] = 120,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Measure what is not in the file yet; prints the table."""
    torch.set_num_threads(threads)
    segmenter = MatchSegSegmenter.load_bundled()
    engine = ReferenceEngine(segmenter, BundledEmbedder(segmenter), annotation="complete")
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {key(row) for row in read(out)}
    for seed in range(draws):
        for name in sets.split(","):
            chosen = read_set(data, name)
            cases = some(chosen.targets, slices)
            truths = {case.image_id: true_map(case)[0] for case in cases}
            for number in (int(n) for n in labels.split(",")):
                plan = {"set": name, "draw": seed, "labels": number, "slices": slices}
                plan["segmenter"] = segmenter.fingerprint
                if key(plan) in done:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    bank = make_bank(
                        engine, chosen, Path(folder), slices=number, seed=seed, empty=False
                    )
                    founds: dict[str, IntArray] = {}
                    copied, found = (
                        measure(engine, bank, chosen, cases, truths, k, founds, lambda: None)
                        for k in (0, K)
                    )
                row = plan | {
                    "cases": len(cases),
                    "copy": copied.mean,
                    "dice": found.mean,
                    "date": time.strftime("%Y-%m-%d"),
                }
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), file=sys.stderr, flush=True)
    print("\n".join(lines(read(out))))


def some(targets: Sequence[LabelledImage], slices: int) -> list[LabelledImage]:
    """Cases in a drawn order until they have about so many slices."""
    if not slices:
        return list(targets)
    kept, count = [], 0
    for index in np.random.default_rng(0).permutation(len(targets)):
        if count >= slices:
            break
        kept.append(targets[index])
        count += len(true_map(targets[index])[0])
    return kept


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table: mean over whole draws, and their standard deviation."""
    numbers = sorted({row["labels"] for row in rows})
    whole = Counter((row["set"], row["draw"]) for row in rows)
    rows = [row for row in rows if whole[row["set"], row["draw"]] == len(numbers)]
    head = ["set", "cases", "draws", f"copy, {MANY}", *(f"{n}" for n in numbers)]
    head.append(f"of the way from copy to {MANY} with {FEW}")
    found = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in sorted({row["set"] for row in rows}):
        own = [row for row in rows if row["set"] == name]
        by_number = {n: [r for r in own if r["labels"] == n] for n in numbers}
        draws = min(len(by_number[n]) for n in numbers)
        cells = [name, str(own[0]["cases"]), str(draws)]
        means = {n: float(np.mean([r["dice"] for r in by_number[n]])) for n in numbers}
        copied = float(np.mean([r["copy"] for r in by_number[MANY]]))
        cells.append(f"{copied:.3f}")
        for n in numbers:
            values = [row["dice"] for row in by_number[n]]
            spread = f" ± {np.std(values, ddof=1):.3f}" if draws > 1 else ""
            cells.append(f"{means[n]:.3f}{spread}")
        cells.append(f"{(means[FEW] - copied) / (means[MANY] - copied):.0%}")
        found.append("| " + " | ".join(cells) + " |")
    return found


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two measurements the same."""
    return tuple(row[name] for name in ("set", "draw", "labels", "slices", "segmenter"))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results; none where it is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    app()
