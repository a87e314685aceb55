"""Masks come back to the place in space that the image's file gives them.

The oracles are nibabel and SimpleITK, called directly on the files.
"""

import itertools
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from lib.errors import LabelError
from lib.imaging.geometry import Geometry
from lib.imaging.io import read_image, read_label_map, source_label_map, write_label_map
from lib.imaging.slices import assemble, cut, cut_labels

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
ORIENTATIONS = list(
    itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))
)


def oriented(permutation: tuple[int, ...], signs: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """A 3 x 3 matrix of one of the 48 ways in which a file's axes can run."""
    return np.eye(3)[:, list(permutation)] * np.array(signs)


def write_source(path: Path, array: npt.NDArray[np.int16], affine_ras: npt.NDArray) -> None:
    if path.name.endswith((".nii", ".nii.gz")):
        nibabel.save(nibabel.Nifti1Image(array, affine_ras), path)
        return
    affine = LPS @ affine_ras
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    SimpleITK.WriteImage(image, str(path), True)


def read_back(path: Path) -> tuple[npt.NDArray, npt.NDArray[np.float64]]:
    """Values and RAS affine of a file, without RefSeg."""
    if path.name.endswith((".nii", ".nii.gz")):
        image = nibabel.load(path)
        return np.asarray(image.dataobj), image.affine
    image = SimpleITK.ReadImage(str(path))
    origin = np.array(image.TransformIndexToPhysicalPoint((0, 0, 0)))
    steps = [image.TransformIndexToPhysicalPoint(tuple(map(int, e))) - origin for e in np.eye(3)]
    affine = np.eye(4)
    affine[:3, :3] = np.stack(steps, axis=1)
    affine[:3, 3] = origin
    return SimpleITK.GetArrayFromImage(image).T, LPS @ affine


affines = st.builds(
    lambda turn, angles, spacing, origin: nibabel.affines.from_matvec(
        Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
        @ oriented(*turn)
        @ np.diag(spacing),
        origin,
    ),
    st.sampled_from(ORIENTATIONS),
    st.tuples(*[st.one_of(st.just(0.0), st.floats(-60, 60))] * 3),
    st.tuples(*[st.floats(0.05, 12)] * 3),
    st.tuples(*[st.floats(-600, 600)] * 3),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    affine=affines,
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    source=st.sampled_from([".nii.gz", ".nii", ".nrrd", ".mha"]),
    target=st.sampled_from([".nii.gz", ".nii", ".nrrd", ".mha"]),
    axis=st.integers(0, 2),
    compress=st.booleans(),
)
def test_a_mask_made_slice_by_slice_returns_on_the_files_own_grid(
    affine, shape, source, target, axis, compress
):
    with tempfile.TemporaryDirectory() as folder:
        image_path, mask_path = Path(folder) / f"a{source}", Path(folder) / f"m{target}"
        # Every voxel has a number of its own, so one that is misplaced is seen.
        numbers = np.arange(1, np.prod(shape) + 1, dtype=np.int16).reshape(shape)
        write_source(image_path, numbers, affine)
        written, true_affine = read_back(image_path)
        assert (written == numbers).all()

        image = read_image(image_path)
        canonical = image.voxels.astype(np.int32)
        pictures = cut(image, axis)
        masks = cut_labels(canonical, axis)
        assert [p.shape for p in pictures] == [m.shape for m in masks]
        write_label_map(mask_path, assemble(masks, axis), image, compress=compress)

        mask, mask_affine = read_back(mask_path)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, numbers)
        # NIfTI stores float32; one of its steps at 600 mm is 6e-5 mm.
        exact = source.startswith(".nii") or not target.startswith(".nii")
        np.testing.assert_allclose(mask_affine, true_affine, rtol=0, atol=1e-9 if exact else 1e-4)
        # ... and the canonical array names the same points.
        for index in np.ndindex(canonical.shape):
            i, j, k = np.argwhere(numbers == canonical[index])[0]
            np.testing.assert_allclose(
                image.geometry.affine_ras @ (*index, 1), true_affine @ (i, j, k, 1), atol=1e-6
            )
        np.testing.assert_array_equal(read_label_map(mask_path, image), canonical)


@pytest.mark.parametrize("extension", [".nii.gz", ".nrrd"])
@pytest.mark.parametrize(("permutation", "signs"), ORIENTATIONS)
def test_pictures_stand_as_a_radiologist_sees_them_in_all_48_orientations(
    permutation, signs, extension, tmp_path
):
    # World: 12 x 10 x 8 mm, RAS; marks at the patient's left, front and top, and one opposite.
    centre = np.array([5.5, 4.5, 3.5])
    turn = oriented(permutation, signs)
    shape = tuple(int(n) for n in np.abs(turn.T) @ (12, 10, 8))
    affine = nibabel.affines.from_matvec(turn, centre - turn @ ((np.array(shape) - 1) / 2))
    array = np.zeros(shape, np.int16)
    marks = {(1, 4, 3): 100, (5, 8, 3): 200, (5, 4, 6): 300}  # left, front, top
    for point, value in marks.items():
        index = np.linalg.inv(affine) @ (*point, 1)
        array[tuple(np.rint(index[:3]).astype(int))] = value
    path = tmp_path / f"a{extension}"
    write_source(path, array, affine)

    image = read_image(path)
    assert image.geometry.axcodes == ("L", "P", "I")
    grey = (0.0, 300.0)
    axial, coronal, sagittal = (
        np.stack([np.rint(p * 300) for p in cut(image, a, grey)]) for a in (2, 1, 0)
    )
    # x = 1 of 0..11 towards right is column 10 of 0..11; y = 8 is row 1; z = 3 is slice 4.
    assert np.argwhere(axial == 100).tolist() == [[4, 5, 10]]
    assert np.argwhere(axial == 200).tolist() == [[4, 1, 6]]
    assert np.argwhere(axial == 300).tolist() == [[1, 5, 6]]
    assert np.argwhere(coronal == 100).tolist() == [[5, 4, 10]]
    assert np.argwhere(coronal == 300).tolist() == [[5, 1, 6]]
    assert np.argwhere(sagittal == 200).tolist() == [[6, 4, 1]]
    assert np.argwhere(sagittal == 300).tolist() == [[6, 1, 5]]


def test_a_sheared_nifti_keeps_its_affine(tmp_path):
    affine = np.array([[1.0, 0.3, 0, 5], [0, 2, 0.2, 6], [0, 0, 3, 7], [0, 0, 0, 1]], np.float32)
    numbers = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    write_source(tmp_path / "a.nii.gz", numbers, affine)
    image = read_image(tmp_path / "a.nii.gz")
    for extension in (".nii.gz", ".nrrd"):
        write_label_map(tmp_path / f"m{extension}", image.voxels.astype(np.int32), image)
        mask, mask_affine = read_back(tmp_path / f"m{extension}")
        np.testing.assert_array_equal(mask, numbers)
        np.testing.assert_allclose(mask_affine, affine, atol=1e-6)


def test_a_nifti_that_only_has_a_quaternion_keeps_its_place(tmp_path):
    affine = nibabel.affines.from_matvec(
        Rotation.from_euler("xyz", (10, 20, 30), degrees=True).as_matrix() @ np.diag([1, 2, 3]),
        (5, 6, 7),
    )
    source = nibabel.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), None)
    source.set_qform(affine, code=1)
    source.set_sform(None, code=0)
    nibabel.save(source, tmp_path / "a.nii.gz")
    image = read_image(tmp_path / "a.nii.gz")
    write_label_map(tmp_path / "m.nii.gz", image.voxels.astype(np.int32), image)
    # Readers differ in which form they prefer: both must say the same.
    mask = nibabel.load(tmp_path / "m.nii.gz")
    np.testing.assert_allclose(mask.get_qform(coded=True)[0], affine, atol=1e-4)
    np.testing.assert_allclose(mask.get_sform(coded=True)[0], affine, atol=1e-4)


@pytest.mark.parametrize("extension", [".nii.gz", ".nrrd", ".mha"])
def test_a_plane_in_a_volume_format_stays_a_plane(extension, tmp_path):
    picture = SimpleITK.GetImageFromArray(np.arange(12, dtype=np.int16).reshape(3, 4))
    picture.SetSpacing((0.5, 0.7))
    picture.SetOrigin((3.0, 4.0))
    SimpleITK.WriteImage(picture, str(tmp_path / f"a{extension}"))
    image = read_image(tmp_path / f"a{extension}")
    assert image.geometry.shape == (4, 3, 1)
    write_label_map(tmp_path / f"m{extension}", image.voxels.astype(np.int32), image)
    mask = SimpleITK.ReadImage(str(tmp_path / f"m{extension}"))
    assert mask.GetSize() == (4, 3)
    assert mask.GetSpacing() == pytest.approx((0.5, 0.7))
    assert mask.GetOrigin() == pytest.approx((3.0, 4.0))
    assert mask.GetDirection() == pytest.approx(picture.GetDirection())
    np.testing.assert_array_equal(
        SimpleITK.GetArrayFromImage(mask), SimpleITK.GetArrayFromImage(picture)
    )
    np.testing.assert_array_equal(
        read_label_map(tmp_path / f"m{extension}", image), image.voxels.astype(np.int32)
    )


def test_grids_are_the_same_within_a_fraction_of_a_voxel():
    affine = np.diag([0.5, 0.5, 3.0, 1.0])
    grid = Geometry((100, 100, 20), affine)
    assert grid.spacing_mm == (0.5, 0.5, 3.0)
    assert grid.axcodes == ("R", "A", "S")
    moved = affine.copy()
    moved[0, 3] = 0.05  # a tenth of a voxel
    assert not grid.same_grid(Geometry((100, 100, 20), moved))
    assert grid.same_grid(Geometry((100, 100, 20), moved), atol=0.2)
    assert not grid.same_grid(Geometry((100, 100, 19), affine))
    stretched = affine.copy()
    stretched[0, 0] = 0.5001  # 1e-4 mm a voxel, but 0.02 voxels at the far side
    assert not grid.same_grid(Geometry((100, 100, 20), stretched))


@pytest.mark.parametrize(
    "affine", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.eye(3), np.diag([1, 1, 0, 1])]
)
def test_an_affine_that_spans_no_space_is_refused(affine):
    with pytest.raises(ValueError, match="affine"):
        Geometry((2, 2, 2), affine)


def test_a_geometry_cannot_be_changed_through_the_array_it_was_made_of():
    affine = np.eye(4)
    grid = Geometry((2, 2, 2), affine)
    affine[0, 0] = 9
    assert grid.affine_ras[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        grid.affine_ras[0, 0] = 9


def test_a_label_map_of_another_shape_is_not_turned(tmp_path):
    write_source(tmp_path / "a.nii", np.ones((2, 3, 4), np.int16), np.eye(4))
    image = read_image(tmp_path / "a.nii")
    with pytest.raises(LabelError, match=r"\(2, 3, 4\) is needed, got \(4, 3, 2\)"):
        source_label_map(np.zeros((4, 3, 2), np.int32), image)
