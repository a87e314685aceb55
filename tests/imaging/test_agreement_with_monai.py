"""Our masks lie where those of MONAI's reader and MONAI Label's writer lie, as clients see them."""

import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from PIL import Image
from scipy.spatial.transform import Rotation

from lib.imaging.io import read_image, write_label_map

# MONAI and what it imports warn of optional parts that are not installed.
pytestmark = pytest.mark.filterwarnings("ignore")

AFFINE = nibabel.affines.from_matvec(
    Rotation.from_euler("xyz", (5, -12, 20), degrees=True).as_matrix() @ np.diag([0.8, -0.9, 3.0]),
    (-40.0, 35.0, 12.5),
)
NUMBERS = np.arange(1, 121, dtype=np.int16).reshape(4, 5, 6)


@pytest.fixture(autouse=True)
def writers_own_folder(tmp_path, monkeypatch):
    """MONAI Label's writer leaves its files in the folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def monai_label():
    monai = pytest.importorskip("monai.transforms")
    writer = pytest.importorskip("monailabel.transform.writer")
    return monai.LoadImaged, writer.Writer


def written_by_monai_label(monai_label, image: Path, extension: str) -> Path:
    load, writer = monai_label
    data = load(keys="image")({"image": str(image)})
    data["pred"] = data["image"]
    if image.suffix == ".png" and data["pred"].ndim == 3:
        data["pred"] = data["pred"][..., 0]
    data.update(image_path=str(image), result_extension=extension, result_dtype="uint8")
    path, _ = writer()(data)
    return Path(path)


@pytest.mark.parametrize("source", [".nii.gz", ".nrrd"])
@pytest.mark.parametrize("target", [".nii.gz", ".nrrd"])
def test_a_volumes_mask_equals_monai_labels(source, target, monai_label, tmp_path):
    path = tmp_path / f"a{source}"
    if source == ".nrrd":
        image = SimpleITK.GetImageFromArray(NUMBERS.T)
        image.SetSpacing((0.8, 0.9, 3.0))
        image.SetDirection(
            Rotation.from_euler("xyz", (5, -12, 20), degrees=True).as_matrix().ravel().tolist()
        )
        image.SetOrigin((40.0, -35.0, 12.5))
        SimpleITK.WriteImage(image, str(path))
    else:
        nibabel.save(nibabel.Nifti1Image(NUMBERS, AFFINE), path)
    theirs = SimpleITK.ReadImage(str(written_by_monai_label(monai_label, path, target)))
    image = read_image(path)
    write_label_map(tmp_path / f"m{target}", image.voxels.astype(np.int32), image)
    ours = SimpleITK.ReadImage(str(tmp_path / f"m{target}"))

    assert ours.GetSize() == theirs.GetSize()
    assert ours.GetPixelID() == theirs.GetPixelID()
    np.testing.assert_array_equal(
        SimpleITK.GetArrayFromImage(ours), SimpleITK.GetArrayFromImage(theirs)
    )
    for index in ((0, 0, 0), (3, 0, 0), (0, 4, 0), (0, 0, 5), (3, 4, 5)):
        np.testing.assert_allclose(
            ours.TransformIndexToPhysicalPoint(index),
            theirs.TransformIndexToPhysicalPoint(index),
            atol=1e-4,
        )


@pytest.mark.parametrize("extension", [".png", ".nrrd", ".nii.gz"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_pictures_mask_equals_monai_labels(channels, extension, monai_label, tmp_path):
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7)
    picture = np.repeat(grey[..., None], channels, axis=2).squeeze()
    Image.fromarray(picture).save(tmp_path / "a.png")
    theirs = SimpleITK.ReadImage(
        str(written_by_monai_label(monai_label, tmp_path / "a.png", extension))
    )
    image = read_image(tmp_path / "a.png")
    labels = image.voxels.reshape(7, 5, 1, channels)[..., 0].astype(np.int32)
    write_label_map(tmp_path / f"m{extension}", labels, image)
    ours = SimpleITK.ReadImage(str(tmp_path / f"m{extension}"))

    assert ours.GetSize() == theirs.GetSize() == (7, 5)
    for what in ("GetSpacing", "GetOrigin", "GetDirection", "GetPixelID"):
        assert getattr(ours, what)() == getattr(theirs, what)()
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(ours), grey)
    np.testing.assert_array_equal(
        SimpleITK.GetArrayFromImage(ours), SimpleITK.GetArrayFromImage(theirs)
    )
