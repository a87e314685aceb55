"""Dice by number of references, beside copying the most similar mask: `--help` for options.

The bank holds 50 labelled slices (all there are, where fewer) of a set's bank cases, drawn with a
seed from those that show any label (`--empty`: from all); the maps are complete, so a structure
missing on a drawn slice is a negative. Every target case
is segmented through the product's own engine and bank. Dice is per volume for 3D sets and per
image for 2D ones, over the cases that show the label; intervals are 95 % bootstrap over cases.
"""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.annotation import read_annotation
from lib.evaluation.metrics import Mean, dice_by_label, false_alarm
from lib.evaluation.pictures import Panel, contact_sheet
from lib.imaging.io import read_image, read_label_map
from lib.imaging.slices import cut, cut_labels, through_plane_axis
from lib.memory.bank import MemoryBank
from lib.models.matchseg import BundledEmbedder, MatchSegSegmenter
from lib.segmenter import Options, ReferenceEngine
from lib.types import IntArray, LabelledImage, Reference, SliceKey, Study

app = typer.Typer(add_completion=False)
HEADER = (
    "| set | trained on its other half | k | Dice (95 % interval) | cases | by label "
    "| absent but found | s a slice |"
)


class AsTrained(ReferenceEngine):
    """Segments every study in the same way."""

    def study(self, bank: MemoryBank, *, wait: bool = True) -> Study:  # noqa: ARG002
        """Whatever the labels say."""
        return Study()


@dataclass(frozen=True, eq=False)
class DataSet:
    """One set of the index: its labels and its two lists of cases."""

    name: str
    values: tuple[int, ...]
    names: tuple[str, ...]
    bank: tuple[LabelledImage, ...]
    targets: tuple[LabelledImage, ...]
    trained: bool


def read_set(data: Path, name: str) -> DataSet:
    """Read one entry of `data/index.json`."""
    entry = json.loads((data / "index.json").read_text())[name]
    labels = {int(value): label for value, label in entry["labels"].items()}

    def case(key: str) -> LabelledImage:
        image = next(p for p in sorted((data / name).glob(f"{key}.*")) if p.is_file())
        label = next(iter(sorted((data / name / "labels" / "final").glob(f"{key}.*"))))
        return LabelledImage(key, image, label, labels)

    return DataSet(
        name,
        tuple(labels),
        tuple(labels.values()),
        tuple(case(k) for k in entry["bank"]),
        tuple(case(k) for k in entry["targets"]),
        bool(entry["train_ok"]),
    )


def draw_slices(
    bank: tuple[LabelledImage, ...], count: int, *, seed: int, empty: bool
) -> set[SliceKey]:
    """Draw `count` slices of the bank's cases; of those that show a label, or of all (`empty`)."""
    keys = []
    for labelled in bank:
        truth, axis = true_map(labelled)
        kept = range(len(truth)) if empty else np.flatnonzero(truth.any((1, 2))).tolist()
        keys += [SliceKey(labelled.image_id, axis, i) for i in kept]
    rng = np.random.default_rng(seed)
    picks = rng.choice(len(keys), size=min(count, len(keys)), replace=False)
    return {keys[i] for i in picks}


def true_map(labelled: LabelledImage) -> tuple[IntArray, int]:
    """The truth as (N, H, W) and the axis cut along."""
    image = read_image(labelled.image_path)
    axis = through_plane_axis(image)
    return cut_labels(read_label_map(labelled.label_path, image), axis), axis


@dataclass
class Row:
    """One line of the table."""

    set: str
    trained: bool
    k: int  # 0 is the copy floor
    labels: dict[str, dict[str, float]]
    mean: float
    low: float
    high: float
    cases: int
    false_alarms: float
    seconds_per_slice: dict[str, float]
    confidence_rank: float


def copy_floor(
    bank: MemoryBank, data: DataSet, target: LabelledImage, engine: ReferenceEngine
) -> IntArray:
    """For every slice the mask of the most similar reference, stretched to the slice."""
    image = read_image(target.image_path)
    axis = through_plane_axis(image)
    pictures = cut(image, axis)
    by_id = {b.image_id: b for b in data.bank}
    matches = [
        bank.nearest(engine.embedder.embed([picture]), 1, labels=data.names)[0][0]
        for picture in pictures
    ]
    truths = {m.key.image_id: true_map(by_id[m.key.image_id])[0] for m in matches}
    found = []
    for i, match in enumerate(matches):
        truth = truths[match.key.image_id][match.key.index].astype(np.float32)
        mask = torch.from_numpy(truth)[None, None]
        size = pictures[i].shape[:2]
        found.append(F.interpolate(mask, size=size, mode="nearest-exact")[0, 0].numpy())
    return np.stack(found).astype(np.int32)


def make_bank(
    engine: ReferenceEngine,
    data: DataSet,
    folder: Path,
    *,
    slices: int,
    seed: int,
    empty: bool = False,
) -> MemoryBank:
    """A bank of the drawn slices, through the product's own sync."""
    chosen = draw_slices(data.bank, slices, seed=seed, empty=empty)

    def encode(labelled: LabelledImage) -> Iterator[Reference]:
        return (r for r in engine.references_of(labelled) if r.key in chosen)

    bank = MemoryBank(folder, engine.segmenter.fingerprint, encode)
    used = {key.image_id for key in chosen}
    bank.sync([b for b in data.bank if b.image_id in used])
    return bank


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder with index.json.")],
    sets: Annotated[str, typer.Option(help="Names with commas; 'all'.")] = "all",
    ks: Annotated[str, typer.Option(help="Numbers of references.")] = "1,4,8,16",
    slices: Annotated[int, typer.Option(help="Labelled slices in the bank.")] = 50,
    empty: Annotated[
        bool, typer.Option("--empty", help="Draw the bank's slices from all, empty ones too.")
    ] = False,
    targets: Annotated[int, typer.Option(help="At most so many cases, drawn; 0: all.")] = 0,
    weights: Annotated[Path | None, typer.Option(help="Weights; default: the bundled.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON to write; one of the same weights keeps its other sets."),
    ] = None,
    sheets: Annotated[Path | None, typer.Option(help="Folder for contact sheets.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    as_trained: Annotated[
        bool, typer.Option("--as-trained", help="Learn nothing of the study.")
    ] = False,
) -> None:
    """Measure; prints a Markdown table."""
    torch.set_num_threads(threads)
    segmenter = (
        MatchSegSegmenter.load(weights, device=device)
        if weights
        else MatchSegSegmenter.load_bundled(device=device)
    )
    kind = AsTrained if as_trained else ReferenceEngine
    engine = kind(segmenter, BundledEmbedder(segmenter), annotation="complete")
    names = (
        sorted(json.loads((data / "index.json").read_text())) if sets == "all" else sets.split(",")
    )
    numbers = sorted(int(k) for k in ks.split(","))
    rows: list[Row] = []
    settings = {
        "segmenter": segmenter.fingerprint,
        "seed": seed,
        "slices": slices,
        "empty": empty,
        "threads": threads,
        "as_trained": as_trained,
    }
    print(HEADER)
    print("|---|---|---|---|---|---|---|---|")
    with Progress(transient=True, console=None) as progress:
        for name in names:
            chosen = read_set(data, name)
            cases = list(chosen.targets)
            if targets and len(cases) > targets:
                rng = np.random.default_rng(seed)
                cases = [cases[i] for i in sorted(rng.choice(len(cases), targets, replace=False))]
            with tempfile.TemporaryDirectory() as folder:
                bank = make_bank(
                    engine, chosen, Path(folder), slices=slices, seed=seed, empty=empty
                )
                task = progress.add_task(name, total=len(cases) * (len(numbers) + 1))
                truths = {c.image_id: true_map(c)[0] for c in cases}
                founds: dict[str, IntArray] = {}
                for k in [0, *numbers]:
                    advance = partial(progress.advance, task)
                    rows.append(measure(engine, bank, chosen, cases, truths, k, founds, advance))
                    print(line(rows[-1]), flush=True)
                if out is not None:
                    save(out, settings, rows)
                if sheets is not None:
                    sheet(
                        engine,
                        bank,
                        chosen,
                        cases,
                        truths,
                        founds,
                        numbers[-1],
                        sheets / f"{name}.png",
                    )
    fingerprint = segmenter.fingerprint
    print(f"\nPeak memory {peak_gib():.2f} GiB; {threads} threads; seed {seed}; {fingerprint}.")


def peak_gib() -> float:
    """Most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def save(out: Path, settings: dict[str, object], rows: list[Row]) -> None:
    """Write the rows; a file of the same settings keeps the sets that are not among them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    measured = {row.set for row in rows}
    kept, peak = [], peak_gib()
    if out.exists():
        earlier = json.loads(out.read_text())
        if all(earlier.get(name) == value for name, value in settings.items()):
            kept = [row for row in earlier["rows"] if row["set"] not in measured]
            peak = max(peak, earlier["peak_gib"])
    report = {
        **settings,
        "date": time.strftime("%Y-%m-%d"),
        "peak_gib": round(peak, 2),
        "rows": [*kept, *(asdict(row) for row in rows)],
    }
    beside = out.with_suffix(".part")
    beside.write_text(json.dumps(report, indent=1))
    beside.replace(out)


def measure(engine, bank, chosen, cases, truths, k, founds, advance) -> Row:  # type: ignore[no-untyped-def]
    """All cases of one set at one k; `founds` keeps what was found in each."""
    scores: dict[str, list[float]] = {label: [] for label in chosen.names}
    per_case, beliefs, alarms = [], [], []
    seconds: dict[str, float] = {}
    n_slices = 0
    for case in cases:
        truth = truths[case.image_id]
        if k == 0:
            found = copy_floor(bank, chosen, case, engine)
        else:
            image = read_image(case.image_path)
            answer = engine.segment(image, bank, labels=chosen.names, options=Options(k=k))
            values = np.array([0] + [chosen.values[chosen.names.index(n)] for n in answer.labels])
            found = values[cut_labels(answer.label_map, through_plane_axis(image))].astype(np.int32)
            for stage, spent in answer.seconds.items():
                seconds[stage] = seconds.get(stage, 0.0) + spent
            beliefs.append(float(np.mean(list(answer.confidence.values()))))
        founds[case.image_id] = found
        n_slices += len(truth)
        each = dice_by_label(found, truth, chosen.values)
        for label, value in zip(chosen.names, each, strict=True):
            scores[label].append(value)
        alarms += [a for v in chosen.values if (a := false_alarm(found, truth, v)) is not None]
        per_case.append(float(np.nanmean(each)) if not np.all(np.isnan(each)) else float("nan"))
        advance()
    by_label = {label: Mean.of(values) for label, values in scores.items()}
    means = [m.mean for m in by_label.values() if m.cases]
    spread = Mean.of(per_case)
    rank = float("nan")
    if len(beliefs) > 4:
        from scipy.stats import spearmanr

        rank = float(spearmanr(beliefs, per_case, nan_policy="omit").statistic)
    return Row(
        chosen.name,
        chosen.trained,
        k,
        {n: asdict(m) for n, m in by_label.items()},
        float(np.mean(means)),
        spread.low,
        spread.high,
        len(cases),
        float(np.mean(alarms)) if alarms else 0.0,
        {stage: spent / n_slices for stage, spent in seconds.items()},
        rank,
    )


def line(row: Row) -> str:
    """One row as Markdown."""
    by_label = ", ".join(f"{n} {m['mean']:.2f}" for n, m in row.labels.items() if m["cases"])
    what = "copy" if row.k == 0 else str(row.k)
    time_spent = "" if row.k == 0 else f"{sum(row.seconds_per_slice.values()):.2f}"
    return (
        f"| {row.set} | {'yes' if row.trained else 'no'} | {what} | "
        f"**{row.mean:.3f}** ({row.low:.2f}-{row.high:.2f}) | {row.cases} | {by_label} | "
        f"{row.false_alarms:.2f} | {time_spent} |"
    )


def sheet(engine, bank, chosen, cases, truths, founds, k, path) -> None:  # type: ignore[no-untyped-def]
    """Best, median and worst case: slice with most truth, its nearest reference, mask, truth."""
    by_id = {b.image_id: b for b in chosen.bank}
    ranked = []
    for case in cases:
        image = read_image(case.image_path)
        axis = through_plane_axis(image)
        found = founds[case.image_id]
        score = float(
            np.nanmean(
                [
                    *dice_by_label(found, truths[case.image_id], chosen.values),
                    0 if not truths[case.image_id].any() else np.nan,
                ]
            )
        )
        index = int((truths[case.image_id] > 0).sum((1, 2)).argmax())
        ranked.append((score, case, cut(image, axis)[index], found[index], index))
    ranked.sort(key=lambda r: r[0])
    lines = []
    for what, (score, case, picture, found, index) in (
        ("best", ranked[-1]),
        ("median", ranked[len(ranked) // 2]),
        ("worst", ranked[0]),
    ):
        vector = engine.embedder.embed([picture])
        panels = [
            Panel(f"{what}: {case.image_id} [{index}]", picture),
            Panel(f"RefSeg, Dice {score:.2f}", picture, found),
            Panel("truth", picture, truths[case.image_id][index]),
        ]
        for match in bank.nearest(vector, 3, labels=chosen.names)[0][:3]:
            source = by_id[match.key.image_id]
            image = read_image(source.image_path)
            labels = cut_labels(read_annotation(source, image).label_map, match.key.axis)
            panels.append(
                Panel(
                    f"{match.key.image_id} [{match.key.index}] {match.similarity:.2f}",
                    cut(image, match.key.axis)[match.key.index],
                    labels[match.key.index],
                )
            )
        lines.append(panels)
    contact_sheet(
        path, lines, title=f"{chosen.name}, k = {k}: image, found, truth, nearest references"
    )


if __name__ == "__main__":
    app()
