"""A PACS as the studies: nothing that was acknowledged is lost, whatever the PACS does."""

import base64
import errno
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from fastapi import HTTPException

import lib.studies.dicomweb_store as module
from lib.imaging.dicom_seg import write_seg
from lib.imaging.dicom_seg_reading import read_seg
from lib.imaging.io import ImageVolume, read_image, read_label_map, write_label_map
from lib.strategies.board import read_board
from lib.studies.datastore import image_paths, labelled_images
from lib.studies.dicomweb import Pacs
from lib.studies.dicomweb_store import DicomwebStore
from lib.studies.label_store import LabelStore
from lib.types import IntArray
from tests.dicom_series import write_series
from tests.small_pacs import SmallPacs, running_pacs

SHAPE, SPACING = (12, 10, 4), (1.0, 1.5, 4.0)
INFO = {"label_info": [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 2}]}


class Ward:
    """Three series in a PACS, and a store in front of it that looks each time."""

    def __init__(self, pacs: SmallPacs, folder: Path) -> None:
        self.pacs, self.folder = pacs, folder
        self.series = []
        for n in range(3):
            voxels = np.random.default_rng(n).integers(0, 900, SHAPE).astype(np.uint16)
            self.series.append(
                write_series(folder / f"s{n}", voxels, spacing_mm=SPACING, modality="CT")
            )
            pacs.add(folder / f"s{n}")
        self.store = self.open("cache")

    def open(self, name: str, ahead: int = 0) -> DicomwebStore:
        return DicomwebStore(
            Pacs(self.pacs.url, {"Modality": "CT"}),
            folder=self.folder / name,
            copies=self.folder / f"{name} copies",
            ahead=ahead,
        )

    def image(self, n: int) -> ImageVolume:
        return read_image(self.folder / f"s{n}")

    def labels(self, n: int, seed: int = 0) -> IntArray:
        return np.random.default_rng(seed).choice([0, 1, 2], SHAPE).astype(np.int32)

    def file(self, n: int, labels: IntArray) -> str:
        path = self.folder / "submitted.nii.gz"
        write_label_map(path, labels, self.image(n))
        return str(path)

    def save(self, n: int, seed: int) -> IntArray:
        labels = self.labels(n, seed)
        self.store.save_label(self.series[n], self.file(n, labels), "final", INFO)
        return labels

    def draw_elsewhere(self, n: int, seed: int, made_at: str) -> IntArray:
        """A SEG that somebody else sends to the PACS."""
        folder = self.folder / f"elsewhere {n} {seed}"
        folder.mkdir()
        labels = self.labels(n, seed)
        write_seg(folder / "a.dcm", labels, self.image(n), {1: "liver", 2: "spleen"})
        seg = pydicom.dcmread(folder / "a.dcm")
        seg.ContentDate, seg.ContentTime = made_at.split()
        seg.save_as(folder / "a.dcm")
        self.pacs.add(folder)
        return labels

    def held(self, n: int, store: DicomwebStore | None = None) -> IntArray | None:
        """What the bank would learn from."""
        rows = {row.image_id: row for row in labelled_images(store or self.store)}
        row = rows.get(self.series[n])
        if row is None:
            return None
        assert dict(row.label_names) == {1: "liver", 2: "spleen"}
        return read_label_map(row.label_path, read_image(row.image_path))


@contextmanager
def under_way(ward: Ward, hangs_at: str, job: Callable[[], object]) -> Iterator[None]:
    """In the block the PACS lets a request of the job wait, and the job with it."""
    ward.pacs.hangs_at = hangs_at
    with ThreadPoolExecutor() as pool:
        running = pool.submit(job)
        try:
            assert ward.pacs.hangs.wait(30)
            yield
        finally:
            ward.pacs.go_on.set()
        running.result(30)


def soon(job: Callable[[], Any]) -> Any:
    """What a job tells; it fails if it waits for what is under way elsewhere."""
    with ThreadPoolExecutor() as pool:
        return pool.submit(job).result(15)


@pytest.fixture
def ward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ward]:
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(module, "SETTLE_S", 0.0)
    with running_pacs() as pacs:
        yield Ward(pacs, tmp_path)


def test_a_label_is_in_the_pacs_when_it_is_acknowledged_and_the_same_everywhere(
    ward: Ward,
) -> None:
    labels = ward.save(0, seed=1)
    content = ward.pacs.files[ward.pacs.stored[-1]]
    assert pydicom.dcmread(io.BytesIO(content)).Modality == "SEG"
    (ward.folder / "seg.dcm").write_bytes(content)
    in_pacs, names = read_seg(ward.folder / "seg.dcm", ward.image(0))
    np.testing.assert_array_equal(in_pacs, labels)
    assert names == {1: "liver", 2: "spleen"}
    np.testing.assert_array_equal(ward.held(0), labels)
    np.testing.assert_array_equal(ward.held(0, ward.open("another server")), labels)


def test_of_several_labels_the_newest_counts_and_all_stay_in_the_pacs(ward: Ward) -> None:
    ward.draw_elsewhere(0, 1, "20260102 101112")
    later = ward.draw_elsewhere(0, 2, "20260103 000000.5")
    ward.draw_elsewhere(0, 3, "20260103 000000.4")
    np.testing.assert_array_equal(ward.held(0), later)
    assert len(ward.pacs.sets(Modality="SEG")) == 3
    newer = ward.draw_elsewhere(0, 4, "20260104 000000")
    np.testing.assert_array_equal(ward.held(0), newer)


def test_what_was_submitted_last_counts_whatever_clocks_say(ward: Ward) -> None:
    future = ward.draw_elsewhere(0, 1, "29990101 000000")
    np.testing.assert_array_equal(ward.held(0), future)
    mine = ward.save(0, seed=2)
    np.testing.assert_array_equal(ward.held(0), mine)
    again = ward.open("cache")
    np.testing.assert_array_equal(ward.held(0, again), mine)


@pytest.mark.parametrize("fault", ["down", "refuses", "fails", "garbage"])
def test_a_label_that_the_pacs_does_not_take_is_not_acknowledged(ward: Ward, fault: str) -> None:
    first = ward.save(0, seed=1)
    ward.pacs.fault = fault
    with pytest.raises(HTTPException) as refused:
        ward.save(0, seed=2)
    assert refused.value.status_code == 503
    assert "PACS" in refused.value.detail
    ward.pacs.fault = ""
    if fault != "garbage":  # which tells nothing of what was done
        np.testing.assert_array_equal(ward.held(0), first)


@pytest.mark.parametrize("fault", ["down", "garbage"])
def test_while_the_pacs_is_away_all_stays_as_it_was(ward: Ward, fault: str) -> None:
    labels = ward.save(0, seed=1)
    ward.store.refresh()
    ward.pacs.fault = fault
    assert set(ward.store.list_images()) == set(ward.series)
    np.testing.assert_array_equal(ward.held(0), labels)
    restarted = ward.open("cache")
    np.testing.assert_array_equal(ward.held(0, restarted), labels)
    with pytest.raises(HTTPException, match="PACS"):
        restarted.get_image_uri(ward.series[2])


def test_a_label_deleted_in_the_pacs_is_forgotten_and_kept_in_the_history(ward: Ward) -> None:
    ward.save(0, seed=1)
    ward.pacs.drop(ward.pacs.stored[-1])
    assert ward.held(0) is None
    assert ward.store.versions(ward.series[0], "final")


def test_a_pacs_that_lists_late_loses_no_label(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_S", 60.0)
    labels = ward.save(0, seed=1)
    uid = ward.pacs.stored[-1]
    content = ward.pacs.files.pop(uid)
    np.testing.assert_array_equal(ward.held(0), labels)
    ward.pacs.files[uid] = content
    np.testing.assert_array_equal(ward.held(0), labels)


def test_a_segmentation_that_does_not_fit_hides_no_other(ward: Ward, tmp_path: Path) -> None:
    good = ward.draw_elsewhere(0, 1, "20260102 101112")
    voxels = np.zeros((5, 5, 4), np.uint16)
    write_series(tmp_path / "other", voxels, spacing_mm=(0.7, 0.7, 4.0))
    other = read_image(tmp_path / "other")
    (tmp_path / "bad").mkdir()
    write_seg(tmp_path / "bad" / "b.dcm", np.ones((5, 5, 4), np.int32), other, {1: "liver"})
    seg = pydicom.dcmread(tmp_path / "bad" / "b.dcm")
    seg.ReferencedSeriesSequence[0].SeriesInstanceUID = ward.series[0]
    seg.ContentDate = "20270101"
    seg.save_as(tmp_path / "bad" / "b.dcm")
    ward.pacs.add(tmp_path / "bad")
    np.testing.assert_array_equal(ward.held(0), good)


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_newest_label_is_looked_at_again_when_it_could_not_be_fetched(
    ward: Ward, mirrored: bool
) -> None:
    first = ward.draw_elsewhere(0, 1, "20260101 000000")
    if mirrored:
        np.testing.assert_array_equal(ward.held(0), first)
    ward.draw_elsewhere(0, 2, "20260102 000000")
    newest = ward.draw_elsewhere(0, 3, "20260103 000000")
    ward.pacs.broken_at = f"/instances/{ward.pacs.stored[-1]}"
    if mirrored:
        np.testing.assert_array_equal(ward.held(0), first)
    else:
        assert ward.held(0) is None
    ward.pacs.broken_at = ""
    np.testing.assert_array_equal(ward.held(0), newest)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_label_that_came_before_its_series_was_whole_is_used_once_it_is(
    ward: Ward, tmp_path: Path, mirrored: bool
) -> None:
    files = sorted((ward.folder / "s1").iterdir())
    last = str(pydicom.dcmread(files[-1]).SOPInstanceUID)
    content = ward.pacs.files.pop(last)
    if mirrored:  # one that fits what is there
        part = tmp_path / "part"
        part.mkdir()
        for file in files[:-1]:
            (part / file.name).write_bytes(file.read_bytes())
        (tmp_path / "seg").mkdir()
        fits = np.ones((*SHAPE[:2], SHAPE[2] - 1), np.int32)
        write_seg(tmp_path / "seg" / "a.dcm", fits, read_image(part), {1: "liver"})
        seg = pydicom.dcmread(tmp_path / "seg" / "a.dcm")
        seg.ContentDate = "20250101"
        seg.save_as(tmp_path / "seg" / "a.dcm")
        ward.pacs.add(tmp_path / "seg")
    labels = ward.draw_elsewhere(1, 1, "20260101 000000")
    rows = labelled_images(ward.store)
    assert [row.image_id for row in rows] == [ward.series[1]] * mirrored
    asked = len([path for _, path, _ in ward.pacs.asked if "/instances/" in path])
    ward.store.refresh()
    assert len([path for _, path, _ in ward.pacs.asked if "/instances/" in path]) == asked
    ward.pacs.files[last] = content
    np.testing.assert_array_equal(ward.held(1), labels)


def test_a_fetch_under_way_keeps_nobody_from_series_that_are_here(ward: Ward) -> None:
    here, away = ward.series[:2]
    ward.store.refresh()
    ward.store.get_image_uri(here)
    with under_way(ward, f"/series/{away}", lambda: ward.store.get_image_uri(away)):
        assert Path(soon(lambda: ward.store.get_image_uri(here))).is_file()
    assert ward.store.at_hand(away)


def test_labels_under_way_hold_up_no_submit_and_no_other_request(ward: Ward) -> None:
    ward.store.refresh()
    ward.store.get_image_uri(ward.series[0])
    labels = ward.draw_elsewhere(1, 2, "20260101 000000")
    with under_way(ward, f"/series/{ward.series[1]}", ward.store.refresh):
        mine = soon(lambda: ward.save(0, seed=1))
        np.testing.assert_array_equal(soon(lambda: ward.held(0)), mine)
    np.testing.assert_array_equal(ward.held(1), labels)
    np.testing.assert_array_equal(ward.held(0), mine)


def test_a_label_submitted_while_an_older_one_is_fetched_stays_the_label(ward: Ward) -> None:
    ward.store.refresh()
    ward.store.get_image_uri(ward.series[0])
    ward.draw_elsewhere(0, 1, "29990101 000000")
    older = ward.pacs.stored[-1]
    with under_way(ward, f"/instances/{older}", ward.store.refresh):
        mine = soon(lambda: ward.save(0, seed=2))
    for store in (ward.store, ward.open("cache")):
        np.testing.assert_array_equal(ward.held(0, store), mine)


def test_who_chooses_the_next_image_waits_for_labels_under_way(ward: Ward) -> None:
    ward.store.refresh()
    ward.store.get_image_uri(ward.series[0])
    ward.draw_elsewhere(0, 1, "20260101 000000")
    seg = ward.pacs.stored[-1]
    with ThreadPoolExecutor() as pool:
        with under_way(ward, f"/instances/{seg}", ward.store.refresh):
            board = pool.submit(read_board, ward.store)
            with pytest.raises(TimeoutError):
                board.result(0.5)
        assert board.result(30).labelled == {ward.series[0]}


def test_who_chooses_the_next_image_waits_for_the_first_to_be_fetched(ward: Ward) -> None:
    store = ward.open("ahead", ahead=2)
    assert read_board(store).paths


def test_a_label_in_the_pacs_is_no_failure_when_there_is_no_room_for_it_here(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    future = ward.draw_elsewhere(0, 1, "29990101 000000")
    np.testing.assert_array_equal(ward.held(0), future)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "LOOK_EVERY_S", 60.0)
    with monkeypatch.context() as disk:
        disk.setattr(LabelStore, "save_label", full)
        mine = ward.save(0, seed=2)
        np.testing.assert_array_equal(ward.held(0), future)
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.0)
    np.testing.assert_array_equal(ward.held(0), mine)
    np.testing.assert_array_equal(ward.held(0, ward.open("cache")), mine)


def test_a_series_that_has_grown_is_fetched_anew(ward: Ward, tmp_path: Path) -> None:
    files = sorted((ward.folder / "s1").iterdir())
    last = str(pydicom.dcmread(files[-1]).SOPInstanceUID)
    content = ward.pacs.files.pop(last)
    ward.store.refresh()
    first = ward.store.get_image_uri(ward.series[1])
    assert read_image(Path(first)).geometry.shape == (*SHAPE[:2], 3)
    ward.pacs.files[last] = content
    ward.store.refresh()
    second = ward.store.get_image_uri(ward.series[1])
    assert read_image(Path(second)).geometry.shape == SHAPE


def test_images_are_fetched_when_needed_and_some_ahead(ward: Ward) -> None:
    ward.save(0, seed=1)
    store = ward.open("ahead", ahead=1)
    assert set(store.list_images()) == set()
    store.refresh()
    assert set(store.list_images()) == set(ward.series)
    for thread in threading.enumerate():
        if thread.name == "refseg-fetch":
            thread.join()
    here = set(image_paths(store)) - {ward.series[0]}
    assert len(here) == 1
    assert set(read_board(store).paths) == here | {ward.series[0]}
    info = store.get_image_info(here.copy().pop())
    assert info["Modality"] == "CT"
    assert info["StudyInstanceUID"]
    assert Path(info["path"]).is_file()


def test_a_series_outside_the_filter_is_an_image_once_it_was_asked_for(
    ward: Ward, tmp_path: Path
) -> None:
    voxels = np.random.default_rng(9).integers(0, 900, SHAPE).astype(np.uint16)
    series = write_series(tmp_path / "mr", voxels, spacing_mm=SPACING, modality="MR")
    ward.pacs.add(tmp_path / "mr")
    ward.store.refresh()
    assert series not in ward.store.list_images()
    assert Path(ward.store.get_image_uri(series)).is_file()
    labels = ward.labels(0, 5)
    file = tmp_path / "mr.nii.gz"
    write_label_map(file, labels, read_image(tmp_path / "mr"))
    ward.store.save_label(series, str(file), "final", INFO)
    restarted = ward.open("cache")
    assert series in {row.image_id for row in labelled_images(restarted)}


def test_labels_of_other_tags_stay_here_and_final_ones_are_deleted_in_the_pacs(
    ward: Ward,
) -> None:
    ward.store.refresh()
    image = ward.series[0]
    before = len(ward.pacs.files)
    ward.store.save_label(image, ward.file(0, ward.labels(0)), "original", {})
    assert len(ward.pacs.files) == before
    ward.store.remove_label(image, "original")
    ward.save(0, seed=1)
    for refused in (
        lambda: ward.store.remove_label(image, "final"),
        lambda: ward.store.remove_image(image),
        lambda: ward.store.add_image("x", "x.nii.gz", {}),
    ):
        with pytest.raises(HTTPException) as told:
            refused()
        assert told.value.status_code == 409


def test_the_pacs_is_told_who_asks(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.studies.dicomweb.platform.MONAI_LABEL_DICOMWEB_USERNAME", "me")
    monkeypatch.setattr("lib.studies.dicomweb.platform.MONAI_LABEL_DICOMWEB_PASSWORD", "secret")
    assert Pacs(ward.pacs.url, {}).images()
    told = ward.pacs.asked[-1][2]["Authorization"]
    assert told == f"Basic {base64.b64encode(b'me:secret').decode()}"


@pytest.mark.parametrize("image_id", ["1.2.3", "../x", "", "*", "a?Modality=CT"])
def test_an_image_that_is_not_there_is_not_found(ward: Ward, image_id: str) -> None:
    assert ward.store.get_image_uri(image_id) == ""
    assert not any("../" in path for _, path, _ in ward.pacs.asked)
