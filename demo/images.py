"""Makes the demo's two studies from picture files that come inside packages of the registry.

Nuclei: one real fluorescence picture (Data Science Bowl 2018, CC0; inside `stardist`), cut into
nine. Brains: the real average brain ICBM 152 2009 (inside `nilearn`), turned into six patients:
each is bent and scaled at random, has its own contrast, bias field and noise, thick slices, and its
own orientation in the file. Nothing is downloaded here.
"""

import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from demo.study import Study

FloatVolume = npt.NDArray[np.float32]

TILES_A_SIDE = 3
SPACING_MM = (1.8, 1.8, 7.0)
# Half the box that is imaged, in mm, around the template's middle.
HALF_BOX_MM = (76.0, 94.0, 70.0)
ORIENTATIONS = ("RAS", "LPS", "LAS", "RPI", "LPI", "RAI")
TISSUES = {1: "white matter", 2: "grey matter", 3: "ventricles"}


def package_file(package: str, inside: str) -> Path:
    """Find a file of an installed package without importing it."""
    try:
        path = Path(str(distribution(package).locate_file(inside)))
    except PackageNotFoundError:
        path = Path(inside)
    if not path.is_file():
        msg = f"{inside} of the package {package} is not installed. `make demo` installs it."
        raise SystemExit(msg)
    return path


def fresh_folder(root: Path, name: str) -> tuple[Path, Path]:
    """Empty folders for a study's images and for its truth."""
    shutil.rmtree(root / name, ignore_errors=True)
    images, truth = root / name / "studies", root / name / "truth"
    images.mkdir(parents=True)
    truth.mkdir()
    return images, truth


def nuclei(root: Path) -> Study:
    """Nine pictures of cell nuclei, cut from one field of view, 8-bit grey PNG."""
    images, truth_folder = fresh_folder(root, "nuclei")
    inside = "stardist/data/images"
    with Image.open(package_file("stardist", f"{inside}/img2d.tif")) as picture:
        pixels = np.asarray(picture, np.float32)
    with Image.open(package_file("stardist", f"{inside}/mask2d.tif")) as picture:
        mask = np.asarray(picture) > 0
    grey = (255 * np.clip(pixels / np.percentile(pixels, 99.5), 0, 1)).astype(np.uint8)
    edges = np.linspace(0, len(grey), TILES_A_SIDE + 1).astype(int)
    truth = {}
    for row in range(TILES_A_SIDE):
        for column in range(TILES_A_SIDE):
            tile = (slice(*edges[row : row + 2]), slice(*edges[column : column + 2]))
            image_id = f"nuclei_{row + 1}{column + 1}"
            truth[image_id] = truth_folder / f"{image_id}.png"
            Image.fromarray(grey[tile]).save(images / f"{image_id}.png")
            Image.fromarray(mask[tile].astype(np.uint8)).save(truth[image_id])
    return Study(
        name="nuclei",
        about="nine pieces of a real fluorescence picture (Data Science Bowl 2018, CC0)",
        folder=images,
        truth=truth,
        label_names={1: "nucleus"},
        rounds=(1, 2, 4),
        suffix=".png",
    )


def brains(root: Path, seed: int = 0) -> Study:
    """Six patients made of the real average brain, int16 NIfTI, each in another orientation."""
    images, truth_folder = fresh_folder(root, "brains")
    t1, tissues, middle = template()
    rng = np.random.default_rng(seed)
    truth = {}
    for number, codes in enumerate(ORIENTATIONS, start=1):
        points, affine = patient_points(rng)
        where = points + middle[:, None, None, None]
        grey = ndimage.map_coordinates(t1, where, order=1)
        labels = ndimage.map_coordinates(tissues, where, order=0)
        image_id = f"brain_{number}"
        truth[image_id] = truth_folder / f"{image_id}.nii.gz"
        scanned = scan(grey, rng)
        save_oriented(scanned, affine, codes, images / f"{image_id}.nii.gz")
        save_oriented(labels.astype(np.uint8), affine, codes, truth[image_id])
    return Study(
        name="brains",
        about="six simulated patients: the real average brain ICBM 152, bent, with noise and bias",
        folder=images,
        truth=truth,
        label_names=TISSUES,
        rounds=(1, 2, 3),
        suffix=".nii.gz",
    )


def template() -> tuple[FloatVolume, npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """The average brain: T1 in 0..1 blurred as by thick slices, tissues, and its middle voxel.

    Voxels are 1 mm and the file's axes run to Right, Anterior, Superior, so that a place in mm from
    the middle is a place in voxels.
    """
    inside = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
    parts = []
    for part in ("t1", "gm", "wm"):
        path = package_file("nilearn", inside.format(part))
        voxels = np.asanyarray(nib.Nifti1Image.from_filename(path).dataobj)
        parts.append(voxels.astype(np.float32) / 255)
    t1, gm, wm = parts
    brain = ndimage.binary_fill_holes(t1 > 0)
    fluid = np.clip(1 - gm - wm, 0, 1) * brain
    inner = ndimage.distance_transform_edt(brain) > 14  # fluid nearer to the skull is not ventricle
    tissues = np.zeros(t1.shape, np.uint8)
    tissues[wm > np.maximum(gm, fluid)] = 1
    tissues[(gm >= wm) & (gm > fluid)] = 2
    tissues[(fluid >= np.maximum(gm, wm)) & inner] = 3
    tissues[~brain] = 0
    blurred = ndimage.gaussian_filter(t1, (0.6, 0.6, 2.0))
    return blurred, tissues, (np.array(t1.shape) - 1) / 2


def patient_points(
    rng: np.random.Generator,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Where each voxel of a new patient lies in the template, in mm from its middle.

    Returns:
        Points (3, I, J, K), and the affine of the patient's grid with axes to R, A, S.
    """
    spacing, half = np.array(SPACING_MM), np.array(HALF_BOX_MM)
    axes = [np.arange(-h, h + 1e-6, s) for h, s in zip(half, spacing, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    turn = np.eye(3)
    for axis in range(3):
        angle = np.deg2rad(rng.uniform(-7, 7))
        i, j = [other for other in range(3) if other != axis]
        rotation = np.eye(3)
        rotation[[i, j], [i, j]] = np.cos(angle)
        rotation[i, j], rotation[j, i] = -np.sin(angle), np.sin(angle)
        turn = turn @ rotation
    size = rng.uniform(0.93, 1.12, (3, 1, 1, 1))
    points = np.einsum("ab,bijk->aijk", turn, grid) * size
    points += np.stack([smooth_field(rng, grid.shape[1:], 4.0) for _ in range(3)])
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [axis[0] for axis in axes]
    return points, affine


def smooth_field(rng: np.random.Generator, shape: tuple[int, ...], size: float) -> FloatVolume:
    """A random field of the given standard deviation that changes over a few centimeters."""
    coarse = rng.normal(0, size, (6, 7, 5))
    factors = [wanted / have for wanted, have in zip(shape, coarse.shape, strict=True)]
    field: FloatVolume = ndimage.zoom(coarse, factors, order=3).astype(np.float32)
    return field


def scan(grey: FloatVolume, rng: np.random.Generator) -> npt.NDArray[np.int16]:
    """Give a patient its own contrast, coil sensitivity and noise."""
    curve = np.clip(grey, 0, 1) ** rng.uniform(0.8, 1.4)
    sensitivity = np.exp(smooth_field(rng, grey.shape, 0.12))
    noise = rng.normal(0, 0.025, (2, *grey.shape))
    magnitude = np.hypot(curve * sensitivity + noise[0], noise[1])
    scaled: npt.NDArray[np.int16] = (magnitude * rng.uniform(500, 1500)).astype(np.int16)
    return scaled


def save_oriented(
    voxels: npt.NDArray[np.generic], affine: npt.NDArray[np.float64], codes: str, path: Path
) -> None:
    """Write a volume whose axes run to R, A, S with its axes to `codes` instead."""
    volume = nib.Nifti1Image(voxels, affine)
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
    )
    nib.save(volume.as_reoriented(turn), path)
