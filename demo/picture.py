"""Draws what the demo saw: image, two of its references, RefSeg's mask, the truth."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from demo.annotator import Answer
from demo.study import Study, Voxels, read

REFERENCES = 2
# Okabe and Ito's colors, told apart by color-blind readers: blue, orange, green, ...
COLORS = ((86, 180, 233), (230, 159, 0), (0, 190, 130), (240, 228, 66), (204, 121, 167))
OPACITY = 0.5

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Row:
    """One line of the picture."""

    study: Study
    answer: Answer
    title: str


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the picture as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    columns = 3 + REFERENCES
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(2.1 * columns, 2.35 * len(rows)), squeeze=False
    )
    for line, row in zip(axes, rows, strict=True):
        for axis, (title, pixels) in zip(line, panels(row), strict=True):
            axis.imshow(pixels)
            axis.set_title(title, fontsize=7)
        for axis in line:
            axis.set_axis_off()
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def panels(row: Row) -> list[tuple[str, Pixels]]:
    """Titles and pixels of one line, as many as there are columns."""
    study, answer = row.study, row.answer
    query = load(study.image(answer.image_id))
    truth = load(study.truth[answer.image_id])
    depth = richest_slice(truth, heights_of(answer.params))
    grey = shades(query, depth)
    known = {name: value for value, name in study.label_names.items()}
    result = [(f"{row.title}: {answer.image_id}", paint(grey, truth[..., depth], {}))]
    for place in range(REFERENCES):
        result.append(reference_panel(study, answer, depth, place))
    found = paint(grey, load(answer.mask)[..., depth], answer.values, known)
    result.append((f"RefSeg, Dice {answer.mean_dice:.2f}", found))
    result.append(("truth", paint(grey, truth[..., depth], known)))
    return result


def reference_panel(study: Study, answer: Answer, depth: int, place: int) -> tuple[str, Pixels]:
    """The reference that was used at this place of the list, or an empty panel."""
    used = references_of(answer.params, depth)
    if place >= len(used):
        return "", np.full((8, 8, 3), 255, np.uint8)
    image_id, index = used[place]
    truth = load(study.truth[image_id])
    known = {name: value for value, name in study.label_names.items()}
    grey = shades(load(study.image(image_id)), index)
    where = f", slice {index}" if truth.shape[2] > 1 else ""
    return f"reference: {image_id}{where}", paint(grey, truth[..., index], known)


def references_of(params: Mapping[str, Any], depth: int) -> list[tuple[str, int]]:
    """Image and slice of the references used: those nearest in height, then the most similar.

    The answer names the references of the whole volume, the most similar ones only.
    """
    similarity: dict[tuple[str, int], float] = {}
    for rows in params["references"].values():
        for row in rows:
            place = (str(row["image"]), int(row["slice"]))
            similarity[place] = max(float(row["similarity"]), similarity.get(place, -1.0))
    return sorted(similarity, key=lambda place: (abs(place[1] - depth), -similarity[place]))


def heights_of(params: Mapping[str, Any]) -> set[int]:
    """The slices that the named references come from."""
    return {int(row["slice"]) for rows in params["references"].values() for row in rows}


def load(path: Path) -> Voxels:
    """Read a picture or a volume as (H, W, N) slices in canonical order (to L, P, I)."""
    voxels = read(path)
    if voxels.ndim == 2:
        return voxels[..., None]
    affine = nib.Nifti1Image.from_filename(path).affine
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt("LPI")
    )
    turned = nib.orientations.apply_orientation(voxels, turn)
    return np.asarray(turned).transpose(1, 0, 2)


def richest_slice(truth: Voxels, heights: Collection[int]) -> int:
    """The slice where the rarest of the labels has most pixels, at a reference's height if any."""
    values = [value for value in np.unique(truth) if value > 0]
    if not values:
        return truth.shape[2] // 2
    rarest = np.min([(truth == value).sum(axis=(0, 1)) for value in values], axis=0)
    allowed = [height for height in heights if height < truth.shape[2]] or range(truth.shape[2])
    return max(allowed, key=lambda height: (int(rarest[height]), -height))


def shades(slices: Voxels, depth: int) -> Pixels:
    """One slice as grey pixels, scaled by the volume's brightest half percent."""
    high = max(float(np.percentile(slices, 99.5)), 1e-6)
    grey = np.clip(slices[..., depth].astype(np.float32) / high, 0, 1)
    return np.repeat((255 * grey).astype(np.uint8)[..., None], 3, axis=2)


def paint(
    grey: Pixels,
    labels: Voxels,
    values: Mapping[str, int],
    order: Mapping[str, int] | None = None,
) -> Pixels:
    """Lay the labels over the picture; a name keeps its color in every panel."""
    painted = grey.astype(np.float32)
    names = list(order or values)
    for name, value in values.items():
        color = np.array(COLORS[names.index(name) % len(COLORS)] if name in names else (255, 0, 0))
        inside = labels == value
        painted[inside] = (1 - OPACITY) * painted[inside] + OPACITY * color
    return painted.astype(np.uint8)
