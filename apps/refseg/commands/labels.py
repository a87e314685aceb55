"""The command line's `labels`: what a label was before, and how to have it again."""

from pathlib import Path
from typing import Annotated, Any

import typer

from apps.refseg.cli import AsJson, _tell, app, reported
from lib.errors import RequestError
from lib.names import check_name

labels_app = typer.Typer(
    no_args_is_help=True, help="Versions of labels that were overwritten or deleted."
)
app.add_typer(labels_app, name="labels")

Studies = Annotated[Path, typer.Option(help="Studies folder, as given to the server.")]
Tag = Annotated[str, typer.Option(help="Kind of label: final, original, or one of your own.")]


@labels_app.command("history")
@reported
def history(
    image: Annotated[str | None, typer.Argument(help="Id of an image; default: all.")] = None,
    studies: Studies = Path(),
    tag: Tag = "final",
    as_json: AsJson = False,
) -> None:
    """List what is kept of one image's label, or which labels have something kept."""
    store = _store(studies)
    if image is None:
        rows = [
            {"image": name, "tag": kind, "versions": len(store.versions(name, kind))}
            for kind, name in store.kept_labels()
        ]
        _tell(rows, rows, as_json, nothing="no label was overwritten or deleted yet")
        return
    check_name("image", image)
    check_name("--tag", tag)
    rows = [_row(entry) for entry in store.versions(image, tag)]
    present = store.get_labels_by_image_id(image)
    if tag in present:
        info = store.get_label_info(image, tag)
        file = Path(store.get_label_uri(image, tag))
        rows.append(_fields(info.get("version", "-"), "in use", "", file, info))
    _tell(rows, rows, as_json, nothing=f"{image} has no label {tag}, and none is kept")


@labels_app.command("restore")
@reported
def restore(
    image: Annotated[str, typer.Argument(help="Id of the image.")],
    version: Annotated[int, typer.Argument(help="Number, as `labels history IMAGE` shows.")],
    studies: Studies = Path(),
    tag: Tag = "final",
    as_json: AsJson = False,
) -> None:
    """Make a version the label again; the one in use now is kept. The server may be running."""
    check_name("image", image)
    check_name("--tag", tag)
    store = _store(studies)
    if image not in store.list_images():
        msg = f"{studies} has no image {image}; a label needs its image."
        raise RequestError(msg)
    new = store.restore_label(image, tag, version)
    row = {"image": image, "tag": tag, "restored": version, "now": new}
    _tell(row, [row], as_json)


def _store(studies: Path) -> Any:
    from lib.settings import from_conf
    from lib.studies.datastore import StudiesDatastore

    if not (studies / "labels").is_dir():
        msg = f"{studies} is no studies folder: it has no labels. Give --studies DIR."
        raise RequestError(msg)
    keep = from_conf({}).history
    return StudiesDatastore(str(studies.resolve()), copies=studies, watch=False, keep=keep)


def _row(entry: Any) -> dict[str, Any]:
    return _fields(entry.version, entry.why, entry.kept, entry.file, entry.info)


def _fields(version: Any, state: str, when: str, file: Path, info: Any) -> dict[str, Any]:
    listed = info.get("label_info")
    names = [str(e.get("name")) for e in listed if isinstance(e, dict)] if listed else []
    return {
        "version": version,
        "state": state,
        "since": when,
        "bytes": file.stat().st_size,
        "client": str(info.get("client_id", "")),
        "labels": ", ".join(names),
        "file": str(file),
    }
