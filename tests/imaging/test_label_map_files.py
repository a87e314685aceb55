"""Label maps: what fits an image, what is refused, and how they are written."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from PIL import Image
from scipy import ndimage
from scipy.spatial.transform import Rotation

from lib.errors import LabelError
from lib.imaging.geometry import CANONICAL
from lib.imaging.io import ImageVolume, read_image, read_label_map, write_label_map

LPI = np.diag([-1.0, -1.0, -1.0, 1.0])  # a file on this grid is canonical as it is


def volume(tmp_path: Path, shape=(8, 9, 10), affine=LPI) -> ImageVolume:
    path = tmp_path / "image.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ones(shape, np.int16), affine), path)
    return read_image(path)


def picture(tmp_path: Path, width=7, height=5) -> ImageVolume:
    path = tmp_path / "image.png"
    Image.new("L", (width, height)).save(path)
    return read_image(path)


def label_file(tmp_path: Path, array: np.ndarray, affine=LPI) -> Path:
    path = tmp_path / "label.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def ball(affine: np.ndarray, shape: tuple[int, int, int], centre, radius: float) -> np.ndarray:
    """A ball in millimetres, drawn on any grid: 2 in one half, 1 in the other."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    point = index @ affine[:3, :3].T + affine[:3, 3]
    inside = np.linalg.norm(point - centre, axis=-1) < radius
    return (inside * np.where(point[..., 0] > centre[0], 2, 1)).astype(np.uint8)


def test_a_label_map_on_another_grid_is_looked_up_by_position(tmp_path):
    turn = Rotation.from_euler("xyz", (10, -20, 30), degrees=True).as_matrix()
    affine = nibabel.affines.from_matvec(turn @ np.diag([-1.0, 1.2, 2.0]), (30.0, -20.0, 5.0))
    image = volume(tmp_path, (30, 28, 16), affine)
    centre = (affine @ (15, 14, 8, 1))[:3]
    # A finer grid, axes swapped, cropped to the ball: what a segmentation editor may save.
    other = nibabel.affines.from_matvec(np.array([[0, 0.5, 0], [0.5, 0, 0], [0, 0, -0.5]]))
    other[:3, 3] = centre - other[:3, :3] @ (25, 25, 25)
    path = label_file(tmp_path, ball(other, (51, 51, 51), centre, 9.0), other)

    found = read_label_map(path, image)
    assert found.dtype == np.int32
    step = np.linalg.inv(other) @ image.geometry.affine_ras
    np.testing.assert_array_equal(
        found,
        ndimage.affine_transform(
            ball(other, (51, 51, 51), centre, 9.0),
            step[:3, :3],
            step[:3, 3],
            output_shape=image.geometry.shape,
            order=0,
        ),
    )
    # The same ball drawn on the image's own grid differs at its rim alone.
    expected = ball(image.geometry.affine_ras, image.geometry.shape, centre, 9.0)
    for label in (1, 2):
        ours, true = found == label, expected == label
        assert 2 * (ours & true).sum() / (ours.sum() + true.sum()) > 0.94


def test_the_same_grid_in_other_axes_is_exact(tmp_path):
    image = volume(tmp_path, (4, 5, 6), np.diag([-1.5, -2.0, -3.0, 1.0]))
    labels = np.random.default_rng(0).integers(0, 9, (4, 5, 6)).astype(np.uint8)
    stored = nibabel.Nifti1Image(labels, np.diag([-1.5, -2.0, -3.0, 1.0]))
    for axes in (("R", "A", "S"), ("S", "L", "A"), ("P", "I", "R")):
        turn = nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt(CANONICAL), nibabel.orientations.axcodes2ornt(axes)
        )
        nibabel.save(stored.as_reoriented(turn), tmp_path / "label.nii")
        np.testing.assert_array_equal(read_label_map(tmp_path / "label.nii", image), labels)


def test_an_affine_off_by_rounding_does_not_shift_a_voxel(tmp_path):
    affine = np.diag([-0.7, -0.7, -5.0, 1.0])
    image = volume(tmp_path, (40, 40, 12), affine)
    labels = np.random.default_rng(0).integers(0, 3, (40, 40, 12)).astype(np.uint8)
    off = affine.copy()
    off[:3, 3] = 0.2  # less than half a voxel
    np.testing.assert_array_equal(read_label_map(label_file(tmp_path, labels, off), image), labels)


def test_a_label_map_elsewhere_in_space_is_refused(tmp_path):
    image = volume(tmp_path)
    away = LPI.copy()
    away[:3, 3] = 500
    path = label_file(tmp_path, np.ones((8, 9, 10), np.uint8), away)
    with pytest.raises(LabelError, match="lies wholly outside"):
        read_label_map(path, image)
    # ... but an empty one says "nothing here" wherever it lies.
    path = label_file(tmp_path, np.zeros((8, 9, 10), np.uint8), away)
    assert not read_label_map(path, image).any()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, "fractions"),
        (-1.0, "holds values -1.0"),
        (65536.0, "65536"),
        (np.nan, "nan"),
        (np.inf, "inf"),
    ],
)
def test_values_that_are_no_label_numbers_are_refused(value, message, tmp_path):
    labels = np.zeros((8, 9, 10), np.float32)
    labels[1, 2, 3] = value
    with pytest.raises(LabelError, match=message):
        read_label_map(label_file(tmp_path, labels), volume(tmp_path))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
def test_whole_numbers_of_any_type_are_labels(dtype, tmp_path):
    labels = np.random.default_rng(0).integers(0, 200, (8, 9, 10)).astype(dtype)
    np.testing.assert_array_equal(
        read_label_map(label_file(tmp_path, labels), volume(tmp_path)), labels
    )


def test_rounding_errors_of_scaled_labels_are_mended(tmp_path):
    labels = np.random.default_rng(0).integers(0, 200, (8, 9, 10))
    for error in (-1e-4, 1e-4):
        path = label_file(tmp_path, np.maximum(labels + error, 0).astype(np.float32))
        np.testing.assert_array_equal(read_label_map(path, volume(tmp_path)), labels)


def test_a_damaged_or_unfit_label_file_is_a_label_error(tmp_path):
    image = volume(tmp_path)
    (tmp_path / "label.nrrd").write_bytes(b"NRRD0004\nnothing")
    with pytest.raises(LabelError, match="label map cannot be read: label.nrrd"):
        read_label_map(tmp_path / "label.nrrd", image)
    with pytest.raises(LabelError, match="does not exist"):
        read_label_map(tmp_path / "absent.nii.gz", image)
    with pytest.raises(LabelError, match="8 x 9 x 10 x 2"):
        read_label_map(label_file(tmp_path, np.zeros((8, 9, 10, 2), np.uint8)), image)
    Image.new("L", (8, 9)).save(tmp_path / "label.png")
    with pytest.raises(LabelError, match="Submit a volume"):
        read_label_map(tmp_path / "label.png", image)


# -- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", [".png", ".tif", ".bmp", ".nii.gz", ".nrrd", ".mha"])
def test_a_pictures_label_map_fits_whatever_format_the_client_sends(extension, tmp_path):
    image = picture(tmp_path)
    labels = np.arange(35, dtype=np.uint8).reshape(5, 7)  # (H, W), as the pixels stand
    path = tmp_path / f"label{extension}"
    if extension in {".png", ".tif", ".bmp"}:
        Image.fromarray(labels).save(path)
    else:  # 3D Slicer: one slice of a volume, W first
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(labels[None]), str(path))
    np.testing.assert_array_equal(read_label_map(path, image)[:, :, 0].T, labels)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5, 2), (7, 4, 1)])
def test_a_pictures_label_map_of_another_size_is_refused(shape, tmp_path):
    path = label_file(tmp_path, np.zeros(shape, np.uint8))
    with pytest.raises(LabelError, match="its image 7 x 5"):
        read_label_map(path, picture(tmp_path))


def test_label_numbers_of_a_palette_or_two_tone_picture_are_its_indices(tmp_path):
    image = picture(tmp_path)
    numbers = np.arange(35, dtype=np.uint8).reshape(5, 7)
    paletted = Image.fromarray(numbers).convert("P")
    paletted.putdata(numbers.ravel().tolist())
    paletted.putpalette(np.random.default_rng(0).integers(0, 255, 768).tolist())
    paletted.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(
        read_label_map(tmp_path / "palette.png", image)[:, :, 0].T, numbers
    )
    Image.fromarray(numbers > 9).save(tmp_path / "tone.png")
    np.testing.assert_array_equal(
        read_label_map(tmp_path / "tone.png", image)[:, :, 0].T, numbers > 9
    )
    grey = np.repeat(numbers[..., None], 3, axis=2)
    Image.fromarray(grey).save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(read_label_map(tmp_path / "rgb.png", image)[:, :, 0].T, numbers)


def test_color_and_jpeg_pictures_are_no_label_maps(tmp_path):
    image = picture(tmp_path)
    color = np.zeros((5, 7, 3), np.uint8)
    color[2, 2] = (1, 2, 3)
    Image.fromarray(color).save(tmp_path / "label.png")
    with pytest.raises(LabelError, match="color"):
        read_label_map(tmp_path / "label.png", image)
    Image.new("L", (7, 5)).save(tmp_path / "label.jpg")
    with pytest.raises(LabelError, match="JPEG"):
        read_label_map(tmp_path / "label.jpg", image)


# -- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("highest", "dtype"), [(0, np.uint8), (255, np.uint8), (256, np.uint16), (65535, np.uint16)]
)
@pytest.mark.parametrize("extension", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_the_smallest_sufficient_integer_type_is_written(extension, highest, dtype, tmp_path):
    image = volume(tmp_path)
    labels = np.zeros(image.geometry.shape, np.int32)
    labels[1, 2, 3] = highest
    path = tmp_path / f"m{extension}"
    write_label_map(path, labels, image)
    written = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
    assert written.dtype == dtype
    assert written.max() == highest
    np.testing.assert_array_equal(read_label_map(path, image), labels)


@pytest.mark.parametrize("extension", [".png", ".tif"])
def test_a_picture_with_many_labels_is_written_in_16_bits(extension, tmp_path):
    image = picture(tmp_path)
    labels = (np.arange(35, dtype=np.int32) * 1900).reshape(7, 5, 1)
    for compress in (True, False):
        write_label_map(tmp_path / f"m{extension}", labels, image, compress=compress)
        with Image.open(tmp_path / f"m{extension}") as written:
            np.testing.assert_array_equal(np.asarray(written), labels[:, :, 0].T)


def test_a_nrrd_is_raw_for_ohif_and_gzip_by_default(tmp_path):
    image = volume(tmp_path)
    labels = np.ones(image.geometry.shape, np.int32)
    write_label_map(tmp_path / "m.nrrd", labels, image, compress=False)
    header, data = (tmp_path / "m.nrrd").read_bytes().split(b"\n\n", 1)
    assert b"\nencoding: raw\n" in header
    assert b"\ntype: unsigned char\n" in header
    assert data == b"\1" * (8 * 9 * 10)
    write_label_map(tmp_path / "m.nrrd", labels, image)
    assert b"\nencoding: gzip\n" in (tmp_path / "m.nrrd").read_bytes()


def test_formats_that_cannot_hold_the_label_map_are_refused_and_leave_no_file(tmp_path):
    image = volume(tmp_path)
    labels = np.zeros(image.geometry.shape, np.int32)
    for name in ("m.png", "m.jpg", "m.mhd", "m", "m.dcm"):
        with pytest.raises(LabelError, match="cannot be written as .*nii.gz"):
            write_label_map(tmp_path / name, labels, image)
    with pytest.raises(LabelError, match="is needed"):
        write_label_map(tmp_path / "m.nii", labels[1:], image)
    with pytest.raises(LabelError, match="-1"):
        write_label_map(tmp_path / "m.nii", labels - 1, image)
    flat = picture(tmp_path)
    with pytest.raises(LabelError, match="BMP"):
        write_label_map(tmp_path / "m.bmp", np.full((7, 5, 1), 300, np.int32), flat)
    with pytest.raises(LabelError, match=r"\.png"):
        write_label_map(tmp_path / "m.jpg", np.zeros((7, 5, 1), np.int32), flat)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.nii.gz", "image.png"]


def test_a_failed_write_leaves_the_former_file_and_nothing_else(tmp_path):
    image = picture(tmp_path)
    former = np.full((7, 5, 1), 3, np.int32)
    write_label_map(tmp_path / "m.bmp", former, image)
    with pytest.raises(LabelError):
        write_label_map(tmp_path / "m.bmp", former * 100, image)
    np.testing.assert_array_equal(read_label_map(tmp_path / "m.bmp", image), former)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.png", "m.bmp"]


def test_a_full_disk_leaves_the_former_file_and_nothing_else(tmp_path):
    images = [picture(tmp_path, 300, 300), volume(tmp_path, (40, 40, 40))]
    names = [("m.png", 0), ("m.tif", 0), ("m.nii", 1), ("m.nii.gz", 1), ("m.nrrd", 1), ("m.mha", 1)]
    for name, which in names:
        image = images[which]
        write_label_map(tmp_path / name, np.ones(image.geometry.shape, np.int32), image)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    # The limit on a file's size stands in for the disk's; noise does not pack below it.
    program = f"""
import pathlib, resource, numpy as np
from lib.imaging.io import read_image, write_label_map
folder = pathlib.Path({str(tmp_path)!r})
images = [read_image(folder / name) for name in ("image.png", "image.nii.gz")]
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
for name, which in {names}:
    image = images[which]
    labels = np.random.default_rng(0).integers(0, 255, image.geometry.shape).astype(np.int32)
    for compress in (True, False):
        try:
            write_label_map(folder / name, labels, image, compress=compress)
        except OSError:
            print("refused", name, compress)
"""
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    refused = [f"refused {name} {compress}" for name, _ in names for compress in (True, False)]
    assert child.stdout.splitlines() == refused, child.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_reader_never_sees_half_a_label_map(tmp_path):
    image = volume(tmp_path, (64, 64, 20))
    path = tmp_path / "m.nrrd"
    done = threading.Event()

    def rewrite() -> None:
        for value in range(40):
            write_label_map(path, np.full(image.geometry.shape, value % 7, np.int32), image)
        done.set()

    write_label_map(path, np.zeros(image.geometry.shape, np.int32), image)
    writer = threading.Thread(target=rewrite)
    writer.start()
    reads = 0
    while not done.is_set():
        found = read_label_map(path, image)
        assert (found == found[0, 0, 0]).all()
        reads += 1
    writer.join()
    assert reads > 3


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    image = volume(tmp_path, (128, 128, 20))
    path = tmp_path / "m.nrrd"
    write_label_map(path, np.full(image.geometry.shape, 1, np.int32), image)
    program = f"""
import itertools, pathlib, numpy as np
from lib.imaging.io import read_image, write_label_map
image = read_image(pathlib.Path({str(image.path)!r}))
print("ready", flush=True)
for value in itertools.count(1):
    noise = np.random.default_rng(value).integers(0, 2, image.geometry.shape) * 2
    write_label_map(pathlib.Path({str(path)!r}), noise + value % 2, image)
"""
    for delay in (0.11, 0.23):  # a child's imports take seconds
        with subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, env={**os.environ}
        ) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(delay)
            child.send_signal(signal.SIGKILL)
        found = read_label_map(path, image)
        # All values of one map have the same remainder.
        assert len(np.unique(found % 2)) == 1
