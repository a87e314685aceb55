"""How well the confidence foretells Dice, and how soon a review meets the bad masks.

    python benchmarks/confidence.py ../shared/data --sets busi,kvasir_seg --labels 20 --targets 40

Of each set so many images of its bank are labelled, drawn by a seed; the calibration leaves them
out in turn, as the product does; then every target is segmented by them, and the confidence is
compared with the true Dice on the slices looked at. Told are Spearman's rank correlation of all
masks of a set, and that of the product of similarity, presence and quality (what was told before),
the mean error, and the share of bad masks (Dice below one half) among the fifth that `review` puts
first. Every sample goes to --out, so that the fit can be studied without segmenting again.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.reference_segmentation import read_set
from lib.confidence.calibration import Calibration, Sample
from lib.confidence.evidence import Evidence
from lib.reviewing.reviewer import Reviewer
from lib.runtime import Runtime
from lib.settings import RefSegSettings

BAD = 0.5
BINS = 5


def as_row(sample: Sample, **more: Any) -> dict[str, Any]:
    """JSON without NaN."""
    signs = {**sample.evidence.signs(), "area": sample.evidence.area}
    facts = {"label": sample.label, "dice": sample.dice, "present": sample.present}
    return {**facts, "signs": signs, **more}


def as_sample(row: dict[str, Any]) -> Sample:
    """The other way round."""
    return Sample(row["label"], Evidence(**row["signs"]), row["dice"], row.get("present", True))


def measure(data: Path, name: str, labels: int, targets: int, seed: int) -> dict[str, Any]:
    """Calibrate on some images of a set's bank, and segment some of its targets."""
    one = read_set(data, name)
    generator = np.random.default_rng(seed)

    def draw(cases: Any, count: int) -> list[Any]:
        chosen = generator.choice(len(cases), min(count, len(cases)), replace=False)
        return [cases[number] for number in sorted(chosen)]

    labelled, wanted = draw(one.bank, labels), draw(one.targets, targets)
    with tempfile.TemporaryDirectory() as folder:
        settings = RefSegSettings(
            segmenter="matchseg", annotation="complete", bank=Path(folder), device="cpu"
        )
        runtime = Runtime(settings, bank_root=Path(folder), studies=name)
        runtime.sync(lambda: labelled)
        reviewer = Reviewer(runtime)
        start = time.perf_counter()
        calibration = reviewer.calibrate(labelled)
        calibrated = time.perf_counter()
        by_id = {case.image_id: case for case in labelled}
        rows = []
        for case in wanted:
            for sample in reviewer.leave_out(case, by_id):
                rows.append(as_row(sample, image=case.image_id))
        seconds = (calibrated - start, time.perf_counter() - calibrated)
    return {
        "set": name,
        "labelled": len(labelled),
        "targets": len(wanted),
        "seed": seed,
        "samples": [as_row(sample) for sample in calibration.samples],
        "rows": rows,
        "seconds_to_calibrate": round(seconds[0], 1),
        "seconds_a_target": round(seconds[1] / max(1, len(wanted)), 2),
    }


def judge(found: dict[str, Any]) -> dict[str, Any]:
    """Figures of one set, from what was measured."""
    calibration = Calibration([as_sample(row) for row in found["samples"]])
    # only masks that somebody would look at: found, or missing where the truth shows the label
    rows = [row for row in found["rows"] if row["signs"]["area"] or row["dice"] == 0]
    told = np.array([trust(calibration, row) for row in rows])
    true = np.array([row["dice"] for row in rows])
    before = np.array(
        [
            np.prod([row["signs"].get(n, 0.0) for n in ("similarity", "presence", "quality")])
            for row in rows
        ]
    )
    first = np.argsort(told, kind="stable")[: max(1, round(len(told) / 5))]
    bad = true < BAD
    edges = np.quantile(told, np.linspace(0, 1, BINS + 1))
    place = np.clip(np.searchsorted(edges, told, side="right") - 1, 0, BINS - 1)
    return {
        "set": found["set"],
        "labelled": found["labelled"],
        "masks": len(rows),
        "spearman": rank(told, true),
        "spearman_before": rank(before, true),
        "mean_error": round(float(np.abs(told - true).mean()), 3),
        "bias": round(float((told - true).mean()), 3),
        "bad": int(bad.sum()),
        "bad_in_first_fifth": round(float(bad[first].sum() / bad.sum()), 3) if bad.any() else None,
        "bad_share_of_first_fifth": round(float(bad[first].mean()), 3),
        "reliability": [
            [round(float(told[place == b].mean()), 3), round(float(true[place == b].mean()), 3)]
            for b in range(BINS)
            if (place == b).any()
        ],
        "spearman_of_each_sign": {
            sign: rank(np.array([row["signs"].get(sign, 0.0) for row in rows]), true)
            for sign in sorted({sign for row in rows for sign in row["signs"]} - {"area"})
        },
    }


def trust(calibration: Calibration, row: dict[str, Any]) -> float:
    """Expected Dice of a mask."""
    sample = as_sample(row)
    return calibration.confidence(sample.label, sample.evidence)


def rank(one: Any, other: Any) -> float | None:
    """Spearman's correlation; None where one of them does not vary."""
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return round(float(spearmanr(one, other).statistic), 3)


def draw_plot(figures: list[dict[str, Any]], path: Path) -> None:
    """Expected against true Dice, in fifths of each set's masks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 5))
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1)
    for row in figures:
        points = np.array(row["reliability"])
        name = f"{row['set']} (n = {row['masks']}, rank correlation {row['spearman']})"
        axes.plot(points[:, 0], points[:, 1], marker="o", label=name)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="expected Dice", ylabel="true Dice (mean of a fifth)")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def lines(measured: list[dict[str, Any]]) -> list[str]:
    """The table: a row for each set."""
    found = [
        "| set | labelled | masks | Spearman | similarity x presence x quality alone | mean error "
        "| bad masks | of them in the first fifth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in map(judge, measured):
        first = row["bad_in_first_fifth"]
        found.append(
            f"| {row['set']} | {row['labelled']} | {row['masks']} | {row['spearman']} | "
            f"{row['spearman_before']} | {row['mean_error']} (bias {row['bias']}) | {row['bad']} | "
            f"{'–' if first is None else first} |"
        )
    return found


def main(
    data: Path,
    sets: Annotated[str, typer.Option(help="Names, comma-separated.")] = "busi",
    labels: Annotated[int, typer.Option(help="Labelled images.")] = 20,
    targets: Annotated[int, typer.Option(help="Images to segment.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON of all samples.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of the reliability plot.")] = None,
    again: Annotated[
        Path | None, typer.Option(help="Judge the samples of this JSON, segment nothing.")
    ] = None,
) -> None:
    """Print one line for each set."""
    if again is not None:
        measured = json.loads(again.read_text())["sets"]
    else:
        measured = []
        for name in sets.split(","):
            measured.append(measure(data, name, labels, targets, seed))
            if out is not None:
                commit = subprocess.run(
                    ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
                ).stdout.strip()
                out.write_text(json.dumps({"commit": commit, "sets": measured}) + "\n")
    figures = [judge(found) for found in measured]
    print("\n".join(lines(measured)))
    for row in figures:
        print(json.dumps({k: row[k] for k in ("set", "reliability", "spearman_of_each_sign")}))
    if plot is not None:
        draw_plot(figures, plot)


if __name__ == "__main__":
    typer.run(main)
