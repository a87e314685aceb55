"""A site's own model against U-Nets and against reference alone, by number of labels: `--help`.

`run` trains and tests; each finished (set, labels, method, seed) is one JSON line, appended at
once, and is not run again: stop it when you like. `table` prints what is there as Markdown.
All methods get the same labelled cases, split (a fifth is kept to choose the best epoch), time, and
working size in training. `matchseg-all` learns from that fifth, too, in the second half of its
time (option `all_images` of a server); the others never do. What is done after that time (networks
on the way back to the bundled weights are measured) is in `seconds_train`. Tests are on the index's
target cases; Dice is per image, per volume in 3D. U-Nets segment at the size they were trained at,
networks by reference at their own (256).
"""

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from reference_segmentation import DataSet, read_set, true_map

from lib.evaluation.metrics import dice_by_label
from lib.imaging.io import read_image
from lib.imaging.slices import cut_labels, through_plane_axis
from lib.memory.bank import MemoryBank
from lib.models.matchseg import BundledEmbedder, MatchSegSegmenter
from lib.segmenter import Options, ReferenceEngine
from lib.settings import RefSegSettings
from lib.site.average import AveragedSegmenter
from lib.trainers.site.fitting import SCRATCH_RATE, TrainOptions, fit, refit
from lib.trainers.site.loop import SitePlan
from lib.trainers.site.packing import PackedCase, Rules, pack_cases
from lib.trainers.site.split import split
from lib.trainers.site.validation import Validator
from lib.types import IntArray, LabelledImage

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

KINDS = ("unet", "dynunet")
METHODS = ("matchseg", "matchseg-all", "matchseg-scratch", "unet", "dynunet", "refseg")
AVERAGE = "matchseg + bundled"  # their mean, as by --conf site_average true
RECIPE = {  # grows with each change; rows of earlier ones are told apart, and run anew if asked for
    "matchseg": 5,
    "matchseg-all": 7,
    "matchseg-scratch": 4,
    "refseg": 2,
}
CROSS = {"busi": ("bus_bra",), "bus_bra": ("busi",), "glas": ("dsb2018-stained",)}
PAPER = {
    ("busi", "U-Net"): None,
    ("busi", "MatchSeg"): 81.03,
    ("glas", "MatchSeg"): 90.92,
    ("busi > bus_bra", "U-Net"): 74.72,
    ("busi > bus_bra", "MatchSeg"): 78.07,
    ("bus_bra > busi", "U-Net"): 56.85,
    ("bus_bra > busi", "MatchSeg"): 59.27,
}
STAINED = 0.08  # mean difference of a picture's channels from which on it is a stained section

Predictor = Callable[[LabelledImage], IntArray]


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="Folder with index.json.")],
    sets: Annotated[
        str, typer.Option(help="Names with commas.")
    ] = "busi,glas,kvasir_seg,acdc,bus_bra",
    labels: Annotated[str, typer.Option(help="Labelled cases; 'all'.")] = "5,10,30,all",
    methods: Annotated[
        str, typer.Option(help=f"Of {', '.join(METHODS)}; a U-Net with '-plain': own augmentation.")
    ] = ",".join(METHODS),
    seeds: Annotated[int, typer.Option(help="How many, from 0.")] = 3,
    minutes: Annotated[float, typer.Option(help="Of training, for each run.")] = 10,
    steps: Annotated[int, typer.Option(help="Between two looks at the validation cases.")] = 40,
    images: Annotated[int, typer.Option(help="Slices a step.")] = 8,
    k: Annotated[int, typer.Option(help="References for each slice.")] = 16,
    targets: Annotated[int, typer.Option(help="At most so many test cases; 0: all.")] = 0,
    out: Annotated[Path, typer.Option(help="File of results, added to.")] = Path(
        "runs/matchseg.jsonl"
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: all.")] = 0,
) -> None:
    """Train and test what is not in the file of results yet."""
    if threads:
        torch.set_num_threads(threads)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {_key(row) for row in read_results(out)}
    settings = RefSegSettings(device=device, annotation="complete", k=k, segmenter="matchseg")
    for name, wanted, seed, method in _grid(data, sets, labels, methods, seeds):
        row: dict[str, Any] = {
            "set": name,
            "labels": wanted,
            "method": method,
            "seed": seed,
            "minutes": 0 if method == "refseg" else minutes,
            "k": k,
            "targets": targets,
        }
        if method in RECIPE:
            row["recipe"] = RECIPE[method]
        if _key(row) in done:
            continue
        with tempfile.TemporaryDirectory() as room:
            row |= one_run(
                data, name, wanted, method, seed, settings, Path(room), minutes, steps, images,
                targets,
            )  # fmt: skip
        row |= {"device": device, "date": time.strftime("%Y-%m-%d %H:%M")}
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({key: row[key] for key in ("set", "labels", "method", "seed", "tests")}))
        sys.stdout.flush()


def one_run(
    data: Path,
    name: str,
    wanted: str,
    method: str,
    seed: int,
    settings: RefSegSettings,
    room: Path,
    minutes: float,
    steps: int,
    images: int,
    targets: int,
) -> dict[str, Any]:
    """Train one method on one draw of labels, and test it."""
    source = read_set(data, name)
    drawn = draw(source, wanted, seed)
    start = time.monotonic()
    extra: dict[str, Any] = {}
    if method == "refseg":
        predictor = by_reference(MatchSegSegmenter.load_bundled(device=settings.device), drawn,
                                 source, settings, room)  # fmt: skip
    elif method.startswith("matchseg"):
        scratch = method == "matchseg-scratch"
        rates = {"rate": SCRATCH_RATE, "encoder_rate": SCRATCH_RATE} if scratch else {}
        plan = SitePlan(
            epochs=10**6, steps=steps, minutes=minutes, patience=0, images=images, seed=seed,
            **rates,
        )  # fmt: skip
        start_from = "scratch" if scratch else "bundled"
        options = TrainOptions(plan, start=start_from, all_images=method == "matchseg-all")
        fitted = fit(drawn, room / "fit", options, settings)
        # a server publishes it only if it is better on the images kept
        job = fitted.job
        validator = Validator(job.training, job.validation, settings, room=room)
        before = validator.measure(MatchSegSegmenter.load_bundled(device=settings.device))
        extra = {
            "epochs": fitted.end.epochs,
            "best_epoch": fitted.end.best_epoch,
            "trained_share": fitted.trained_share,
            "published": fitted.measured.gain_over(before) > 0,
            "kept": {"before": before.cases, "after": fitted.measured.cases},
        }
        weights = refit(fitted, options) if options.all_images else fitted.weights
        segmenter = MatchSegSegmenter.load(weights, device=settings.device)
        predictor = by_reference(segmenter, drawn, source, settings, room)
    else:
        from baselines import BaselinePlan, fit_baseline, predict

        kind, _, plain = method.partition("-")
        if kind not in KINDS or plain not in ("", "plain"):
            msg = f"method {method!r} is unknown; allowed are {METHODS}, and {KINDS} with -plain"
            raise typer.BadParameter(msg)
        learned, measured = _split(drawn, room / "fit", seed, settings)
        baseline = BaselinePlan(
            minutes=minutes, steps=steps, images=images, size=SitePlan().size, seed=seed,
            device=settings.device, augmentation=plain or "same",
        )  # fmt: skip
        net, done = fit_baseline(kind, learned, measured, source.names, baseline)
        extra = {"steps": done}

        def predictor(case: LabelledImage) -> IntArray:
            return predict(net, case.image_path, size=baseline.size, device=baseline.device)

    trained = time.monotonic() - start
    tests = {}
    for where in (name, *(CROSS.get(name, ()) if wanted == "all" else ())):
        cases = some(read_targets(data, where), targets)
        tests[where] = test(predictor, cases, source)
    if method in ("refseg", "matchseg", "matchseg-all") and wanted == "all" and name in CROSS:
        # What a method by reference can do that a U-Net cannot: labels of the new place, unlearned.
        segmenter = (
            MatchSegSegmenter.load_bundled(device=settings.device)
            if method == "refseg"
            else segmenter
        )
        for where in CROSS[name]:
            other = read_bank(data, where)[:10]
            here = LabelNames(source)
            local = by_reference(segmenter, here.renamed(other), source, settings, room / where)
            cases = some(read_targets(data, where), targets)
            tests[f"{where}, 10 references there"] = test(local, cases, source)
    if method == "matchseg":  # is the mean with the bundled network worth its time?
        bundled = MatchSegSegmenter.load_bundled(device=settings.device)
        both = AveragedSegmenter(segmenter, bundled)
        averaged = by_reference(both, drawn, source, settings, room / "average")
        cases = some(source.targets, targets)
        extra["tests_average"] = {name: test(averaged, cases, source)}
    return {
        **extra,
        "cases": [one.image_id for one in drawn],
        "seconds_train": round(trained, 1),
        "tests": tests,
    }


class LabelNames:
    """Another set's labels under this set's names, in the order of their values."""

    def __init__(self, source: DataSet) -> None:
        self._names = source.names

    def renamed(self, cases: Sequence[LabelledImage]) -> list[LabelledImage]:
        """The same files; the i-th value is this set's i-th name."""
        return [
            LabelledImage(
                case.image_id,
                case.image_path,
                case.label_path,
                dict(zip(sorted(case.label_names), self._names, strict=False)),
            )
            for case in cases
        ]


def by_reference(
    segmenter: MatchSegSegmenter | AveragedSegmenter,
    drawn: Sequence[LabelledImage],
    source: DataSet,
    settings: RefSegSettings,
    room: Path,
) -> Predictor:
    """The product's own path: engine and bank with the drawn cases as references."""
    own = segmenter if isinstance(segmenter, MatchSegSegmenter) else segmenter.first
    engine = ReferenceEngine(
        segmenter, BundledEmbedder(own), annotation="complete", batch=settings.batch
    )
    room.mkdir(parents=True, exist_ok=True)
    bank = MemoryBank(room / "bank", segmenter.fingerprint, engine.references_of)
    bank.sync(list(drawn))
    options = Options(k=settings.k)

    def predictor(case: LabelledImage) -> IntArray:
        image = read_image(case.image_path)
        found = engine.segment(image, bank, labels=source.names, options=options)
        places = np.array([0, *(source.names.index(name) + 1 for name in found.labels)], np.int32)
        return places[cut_labels(found.label_map, through_plane_axis(image))]

    return predictor


def test(predictor: Predictor, cases: Sequence[LabelledImage], source: DataSet) -> dict[str, Any]:
    """Mean Dice over the labels of the mean over cases, by label, and seconds a slice."""
    scores: dict[str, list[float]] = {name: [] for name in source.names}
    seconds, slices = 0.0, 0
    for case in cases:
        truth, _ = true_map(case)
        start = time.perf_counter()
        found = predictor(case)
        seconds += time.perf_counter() - start
        slices += len(truth)
        values = sorted(case.label_names)
        places = [values.index(v) + 1 for v in values[: len(source.names)]]
        truth = np.select([truth == v for v in values], range(1, len(values) + 1), 0)
        each = dice_by_label(found, truth.astype(np.int32), places)
        for name, value in zip(source.names, each, strict=False):
            scores[name].append(value)
    by_label = {name: float(np.nanmean(v)) for name, v in scores.items() if not _all_nan(v)}
    return {
        "dice": round(float(np.mean(list(by_label.values()))), 4),
        "labels": {name: round(value, 4) for name, value in by_label.items()},
        "cases": len(cases),
        "seconds_per_slice": round(seconds / max(1, slices), 3),
    }


def _all_nan(values: Sequence[float]) -> bool:
    return bool(np.all(np.isnan(values))) if values else True


def draw(source: DataSet, wanted: str, seed: int) -> list[LabelledImage]:
    """The first `wanted` cases of a seeded order: more labels contain the fewer."""
    order = np.random.default_rng(seed).permutation(len(source.bank))
    count = len(source.bank) if wanted == "all" else int(wanted)
    return [source.bank[i] for i in order[:count]]


def _split(
    drawn: Sequence[LabelledImage], room: Path, seed: int, settings: RefSegSettings
) -> tuple[list[PackedCase], list[PackedCase]]:
    """The very split that `fit` makes of these cases: to learn from, and to measure on."""
    rules = Rules(settings.annotation, settings.window, settings.axis_index)
    cases = pack_cases(drawn, room / "cases", rules)
    chosen = split(cases, share=TrainOptions().share, seed=seed)
    return [cases[i] for i in chosen.training], [cases[i] for i in chosen.validation]


def read_targets(data: Path, name: str) -> list[LabelledImage]:
    """The test cases of a set; `-stained` keeps stained sections alone."""
    base, _, part = name.partition("-")
    return [c for c in read_set(data, base).targets if not part or is_stained(c.image_path)]


def read_bank(data: Path, name: str) -> list[LabelledImage]:
    """The labelled cases of a set, as `read_targets`."""
    base, _, part = name.partition("-")
    return [c for c in read_set(data, base).bank if not part or is_stained(c.image_path)]


def is_stained(path: Path) -> bool:
    """Whether a picture has the colors of a stained section."""
    pixels = np.asarray(Image.open(path).convert("RGB"), np.float32) / 255
    return float((pixels.max(-1) - pixels.min(-1)).mean()) > STAINED


def some(cases: Sequence[LabelledImage], count: int) -> list[LabelledImage]:
    """At most so many, evenly spread; 0: all."""
    if not count or len(cases) <= count:
        return list(cases)
    return [cases[int((n + 0.5) * len(cases) / count)] for n in range(count)]


def _grid(
    data: Path, sets: str, labels: str, methods: str, seeds: int
) -> Iterator[tuple[str, str, int, str]]:
    """Seed by seed, so that a stopped run has all methods for the first seeds."""
    for seed in range(seeds):
        for name in sets.split(","):
            total = len(read_set(data, name).bank)
            for wanted in labels.split(","):
                if wanted != "all" and int(wanted) >= total:
                    continue
                for method in methods.split(","):
                    yield name, wanted, seed, method


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    fields = ("set", "labels", "method", "seed", "minutes", "k", "targets")
    return (*(row[field] for field in fields), row.get("recipe", 1))


def read_results(path: Path) -> list[dict[str, Any]]:
    """All whole lines; one that a kill cut short is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"a broken line of {path} is passed over", file=sys.stderr)
    return rows


@app.command()
def table(
    results: Annotated[list[Path], typer.Argument(help="Files of results.")],
) -> None:
    """Print mean and spread over seeds as Markdown: own test cases, then other places'."""
    print("\n".join(lines([row for path in results for row in read_results(path)])))


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table: a row for each test set, number of labels, and minutes of training."""
    figures, earlier = _newest(rows)
    methods = list(dict.fromkeys(method for _, method in figures))
    trained = {one for one, method in figures if not method.startswith("refseg")}
    text = [
        "| set | labels | minutes | " + " | ".join(methods) + " | own model - best U-Net |",
        "|---|---|---|" + "---|" * (len(methods) + 1),
    ]
    for one in sorted(trained, key=Line.order):
        cells = [
            _cell(figures.get((one, method), []), earlier=(one, method) in earlier)
            for method in methods
        ]
        text.append(
            f"| {one.what} | {one.labels} | {one.minutes:g} | "
            + " | ".join(cells)
            + f" | {_lead(figures, one)} |"
        )
    text.append("\nDice in %, mean ± standard deviation over seeds (number of seeds in brackets).")
    if earlier:
        text.append("† By an earlier recipe, not run again since.")
    trainings = [row for row in rows if "kept" in row and row["method"] == "matchseg-all"]
    refused = [_refused(row, rows) for row in trainings if not row["published"]]
    if trainings:
        text.append(
            f"Of {len(trainings)} `matchseg-all` refused for what the images kept showed: "
            f"{len(refused)} (points above reference alone: {'; '.join(refused) or '-'})."
        )
    told = [f"{what}: {method} {value}" for (what, method), value in PAPER.items() if value]
    text.append(
        f"MatchSeg's paper (arXiv 2403.15901), on larger sets of its own split: {'; '.join(told)}."
    )
    return text


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    what: str
    labels: str
    minutes: float

    def order(self) -> tuple[bool, str, int, float]:
        """Own test cases first; by set, labels and time."""
        number = 10**6 if self.labels == "all" else int(self.labels)
        return ">" in self.what, self.what, number, self.minutes


def _newest(
    rows: Sequence[dict[str, Any]],
) -> tuple[dict[tuple[Line, str], list[float]], set[tuple[Line, str]]]:
    """Dice in % by line and method, of the latest recipe there; which of these is not today's."""
    found: dict[tuple[Line, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    spent = sorted({row["minutes"] for row in rows if row["minutes"]})
    for row in rows:
        # what is not trained stands beside every time that others were given
        for minutes in [row["minutes"]] if row["minutes"] else spent:
            for tests, column in (("tests", row["method"]), ("tests_average", AVERAGE)):
                if column == AVERAGE and row["method"] != "matchseg":
                    continue
                for where, told in row.get(tests, {}).items():
                    key = Line(_what(row, where), row["labels"], minutes), column
                    found[key][row.get("recipe") or 0].append(100 * told["dice"])
    now = {**RECIPE, AVERAGE: RECIPE["matchseg"]}
    earlier = {key for key, by_recipe in found.items() if max(by_recipe) < now.get(key[1], 0)}
    return {key: by_recipe[max(by_recipe)] for key, by_recipe in found.items()}, earlier


def _what(row: dict[str, Any], where: str) -> str:
    """Where it was tested, and on how many cases where these are not all."""
    some_of = f", {row['targets']} cases" if row["targets"] else ""
    return (row["set"] if where == row["set"] else f"{row['set']} > {where}") + some_of


def _refused(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    same = ("set", "labels", "seed", "targets")
    told = f"{row['set']} {row['labels']}, seed {row['seed']}"
    for other in rows:
        if other["method"] == "refseg" and all(other[key] == row[key] for key in same):
            gain = row["tests"][row["set"]]["dice"] - other["tests"][row["set"]]["dice"]
            return f"{told}: {100 * gain:+.1f}"
    return told


def _cell(values: Sequence[float], *, earlier: bool) -> str:
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread} ({len(values)}){' †' * earlier}"


def _lead(figures: dict[tuple[Line, str], list[float]], one: Line) -> str:
    own = figures.get((one, "matchseg"))
    nets = [
        float(np.mean(values))
        for (where, method), values in figures.items()
        if where == one and method.split("-")[0] in KINDS
    ]
    return f"{np.mean(own) - max(nets):+.1f}" if own and nets else ""


if __name__ == "__main__":
    app()
