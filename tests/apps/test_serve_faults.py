"""A server whose disks are full or read-only, or whose files are damaged while it runs."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from tests.apps.phantoms import write_picture, write_picture_labels
from tests.apps.serve_process import ServeProcess

pytestmark = pytest.mark.server

TABLE = "datastore_v2.json"
NAMES = {"label_info": [{"name": "ball", "idx": 1}]}
TRUTH = ["labels/final/p0.png", "labels/final/p1.png", "p0.png", "p1.png", "p2.png", "p3.png"]


def small_disk(folder: Path, size: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")


class Faulty(ServeProcess):
    """A server with its studies and its bank on small disks of their own."""

    def submit(self, image: str, seed: int) -> requests.Response:
        label = write_picture_labels(self.studies.parent / "label.png", seed)
        files = {"label": ("l.png", label.read_bytes()), "params": (None, json.dumps(NAMES))}
        return self.request("PUT", f"/datastore/label?image={image}", files=files)

    def segment(self, image: str = "p3") -> requests.Response:
        return self.request("POST", f"/infer/refseg?image={image}&output=json")

    def truth(self) -> dict[str, bytes]:
        return {name: (self.studies / name).read_bytes() for name in TRUTH}

    def bank_file(self, pattern: str) -> Path:
        (found, *_) = sorted((self.studies.parent / "bank").rglob(pattern))
        return found

    def segments_as_before(self, answer: requests.Response) -> bool:
        said = answer.json()
        return answer.ok and said["label_names"] == {"ball": 1} and not said["warnings"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    folder = tmp_path_factory.mktemp("faults")
    studies, bank, temporary = (folder / name for name in ("studies", "bank", "temporary"))
    for place in (studies, bank, temporary):
        place.mkdir()
    small_disk(studies, "2m")
    started = None
    try:
        small_disk(bank, "8m")
        small_disk(temporary, "1m")
        for seed in range(4):
            write_picture(studies / f"p{seed}.png", seed)
        started = Faulty(folder, studies, "--conf", "examine=0").wait()
        for seed in range(2):
            assert started.submit(f"p{seed}", seed).ok
        assert started.segments_as_before(started.segment())
        yield started
        assert started.stop() == -signal.SIGTERM  # as uvicorn ends: in order
        assert "Traceback" not in started.log
    finally:
        if started is not None:
            started.stop()  # else the disks are in use
        for place in (studies, bank, temporary):
            subprocess.run(["umount", str(place)], check=False)


@pytest.fixture
def untouched(server: Faulty) -> Iterator[None]:
    """What is the user's is after the test what it was before."""
    before = server.truth()
    yield
    assert server.truth() == before
    assert not list(server.studies.rglob(".*.part"))


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """Not a byte is left on the disk of a folder."""
    ballast = folder / ".ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
    try:
        yield
    finally:
        ballast.unlink()


def scribble(path: Path) -> None:
    path.write_bytes(b"not what it was" * 200)


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        ("catalogue.sqlite", "catalogue.sqlite is damaged"),
        ("regions.sqlite", "regions.sqlite is damaged"),
        ("leases.sqlite", "leases.sqlite is damaged"),
    ],
)
def test_a_damaged_file_of_the_bank_is_mended_with_one_line(
    server: Faulty, untouched: None, pattern: str, line: str
) -> None:
    server.request("POST", "/activelearning/refseg", json={"client_id": "me"})
    scribble(server.bank_file(pattern))
    before = len(server.log)
    assert server.segments_as_before(server.segment())
    assert server.request("POST", "/activelearning/refseg", json={"client_id": "me"}).ok
    told = server.log[before:].splitlines()
    assert len([one for one in told if "damaged" in one]) == 1, told
    assert [one for one in told if line in one]


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe{", b"[]", b'{"objects": 3}', b"[" * 100_000])
def test_a_damaged_table_is_put_aside_while_the_server_runs(
    server: Faulty, untouched: None, damage: bytes
) -> None:
    (server.studies / TABLE).write_bytes(damage)
    before = len(server.log)
    assert server.segments_as_before(server.segment())
    listed = server.request("GET", "/datastore/?output=all").json()["objects"]
    assert sorted(listed) == ["p0", "p1", "p2", "p3"]
    assert sorted(one for one in listed if listed[one]["labels"]) == ["p0", "p1"]
    told = [one for one in server.log[before:].splitlines() if "is damaged" in one]
    assert len(told) == 1
    (aside,) = server.studies.glob("*.damaged-*")
    assert aside.read_bytes() == damage
    aside.unlink()
    held = json.loads((server.studies / TABLE).read_bytes())["objects"]
    assert held["p0"]["labels"]["final"]["info"]["label_info"] == NAMES["label_info"]


def test_a_full_disk_refuses_a_label_and_keeps_the_one_before(
    server: Faulty, untouched: None
) -> None:
    table = (server.studies / TABLE).read_bytes()
    with full(server.studies):
        refused = server.submit("p1", 7)
        assert refused.status_code == 507
        assert "disk is full" in refused.json()["detail"]
        assert server.segments_as_before(server.segment())
    assert (server.studies / TABLE).read_bytes() == table
    listed = server.request("GET", "/datastore/label/info?label=p1&tag=final").json()
    assert listed["label_info"] == NAMES["label_info"]


def test_a_copy_that_a_full_disk_cut_short_is_removed(server: Faulty, untouched: None) -> None:
    assert server.has_no_temporary_files()
    with full(server.temporary):
        refused = server.submit("p1", 7)
        assert refused.status_code == 507
        assert server.has_no_temporary_files()
    assert server.segments_as_before(server.segment())


def test_studies_that_are_read_only_are_segmented_and_a_label_is_refused(
    server: Faulty, untouched: None
) -> None:
    remount = ["mount", "-o", "remount,ro", str(server.studies)]
    if os.geteuid() or subprocess.run(remount, capture_output=True).returncode:
        pytest.skip("this user may not mount a disk read-only")
    try:
        refused = server.submit("p1", 8)
        assert refused.status_code == 503
        assert "may not write" in refused.json()["detail"]
        assert server.segments_as_before(server.segment())
        given = server.request("POST", "/activelearning/refseg", json={"client_id": "me"})
        assert given.json()["id"] in ("p2", "p3")
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(server.studies)], check=True)


def test_a_bank_on_a_full_disk_keeps_the_label_and_learns_it_when_there_is_room(
    server: Faulty,
) -> None:
    bank = server.studies.parent / "bank"
    with full(bank):
        assert server.submit("p2", 2).ok  # the label is the user's, the bank can wait
        answer = server.segment()
        assert answer.status_code == 503
        assert "free disk space" in answer.json()["detail"]
    said = server.segment()
    assert server.segments_as_before(said)
    used = said.json()["references"]["ball"]
    assert {one["image"] for one in used} == {"p0", "p1", "p2"}
    assert not [one for one in bank.rglob("staging/*/*") if one.is_file()]
    assert server.request("DELETE", "/datastore/label?id=p2&tag=final").ok
