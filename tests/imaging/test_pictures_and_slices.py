"""2D pictures as arrays, the cutting axis, and the grey of slices."""

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from lib.errors import RequestError
from lib.imaging.intensity import grey_range
from lib.imaging.io import ImageVolume, read_image
from lib.imaging.slices import assemble, cut, cut_labels, through_plane_axis

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 255, (5, 7)).astype(np.uint8)
COLOR = RNG.integers(0, 255, (5, 7, 3)).astype(np.uint8)


def saved(path: Path, picture: Image.Image, **options: object) -> ImageVolume:
    picture.save(path, **options)
    return read_image(path)


@pytest.mark.parametrize("extension", [".png", ".tif", ".tiff", ".bmp"])
@pytest.mark.parametrize("array", [GREY, COLOR], ids=["grey", "color"])
def test_a_picture_is_cut_to_itself(array, extension, tmp_path):
    image = saved(tmp_path / f"a{extension}", Image.fromarray(array))
    assert image.kind == "picture"
    assert image.geometry.shape == image.source.shape == (7, 5, 1)
    pictures = cut(image, through_plane_axis(image))
    assert len(pictures) == 1
    assert pictures[0].dtype == np.float32
    np.testing.assert_allclose(pictures[0], array / 255, atol=1e-7)


@pytest.mark.parametrize("extension", [".jpg", ".jpeg"])
def test_a_jpeg_is_read_nearly(extension, tmp_path):
    smooth = np.add.outer(np.arange(40), np.arange(56)).astype(np.uint8)
    image = saved(tmp_path / f"a{extension}", Image.fromarray(smooth), quality=95)
    np.testing.assert_allclose(cut(image, 2)[0] * 255, smooth, atol=6)


def test_alpha_is_dropped_and_palettes_become_color(tmp_path):
    alpha = Image.fromarray(np.dstack([COLOR, GREY]))
    np.testing.assert_array_equal(
        saved(tmp_path / "a.png", alpha).voxels[:, :, 0].swapaxes(0, 1), COLOR
    )
    grey_alpha = Image.fromarray(np.dstack([GREY, GREY[::-1]]))
    np.testing.assert_array_equal(saved(tmp_path / "b.png", grey_alpha).voxels[:, :, 0].T, GREY)
    few = Image.fromarray(COLOR).quantize(64)
    np.testing.assert_array_equal(
        saved(tmp_path / "c.png", few).voxels[:, :, 0].swapaxes(0, 1),
        np.asarray(few.convert("RGB")),
    )
    cmyk = Image.fromarray(COLOR).convert("CMYK")
    assert saved(tmp_path / "d.tif", cmyk).voxels.shape == (7, 5, 1, 3)


def test_16_bit_and_float_pictures_are_spread_over_what_they_use(tmp_path):
    twelve = RNG.integers(0, 4096, (50, 70)).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        image = saved(tmp_path / name, Image.fromarray(twelve))
        np.testing.assert_array_equal(image.voxels[:, :, 0].T, twelve)
        picture = cut(image, 2)[0]
        assert picture.max() == 1
        assert 0.45 < picture.mean() < 0.55
    image = saved(tmp_path / "f.tif", Image.fromarray((twelve / 1e4).astype(np.float32)))
    assert 0.45 < cut(image, 2)[0].mean() < 0.55


def test_two_tone_pictures_are_black_and_white(tmp_path):
    image = saved(tmp_path / "a.png", Image.fromarray(GREY > 99))
    np.testing.assert_array_equal(cut(image, 2)[0], GREY > 99)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_does_not_turn_a_picture_away_from_what_the_clients_see(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x112] = orientation
    for name in ("a.jpg", "a.png"):
        image = saved(tmp_path / name, Image.fromarray(GREY), exif=exif)
        assert image.geometry.shape == (7, 5, 1)
        np.testing.assert_allclose(image.voxels[:, :, 0].T, GREY, atol=60 if ".jpg" in name else 0)


def test_a_tiff_that_is_mirrored_by_its_tag_is_seen_as_itk_shows_it(tmp_path):
    simple_itk = pytest.importorskip("SimpleITK")
    image = saved(tmp_path / "a.tif", Image.fromarray(GREY), tiffinfo={0x112: 4})
    shown = simple_itk.GetArrayFromImage(simple_itk.ReadImage(str(tmp_path / "a.tif")))
    np.testing.assert_array_equal(image.voxels[:, :, 0].T, shown)
    np.testing.assert_array_equal(shown, GREY[::-1])


# -- axis -----------------------------------------------------------------------------------------


def volume(tmp_path: Path, array: np.ndarray, spacing=(1.0, 1.0, 1.0)) -> ImageVolume:
    affine = np.diag([-spacing[0], -spacing[1], -spacing[2], 1.0])  # canonical as it is
    nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / "a.nii")
    return read_image(tmp_path / "a.nii")


@pytest.mark.parametrize(
    ("shape", "spacing", "axis"),
    [
        ((4, 5, 6), (1, 1, 1), 2),
        ((4, 5, 6), (1, 1, 3), 2),
        ((4, 5, 6), (1, 3, 1), 1),
        ((4, 5, 6), (3, 1, 1), 0),
        ((4, 5, 6), (3, 1, 3), 2),
        ((4, 5, 6), (1.001, 1, 1), 2),
        ((1, 5, 6), (1, 1, 1), 0),
        ((4, 1, 6), (1, 1, 5), 1),
        ((1, 1, 6), (1, 1, 1), 2),
    ],
)
def test_the_axis_across_the_slices_is_the_coarsest(shape, spacing, axis, tmp_path):
    image = volume(tmp_path, np.ones(shape, np.int16), spacing)
    assert through_plane_axis(image) == axis
    assert through_plane_axis(image, 0) == 0


def test_an_axis_that_does_not_exist_is_refused(tmp_path):
    image = volume(tmp_path, np.ones((2, 3, 4), np.int16))
    for axis in (-1, 3):
        with pytest.raises(RequestError, match="allowed are 0"):
            through_plane_axis(image, axis)
        with pytest.raises(RequestError, match="allowed are 0"):
            cut(image, axis)


@given(
    hnp.arrays(np.int32, hnp.array_shapes(min_dims=3, max_dims=3, max_side=5)),
    st.integers(0, 2),
)
def test_assembling_is_the_inverse_of_cutting(labels, axis):
    masks = cut_labels(labels, axis)
    assert len(masks) == labels.shape[axis]
    np.testing.assert_array_equal(assemble(masks, axis), labels)
    np.testing.assert_array_equal(cut_labels(assemble(labels, axis), axis), labels)


# -- grey -----------------------------------------------------------------------------------------


def test_slices_are_a_sequence(tmp_path):
    image = volume(tmp_path, RNG.integers(0, 900, (4, 5, 6)).astype(np.int16))
    pictures = cut(image, 1)
    assert isinstance(pictures, Sequence)
    assert len(pictures) == 5
    assert [p.shape for p in pictures] == [(6, 4)] * 5
    np.testing.assert_array_equal(pictures[-1], pictures[4])
    np.testing.assert_array_equal(np.stack(pictures[1:4:2]), np.stack([pictures[1], pictures[3]]))
    with pytest.raises(IndexError):
        pictures[5]


def test_one_slice_of_a_large_volume_is_made_without_copying_the_volume(tmp_path):
    image = volume(tmp_path, np.zeros((160, 160, 160), np.int16))
    for axis in range(3):
        pictures = cut(image, axis)
        tracemalloc.start()
        assert pictures[80].shape == (160, 160)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < image.voxels.nbytes / 10


def test_outliers_do_not_darken_a_volume(tmp_path):
    array = RNG.normal(500, 100, (30, 30, 30))
    array[0, 0, 0], array[1, 1, 1] = 1e6, -1e6
    picture = cut(volume(tmp_path, array.astype(np.float32)), 2)[15]
    assert 0.45 < picture.mean() < 0.55
    assert picture.std() > 0.1


@pytest.mark.parametrize("filling", [0, -3000])
def test_filling_does_not_decide_the_grey(filling, tmp_path):
    body = RNG.integers(100, 200, (8, 8, 8))
    array = np.full((64, 64, 64), filling, np.int16)  # the body is 0.2 % of it
    array[10:18, 20:28, 30:38] = body
    grey = grey_range(volume(tmp_path, array).voxels)
    np.testing.assert_allclose(grey, np.percentile(body, (0.5, 99.5)), atol=2)


def test_a_constant_volume_is_black_and_two_values_are_black_and_white(tmp_path):
    constant = volume(tmp_path, np.full((4, 5, 6), 77, np.int16))
    assert not any(p.any() for p in cut(constant, 2))
    two = np.full((4, 5, 6), 77, np.int16)
    two[1, 2, 3] = 78
    assert sorted(np.unique(np.stack(cut(volume(tmp_path, two), 2)))) == [0, 1]


def test_a_subsample_of_a_large_volume_finds_the_same_grey():
    voxels = RNG.gamma(2, 100, (300, 200, 150)).astype(np.float32)
    exact = np.percentile(voxels, (0.5, 99.5))
    np.testing.assert_allclose(grey_range(voxels), exact, rtol=0.02)


def test_a_window_shows_its_ends_black_and_white(tmp_path):
    array = np.arange(-200, -200 + 4 * 5 * 6 * 5, 5, dtype=np.int16).reshape(4, 5, 6)
    image = volume(tmp_path, array)
    pictures = np.stack(cut(image, 2, (-160, 240)))
    np.testing.assert_allclose(
        pictures, np.clip((array.transpose(2, 1, 0) + 160) / 400, 0, 1), atol=1e-6
    )


def test_a_window_is_not_laid_on_color(tmp_path):
    image = saved(tmp_path / "a.png", Image.fromarray(COLOR))
    np.testing.assert_array_equal(cut(image, 2, (-160, 240))[0], cut(image, 2)[0])


@pytest.mark.parametrize("window", [(1, 1), (2, 1), (0, np.inf), (np.nan, 1)])
def test_a_window_that_is_none_is_refused(window, tmp_path):
    with pytest.raises(RequestError, match="low < high"):
        cut(volume(tmp_path, np.ones((2, 3, 4), np.int16)), 2, window)
