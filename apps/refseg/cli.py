"""RefSeg's command line, `python apps/refseg/main.py`; results on stdout, the rest on stderr."""

import functools
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from apps.refseg.doctor import FAIL, Finding, examine
from lib.errors import RefSegError, RequestError
from lib.settings import RefSegSettings, from_conf

APP_FOLDER = Path(__file__).resolve().parent

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="RefSeg without a server: weights, memory bank, segmentation of files, and what is amiss.",
    epilog="Exit codes: 0 all is well, 1 something failed, 2 the command line is wrong.",
)
weights_app = typer.Typer(no_args_is_help=True, help="Published weights (SAM 2, DINOv2, CLIP).")
bank_app = typer.Typer(no_args_is_help=True, help="The memory bank of a studies folder.")
app.add_typer(weights_app, name="weights")
app.add_typer(bank_app, name="bank")

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

Studies = Annotated[Path, typer.Option(help="Studies folder, as given to the server.")]
BankRoot = Annotated[
    Path | None, typer.Option(help="Folder of the banks; else where the server keeps them.")
]
WeightsDir = Annotated[
    Path | None, typer.Option("--weights", help="Folder of weights; else Hugging Face's cache.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")]
Conf = Annotated[
    list[str] | None, typer.Option("--conf", help="An option as NAME=VALUE; may be repeated.")
]


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors that a user can mend into one line and exit code 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (RefSegError, OSError) as error:
            err.print(Text.assemble(("error:", "bold red"), f" {error}"), highlight=False)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            err.print("stopped")
            raise typer.Exit(1) from None

    return run


@app.callback()
def _root(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is done.")] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.ERROR,
        format="%(message)s",
        handlers=[RichHandler(console=err, show_path=False)],
    )


# -- weights ----------------------------------------------------------------------------------


@weights_app.command("list")
@reported
def weights_list(weights: WeightsDir = None, as_json: AsJson = False) -> None:
    """Show the weights that RefSeg can use, and which are on this machine."""
    from lib.models.weights import list_known

    rows: list[dict[str, Any]] = [
        {
            "name": row.name,
            "use": row.use,
            "repository": f"{row.repo}@{row.revision[:12]}",
            "licence": row.licence,
            "size": row.size,
            "path": str(row.path) if row.path else None,
        }
        for row in list_known(_settings(weights=weights).weights)
    ]
    show = [{**r, "size": _bytes(r["size"]), "path": r["path"] or "not here"} for r in rows]
    _tell(rows, show, as_json)


@weights_app.command("fetch")
@reported
def weights_fetch(
    names: Annotated[list[str], typer.Argument(help="Names of `weights list`.")],
    weights: WeightsDir = None,
    as_json: AsJson = False,
) -> None:
    """Download weights at a pinned revision and check them; an interrupted one goes on."""
    from lib.models.weights import fetch

    rows = []
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as bar:
        for name in names:
            task = bar.add_task(name, total=None)

            def report(file: str, done: int, total: int, task: Any = task) -> None:
                bar.update(task, description=file, completed=done, total=total)

            path = fetch(name, _settings(weights=weights).weights, on_progress=report)
            rows.append({"name": name, "path": str(path)})
    _tell(rows, rows, as_json)


@weights_app.command("verify")
@reported
def weights_verify(
    names: Annotated[list[str] | None, typer.Argument(help="Default: all that are here.")] = None,
    weights: WeightsDir = None,
    as_json: AsJson = False,
) -> None:
    """Compare checksums; exit code 1 if a file is damaged."""
    from lib.models.weights import list_known, verify

    folder = _settings(weights=weights).weights
    chosen = names or [row.name for row in list_known(folder) if row.path]
    rows = [
        {"name": name, "file": str(check.path), "state": check.state, "compared": check.source}
        for name in chosen
        for check in verify(name, folder)
    ]
    _tell(rows, rows, as_json, nothing="no fetched weights are on this machine")
    if any(row["state"] == "damaged" for row in rows):
        raise typer.Exit(1)


# -- bank -------------------------------------------------------------------------------------


@bank_app.command("status")
@reported
def bank_status(
    studies: Studies, bank: BankRoot = None, conf: Conf = None, as_json: AsJson = False
) -> None:
    """Show what the bank holds, as it is on disk."""
    runtime = _runtime(_settings(conf, bank=bank), studies)
    status = runtime.bank.status()
    row = {
        "folder": str(runtime.bank.folder),
        "images": status.images,
        "slices": status.slices,
        "labels": {
            name: {"present": count.present, "absent": count.absent}
            for name, count in runtime.bank.labels().items()
        },
        "bytes": status.bytes,
        "generation": status.generation,
        "failed": dict(status.failed),
        "others": [str(path) for path in runtime.bank.other_fingerprints()],
    }
    labels = ", ".join(f"{n} ({c['present']}+{c['absent']})" for n, c in row["labels"].items())
    show = {**row, "bytes": _bytes(status.bytes), "labels": labels or "none"}
    _tell(row, [{"what": key, "value": str(value)} for key, value in show.items()], as_json)


@bank_app.command("rebuild")
@reported
def bank_rebuild(
    studies: Studies, bank: BankRoot = None, conf: Conf = None, as_json: AsJson = False
) -> None:
    """Encode all labelled images anew."""
    runtime = _runtime(_settings(conf, bank=bank), studies)
    labelled = _labelled(runtime, studies)
    start = time.perf_counter()
    with err.status(f"learning {len(labelled)} labelled images"):
        report = runtime.bank.rebuild(labelled)
    row = {
        "images": len(labelled),
        "slices": runtime.bank.status().slices,
        "seconds": round(time.perf_counter() - start, 1),
        "failed": dict(report.failed),
    }
    _tell(row, [{"what": key, "value": str(value)} for key, value in row.items()], as_json)
    if report.failed:
        raise typer.Exit(1)


@bank_app.command("verify")
@reported
def bank_verify(
    studies: Studies, bank: BankRoot = None, conf: Conf = None, as_json: AsJson = False
) -> None:
    """Read all files of the bank; exit code 1 if one is damaged."""
    runtime = _runtime(_settings(conf, bank=bank), studies)
    problems = runtime.bank.verify()
    show = [{"problem": problem} for problem in problems]
    _tell({"problems": problems}, show, as_json, nothing="no problems")
    if problems:
        err.print("`bank rebuild` makes all references anew.")
        raise typer.Exit(1)


# -- infer ------------------------------------------------------------------------------------


@app.command("infer")
@reported
def infer(
    path: Annotated[Path, typer.Argument(help="Image, DICOM folder, or folder of images.")],
    output: Annotated[Path, typer.Option("--out", help="Folder for the masks.")],
    studies: Annotated[
        Path | None, typer.Option(help="Studies folder whose labels are the references.")
    ] = None,
    bank: Annotated[
        Path | None,
        typer.Option(help="Folder of the banks; without --studies: a bank to use as it is."),
    ] = None,
    extension: Annotated[str, typer.Option("--format", help="Such as .nii.gz or .png.")] = "",
    labels: Annotated[str, typer.Option(help="Names to segment; default: all known.")] = "",
    conf: Conf = None,
    as_json: AsJson = False,
) -> None:
    """Segment one image or a folder of images; the value of each label is told with the result."""
    from apps.refseg.files import bank_folder, images_in, segment_file

    extra = {"labels": labels} if labels else {}
    if studies is None and bank is None:
        msg = "Where are the references? Give --studies DIR or --bank DIR."
        raise RequestError(msg)
    images = images_in(path)
    if studies is not None:
        runtime = _runtime(_settings(conf, bank=bank, **extra), studies)
        labelled, _ = runtime.sync(lambda: _labelled(runtime, studies))
    else:
        runtime = _runtime(_settings(conf, **extra), None)
        runtime.use_bank(bank_folder(Path(str(bank)), runtime.fingerprint))
        labelled = []
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    with _bar("segmenting", len(images)) as advance:
        for image in images:
            rows.append(segment_file(runtime, image, output, labelled, extension=extension))
            advance()
    show = [
        {
            "image": row["image"],
            "mask": row.get("mask") or "-",
            "labels": ", ".join(f"{value} {name}" for name, value in row["label_names"].items()),
            "seconds": row["seconds"],
            "message": row["message"],
        }
        for row in rows
    ]
    _tell(rows, show, as_json)
    if any("mask" not in row for row in rows):
        raise typer.Exit(1)


# -- doctor -----------------------------------------------------------------------------------


@app.command("doctor")
@reported
def doctor(
    studies: Annotated[Path | None, typer.Option(help="Studies folder to look at, too.")] = None,
    bank: BankRoot = None,
    conf: Conf = None,
    as_json: AsJson = False,
) -> None:
    """Look at versions, devices, weights, datastore and disk; say what to do about each."""
    findings: list[Finding] = examine(_settings(conf, bank=bank), studies, APP_FOLDER)
    rows = [finding.row() for finding in findings]
    colors = {"ok": "green", "note": "yellow", "fail": "red"}
    show = [{**row, "state": Text(row["state"], colors[row["state"]])} for row in rows]
    _tell(rows, show, as_json)
    if any(finding.state == FAIL for finding in findings):
        raise typer.Exit(1)


# -- shared -----------------------------------------------------------------------------------


def _settings(conf: Sequence[str] | None = None, **more: Any) -> RefSegSettings:
    pairs = [text.partition("=") for text in conf or ()]
    for name, sign, _ in pairs:
        if not sign:
            msg = f"--conf {name!r} is not NAME=VALUE, such as --conf k=4."
            raise RequestError(msg)
    chosen = {name: value for name, _, value in pairs}
    return from_conf({**chosen, **{k: str(v) for k, v in more.items() if v is not None}})


def _runtime(settings: RefSegSettings, studies: Path | None) -> Any:
    if studies is not None and not studies.is_dir():
        msg = f"Studies folder {studies} does not exist; name the one given to the server."
        raise RequestError(msg)
    from lib.runtime import Runtime

    root = APP_FOLDER / "model" / "bank"
    return Runtime(settings, bank_root=root, studies=str(studies.resolve() if studies else ""))


def _labelled(runtime: Any, studies: Path) -> list[Any]:
    from lib.studies.datastore import StudiesDatastore, labelled_images

    store = StudiesDatastore(str(studies.resolve()), copies=runtime.folder / "copies", watch=False)
    found: list[Any] = labelled_images(store, runtime.settings.tags)
    return found


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.completed} of {task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def _tell(data: Any, rows: Sequence[Any], as_json: bool, *, nothing: str = "nothing") -> None:
    """Write `data` as JSON, or `rows` as a table."""
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
        return
    if not rows:
        out.print(nothing)
        return
    table = Table(box=None, header_style="bold")
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        # as text: rich would take the brackets of a file's name for its markup
        table.add_row(*(v if isinstance(v, Text) else Text(str(v)) for v in row.values()))
    out.print(table)


def _bytes(size: int | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / 2**20:.1f} MB" if size >= 2**20 else f"{size / 2**10:.1f} kB"


from apps.refseg.commands import embed as _embed  # noqa: F401  registers its command
from apps.refseg.commands import labels as _labels  # noqa: F401  registers its commands
from apps.refseg.commands import models as _models  # noqa: F401  registers its commands
from apps.refseg.commands import review as _review  # noqa: F401  registers its command
from apps.refseg.commands import serve as _serve  # noqa: F401  registers its command
from apps.refseg.commands import simulate as _simulate  # noqa: F401  registers its command


def main() -> int:
    """Run the command line; the exit code comes from typer."""
    app()
    return 0
