"""What a dry run leaves behind: pool.json, pool.csv and pool.html."""

import csv
import io
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from lib.campaign.atlas import Atlas, chart
from lib.campaign.report import THUMBNAIL, Thumbnail, plain, render, write
from lib.evaluation.pictures import Panel, data_address
from lib.imaging.io import read_image
from lib.imaging.slices import cut, through_plane_axis
from lib.settings import RefSegSettings


def write_atlas(
    folder: Path,
    atlas: Atlas,
    paths: Mapping[str, Path],
    *,
    studies: str,
    strategy: str,
    networks: str,
    settings: RefSegSettings,
) -> None:
    """pool.json, pool.csv and pool.html of a dry run."""
    place = {proposal.image_id: n for n, proposal in enumerate(atlas.order, start=1)}
    rows = [
        {
            "image": image_id,
            "x": float(x),
            "y": float(y),
            "labelled": image_id in atlas.labelled,
            "next": place.get(image_id),
            "far": image_id in atlas.far,
            "likeness": float(like),
        }
        for image_id, (x, y), like in zip(atlas.ids, atlas.places, atlas.likeness, strict=True)
    ]
    data = {
        "strategy": strategy,
        "explained": atlas.explained,
        "order": [asdict(proposal) for proposal in atlas.order],
        "images": rows,
    }
    write(folder / "pool.json", json.dumps(plain(data), indent=1, allow_nan=False) + "\n")
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write(folder / "pool.csv", text.getvalue())

    def thumbnail(image_id: str, reason: str) -> Thumbnail:
        image = read_image(paths[image_id])
        pictures = cut(image, through_plane_axis(image, settings.axis_index), settings.window)
        panel = Panel("", pictures[len(pictures) // 2])
        return Thumbnail(image_id, reason, data_address(panel, THUMBNAIL))

    likeness = dict(zip(atlas.ids, atlas.likeness, strict=True))
    page = render(
        "atlas.html",
        atlas=atlas,
        chart=chart(atlas),
        studies=studies,
        strategy=strategy,
        networks=networks,
        date=time.strftime("%Y-%m-%d"),
        order=[thumbnail(p.image_id, p.reason) for p in atlas.order],
        far=[thumbnail(i, f"likeness {likeness[i]:.2f}") for i in atlas.far],
    )
    write(folder / "pool.html", page)
