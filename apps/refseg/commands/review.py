"""The command line's `review`: the masks of images without a label, the least trusted first."""

import html
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from apps.refseg.cli import (
    AsJson,
    BankRoot,
    Conf,
    Studies,
    _bar,
    _labelled,
    _runtime,
    _settings,
    _tell,
    app,
    err,
    reported,
)
from lib.durable import write_text
from lib.errors import RequestError

THUMBNAIL_ROWS = 200


@app.command("review")
@reported
def review(
    studies: Studies,
    page: Annotated[
        Path | None, typer.Option("--html", help="Write a page with thumbnails, too.")
    ] = None,
    limit: Annotated[
        int, typer.Option(help="Look at so many images, spread over the folder; 0: all.", min=0)
    ] = 0,
    bank: BankRoot = None,
    conf: Conf = None,
    as_json: AsJson = False,
) -> None:
    """List images without a label by how far their masks are to be trusted, worst first."""
    from lib.reviewing.reviewer import Reviewer
    from lib.strategies.board import read_board
    from lib.studies.datastore import StudiesDatastore

    runtime = _runtime(_settings(conf, bank=bank), studies)
    labelled, _ = runtime.sync(lambda: _labelled(runtime, studies))
    if not labelled:
        msg = f"{studies} has no labels yet; label one image first: there is nothing to judge by."
        raise RequestError(msg)
    copies = runtime.folder / "copies"
    store = StudiesDatastore(str(studies.resolve()), copies=copies, watch=False)
    board = read_board(store, runtime.settings.tags)
    ids = [name for name in board.paths if name not in board.labelled | board.flagged]
    if limit and limit < len(ids):
        ids = [ids[int((n + 0.5) * len(ids) / limit)] for n in range(limit)]
    reviewer = Reviewer(runtime)
    start = time.perf_counter()
    with _bar("leaving labels out", min(60, len(labelled))) as advance:
        calibration = reviewer.calibrate(labelled, on_image=lambda *_: advance())
    rows = []
    with _bar("looking at masks", len(ids)) as advance:
        for name in ids:
            rows.append(
                reviewer.review(
                    name,
                    board.paths[name],
                    labelled,
                    calibration,
                    thumbnail=THUMBNAIL_ROWS if page else 0,
                )
            )
            advance()
    rows.sort(key=lambda row: (row.trust, row.image_id))
    data = [
        {
            "image": row.image_id,
            "worst": row.worst,
            "confidence": dict(row.confidence),
            "areas": dict(row.areas),
            "signs": {label: dict(signs) for label, signs in row.signs.items()},
            "slice": row.picture_slice,
            "message": row.message,
        }
        for row in rows
    ]
    show = [
        {
            "image": row.image_id,
            "expected Dice": f"{row.trust:.2f}" if row.confidence else "-",
            "of": row.worst or "-",
            "all labels": ", ".join(
                f"{name} {value:.2f}{'' if row.areas[name] else ' (none found)'}"
                for name, value in sorted(row.confidence.items(), key=lambda item: item[1])
            ),
            "note": row.message,
        }
        for row in rows
    ]
    learned = f"{len(calibration.samples)} masks of {len(labelled)} labelled images left out"
    if page:
        seconds = time.perf_counter() - start
        write_text(page, _page(studies, rows, learned, seconds))
        err.print(f"wrote {page}", highlight=False)
    _tell(data, show, as_json, nothing="every image is labelled or flagged")


def _page(studies: Path, rows: Sequence[Any], learned: str, seconds: float) -> str:
    """One self-contained page."""
    figures = "\n".join(_figure(row) for row in rows)
    name = html.escape(studies.resolve().name)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Review of {name}</title>
<link rel="icon" href="data:,">
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 1rem; }}
figure {{ margin: 0; border: 1px solid #ddd; padding: .5rem; }}
img {{ width: 100%; height: 200px; object-fit: contain; background: #000; }}
figcaption {{ overflow-wrap: anywhere; }}
.bar {{ height: 6px; background: #eee; }}
.bar i {{ display: block; height: 6px; background: #0072B2; }}
.quiet {{ color: #666; }}
</style></head><body>
<h1>Review of {name}</h1>
<p class="quiet">{len(rows)} images without a label, the least trusted mask first. Expected Dice is
learned from {html.escape(learned)}; {seconds:.0f} s.</p>
<main>
{figures}
</main></body></html>
"""


def _figure(row: Any) -> str:
    picture = (
        f'<img src="{row.thumbnail}" alt="{html.escape(row.image_id)}">' if row.thumbnail else ""
    )
    others = ", ".join(
        f"{html.escape(name)} {value:.2f}" for name, value in sorted(row.confidence.items())
    )
    told = html.escape(row.message) if row.message else f"slice {row.picture_slice} · {others}"
    return (
        f"<figure>{picture}<figcaption><b>{html.escape(row.image_id)}</b><br>"
        f"expected Dice {row.trust:.2f} {html.escape(row.worst)}"
        f'<div class="bar"><i style="width:{100 * row.trust:.0f}%"></i></div>'
        f'<span class="quiet">{told}</span></figcaption></figure>'
    )
