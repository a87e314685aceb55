"""The command line's `simulate`: how many labels will do, replayed on a folder that has them."""

import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from filelock import FileLock, Timeout
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from apps.refseg.cli import AsJson, Conf, _runtime, _settings, _tell, app, err, reported
from lib.errors import RequestError
from lib.settings import RefSegSettings

if TYPE_CHECKING:  # it brings torch along, which `--help` does without
    from lib.types import LabelledImage

SHOWN = 20  # images of a dry run


@app.command("simulate")
@reported
def simulate(
    studies: Annotated[Path, typer.Option(help="Folder whose images are all labelled.")],
    labels: Annotated[
        str, typer.Option(help="Folder of the labels, in the studies folder or anywhere.")
    ] = "labels/final",
    strategy: Annotated[
        str, typer.Option(help="Rankings to compare, comma-separated.")
    ] = "refseg,coverage,random",
    budget: Annotated[
        str, typer.Option(help="Numbers of labelled images, comma-separated.")
    ] = "1,2,5,10,20,50",
    seeds: Annotated[int, typer.Option(help="Repetitions of each strategy.", min=1)] = 10,
    part: Annotated[
        float,
        typer.Option(
            help="Share of the images that each repetition may label, drawn anew; 1: all.",
            min=0.1,
            max=1.0,
        ),
    ] = 0.85,
    task: Annotated[str, typer.Option(help="What segments; there is `refseg`.")] = "refseg",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; default: campaigns/NAME.")
    ] = None,
    limit_targets: Annotated[
        int, typer.Option(help="Score so many images, drawn once; 0: all.", min=0)
    ] = 0,
    limit_slices: Annotated[
        int, typer.Option(help="Score so many slices of a volume, evenly spread; 0: all.", min=0)
    ] = 0,
    wish: Annotated[str, typer.Option(help="Dice to forecast.")] = "0.8,0.9",
    tolerance: Annotated[float, typer.Option(help="Of the surface Dice, in mm.", min=0.0)] = 2.0,
    dry: Annotated[
        bool, typer.Option("--dry", help="No labels needed: the order proposed, and a map.")
    ] = False,
    conf: Conf = None,
    as_json: AsJson = False,
) -> None:
    """Replay an annotation campaign: Dice by number of labels, and how many the next one needs."""
    if task != "refseg":
        msg = f"task {task!r} is unknown; there is refseg."
        raise RequestError(msg)
    settings = _settings(conf)
    folder = out or Path("campaigns") / studies.resolve().name
    names, budgets = _words(strategy), _numbers(budget, int, "budget")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock").acquire(timeout=0):
            if dry:
                _survey(settings, studies, labels, names[0], budgets, folder, as_json)
                return
            _campaign(
                settings,
                studies,
                labels,
                folder,
                names=names,
                budgets=budgets,
                seeds=seeds,
                part=part,
                limit_targets=limit_targets,
                limit_slices=limit_slices,
                wishes=_numbers(wish, float, "wish"),
                tolerance=tolerance,
                as_json=as_json,
            )
    except Timeout:
        msg = f"another simulation is at work in {folder}; wait for it, or name another --out."
        raise RequestError(msg) from None


def _campaign(
    settings: RefSegSettings,
    studies: Path,
    labels: str,
    folder: Path,
    *,
    names: list[str],
    budgets: list[int],
    seeds: int,
    part: float,
    limit_targets: int,
    limit_slices: int,
    wishes: list[float],
    tolerance: float,
    as_json: bool,
) -> None:
    from lib.campaign.journal import Journal
    from lib.campaign.plan import Plan, check_budgets, check_strategies, draw_targets, source_of
    from lib.campaign.replay import CampaignRuntime, Replay
    from lib.campaign.report import Facts, write_csv, write_html, write_json
    from lib.campaign.run import play, seconds_at_most, steps
    from lib.campaign.summary import summarize

    start = time.perf_counter()
    chosen = check_strategies(names)
    runtime = CampaignRuntime(settings, work=folder / "work", studies=str(studies.resolve()))
    labelled = _labelled_in(_store(studies, runtime.folder / "copies"), studies, labels)
    check_budgets(budgets, len(labelled), part)
    replay = Replay(runtime, labelled, slices=limit_slices)
    with _progress("encoding", len(labelled)) as advance:
        pool = replay.prepare(lambda: advance(1))
    for image_id, reason in replay.failed:
        err.print(f"left out: {image_id}: {reason}", highlight=False, markup=False)
    fitting = check_budgets(budgets, len(replay.labelled), part)
    if len(fitting) < len(set(budgets)):
        msg = f"{len(replay.labelled)} images, of which a repetition may label --part {part:g}: "
        err.print(f"{msg}the budgets are {', '.join(map(str, fitting))}")
    targets = draw_targets(list(replay.labelled), limit_targets)
    plan = Plan(
        strategies=chosen,
        budgets=fitting,
        seeds=seeds,
        targets=targets,
        labels=replay.names,
        slices=limit_slices,
        part=part,
        tolerance_mm=tolerance,
        source=source_of(
            list(replay.labelled.values()), runtime.fingerprint, repr(runtime.options)
        ),
    )
    journal = Journal(folder / "campaign.jsonl", plan.protocol)
    hours = seconds_at_most(plan, replay, journal) / 3600
    if hours > 1:
        err.print(
            f"this takes {hours:.0f} hours at most; --limit-targets, --limit-slices or fewer "
            "--seeds make it shorter, and it may be stopped and gone on with at any time"
        )
    with _progress("campaigns", steps(plan)) as advance:
        play(plan, replay, pool, journal, advance=advance)
    mine = {
        place: outcome
        for place, outcome in journal.outcomes.items()
        if place[0] in plan.strategies and place[1] < plan.seeds and place[2] in plan.budgets
    }
    summaries = summarize(plan, mine, wishes)
    facts = Facts(
        studies=studies.resolve().name,
        images=len(replay.labelled),
        command=shlex.join(["python", "apps/refseg/main.py", *sys.argv[1:]]),
        networks=" and ".join(runtime.names()),
        options=(
            ("references for each slice", str(settings.k)),
            ("at most of one case", str(settings.cap_per_case or "no limit")),
            ("annotation", settings.annotation),
            ("network", runtime.fingerprint),
        ),
        seconds=time.perf_counter() - start,
        peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        date=time.strftime("%Y-%m-%d"),
        failed=replay.failed,
    )
    write_json(folder / "campaign.json", plan, facts, summaries, mine.values())
    write_csv(folder / "campaign.csv", mine.values())
    write_html(folder / "report.html", plan, facts, summaries, mine, replay)
    rows = [
        {
            "strategy": one.strategy,
            **{f"Dice at {level.budget}": f"{level.dice.mean:.3f}" for level in one.levels},
            "area": f"{one.area.mean:.3f}",
            "less random's, points": f"{100 * one.gain.mean:+.1f}" if one.gain else "",
        }
        for one in summaries
    ]
    if as_json:
        sys.stdout.write((folder / "campaign.json").read_text(encoding="utf-8"))
    else:
        _tell(rows, rows, False)
        for one in summaries[0].forecasts:
            text = f"{summaries[0].strategy}, Dice {one.wish:g}: {one.verdict}"
            err.print(text, highlight=False, markup=False)
        err.print(f"{folder / 'report.html'}", highlight=False, markup=False)


def _survey(
    settings: RefSegSettings,
    studies: Path,
    labels: str,
    strategy: str,
    budgets: list[int],
    folder: Path,
    as_json: bool,
) -> None:
    from lib.campaign.atlas import survey
    from lib.campaign.plan import check_strategies
    from lib.campaign.pool_page import write_atlas
    from lib.studies.datastore import image_paths

    check_strategies([strategy])
    runtime = _runtime(settings, studies)
    store = _store(studies, runtime.folder / "copies")
    paths = image_paths(store)
    if not paths:
        msg = f"{studies} holds no images."
        raise RequestError(msg)
    labelled = {one.image_id for one in _labelled_in(store, studies, labels, none=True)}
    embedded: set[str] = set()
    with _progress("embedding", len(paths)) as advance:
        for image_id, path in paths.items():
            embedded |= runtime.pool.advance({image_id: path}, seconds=0)  # one at least
            advance(1)
    count = max(budgets) if budgets else SHOWN
    atlas = survey(runtime.pool.view(embedded), labelled, strategy, min(count, len(paths)))
    write_atlas(
        folder,
        atlas,
        paths,
        studies=studies.resolve().name,
        strategy=strategy,
        networks=" and ".join(runtime.names()),
        settings=settings,
    )
    rows = [
        {
            "place": place,
            "image": proposal.image_id,
            "why": proposal.reason,
            "slices": ", ".join(map(str, proposal.slices)),
        }
        for place, proposal in enumerate(atlas.order, start=1)
    ]
    if as_json:
        sys.stdout.write((folder / "pool.json").read_text(encoding="utf-8"))
    else:
        _tell(rows, rows, False)
        err.print(f"{folder / 'pool.html'}", highlight=False, markup=False)


def _store(studies: Path, copies: Path) -> Any:
    from lib.studies.datastore import StudiesDatastore

    if not studies.is_dir():
        msg = f"Studies folder {studies} does not exist; name the one given to the server."
        raise RequestError(msg)
    return StudiesDatastore(str(studies.resolve()), copies=copies, watch=False)


def _labelled_in(
    store: Any, studies: Path, labels: str, *, none: bool = False
) -> "list[LabelledImage]":
    """Labelled images: by the datastore's tag, or by file names where the folder is elsewhere."""
    from lib.studies.datastore import image_paths, labelled_images
    from lib.types import LabelledImage

    folder = (studies / labels).resolve()
    if folder.parent == (studies / "labels").resolve():
        found: list[LabelledImage] = labelled_images(store, (folder.name,))
    else:
        files = sorted(folder.glob("*")) if folder.is_dir() else []
        found = [
            LabelledImage(image_id, path, file)
            for image_id, path in image_paths(store).items()
            for file in [f for f in files if f.name.startswith(f"{image_id}.")][:1]
        ]
    if len(found) < 2 and not none:
        msg = f"{len(found)} images of {studies} have a label in {labels}; a campaign needs two or "
        msg += "more. For a folder without labels there is --dry."
        raise RequestError(msg)
    return found


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn(what),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("· left"),
        TimeRemainingColumn(),
    )
    # minutes can lie between two steps: the estimate must look back far enough
    with Progress(*columns, console=err, speed_estimate_period=1800) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str, kind: Callable[[str], Any], name: str) -> list[Any]:
    try:
        return [kind(word) for word in _words(text)]
    except ValueError:
        msg = f"--{name} {text!r} is not numbers with commas between them."
        raise RequestError(msg) from None
