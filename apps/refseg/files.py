"""The command line's `infer`: which files, which bank, and one file's mask."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.durable import write_json
from lib.errors import RefSegError, RequestError
from lib.imaging.formats import ITK, NIFTI, PICTURES, WRITABLE, extension_of
from lib.imaging.io import read_image, write_label_map
from lib.imaging.volumes import is_dicom
from lib.infers.provenance import provenance_of
from lib.runtime import Runtime
from lib.segmentation import Segmentation
from lib.types import LabelledImage


def images_in(path: Path) -> list[Path]:
    """The image itself, or the images and DICOM folders of a folder, sorted."""
    if not path.exists():
        msg = f"{path} does not exist."
        raise RequestError(msg)
    if path.is_file() or _is_series(path):
        return [path]
    images = [
        entry
        for entry in sorted(path.iterdir())
        if (entry.is_dir() and _is_series(entry))
        or (entry.is_file() and extension_of(entry) in PICTURES | NIFTI | ITK)
    ]
    if not images:
        msg = f"{path} holds no images; known are {', '.join(sorted(PICTURES | NIFTI | ITK))}."
        raise RequestError(msg)
    return images


def bank_folder(root: Path, fingerprint: str) -> Path:
    """The folder above the fingerprint's, wherever in `root` it lies.

    Raises:
        RequestError: there is no bank of this fingerprint below `root`, or several.
    """
    catalogues = [root / "catalogue.sqlite", *root.glob("*/catalogue.sqlite")]
    catalogues += root.glob("*/*/catalogue.sqlite")
    folders = [path.parent for path in catalogues if path.is_file()]
    fitting = [folder for folder in folders if folder.name == fingerprint]
    if len(fitting) == 1:
        return fitting[0].resolve().parent
    if fitting:
        names = ", ".join(str(folder) for folder in fitting)
        msg = f"{root} holds several banks; name one of {names}."
        raise RequestError(msg)
    found = ", ".join(folder.name for folder in folders) or "none"
    msg = f"{root} holds no bank of {fingerprint} (found: {found}). Give --studies DIR to make it."
    raise RequestError(msg)


def segment_file(
    runtime: Runtime,
    path: Path,
    output: Path,
    labelled: Sequence[LabelledImage],
    *,
    extension: str,
) -> dict[str, Any]:
    """Segment one file and write its mask; a file that cannot be segmented is told, not raised."""
    start = time.perf_counter()
    row: dict[str, Any] = {"image": str(path), "label_names": {}, "message": ""}
    try:
        image = read_image(path)
        wanted = path.resolve()
        found = runtime.engine.segment(
            image,
            runtime.bank,
            labels=runtime.settings.labels,
            options=runtime.options,
            own=next((o for o in labelled if o.image_path.resolve() == wanted), None),
        )
        ending = extension or _ending(path, image.kind)
        name = path.name if path.is_dir() else path.name.removesuffix(extension_of(path))
        target = output / f"{name}{ending}"
        if target.resolve() == wanted:
            msg = f"The mask would overwrite {path.name}; choose another --out folder."
            raise RequestError(msg)
        write_label_map(target, found.label_map, image)
        row["mask"] = str(target)
        row["label_names"] = {name: value for value, name in enumerate(found.labels, start=1)}
        row["confidence"] = dict(found.confidence)
        row["message"] = found.message
        _write_provenance(runtime, found, target.with_name(f"{name}.provenance.json"), row)
    except (RefSegError, OSError) as error:
        row["message"] = str(error)
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def _write_provenance(
    runtime: Runtime, found: Segmentation, target: Path, row: Mapping[str, Any]
) -> None:
    references = {
        name: [
            {"image": used.key.image_id, "axis": used.key.axis, "slice": used.key.index}
            | {"similarity": round(used.similarity, 4), "slices": used.slices}
            for used in rows
        ]
        for name, rows in found.references.items()
    }
    told = {key: row[key] for key in ("image", "mask", "label_names", "confidence", "message")}
    made = provenance_of(runtime, runtime.options, found.study)
    write_json(target, {**told, **made, "references": references})


def _ending(path: Path, kind: str) -> str:
    own = "" if path.is_dir() else extension_of(path)
    if own in WRITABLE and (kind == "picture" or own not in PICTURES):
        return own
    return ".png" if kind == "picture" else ".nii.gz"


def _is_series(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return any(is_dicom(file) for file in sorted(folder.iterdir())[:3] if file.is_file())
