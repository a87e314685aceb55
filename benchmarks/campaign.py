"""Strategies compared on whole sets, by `simulate`: `--help` for options.

Each set of the index is one campaign: its images are the pool, of which each repetition may label a
part that is drawn anew; 40 of them (all there are, where fewer), drawn once, are scored as long as
they are not labelled; of volumes a few slices, evenly spread. Label maps are complete. Sets and
repetitions are worked off in rounds, so that an early look has something of each; stop it and start
it again at any time. What a strategy gains is told on the images that neither it nor random has
labelled yet.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
SETS = "hippocampus_msd,busi,kvasir_seg,acdc,dsb2018,chaos_mr_t2"
STRATEGIES = "refseg,coverage,random,foreground,typiclust,probcover,kcenter,uncertainty"
STYLES = [(line, marker) for line in ("-", "--") for marker in "osv^Dx"]
ROUNDS = (1, 3, 6)  # repetitions after which the next set is turned to

app = typer.Typer(add_completion=False)


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder of local datastores.")],
    out: Annotated[Path, typer.Option(help="Folder of all results; kept between runs.")],
    sets: Annotated[str, typer.Option(help="Names with commas.")] = SETS,
    strategy: Annotated[str, typer.Option(help="Rankings with commas.")] = STRATEGIES,
    budget: Annotated[str, typer.Option(help="Numbers of labels.")] = "1,2,5,10,20,50",
    seeds: Annotated[int, typer.Option(help="Repetitions.")] = 10,
    part: Annotated[float, typer.Option(help="Share that a repetition may label.")] = 0.6,
    targets: Annotated[int, typer.Option(help="Images scored, drawn once.")] = 40,
    slices: Annotated[int, typer.Option(help="Slices scored of a volume; 0: all.")] = 3,
    table: Annotated[bool, typer.Option("--table", help="Only show what there is.")] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG of the curves.")] = None,
) -> None:
    """Measure; prints a Markdown table."""
    names = sets.split(",")
    for repetitions in sorted({*(n for n in ROUNDS if n < seeds), seeds}) if not table else ():
        for name in names:
            start = time.perf_counter()
            studies = link(data / name, out / "studies" / name)
            command = [sys.executable, str(ROOT / "apps" / "refseg" / "main.py"), "simulate"]
            command += ["--studies", str(studies), "--out", str(out / name)]
            command += ["--strategy", strategy, "--budget", budget, "--seeds", str(repetitions)]
            command += ["--part", str(part)]
            command += ["--limit-targets", str(targets), "--limit-slices", str(slices)]
            command += ["--conf", "annotation=complete"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - start
            print(f"{name}: {repetitions} repetitions after {seconds:.0f} s", file=sys.stderr)
    files = [out / name / "campaign.json" for name in names]
    print("\n".join(lines(files)))
    if plot is not None:
        draw_curves([file for file in files if file.is_file()], plot)


def link(source: Path, target: Path) -> Path:
    """A studies folder of links: MONAI Label writes a file of its own into the folder it reads."""
    (target / "labels" / "final").mkdir(parents=True, exist_ok=True)
    for part in (Path(), Path("labels", "final")):
        for file in sorted((source / part).iterdir()):
            place = target / part / file.name
            if file.is_file() and file.suffix != ".json" and not place.is_symlink():
                place.symlink_to(file.resolve())
    return target


def lines(files: list[Path]) -> list[str]:
    """The table: a row for each set and strategy."""
    found = [
        "| set | images, scored | labels | repetitions | strategy | area (95 % over seeds) "
        "| above random's, points (over seeds) | (over seeds and images) | Dice at the last |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for file in files:
        if not file.is_file():
            continue
        report = json.loads(file.read_text(encoding="utf-8"))
        plan, facts = report["plan"], report["facts"]
        for one in report["strategies"]:
            last = one["levels"][-1]
            found.append(
                f"| {file.parent.name} | {facts['images']}, {len(plan['targets'])} "
                f"| {', '.join(map(str, plan['budgets']))} | {one['seeds']} | {one['strategy']} "
                f"| {interval(one['area'], 1, '.3f')} | {interval(one['gain'], 100, '+.1f')} "
                f"| {interval(one['gain_images'], 100, '+.1f')} "
                f"| {figure(last['dice']['mean'], 1, '.3f')} |"
            )
    return found


def draw_curves(files: list[Path], path: Path) -> None:
    """Dice by number of labels, a picture for each set; bands are over repetitions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(files))
    rows = -(-len(files) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.2 * rows), squeeze=False)
    for axes, file in zip(grid.flat, files, strict=False):
        report = json.loads(file.read_text(encoding="utf-8"))
        for one, (line, marker) in zip(report["strategies"], STYLES, strict=False):
            labels = [level["budget"] for level in one["levels"]]
            dice = [level["dice"] for level in one["levels"]]
            name = f"{one['strategy']} ({one['seeds']})"
            drawn = axes.plot(labels, [d["mean"] for d in dice], line, marker=marker, label=name)
            low, high = ([d[end] for d in dice] for end in ("low", "high"))
            axes.fill_between(labels, low, high, color=drawn[0].get_color(), alpha=0.15)
        axes.set(title=file.parent.name, xscale="log", xlabel="labelled images", ylabel="Dice")
        axes.set_xticks(labels, [str(number) for number in labels], minor=False)
        axes.minorticks_off()
        axes.legend(fontsize=7, loc="lower right")
    for axes in grid.flat[len(files) :]:
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def interval(mean: dict[str, float] | None, scale: float, form: str) -> str:
    """Mean and its interval; a dash where there is none."""
    if mean is None:
        return "–"
    low, high = (figure(mean[end], scale, form) for end in ("low", "high"))
    return f"{figure(mean['mean'], scale, form)} ({low} to {high})"


def figure(value: float | None, scale: float, form: str) -> str:
    """One number; a dash where there is none."""
    return "–" if value is None else format(scale * value, form)


if __name__ == "__main__":
    app()
