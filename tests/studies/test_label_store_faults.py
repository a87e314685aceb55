"""A full disk, a folder that cannot be written, a clock that jumps: labels stay what they were."""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from lib.errors import RefSegError
from lib.studies import label_store, table
from lib.studies.datastore import StudiesDatastore, labelled_images


def picture(path: Path, seed: int, size: int = 20) -> Path:
    values = np.random.default_rng(seed).integers(0, 255, (size, size), np.uint8)
    Image.fromarray(values).save(path)
    return path


def open_store(studies: Path, copies: Path) -> StudiesDatastore:
    return StudiesDatastore(str(studies), copies=copies, watch=False, keep=1000)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    picture(small_disk / "a.png", 0)
    store = open_store(small_disk, tmp_path)
    saved: list[bytes] = []

    def fill() -> None:
        for number in range(100):
            file = picture(tmp_path / "label.png", number, size=100)
            info = {"label_info": [{"name": f"name {number}", "idx": 1}]}
            store.save_label("a", str(file), "final", info)
            saved.append(file.read_bytes())

    with pytest.raises(OSError, match="No space left"):
        fill()
    assert len(saved) > 3
    for again in (store, open_store(small_disk, tmp_path)):
        (labelled,) = labelled_images(again)
        assert labelled.label_path.read_bytes() == saved[-1]
        assert labelled.label_names == {1: f"name {len(saved) - 1}"}
        kept = [version.file.read_bytes() for version in again.versions("a", "final")]
        assert kept[-len(saved) + 1 :] == saved[:-1] or kept == saved
    assert not list(small_disk.rglob(".*.part"))
    (small_disk / "labels/.history/final/a/000001.png").unlink()
    store.remove_label("a", "final")
    assert store.get_labeled_images() == []


@pytest.fixture(params=["whole", "damaged"])
def read_only_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """One labelled image and one that the table does not know, or a table that tells nothing."""
    disk = tmp_path / "disk"
    disk.mkdir()
    picture(disk / "a.png", 0)
    store = open_store(disk, tmp_path)
    store.save_label("a", str(picture(tmp_path / "l.png", 1)), "final", {})
    picture(disk / "new.png", 2)
    if request.param == "damaged":
        (disk / "datastore_v2.json").write_bytes(b"{" * 9000)
    command = ["mount", "--bind", str(disk), str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount")
    subprocess.run(["mount", "-o", "remount,ro,bind", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_studies_that_cannot_be_written_can_be_read(
    read_only_disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(read_only_disk, tmp_path)
    for _ in range(3):
        store.refresh()
    assert sorted(store.list_images()) == ["a", "new"]
    assert [row.image_id for row in labelled_images(store)] == ["a"]
    with pytest.raises(OSError, match="Read-only"):
        store.save_label("a", str(picture(tmp_path / "l.png", 3)), "final", {})
    with pytest.raises(OSError, match="Read-only"):
        store.remove_label("a", "final")
    assert [row.image_id for row in labelled_images(store)] == ["a"]
    assert sum("cannot be written" in record.message for record in caplog.records) == 1


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """One image."""
    folder = tmp_path / "studies"
    folder.mkdir()
    picture(folder / "a.png", 0)
    return folder


def test_a_clock_that_jumps_back_mixes_up_no_versions(
    studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(studies, tmp_path)
    files = [picture(tmp_path / f"l{number}.png", number) for number in range(4)]
    now = time.time()
    for file, jump in zip(files, (0, -(10**7), 10**8, -5), strict=True):
        monkeypatch.setattr(time, "time", lambda jump=jump: now + jump)
        store.save_label("a", str(file), "final", {})
        os.utime(studies / "datastore_v2.json", (now + jump, now + jump))
        store.refresh()
    kept = [version.file.read_bytes() for version in store.versions("a", "final")]
    assert kept == [file.read_bytes() for file in files[:-1]]
    assert (studies / "labels/final/a.png").read_bytes() == files[-1].read_bytes()


def test_a_table_that_another_process_holds_for_too_long_is_not_written_past_it(
    studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(studies, tmp_path)
    before = (studies / "datastore_v2.json").read_bytes()
    monkeypatch.setattr(table, "LOCK_TIMEOUT_S", 0.2)
    label = picture(tmp_path / "l.png", 1)
    with FileLock(studies / ".lock"):
        with pytest.raises(RefSegError, match="Try again"):
            store.save_label("a", str(label), "final", {})
        store.refresh()  # reading goes on by what is known
        assert store.list_images() == ["a"]
    assert "looked at later" in caplog.text
    assert "cannot be written" not in caplog.text
    assert (studies / "datastore_v2.json").read_bytes() == before
    assert not list((studies / "labels/final").iterdir())
    store.save_label("a", str(label), "final", {})
    assert (studies / "labels/final/a.png").read_bytes() == label.read_bytes()


def test_a_large_label_is_copied_before_other_requests_have_to_wait(
    studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(studies, tmp_path)
    answered = []
    copy = label_store.stage_copy

    def slow_copy(target: Path, source: Path) -> Path:
        asking = threading.Thread(target=lambda: answered.append(store.status()))
        asking.start()
        asking.join(timeout=10)
        return copy(target, source)

    monkeypatch.setattr(label_store, "stage_copy", slow_copy)
    store.save_label("a", str(picture(tmp_path / "l.png", 1)), "final", {})
    assert len(answered) == 1
    store.add_image("b", str(picture(tmp_path / "b.png", 2)), {})
    assert len(answered) == 2


def test_names_of_a_label_that_was_refused_are_not_given_to_the_one_that_stays(
    studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(studies, tmp_path)
    label = picture(tmp_path / "l.png", 1)
    store.save_label("a", str(label), "final", {"label_info": [{"name": "liver", "idx": 1}]})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(store, "_keep", full)
        with pytest.raises(OSError, match="No space"):
            store.save_label("a", str(label), "final", {"label_info": [{"name": "x", "idx": 1}]})
    again = open_store(studies, tmp_path)
    again.refresh()
    assert again.get_label_info("a", "final")["label_info"][0]["name"] == "liver"
