"""Thin slices: what is saved, and lost, by taking those between two that agree from these.

    python benchmarks/thin_slices.py

Simulated patients with slices of 1 mm (`demo/images.py`: the real average brain ICBM 152, bent,
with noise and bias; needs `requirements-demo.txt`): two are labelled in every twelfth slice, the
others are segmented, once slice by slice and once as by default.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import nibabel as nib
import numpy as np
import torch
import typer
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import images as patients
from lib.evaluation.metrics import dice
from lib.imaging.io import read_image, read_label_map
from lib.memory.bank import MemoryBank
from lib.models.matchseg import BundledEmbedder, MatchSegSegmenter
from lib.segmenter import Options, ReferenceEngine
from lib.types import LabelledImage

LABELLED, TARGETS = 2, 2
EVERY = 12  # of the slices of a labelled volume
NAMES = {1: "white matter", 2: "grey matter", 3: "ventricles"}
TASKS = {"ventricles": {3: 1}, "whole brain": {1: 1, 2: 1, 3: 1}, "tissues": {1: 1, 2: 2, 3: 3}}


def main(
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Measure; prints a Markdown table."""
    torch.set_num_threads(threads)
    patients.SPACING_MM = (1.0, 1.0, 1.0)
    print(
        "| labels | patient | slices | of them between two | Dice, every slice | Dice, default "
        "| s, every slice | s, default |\n|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        volumes = [make(Path(folder), number, seed) for number in range(LABELLED + TARGETS)]
        for task, values in TASKS.items():
            engine_for(Path(folder) / task, task, values, volumes)


def make(folder: Path, number: int, seed: int) -> tuple[Path, Path]:
    """One patient's image and tissues as files."""
    t1, tissues, middle = patients.template()
    rng = np.random.default_rng((seed, number))
    points, affine = patients.patient_points(rng)
    where = points + middle[:, None, None, None]
    image, truth = folder / f"{number}.nii.gz", folder / f"{number}-truth.nii.gz"
    grey = patients.scan(ndimage.map_coordinates(t1, where, order=1), rng)
    patients.save_oriented(grey, affine, "RAS", image)
    drawn = ndimage.map_coordinates(tissues, where, order=0).astype(np.uint8)
    patients.save_oriented(drawn, affine, "RAS", truth)
    return image, truth


def engine_for(
    folder: Path, task: str, values: dict[int, int], volumes: list[tuple[Path, Path]]
) -> None:
    """Label the first patients for a task, segment the others both ways, print the lines."""
    folder.mkdir()
    names = {1: task} if len(set(values.values())) == 1 else NAMES
    table = np.array([0, *(values.get(tissue, 0) for tissue in NAMES)], np.uint8)
    segmenter = MatchSegSegmenter.load_bundled()
    engine = ReferenceEngine(segmenter, BundledEmbedder(segmenter))
    bank = MemoryBank(folder / "bank", engine.segmenter.fingerprint, engine.references_of)
    labelled = []
    for number, (image, truth) in enumerate(volumes[:LABELLED]):
        whole = nib.load(truth)
        drawn = table[np.asanyarray(whole.dataobj)]
        drawn[..., np.arange(drawn.shape[2]) % EVERY != EVERY // 2] = 0
        path = folder / f"{number}.nii.gz"
        nib.save(nib.Nifti1Image(drawn, whole.affine), path)
        labelled.append(LabelledImage(str(number), image, path, names))
    bank.sync(labelled)
    for number, (path, truth) in enumerate(volumes[LABELLED:]):
        image = read_image(path)
        wanted = table[read_label_map(truth, image)]
        cells = []
        for every in (True, False):
            engine.study(bank)
            start = time.perf_counter()
            found = engine.segment(
                image, bank, labels=tuple(names.values()), options=Options(every_slice=every)
            )
            spent = time.perf_counter() - start
            each = [
                dice(found.label_map == row, wanted == value)
                for row, value in enumerate(names, start=1)
            ]
            cells.append((f"{np.mean(each):.4f}", f"{spent:.0f}"))
        (before, slow), (after, fast) = cells
        print(
            f"| {task} | {number + 1} | {found.slices} | {found.between} "
            f"| {before} | {after} | {slow} | {fast} |",
            flush=True,
        )


if __name__ == "__main__":
    typer.run(main)
