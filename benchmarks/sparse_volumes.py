"""Volumes that their annotator labelled in every n-th slice: how well is the rest finished?

    python benchmarks/sparse_volumes.py --data DIR

Of each volume every n-th slice that shows a label is kept, and the last; the slices between are
segmented by the app's own path, with other labelled volumes in the bank. Beside it: the same
without what the drawn contours say of the slices between them (`lib/contours.py`), and these
contours alone, interpolated by signed distance, which is how viewers fill between slices. Dice is
on the slices between, the mean over labels, then over volumes.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
import typer
from scipy.ndimage import distance_transform_edt

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).parent)]

from reference_segmentation import DataSet, read_set, true_map

from lib import segmenter as engine_module
from lib.evaluation.metrics import dice_by_label
from lib.imaging.io import ImageVolume, read_image
from lib.imaging.slices import assemble, cut_labels
from lib.memory.bank import MemoryBank
from lib.models.matchseg import BundledEmbedder, MatchSegSegmenter
from lib.segmenter import Options, ReferenceEngine
from lib.types import FloatArray, IntArray, LabelledImage

SETS = "hippocampus_msd,acdc,chaos_mr_t2"
NOT_SHOWN = -8.0  # pixels, of a slice without the label: for the interpolation alone


def main(
    data: Annotated[Path, typer.Option(help="Folder of local datastores.")],
    sets: Annotated[str, typer.Option(help="Names with commas.")] = SETS,
    every: Annotated[str, typer.Option(help="Which slices are labelled.")] = "2,3,4,6,10",
    volumes: Annotated[int, typer.Option(help="Of each set.")] = 8,
    references: Annotated[int, typer.Option(help="Other labelled volumes in the bank.")] = 6,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Measure; prints a Markdown table."""
    torch.set_num_threads(threads)
    segmenter = MatchSegSegmenter.load_bundled(device="cpu")
    engine = ReferenceEngine(segmenter, BundledEmbedder(segmenter))
    print(
        "| set | volumes | mm between slices | every | RefSeg | without contours "
        "| contours alone | worst change by contours |\n|---|---|---|---|---|---|---|---|"
    )
    for name in sets.split(","):
        source = read_set(data, name)
        for number in map(int, every.split(",")):
            rows = []
            for target in source.targets[:volumes]:
                with tempfile.TemporaryDirectory() as folder:
                    rows += _one(engine, source, target, number, references, Path(folder))
            if rows:
                found = np.array([row[1:] for row in rows])
                mm = np.mean([row[0] for row in rows])
                change = found[:, 0] - found[:, 1]
                figures = " | ".join(f"{value:.3f}" for value in found.mean(0))
                print(f"| {name} | {len(rows)} | {mm:.1f} | {number} | {figures} "
                      f"| {change.min():+.3f} |", flush=True)  # fmt: skip


def _one(
    engine: ReferenceEngine,
    source: DataSet,
    target: LabelledImage,
    number: int,
    references: int,
    folder: Path,
) -> list[tuple[float, float, float, float]]:
    """Distance of slices, and Dice by the three ways; nothing where no slice is between."""
    truth, axis = true_map(target)
    shown = np.flatnonzero(truth.any((1, 2)))
    if not len(shown):
        return []
    own = sorted({*shown[::number].tolist(), int(shown[-1])})
    between = [i for i in range(own[0], own[-1]) if i not in own]
    if not between:
        return []
    image = read_image(target.image_path)
    label = replace(target, label_path=_sparse(truth, own, axis, image, folder / "own.nii.gz"))
    bank = MemoryBank(folder / "bank", engine.segmenter.fingerprint, engine.references_of)
    bank.sync([label, *source.bank[:references]])
    maps = []
    for contours in (True, False):
        kept = engine_module._contours
        if not contours:
            engine_module._contours = lambda *_: None
        try:
            found = engine.segment(image, bank, labels=source.names, options=Options(), own=label)
        finally:
            engine_module._contours = kept
        places = [0, *(source.values[source.names.index(name)] for name in found.labels)]
        maps.append(np.array(places, np.int32)[cut_labels(found.label_map, axis)])
    maps.append(_interpolated(truth, own, source.values))
    dices = [
        float(np.nanmean(dice_by_label(m[between], truth[between], source.values))) for m in maps
    ]
    if np.isnan(dices[0]):
        return []
    return [(image.geometry.spacing_mm[axis], *dices)]  # type: ignore[list-item]


def _sparse(truth: IntArray, own: Sequence[int], axis: int, image: ImageVolume, path: Path) -> Path:
    """The label map with these slices alone, as a file."""
    sparse = np.zeros_like(truth)
    sparse[own] = truth[own]
    nib.save(
        nib.Nifti1Image(assemble(sparse, axis).astype(np.int16), image.geometry.affine_ras), path
    )
    return path


def _interpolated(truth: IntArray, own: Sequence[int], values: Sequence[int]) -> IntArray:
    """Signed distances, linear between the own slices, where one is positive and highest."""
    found = np.zeros_like(truth)
    best = np.zeros(truth.shape)
    for value in values:
        distances = {i: _signed(truth[i] == value) for i in own}
        for low, high in pairwise(own):
            for i in range(low + 1, high):
                share = (i - low) / (high - low)
                between = distances[low] * (1 - share) + distances[high] * share
                wins = between > best[i]
                found[i][wins] = value
                best[i] = np.maximum(best[i], between)
    return found


def _signed(mask: npt.NDArray[np.bool_]) -> FloatArray:
    if not mask.any():
        return np.full(mask.shape, NOT_SHOWN, np.float32)
    inside, outside = distance_transform_edt(mask), distance_transform_edt(~mask)
    signed: FloatArray = (inside - outside).astype(np.float32)
    return signed


if __name__ == "__main__":
    typer.run(main)
