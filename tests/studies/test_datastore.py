"""MONAI Label's local datastore as RefSeg uses it: real files, the platform's own class."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monailabel.datastore.local import LocalDatastore
from PIL import Image

from lib.imaging.io import read_image
from lib.strategies.board import read_board
from lib.studies.datastore import (
    StudiesDatastore,
    extensions,
    find_by_path,
    image_paths,
    label_names,
    labelled_images,
)
from tests.dicom_series import write_series


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    folder = tmp_path / "studies"
    folder.mkdir()
    for name in ("a.png", "b.jpeg", "c.tiff", "d.bmp"):
        Image.fromarray(np.zeros((4, 5), np.uint8)).save(folder / name)
    volume = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4))
    nib.save(volume, folder / "e.1 (left).nii.gz")
    return folder


@pytest.fixture
def store(studies: Path, tmp_path: Path) -> StudiesDatastore:
    return StudiesDatastore(str(studies), copies=tmp_path / "copies", watch=False)


def save(store: StudiesDatastore, image_id: str, tmp_path: Path, **info: object) -> None:
    file = tmp_path / "label.png"
    Image.fromarray(np.ones((4, 5), np.uint8)).save(file)
    store.save_label(image_id, str(file), "final", dict(info))


def test_every_kind_of_picture_is_served(store: StudiesDatastore) -> None:
    assert set(store.list_images()) == {"a", "b", "c", "d", "e.1 (left)"}
    assert set(image_paths(store)) == set(store.list_images())


def test_only_final_labels_are_listed_unless_told_otherwise(
    store: StudiesDatastore, tmp_path: Path
) -> None:
    save(store, "a", tmp_path, label_info=[{"name": "x", "idx": 1}])
    file = tmp_path / "label.png"
    store.save_label("b", str(file), "original", {})
    (only,) = labelled_images(store)
    assert only.image_id == "a"
    assert only.label_names == {1: "x"}
    both = labelled_images(store, ("final", "original"))
    assert [row.image_id for row in both] == ["a", "b"]


def test_a_label_dropped_or_renamed_on_the_disk_is_seen(
    store: StudiesDatastore, studies: Path, tmp_path: Path
) -> None:
    label = np.ones((4, 5), np.uint8)
    Image.fromarray(label).save(studies / "labels" / "final" / "c.png")
    assert [row.image_id for row in labelled_images(store)] == ["c"]
    (studies / "c.tiff").rename(studies / "cc.tiff")
    (studies / "labels" / "final" / "c.png").rename(studies / "labels" / "final" / "cc.png")
    assert [row.image_id for row in labelled_images(store)] == ["cc"]


def test_a_dicom_folder_is_one_image_and_clients_get_a_file(
    store: StudiesDatastore, studies: Path
) -> None:
    voxels = np.arange(8 * 6 * 4, dtype=np.uint16).reshape(8, 6, 4)
    write_series(studies / "1.2.840.9", voxels, spacing_mm=(1.0, 2.0, 5.0))
    write_series(studies / "1.2.840.10", voxels + 1, spacing_mm=(1.0, 2.0, 5.0))
    assert {"1.2.840.9", "1.2.840.10"} <= set(image_paths(store))
    file = Path(store.get_image_uri("1.2.840.9"))
    assert file.is_file()
    assert studies not in file.parents
    copy, folder = read_image(file), read_image(studies / "1.2.840.9")
    np.testing.assert_array_equal(copy.voxels, folder.voxels)
    np.testing.assert_allclose(copy.source.affine_ras, folder.source.affine_ras, atol=1e-4)
    assert store.get_image_info("1.2.840.9")["path"] == str(file)
    assert store.get_image_uri("1.2.840.9") == str(file)  # made once


def test_asking_what_there_is_makes_no_copies(
    store: StudiesDatastore, studies: Path, tmp_path: Path
) -> None:
    for number in range(3):
        voxels = np.zeros((8, 6, 4), np.uint16)
        write_series(studies / f"1.2.{number}", voxels, spacing_mm=(1.0, 2.0, 5.0))
    board = read_board(store)
    assert board.paths == image_paths(store)
    assert board.paths["1.2.1"].is_dir()
    store.update_image_info("1.2.1", {"flagged": "motion"})
    assert read_board(store, look_at_disk=False).flagged == {"1.2.1"}
    assert list((tmp_path / "copies").glob("*")) == []
    store.get_image_info("1.2.1")  # a client that loads it has one made
    assert len(list((tmp_path / "copies").glob("*"))) == 1


def test_extensions_may_be_in_capitals_and_the_id_is_the_name_without(
    store: StudiesDatastore, studies: Path, tmp_path: Path
) -> None:
    for name in ("A 1.PNG", "x.v1.JPG", "y.Jpeg", "png.png.Png"):
        Image.fromarray(np.zeros((4, 5), np.uint8)).save(studies / name)
    volume = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4))
    nib.save(volume, studies / "v.nii.gz")
    (studies / "v.nii.gz").rename(studies / "V.1.NII.GZ")
    paths = image_paths(store)
    added = {image_id: paths[image_id].name for image_id in paths.keys() - set("abcd")}
    added.pop("e.1 (left)")
    assert added == {
        "A 1": "A 1.PNG",
        "x.v1": "x.v1.JPG",
        "y": "y.Jpeg",
        "png.png": "png.png.Png",
        "V.1": "V.1.NII.GZ",
    }
    save(store, "A 1", tmp_path)
    Image.fromarray(np.ones((4, 5), np.uint8)).save(studies / "labels" / "final" / "x.v1.PNG")
    assert [row.image_id for row in labelled_images(store)] == ["A 1", "x.v1"]


def test_a_folder_that_cannot_be_read_is_left_out(
    store: StudiesDatastore, studies: Path, caplog: pytest.LogCaptureFixture
) -> None:
    locked = studies / "lost+found"
    locked.mkdir(mode=0o000)
    if os.access(locked, os.R_OK):
        pytest.skip("this user may read every folder")
    assert set(image_paths(store)) == {"a", "b", "c", "d", "e.1 (left)"}
    assert "lost+found" in caplog.text


def test_the_disk_is_read_as_the_platform_reads_it(
    store: StudiesDatastore, studies: Path, tmp_path: Path
) -> None:
    save(store, "a", tmp_path)
    save(store, "b", tmp_path)
    file = tmp_path / "label.png"
    store.save_label("c", str(file), "original", {})
    labels = studies / "labels"
    shutil.copy(file, labels / "final" / "d.png")
    shutil.copy(file, labels / "final" / "nobody.png")
    shutil.copy(file, studies / "new.png")
    (studies / "a.png").unlink()
    (labels / "final" / "b.png").unlink()
    (labels / "original" / "c.png").unlink()
    shutil.copytree(studies, tmp_path / "same")
    platform = LocalDatastore(str(tmp_path / "same"), extensions=extensions())
    store.refresh()
    ours, theirs = store.json()["objects"], platform.json()["objects"]
    for image in [*ours.values(), *theirs.values()]:
        for stored in [image["image"], *image["labels"].values()]:
            assert abs(stored["info"].pop("ts") - time.time()) < 60
    assert ours == theirs
    assert ours.keys() == {"b", "c", "d", "e.1 (left)", "new"}
    assert ours["d"]["labels"].keys() == {"final"}
    assert json.loads((studies / "datastore_v2.json").read_text())["objects"].keys() == ours.keys()


def test_a_folder_without_dicom_is_no_image(store: StudiesDatastore, studies: Path) -> None:
    (studies / "notes").mkdir()
    (studies / "notes" / "read me.txt").write_text("hello")
    assert "notes" not in image_paths(store)


@pytest.mark.parametrize(
    ("info", "names"),
    [
        ({}, {}),
        ({"label_info": None}, {}),
        ({"label_info": [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 2}]},
         {1: "liver", 2: "spleen"}),
        # Slicer counts its scribbles in idx, and leaves them out of the file
        ({"label_info": [{"name": "background_scribbles", "idx": 1}, {"name": "liver", "idx": 2}]},
         {1: "liver"}),
        # a segment without a name still has a value
        ({"label_info": [{"name": "liver"}, {"name": ""}, {"name": "background"}, {"idx": 4},
                         {"name": "spleen"}]},
         {1: "liver", 2: "label_2", 3: "label_3", 4: "spleen"}),
        ({"model": "refseg", "params": {"label_names": {"liver": 1, "spleen": 2}}},
         {1: "liver", 2: "spleen"}),
        ({"params": {"label_names": {"background": 0}}}, {}),
        ({"label_info": ["liver"]}, {}),
    ],
)  # fmt: skip
def test_names_are_read_from_what_clients_send(
    info: dict[str, object], names: dict[int, str]
) -> None:
    assert label_names(info) == names


def test_the_labelled_image_of_a_file_is_found_by_its_path(
    store: StudiesDatastore, tmp_path: Path
) -> None:
    save(store, "a", tmp_path)
    rows = labelled_images(store)
    found = find_by_path(rows, store.get_image_uri("a"))
    assert found is not None
    assert found.image_id == "a"
    assert find_by_path(rows, store.get_image_uri("b")) is None


def test_readers_never_see_the_table_half_filled(store: StudiesDatastore) -> None:
    stop = threading.Event()

    def refresh() -> None:
        while not stop.is_set():
            store.refresh()

    thread = threading.Thread(target=refresh)
    thread.start()
    try:
        seen = {len(store.list_images()) for _ in range(2000)}
        missed = sum(store.get_image_uri("a") == "" for _ in range(2000))
    finally:
        stop.set()
        thread.join()
    assert seen == {5}
    assert missed == 0
