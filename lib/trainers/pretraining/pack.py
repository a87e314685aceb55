"""Packs folders of labelled images into one small file to train from, and reads it back.

A pack is a ZIP of PNG files, `<set>/<split>/<case>[@slice].image.png` and `.label.png`, with an
`index.json` beside them: it travels in one piece, opens without unpacking, and each picture is
decoded only when it is drawn.
"""

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from lib.imaging.io import read_image, read_label_map
from lib.imaging.slices import cut, cut_labels, through_plane_axis

UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PackedSet:
    """One data set in a pack: label values and, per split, the names of its pictures."""

    name: str
    labels: tuple[int, ...]
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def pack(data: Path, target: Path, *, longest: int = 320, slices_per_volume: int = 6) -> list[str]:
    """Pack every set of `data/index.json` that may be trained on; returns their names.

    The index's `bank` cases become the split "train", its `targets` are held out. Volumes give
    `slices_per_volume` labelled slices, evenly spread. Pictures are shrunk to `longest` pixels.
    """
    index = json.loads((data / "index.json").read_text(encoding="utf-8"))
    sets: dict[str, dict[str, list[str] | list[int]]] = {}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, entry in sorted(index.items()):
            if not entry["train_ok"]:
                continue
            sets[name] = {
                "labels": sorted(int(v) for v in entry["labels"]),
                "train": [],
                "held_out": [],
            }
            for split, cases in (("train", entry["bank"]), ("held_out", entry["targets"])):
                for case in cases:
                    for key, picture, labels in _pictures(data / name, case, slices_per_volume):
                        stem = f"{name}/{split}/{key}"
                        archive.writestr(
                            f"{stem}.image.png",
                            _png(_shrink(picture, longest, Image.Resampling.BOX)),
                        )
                        archive.writestr(
                            f"{stem}.label.png",
                            _png(_shrink(labels, longest, Image.Resampling.NEAREST)),
                        )
                        sets[name][split].append(key)  # type: ignore[arg-type]
        archive.writestr("index.json", json.dumps(sets))
    return list(sets)


def _pictures(folder: Path, case: str, limit: int) -> list[tuple[str, UInt8Array, UInt8Array]]:
    image_path = next(p for p in sorted(folder.glob(f"{case}.*")) if p.is_file())
    label_path = next(p for p in sorted((folder / "labels" / "final").glob(f"{case}.*")))
    image = read_image(image_path)
    axis = through_plane_axis(image)
    pictures = cut(image, axis)
    labels = cut_labels(read_label_map(label_path, image), axis)
    kept = [i for i in range(len(labels)) if len(labels) == 1 or labels[i].any()]
    if len(kept) > limit:
        kept = [kept[round(i)] for i in np.linspace(0, len(kept) - 1, limit)]
    return [
        (
            case if len(labels) == 1 else f"{case}@{i}",
            (np.asarray(pictures[i]) * 255).round().astype(np.uint8),
            labels[i].astype(np.uint8),
        )
        for i in kept
    ]


def _shrink(picture: UInt8Array, longest: int, filter_: Image.Resampling) -> UInt8Array:
    scale = longest / max(picture.shape[:2])
    if scale >= 1:
        return picture
    size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
    return np.asarray(Image.fromarray(picture).resize(size, filter_))


def _png(picture: UInt8Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


class Pack:
    """Reads a pack; pictures are decoded on demand."""

    def __init__(self, path: Path):
        self._archive = zipfile.ZipFile(path)
        raw = json.loads(self._archive.read("index.json"))
        self.sets = tuple(
            PackedSet(name, tuple(e["labels"]), tuple(e["train"]), tuple(e["held_out"]))
            for name, e in sorted(raw.items())
        )

    def read(self, name: str, split: str, key: str) -> tuple[UInt8Array, UInt8Array]:
        """Picture (H, W) or (H, W, 3) and label map (H, W), both uint8."""
        stem = f"{name}/{split}/{key}"
        picture = np.asarray(Image.open(io.BytesIO(self._archive.read(f"{stem}.image.png"))))
        labels = np.asarray(Image.open(io.BytesIO(self._archive.read(f"{stem}.label.png"))))
        return picture, labels
