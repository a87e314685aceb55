"""The command line's `embed`: embeddings of a large pool ahead of time, by many at once."""

import time
from pathlib import Path
from typing import Annotated

import typer

from apps.refseg.cli import (
    AsJson,
    BankRoot,
    Conf,
    Studies,
    _bar,
    _runtime,
    _settings,
    _tell,
    app,
    err,
    reported,
)


@app.command("embed")
@reported
def embed(
    studies: Studies,
    workers: Annotated[int, typer.Option(help="Processes on this machine.", min=1)] = 1,
    address: Annotated[
        str,
        typer.Option(help="Of a Dask scheduler, such as tcp://head:8786: its workers do it."),
    ] = "",
    bank: BankRoot = None,
    conf: Conf = None,
    as_json: AsJson = False,
) -> None:
    """Embed all images for the strategies. Stop it whenever you like: it goes on where it was."""
    from lib.embedding import embed_by_dask, embed_here, embed_in_processes, require_dask
    from lib.strategies.board import read_board
    from lib.studies.datastore import StudiesDatastore

    if address:
        require_dask()
    runtime = _runtime(_settings(conf, bank=bank), studies)
    copies = runtime.folder / "copies"
    store = StudiesDatastore(str(studies.resolve()), copies=copies, watch=False)
    paths = read_board(store, runtime.settings.tags).paths
    todo = {name: paths[name] for name in runtime.pool.unembedded(paths)}
    start = time.perf_counter()
    if address:
        found = embed_by_dask(runtime.settings, todo, address)
    elif workers > 1:
        found = embed_in_processes(runtime.settings, todo, workers)
    else:
        found = embed_here(runtime, todo)
    failed: dict[str, str] = {}
    done = 0
    with _bar("embedding", len(todo)) as advance:
        for row in found if todo else ():
            if row.vectors is None:
                failed[row.image_id] = row.error
            else:
                try:
                    path = Path(paths[row.image_id])
                    runtime.pool.keep(row.image_id, path, row.vectors, row.numbers)
                    done += 1
                except OSError as error:
                    failed[row.image_id] = str(error)
            advance()
    seconds = time.perf_counter() - start
    for name, reason in failed.items():
        err.print(f"{name}: {reason}", highlight=False, markup=False)
    told = {
        "images": len(paths),
        "embedded before": len(paths) - len(todo),
        "embedded now": done,
        "failed": failed,
        "seconds": round(seconds, 1),
    }
    _tell(told, [{"what": key, "value": str(value)} for key, value in told.items()], as_json)
    if failed:
        raise typer.Exit(1)
