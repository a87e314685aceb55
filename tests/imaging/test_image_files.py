"""Which image files are read, as what, and which are refused with a sentence."""

import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import psutil
import pytest
import SimpleITK
from PIL import Image

from lib import machine
from lib.errors import ImageError
from lib.imaging.io import read_image, write_label_map
from lib.imaging.slices import cut


def nifti(path: Path, array: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1, 1, 2, 1])), path)
    return path


def nrrd(path: Path, array: np.ndarray, *, vector: bool = False) -> Path:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array, isVector=vector), str(path))
    return path


def cut_off(path: Path) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    return path


def packed(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content))
    return path


def nifti_header(shape: tuple[int, ...], code: int = 4, bits: int = 16) -> bytes:
    """A NIfTI-1 header written by hand, since nibabel refuses to write lies."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, len(shape), *shape, *[1] * (7 - len(shape)))
    struct.pack_into("<2h", header, 70, code, bits)
    struct.pack_into("<8f", header, 76, *[1.0] * 8)
    struct.pack_into("<f", header, 108, 352.0)
    header[344:348] = b"n+1\0"
    return bytes(header)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 900, shape).astype(np.int16)


def picture(path: Path, **options: object) -> Path:
    Image.fromarray(noise(40, 50).astype(np.uint8)).save(path, **options)
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def folder(path: Path, *files: str) -> Path:
    path.mkdir()
    for name in files:
        (path / name).write_text("not an image")
    return path


def pages(path: Path) -> Path:
    first, second = (Image.fromarray(np.full((4, 5), v, np.uint8)) for v in (1, 2))
    first.save(path, save_all=True, append_images=[second])
    return path


def turned_tiff(path: Path) -> Path:
    picture(path, tiffinfo={0x112: 6})
    return path


HUGE_NRRD = (
    b"NRRD0004\ntype: short\ndimension: 3\nsizes: 100000 100000 100000\n"
    b"encoding: raw\nendian: little\n\nabc"
)
HUGE_MHA = (
    b"ObjectType = Image\nNDims = 3\nDimSize = 100000 100000 100000\n"
    b"ElementType = MET_SHORT\nElementDataFile = LOCAL\nabc"
)
LYING_NRRD = HUGE_NRRD.replace(b"100000 100000 100000", b"1000 1000 1000")

BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "absent": (lambda d: d / "a.nii.gz", "does not exist"),
    "pipe": (lambda d: pipe(d / "a.nii"), "neither a file nor a folder"),
    "text": (lambda d: written(d / "a.txt", b"hello"), "no known image"),
    "svs": (lambda d: written(d / "a.svs", b"hello"), "no known image"),
    "empty folder": (lambda d: folder(d / "a"), "no DICOM series"),
    "folder of texts": (lambda d: folder(d / "a", "b.dcm", "c.txt"), "no DICOM series"),
    "4D NIfTI": (lambda d: nifti(d / "a.nii.gz", noise(3, 4, 5, 2)), "3 x 4 x 5 x 2"),
    "5D NIfTI": (lambda d: nifti(d / "a.nii.gz", noise(3, 4, 5, 1, 3)), "3 x 4 x 5 x 1 x 3"),
    "1D NIfTI": (lambda d: nifti(d / "a.nii.gz", noise(3)), "has the shape 3"),
    "4D NRRD": (lambda d: nrrd(d / "a.nrrd", noise(2, 5, 4, 3)), "3 x 4 x 5 x 2"),
    "NRRD vectors": (lambda d: nrrd(d / "a.nrrd", noise(5, 4, 3, 2), vector=True), "2 numbers"),
    "complex": (lambda d: nifti(d / "a.nii", noise(3, 4, 5).astype(np.complex64)), "complex"),
    "all NaN": (lambda d: nifti(d / "a.nii", np.full((3, 4, 5), np.nan, np.float32)), "NaN"),
    "all Inf": (lambda d: nifti(d / "a.nii", np.full((3, 4, 5), np.inf)), "no finite number"),
    "TIFF of NaN": (
        lambda d: (
            (Image.fromarray(np.full((4, 5), np.nan, np.float32)).save(d / "a.tif")) or d / "a.tif"
        ),
        "no finite number",
    ),
    "no voxels": (lambda d: written(d / "a.nii", nifti_header((4, 0, 3))), "is empty"),
    "huge .nii": (lambda d: written(d / "a.nii", nifti_header((32000,) * 3)), "claims 32000"),
    "huge .nii.gz": (lambda d: packed(d / "a.nii.gz", nifti_header((32000,) * 3)), "claims 32000"),
    "lying .nii": (lambda d: written(d / "a.nii", nifti_header((1000,) * 3)), "claims more voxels"),
    "lying .nii.gz": (
        lambda d: packed(d / "a.nii.gz", nifti_header((1000,) * 3)),
        "claims more voxels",
    ),
    "huge NRRD": (lambda d: written(d / "a.nrrd", HUGE_NRRD), "claims 100000"),
    "lying NRRD": (lambda d: written(d / "a.nrrd", LYING_NRRD), "claims more voxels"),
    "huge MHA": (lambda d: written(d / "a.mha", HUGE_MHA), "claims 100000"),
    "NIfTI of no place": (
        lambda d: written(d / "a.nii", nifti_header((2, 2, 2))[:80] + bytes(280)),
        "cannot be read|usable place|cut off",
    ),
    "pages": (lambda d: pages(d / "a.tif"), "2 pages"),
    "APNG": (lambda d: pages(d / "a.png"), "2 pages"),
    "turned TIFF": (lambda d: turned_tiff(d / "a.tif"), "orientation tag"),
    "PNG as NIfTI": (lambda d: picture(d / "a.png").rename(d / "a.nii.gz"), "is a PNG picture"),
    "PNG without name": (lambda d: picture(d / "a.png").rename(d / "a"), "is a PNG picture"),
    "NIfTI as PNG": (
        lambda d: nifti(d / "a.nii", noise(3, 4, 5)).rename(d / "a.png"),
        "is a NIfTI volume",
    ),
    "NRRD as NIfTI": (
        lambda d: nrrd(d / "a.nrrd", noise(3, 4, 5)).rename(d / "a.nii"),
        "is a NRRD volume",
    ),
    "unpacked .nii.gz": (
        lambda d: nifti(d / "a.nii", noise(3, 4, 5)).rename(d / "a.nii.gz"),
        "not packed",
    ),
    "packed .nii": (
        lambda d: nifti(d / "a.nii.gz", noise(3, 4, 5)).rename(d / "a.nii"),
        "packed with gzip",
    ),
    "packed text": (lambda d: packed(d / "a.nii.gz", b"hello" * 100), "cannot be read"),
    **{
        f"zero bytes {e}": (lambda d, e=e: written(d / f"a{e}", b""), "0 bytes")
        for e in (".png", ".jpg", ".nii", ".nii.gz", ".nrrd", ".mha", ".dcm", ".bmp", ".tif")
    },
    **{
        f"noise {e}": (
            lambda d, e=e: written(d / f"a{e}", b"\x07" + noise(4000).tobytes()),
            "read",
        )
        for e in (".png", ".jpg", ".nii", ".nii.gz", ".nrrd", ".mha", ".dcm", ".bmp", ".tif")
    },
    **{
        f"cut off {e}": (lambda d, e=e: cut_off(nifti(d / f"a{e}", noise(30, 20, 10))), "cut off")
        for e in (".nii", ".nii.gz")
    },
    **{
        f"cut off {e}": (lambda d, e=e: cut_off(nrrd(d / f"a{e}", noise(30, 20, 10))), "cut off")
        for e in (".nrrd", ".mha")
    },
    **{
        f"cut off {e}": (lambda d, e=e: cut_off(picture(d / f"a{e}")), "cut off")
        for e in (".png", ".jpg", ".tif", ".bmp")
    },
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_image_is_refused_with_a_sentence(name, tmp_path):
    make, message = BAD[name]
    with pytest.raises(ImageError, match=message) as caught:
        read_image(make(tmp_path))
    text = str(caught.value)
    assert text.endswith(".")
    assert str(tmp_path) not in text  # folders of the server are not the client's business


def test_one_frame_of_a_4d_file_is_a_volume(tmp_path):
    array = noise(3, 4, 5, 1)
    for path in (nifti(tmp_path / "a.nii.gz", array), nrrd(tmp_path / "a.nrrd", array.T)):
        assert sorted(read_image(path).voxels.ravel()) == sorted(array.ravel())
        assert sorted(read_image(path).geometry.shape) == [3, 4, 5]


def test_single_numbers_that_are_not_finite_are_filled(tmp_path):
    array = np.arange(2.0, 26.0).reshape(2, 3, 4)
    array[0, 0, 0], array[0, 1, 0], array[1, 1, 1] = np.nan, -np.inf, np.inf
    image = read_image(nifti(tmp_path / "a.nii.gz", array))
    turned = image.voxels[::-1, ::-1, ::-1]  # the affine is RAS, so all three axes turn
    assert (turned[0, 0, 0], turned[0, 1, 0], turned[1, 1, 1]) == (3.0, 3.0, 25.0)


def test_numbers_beyond_float32_stay_finite(tmp_path):
    array = np.linspace(-1e300, 1e300, 24).reshape(2, 3, 4)
    image = read_image(nifti(tmp_path / "a.nii.gz", array))
    assert np.isfinite(image.voxels).all()
    assert all(np.isfinite(p).all() for p in cut(image, 2))


def test_scaled_nifti_integers_are_read_in_their_own_units(tmp_path):
    source = nibabel.Nifti1Image(np.zeros((2, 3, 4), np.int16), -np.diag([1, 1, 1, -1.0]))
    source.header.set_slope_inter(0.5, -1024)
    source.dataobj[:] = 100
    stored = nibabel.Nifti1Image(np.full((2, 3, 4), -974.0), source.affine, source.header)
    nibabel.save(stored, tmp_path / "a.nii")
    assert (read_image(tmp_path / "a.nii").voxels == -974).all()


@pytest.mark.parametrize("extension", [".NII.GZ", ".NII", ".NRRD", ".MHA"])
def test_extensions_may_be_in_capitals(extension, tmp_path):
    lower = tmp_path / f"a{extension.lower()}"
    (nifti if "nii" in lower.name else nrrd)(lower, noise(3, 4, 5))
    upper = lower.rename(tmp_path / f"B{extension}")
    assert sorted(read_image(upper).voxels.shape) == [3, 4, 5]


def test_a_nifti_slice_without_thickness_is_read(tmp_path):
    source = nibabel.Nifti1Image(noise(3, 4, 1), None)
    source.header.set_zooms((1.5, 1.5, 0))
    nibabel.save(source, tmp_path / "a.nii")
    image = read_image(tmp_path / "a.nii")
    assert image.geometry.shape == (3, 4, 1)
    assert len(cut(image, 2)) == 1


def test_rgb_volumes_keep_their_color(tmp_path):
    color = np.random.default_rng(0).integers(0, 255, (5, 4, 3, 3)).astype(np.uint8)
    nrrd(tmp_path / "a.nrrd", color, vector=True)
    rgb = np.zeros((3, 4, 5), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    for channel, name in enumerate("RGB"):
        rgb[name] = color[..., channel].transpose(2, 1, 0)
    nibabel.save(nibabel.Nifti1Image(rgb, np.diag([-1, -1, 1, 1])), tmp_path / "a.nii.gz")
    for name in ("a.nrrd", "a.nii.gz"):
        image = read_image(tmp_path / name)
        # ITK's default is LPS: the first two axes stay, the third turns to inferior.
        np.testing.assert_array_equal(
            image.voxels, color.transpose(2, 1, 0, 3)[:, :, ::-1].astype(np.float32)
        )
        np.testing.assert_allclose(cut(image, 2)[4], color[0] / 255, atol=1e-6)
        write_label_map(tmp_path / "m.nrrd", image.voxels[..., 0].astype(np.int32), image)


# -- DICOM ----------------------------------------------------------------------------------------


def dicom_series(where: Path, array: np.ndarray, uid: str = "1.2.3", start: int = 0) -> Path:
    """Write (K, H, W) as axial slices of 3 mm distance, 0.5 x 0.75 mm pixels, in mixed order."""
    where.mkdir(exist_ok=True)
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in np.random.default_rng(1).permutation(len(array)):
        plane = SimpleITK.GetImageFromArray(array[k][None])
        plane.SetSpacing((0.5, 0.75, 3.0))
        plane.SetOrigin((10.0, 20.0, 30.0 + 3 * k))
        for tag, value in {
            "0008|0060": "CT",
            "0020|000d": "1.2",
            "0020|000e": uid,
            "0008|0018": f"{uid}.{k + 1}",
            "0020|0013": str(k + 1),
            "0020|0032": f"10\\20\\{30 + 3 * k}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0028|1052": "-1024",
            "0028|1053": "1",
        }.items():
            plane.SetMetaData(tag, value)
        writer.SetFileName(str(where / f"{uid}-{start + 7 * k % 11}.dcm"))
        writer.Execute(plane)
    return where


def test_a_dicom_folder_is_one_volume_and_its_mask_lies_on_it(tmp_path):
    array = noise(6, 5, 4)
    image = read_image(dicom_series(tmp_path / "ct", array))
    assert image.geometry.shape == (4, 5, 6)
    assert image.geometry.spacing_mm == pytest.approx((0.5, 0.75, 3.0))
    # LPS file: the first two axes stay; the third grows to superior and is turned.
    np.testing.assert_array_equal(image.voxels[:, :, ::-1].T, array)
    mark = np.zeros((4, 5, 6), np.int32)
    mark[1, 2, 5 - 3] = 7
    write_label_map(tmp_path / "m.nrrd", mark, image)
    mask = SimpleITK.ReadImage(str(tmp_path / "m.nrrd"))
    index = mask.TransformPhysicalPointToIndex((10 + 0.5, 20 + 2 * 0.75, 30 + 3 * 3.0))
    assert mask[index] == 7
    assert mask.GetSize() == (4, 5, 6)


def test_two_series_in_a_folder_are_refused(tmp_path):
    dicom_series(tmp_path / "ct", noise(3, 5, 4))
    dicom_series(tmp_path / "ct", noise(3, 5, 4), uid="1.2.4")
    with pytest.raises(ImageError, match="holds 2 DICOM series"):
        read_image(tmp_path / "ct")


def test_slices_of_different_sizes_are_refused(tmp_path):
    dicom_series(tmp_path / "ct", noise(3, 5, 4))
    other = dicom_series(tmp_path / "other", noise(5, 6, 6))
    largest = sorted(other.iterdir())[-1]
    largest.rename(tmp_path / "ct" / "9.dcm")
    with pytest.raises(ImageError, match="cannot be read"):
        read_image(tmp_path / "ct")


@pytest.mark.parametrize("name", ["a.dcm", "IM0001", "1.2.840.17"])
def test_one_dicom_file_is_one_slice(name, tmp_path):
    array = noise(1, 5, 4)
    (source,) = dicom_series(tmp_path / "ct", array).iterdir()
    image = read_image(source.rename(tmp_path / name))
    np.testing.assert_array_equal(image.voxels[:, :, 0].T, array[0])
    assert image.kind == "volume"


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_dicom_file_that_is_cut_off_is_refused(as_folder, tmp_path):
    series = dicom_series(tmp_path / "ct", noise(3 if as_folder else 1, 64, 64))
    cut_off(sorted(series.iterdir())[0])
    with pytest.raises(ImageError, match="cut off"):
        read_image(series if as_folder else next(series.iterdir()))


def test_a_bomb_that_keeps_its_word_is_refused_before_memory_is_taken_for_it(
    tmp_path: Path,
) -> None:
    bomb, zeros = tmp_path / "a.nii.gz", gzip.compress(bytes(2**27), 9)
    with bomb.open("wb") as file:
        file.write(gzip.compress(nifti_header((2048, 1024, 1023), code=64, bits=64)))
        for _ in range(128):  # members of a gzip file follow each other
            file.write(zeros)
    assert bomb.stat().st_size < 20 * 2**20
    before = psutil.Process().memory_info().rss
    with pytest.raises(ImageError, match=r"takes 40.0 GiB of memory, and \d+.\d are free"):
        read_image(bomb)
    assert psutil.Process().memory_info().rss - before < 2**27


def test_a_container_may_take_less_than_the_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    whole = machine.free_bytes()
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 900\n")
    assert machine.free_bytes() > whole / 2
    (tmp_path / "memory.max").write_text("5000\n")
    assert machine.free_bytes() == 2000
    image = nifti(tmp_path / "a.nii", noise(20, 20, 4))
    with pytest.raises(ImageError, match="takes 0.0 GiB"):
        read_image(image)
    stat = "anon 900\ninactive_file 9000\nactive_file 90000000\n"
    (tmp_path / "memory.stat").write_text(stat)
    assert read_image(image).voxels.shape == (20, 20, 4), "what the system caches is no memory lost"
