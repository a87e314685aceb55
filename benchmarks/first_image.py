"""Which image teaches the others most, and whether it can be told before anything is labelled.

    python benchmarks/first_image.py --data DIR

Of each set every image in turn is the only label, and a fixed draw of the others is segmented by
it. Two ways of comparing images are asked what they foretold of that: the embedding of whole
pictures by which references are retrieved, and the regions of `lib.retrieval.regions`. Told are

- the rank correlation of likeness and Dice over the images that one could have labelled, mean over
  those segmented;
- the Dice of the image that `coverage` labels first, and the mean of its first two, less the mean
  of all images, in standard deviations of the latter; over ten parts of the images, drawn anew;
- the best of its first two, image by image, less that of two at random, in Dice points.

The sets are those that choices may be made on, none that is named as unseen elsewhere.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from campaign import link
from scipy.stats import spearmanr

from apps.refseg.commands.simulate import _labelled_in, _store
from lib.campaign.plan import draw_part, draw_targets
from lib.campaign.replay import CampaignRuntime, Replay
from lib.campaign.scoring import score_case
from lib.retrieval.herding import Herding
from lib.retrieval.poolview import PoolView
from lib.settings import RefSegSettings

SETS = "bus_bra,kidney_mr_t2,prostate_mr_t2,glomeruli,curvas_ct,"
SETS += "fetal_head_us,carotid_us,spleen_ct,aorta_ct"
PARTS, PART = 10, 0.6
RANDOM_PAIRS = 300

Array = npt.NDArray[np.float64]
app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Measured:
    """One set: Dice (M, T) of each target by each image alone; NaN of itself."""

    ids: tuple[str, ...]
    targets: tuple[str, ...]
    dice: Array
    views: Mapping[str, PoolView]


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder of local datastores.")],
    out: Annotated[Path, typer.Option(help="Folder of work and results.")] = Path("runs/first"),
    sets: Annotated[str, typer.Option(help="Names with commas.")] = SETS,
    targets: Annotated[int, typer.Option(help="Images segmented, drawn once.")] = 25,
    slices: Annotated[int, typer.Option(help="Slices of a volume; 0: all.")] = 2,
    result: Annotated[Path | None, typer.Option(help="JSON of all figures.")] = None,
) -> None:
    """Measure; prints a Markdown table. Sets that were measured before are not measured again."""
    found = {}
    for name in sets.split(","):
        kept = out / f"{name}.json"
        if not kept.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            figures = _figures(_measure(data / name, out / "work" / name, targets, slices))
            kept.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        found[name] = json.loads(kept.read_text(encoding="utf-8"))
        print(name, file=sys.stderr)
    if result is not None:
        result.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines(found)))


def _measure(source: Path, work: Path, count: int, slices: int) -> Measured:
    studies = link(source, work / "studies")
    settings = RefSegSettings(annotation="complete")
    runtime = CampaignRuntime(settings, work=work, studies=str(studies))
    labelled = _labelled_in(_store(studies, runtime.folder / "copies"), studies, "labels/final")
    replay = Replay(runtime, labelled, slices=slices)
    regions = replay.prepare(lambda: None)
    whole = PoolView.of({i: runtime.library.embeddings(i)[1] for i in regions.ids})
    targets = draw_targets(list(regions.ids), count)
    dice = np.full((len(regions), len(targets)), np.nan)
    for row, image_id in enumerate(regions.ids):
        replay.learn([image_id])
        for column, target in enumerate(targets):
            if target != image_id:
                mask, answer = replay.segment(target)
                truth = replay.case(target).truth
                score = score_case(target, mask, truth, answer.confidence, tolerance_mm=2.0)
                dice[row, column] = score.dice
    views = {"whole pictures": whole, "regions": regions}
    return Measured(regions.ids, targets, dice, views)


def _figures(one: Measured) -> dict[str, Any]:
    teach = np.nanmean(one.dice, axis=1)
    z = (teach - teach.mean()) / teach.std()
    parts = [draw_part(one.ids, PART, seed) for seed in range(PARTS)]
    row = {name: number for number, name in enumerate(one.ids)}
    rng = np.random.default_rng(0)
    pairs = [
        [row[name] for name in rng.choice(parts[n % PARTS], 2, replace=False)]
        for n in range(RANDOM_PAIRS)
    ]
    by_chance = float(np.mean([_best(one.dice, pair) for pair in pairs]))
    ways = {}
    for name, view in one.views.items():
        found = [[row[p.image_id] for p in Herding(view.part(part)).next(n=2)] for part in parts]
        ways[name] = {
            "correlation": _correlation(one, view),
            "first": float(np.mean([z[two[0]] for two in found])),
            "first_two": float(np.mean([z[two] for two in found])),
            "best_of_two": float(np.mean([_best(one.dice, two) for two in found])) - by_chance,
        }
    return {"images": len(one.ids), "dice": float(teach.mean()), "sd": float(teach.std()), **ways}


def _best(dice: Array, rows: list[int]) -> float:
    return float(np.nanmean(np.nanmax(dice[rows], axis=0)))


def _correlation(one: Measured, view: PoolView) -> float:
    """Mean over targets of Spearman's correlation of likeness and Dice over images."""
    number = {name: place for place, name in enumerate(view.ids)}
    found = []
    for column, target in enumerate(one.targets):
        place = number[target]
        own = view.vectors[view.starts[place] : view.starts[place + 1]]
        nearest = np.maximum.reduceat(own @ view.vectors.T, view.starts[:-1], axis=1)
        alike, known = nearest.mean(0), np.isfinite(one.dice[:, column])
        if known.sum() > 2:
            found.append(spearmanr(alike[known], one.dice[known, column])[0])
    return float(np.nanmean(found))


def lines(found: Mapping[str, dict[str, Any]]) -> list[str]:
    """The table: two rows for each set, and the means."""
    rows = [
        "| set | images | Dice by one label | by | correlation | first | first two | best of two |"
    ]
    rows.append("|---|---|---|---|---|---|---|---|")
    sums: dict[str, list[list[float]]] = {}
    for name, one in found.items():
        for way in ("whole pictures", "regions"):
            told = [one[way][key] for key in ("correlation", "first", "first_two", "best_of_two")]
            sums.setdefault(way, []).append(told)
            facts = f"{one['images']} | {one['dice']:.2f} ± {one['sd']:.2f}"
            rows.append(_row(name, facts, way, told))
    rows += [_row("**mean**", " | ", way, list(np.mean(all_, 0))) for way, all_ in sums.items()]
    return rows


def _row(name: str, facts: str, way: str, told: list[float]) -> str:
    correlation, first, two, best = told
    return (
        f"| {name} | {facts} | {way} | {correlation:.2f} | {first:+.2f} | {two:+.2f} "
        f"| {100 * best:+.1f} |"
    )


if __name__ == "__main__":
    app()
