"""Labels are never lost: versions, whole files, a table that others write, a crash at any step."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import HTTPException
from PIL import Image

from lib.durable import digest_of
from lib.studies.datastore import StudiesDatastore, labelled_images

TABLE = "datastore_v2.json"


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    folder = tmp_path / "studies"
    folder.mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.zeros((4, 5), np.uint8)).save(folder / f"{name}.png")
    return folder


def open_store(studies: Path, keep: int = 20) -> StudiesDatastore:
    return StudiesDatastore(str(studies), copies=studies.parent / "copies", watch=False, keep=keep)


def label(tmp_path: Path, value: int, ending: str = ".png") -> Path:
    file = tmp_path / f"label{value}{ending}"
    Image.fromarray(np.full((4, 5), value, np.uint8)).save(file)
    return file


def save(store: StudiesDatastore, tmp_path: Path, value: int, image: str = "a") -> Path:
    file = label(tmp_path, value)
    info = {"label_info": [{"name": f"name {value}", "idx": 1}], "client_id": "me"}
    store.save_label(image, str(file), "final", info)
    return file


def name_of(info: dict[str, Any]) -> str:
    return str(info["label_info"][0]["name"])


def test_an_overwritten_label_is_kept_with_its_info(studies: Path, tmp_path: Path) -> None:
    store = open_store(studies)
    first = save(store, tmp_path, 1)
    second = save(store, tmp_path, 2)
    (kept,) = store.versions("a", "final")
    assert (kept.version, kept.why) == (1, "overwritten")
    assert kept.file.read_bytes() == first.read_bytes()
    assert kept.sha256 == digest_of(first)
    assert name_of(dict(kept.info)) == "name 1"
    assert (studies / "labels/final/a.png").read_bytes() == second.read_bytes()
    assert store.get_label_info("a", "final")["version"] == 2


def test_a_deleted_label_is_kept_and_its_number_is_not_given_again(
    studies: Path, tmp_path: Path
) -> None:
    store = open_store(studies)
    first = save(store, tmp_path, 1)
    store.remove_label("a", "final")
    assert store.get_labeled_images() == []
    assert not (studies / "labels/final/a.png").exists()
    save(store, tmp_path, 2)
    (kept,) = store.versions("a", "final")
    assert (kept.version, kept.why) == (1, "deleted")
    assert kept.file.read_bytes() == first.read_bytes()
    assert store.get_label_info("a", "final")["version"] == 2


def test_deleting_an_image_keeps_its_label(studies: Path, tmp_path: Path) -> None:
    store = open_store(studies)
    first = save(store, tmp_path, 1)
    store.remove_image("a")
    assert store.list_images() == ["b"]
    assert [v.file.read_bytes() for v in store.versions("a", "final")] == [first.read_bytes()]


def test_a_version_restored_is_the_label_again_and_the_other_is_kept(
    studies: Path, tmp_path: Path
) -> None:
    store = open_store(studies)
    first, second = save(store, tmp_path, 1), save(store, tmp_path, 2)
    assert store.restore_label("a", "final", 1) == 3
    assert (studies / "labels/final/a.png").read_bytes() == first.read_bytes()
    info = store.get_label_info("a", "final")
    assert (name_of(info), info["restored"], info["version"]) == ("name 1", 1, 3)
    assert [v.version for v in store.versions("a", "final")] == [1, 2]
    assert store.versions("a", "final")[1].file.read_bytes() == second.read_bytes()


def test_a_label_dropped_by_hand_is_kept_when_it_is_overwritten(
    studies: Path, tmp_path: Path
) -> None:
    store = open_store(studies)
    by_hand = label(tmp_path, 7)
    (studies / "labels/final/a.png").write_bytes(by_hand.read_bytes())
    store.refresh()
    save(store, tmp_path, 2)
    assert [v.file.read_bytes() for v in store.versions("a", "final")] == [by_hand.read_bytes()]
    assert store.get_label_info("a", "final")["version"] == 2


def test_another_extension_leaves_no_old_label_behind(studies: Path, tmp_path: Path) -> None:
    store = open_store(studies)
    save(store, tmp_path, 1)
    store.save_label("a", str(label(tmp_path, 2, ".bmp")), "final", {})
    assert sorted(f.name for f in (studies / "labels/final").iterdir()) == ["a.bmp"]
    store.remove_label("a", "final")
    store.refresh()
    assert store.get_labeled_images() == []  # the platform would take the old file up again
    assert [v.file.suffix for v in store.versions("a", "final")] == [".png", ".bmp"]


def test_no_more_versions_are_kept_than_asked_for(studies: Path, tmp_path: Path) -> None:
    store = open_store(studies, keep=2)
    for value in range(1, 6):
        save(store, tmp_path, value)
    assert [v.version for v in store.versions("a", "final")] == [3, 4]
    kept = {f.name for f in (studies / "labels/.history/final/a").iterdir()}
    assert kept == {"000003.png", "000003.json", "000004.png", "000004.json", "current.json"}


def test_the_history_is_taken_for_no_label(studies: Path, tmp_path: Path) -> None:
    store = open_store(studies)
    save(store, tmp_path, 1)
    save(store, tmp_path, 2)
    again = open_store(studies)
    again.refresh()
    assert again.status()["label_tags"] == {"final": 1}
    (found,) = labelled_images(again)
    assert found.label_path == studies / "labels/final/a.png"


@pytest.mark.parametrize("tag", ["../../x", ".history", "a/b", "..", "", "a\nb", "x" * 300])
def test_a_tag_that_could_leave_its_folder_is_refused(
    tag: str, studies: Path, tmp_path: Path
) -> None:
    store = open_store(studies)
    before = sorted(tmp_path.rglob("*"))
    file = label(tmp_path, 1)
    with pytest.raises(HTTPException, match="tag"):
        store.save_label("a", str(file), tag, {})
    file.unlink()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../x.png", "/tmp/x", "..", "a\\b"])
def test_an_image_that_could_leave_the_studies_is_refused(
    name: str, studies: Path, tmp_path: Path
) -> None:
    with pytest.raises(HTTPException, match="image"):
        open_store(studies).add_image(name, str(label(tmp_path, 1)), {})


@pytest.mark.parametrize("ending", [".json", "", ".lock"])
def test_a_file_that_is_no_image_is_not_added(ending: str, studies: Path, tmp_path: Path) -> None:
    store = open_store(studies)
    table = (studies / TABLE).read_bytes()
    file = tmp_path / f"upload{ending}"
    file.write_text("{}")
    with pytest.raises(HTTPException, match="not served"):
        store.add_image("datastore_v2", str(file), {})
    assert (studies / TABLE).read_bytes() == table


def test_an_image_that_is_there_is_not_replaced_by_another_of_its_name(
    studies: Path, tmp_path: Path
) -> None:
    store = open_store(studies)
    present = sorted(studies.glob("*.png"))[0]
    before = present.read_bytes()
    assert store.add_image(present.stem, str(present), {}) == present.stem  # the same again
    with pytest.raises(HTTPException) as caught:
        store.add_image(present.stem, str(label(tmp_path, 1)), {})
    assert caught.value.status_code == 409
    assert "nothing was stored" in caught.value.detail
    assert present.read_bytes() == before
    unseen = studies / "not looked at yet.png"
    unseen.write_bytes(before)
    with pytest.raises(HTTPException, match="another image"):
        store.add_image(unseen.stem, str(label(tmp_path, 1)), {})
    assert unseen.read_bytes() == before


def test_an_image_that_is_a_link_is_unlinked_not_what_it_leads_to(
    studies: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "archive.png"
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(archive)
    (studies / "c.png").symlink_to(archive)
    store = open_store(studies)
    store.remove_image("c")
    assert archive.exists()
    assert store.list_images() == ["a", "b"]


def test_a_damaged_table_is_made_anew_with_the_names_of_the_labels(
    studies: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(open_store(studies), tmp_path, 1)
    damage = (studies / TABLE).read_bytes()[:-40]
    (studies / TABLE).write_bytes(damage)
    again = open_store(studies)
    assert again.list_images() == ["a", "b"]
    assert name_of(again.get_label_info("a", "final")) == "name 1"
    (aside,) = studies.glob("*.damaged-*")
    assert aside.read_bytes() == damage
    assert [r.message for r in caplog.records if "damaged" in r.message]
    assert json.loads((studies / TABLE).read_bytes())["objects"].keys() == {"a", "b"}


def test_two_stores_do_not_lose_each_others_infos(studies: Path, tmp_path: Path) -> None:
    one, other = open_store(studies), open_store(studies)
    for value in range(1, 4):
        save(one, tmp_path, value, "a")
        save(other, tmp_path, value + 10, "b")
        other.update_image_info("a", {f"seen {value}": True})
    again = open_store(studies)
    assert name_of(again.get_label_info("a", "final")) == "name 3"
    assert name_of(again.get_label_info("b", "final")) == "name 13"
    assert again.get_image_info("a")["seen 1"]


def test_provenance_lies_beside_a_mask_of_our_own_and_goes_with_it(
    studies: Path, tmp_path: Path
) -> None:
    store = open_store(studies)
    params = {"provenance": {"segmenter": "x"}, "confidence": {"n": 0.5}, "latencies": {}}
    info = {"model": "refseg", "params": params}
    store.save_label("a", str(label(tmp_path, 1)), "original", info)
    beside = studies / "labels/original/a.provenance.json"
    assert json.loads(beside.read_text()) == {
        "image": "a",
        "segmenter": "x",
        "confidence": {"n": 0.5},
    }
    store.refresh()
    assert store.status()["label_tags"] == {"original": 1}
    store.save_label("a", str(label(tmp_path, 2)), "original", {})
    assert not beside.exists()


CRASH = """
import os, sys
from pathlib import Path
sys.path.insert(0, {repository!r})
from lib.studies.datastore import StudiesDatastore

studies, first, second = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def open_store(folder):
    return StudiesDatastore(str(folder), copies=folder / "copies", watch=False)

def names(text):
    return {{"label_info": [{{"name": text, "idx": 1}}]}}

def interrupted(folder, last, act):
    # all that changes the disk is counted; after `last` of these the process is gone
    left = last
    def counted(function):
        def call(*args, **kwargs):
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1
            return function(*args, **kwargs)
        return call
    for name in ("replace", "rename", "link", "unlink", "fsync", "mkdir", "open"):
        setattr(os, name, counted(getattr(os, name)))
    act(open_store(folder))

import shutil
for kind in ("save", "delete"):
    act = (lambda s: s.save_label("a", second, "final", names("second"))) if kind == "save" else (
        lambda s: s.remove_label("a", "final"))
    for last in range(200):
        folder = studies.parent / f"{{kind}} {{last}}"
        shutil.copytree(studies, folder)
        child = os.fork()
        if not child:
            interrupted(folder, last, act)
            os._exit(0)
        done = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        store = open_store(folder)
        tags = store.get_labels_by_image_id("a")
        state = "none"
        if "final" in tags:
            file = Path(store.get_label_uri("a", "final")).read_bytes()
            info = store.get_label_info("a", "final")["label_info"][0]["name"]
            state = "first" if file == Path(first).read_bytes() else "second"
            assert file in (Path(first).read_bytes(), Path(second).read_bytes())
            assert info == state, (kind, last, info, state)
        kept = [v.file.read_bytes() for v in store.versions("a", "final")]
        assert state == "first" or Path(first).read_bytes() in kept, (kind, last, state)
        assert state == ({{"save": "second", "delete": "none"}}[kind] if done else state)
        store.save_label("a", second, "final", names("after"))  # nothing is in the way
        print(kind, last, state, len(kept), flush=True)
        if done:
            break
    else:
        raise AssertionError("never done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each crash is a forked child; no fork here")
def test_a_crash_at_any_step_leaves_the_old_label_or_the_new_one(
    studies: Path, tmp_path: Path
) -> None:
    store = open_store(studies)
    first, second = save(store, tmp_path, 1), label(tmp_path, 2)
    store.update_label_info("a", "final", {"label_info": [{"name": "first", "idx": 1}]})
    script = tmp_path / "crash.py"
    script.write_text(CRASH.format(repository=str(Path(__file__).resolve().parents[2])))
    run = subprocess.run(
        [sys.executable, str(script), str(studies), str(first), str(second)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    states = {line.split()[2] for line in run.stdout.splitlines()}
    assert states == {"first", "second", "none"}
    assert len(run.stdout.splitlines()) > 25, "the steps were counted"
