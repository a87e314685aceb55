"""A site's own model through a real server: train, watch, infer, roll back, kill, full disk.

The pictures are simple and the trainings tiny: what is tested is what happens to a model, not how
good it gets. The model to be beaten is therefore one that never learned anything.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
import torch
from PIL import Image

from lib.models.matchseg import BUNDLED, load_weights
from lib.models.network import MatchSegNet, NetworkConfig
from lib.runtime import studies_name
from lib.site.store import ModelCard, ModelStore
from lib.trainers.site.blending import SHARES
from lib.trainers.site.progress import read_outcome, read_progress
from lib.trainers.site.training import is_training
from tests.apps.phantoms import ball, dice, write_picture, write_picture_labels
from tests.apps.server_process import Server

pytestmark = pytest.mark.server

TINY = {"steps_per_epoch": 1, "images": 3, "size": 64, "val_split": 0.2}
PATIENCE_S = 240


class Site:
    """A server and the folder of its models."""

    def __init__(self, server: Server, models: Path) -> None:
        self.server = server
        self.models = models

    @property
    def store(self) -> ModelStore:
        return ModelStore(self.models / studies_name(str(self.server.studies)))

    def info(self) -> dict[str, Any]:
        found: dict[str, Any] = self.server.get("/info/").json()
        return found

    def train(self, **options: object) -> dict[str, Any]:
        """Start a training and wait for its end, asking every now and then as clients do."""
        self.start(**options)
        return self.wait()

    def start(self, **options: object) -> None:
        url = f"{self.server.url}/train/matchseg"
        answer = requests.post(url, json={**TINY, **options}, timeout=60)
        assert answer.ok, answer.text
        assert answer.json()["status"] in {"SUBMITTED", "RUNNING"}

    def task(self) -> dict[str, Any]:
        found: dict[str, Any] = self.server.get("/train/").json()
        return found

    def wait(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            task = self.task()
            if task["status"] not in ("SUBMITTED", "RUNNING"):
                return task
            time.sleep(0.2)
        raise AssertionError(f"the training did not end: {task}")

    def infer(self, tmp_path: Path, image: str = "p5") -> tuple[np.ndarray, dict[str, Any]]:
        form = {"params": (None, json.dumps({"k": 4}))}
        url = f"{self.server.url}/infer/matchseg"
        told = requests.post(url, params={"image": image, "output": "json"}, files=form, timeout=90)
        assert told.ok, told.text
        file = requests.post(
            url, params={"image": image, "output": "image"}, files=form, timeout=90
        )
        path = tmp_path / "mask.png"
        path.write_bytes(file.content)
        return np.asarray(Image.open(path)), told.json()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site model")
    studies = pictures(folder, 6)
    models = folder / "models"
    models.mkdir()
    server = Server(folder, studies, {"site_models": str(models)}).start()
    site = Site(server, models)
    yield site
    server.stop()


@pytest.fixture
def labelled(site: Site, tmp_path: Path) -> Site:
    for seed in range(5):
        submit(site, f"p{seed}", seed, tmp_path)
    return site


def pictures(folder: Path, count: int) -> Path:
    """A folder of studies with pictures p0, p1, ..."""
    studies = folder / "studies"
    studies.mkdir()
    for seed in range(count):
        write_picture(studies / f"p{seed}.png", seed)
    return studies


def submit(site: Site, image: str, seed: int, folder: Path) -> None:
    label = write_picture_labels(folder / "label.png", seed)
    answer = requests.put(
        f"{site.server.url}/datastore/label",
        params={"image": image},
        files={
            "label": ("label.png", label.read_bytes()),
            "params": (None, json.dumps({"label_info": [{"name": "ball", "idx": 1}]})),
        },
        timeout=60,
    )
    assert answer.ok, answer.text


def test_before_the_first_model_there_is_a_trainer_and_no_task(site: Site, tmp_path: Path) -> None:
    info = site.info()
    assert list(info["models"]) == ["refseg"]
    assert list(info["trainers"]) == ["matchseg"]
    config = info["trainers"]["matchseg"]["config"]
    assert {"max_epochs", "start", "val_split", "early_stop_patience", "rollback"} <= config.keys()
    assert info["train_stats"] == {"matchseg": {}}
    url = f"{site.server.url}/infer/matchseg?image=p0"
    refused = requests.post(url, files={"params": (None, "{}")}, timeout=60)
    assert refused.status_code == 404
    assert "POST /train/matchseg" in refused.json()["detail"]
    for seed in range(3):
        submit(site, f"p{seed}", seed, tmp_path)
    refused = requests.post(
        f"{site.server.url}/train/matchseg?run_sync=true", json=TINY, timeout=120
    )
    assert refused.status_code == 422
    assert "3 images are labelled; training needs 4" in refused.json()["detail"]
    ended = read_outcome(site.store.folder / "training")
    assert ended is not None
    assert ended.failed
    assert ended.message == refused.json()["detail"]


def test_a_killed_training_leaves_nothing_and_goes_on_where_it_was(labelled: Site) -> None:
    site = labelled
    site.start(start="scratch", max_epochs=500, early_stop_patience=0)
    end = time.monotonic() + PATIENCE_S
    stats: dict[str, Any] = {}
    while time.monotonic() < end and not stats.get("epoch"):
        time.sleep(0.2)
        stats = site.info()["train_stats"]["matchseg"]
    assert stats["total_epochs"] == 500
    assert 0 <= stats["best_metric"] <= 1
    assert stats["total_time"] == ""  # while it runs
    assert site.server.get("/train/", check_if_running="true").ok
    os.kill(_pid(site.store.folder / "training" / "progress.json"), signal.SIGKILL)
    task = site.wait()
    assert task["status"] == "ERROR"
    ended = read_outcome(site.store.folder / "training")
    assert ended is not None
    assert "ended before it was done" in ended.message
    stats = site.info()["train_stats"]["matchseg"]
    assert stats["total_time"] != ""
    assert site.store.versions() == []
    assert list(site.info()["models"]) == ["refseg"]
    assert site.server.post_infer("p5", {}).ok

    done = int(stats["epoch"])
    task = site.train(start="scratch", max_epochs=done + 1, early_stop_patience=0)
    assert task["status"] == "DONE", task
    said = "\n".join(task["details"])
    assert f"going on after epoch {done}" in said
    # One that starts from nothing does not beat the bundled network in so short a time.
    assert "Not published: Dice 0." in said
    assert "of the bundled network" in said
    assert site.store.current() is None
    ended = read_outcome(site.store.folder / "training")
    assert ended is not None
    assert not ended.failed
    assert ended.message.startswith("Not published: Dice 0.")


def test_a_better_model_answers_at_once_and_can_be_rolled_back(
    labelled: Site, tmp_path: Path
) -> None:
    site = labelled
    truth = ball(5)[:, :, 0].T
    torch.manual_seed(0)
    bundled = load_weights(BUNDLED)
    weak = MatchSegNet(NetworkConfig(size=64, tokens=32, heads=2, width=16, vote_dim=8))
    torch.nn.init.normal_(weak.head.weight, std=0.5)
    card = ModelCard(0.1, 0.0, "scratch", ("ball",), (), ())
    site.store.use(site.store.add(weak, card).version)  # as another process would

    info = site.info()
    assert list(info["models"]) == ["matchseg", "refseg"]  # clients run the first
    assert info["models"]["matchseg"]["model"]["version"] == 1
    assert info["models"]["matchseg"]["labels"] == {"ball": 1}
    mask, params = site.infer(tmp_path)
    assert params["model"]["version"] == 1
    before = dice(mask > 0, truth)

    task = site.train(max_epochs=2, all_images=True)
    assert task["status"] == "DONE", task
    assert "Published as model 2" in "\n".join(task["details"])
    card = site.store.current()
    assert card is not None
    assert card.options["trained_share"] in SHARES
    assert card.sha256_measured not in ("", card.sha256)  # it learned from all in the end
    assert (card.epochs, len(card.training) + len(card.validation)) == (2, 5)
    left = {path.name for path in (site.store.folder / "training").iterdir()}
    assert not left & {"cases", "all", "best.safetensors", "blended.safetensors", "checkpoint.pt"}
    mask, params = site.infer(tmp_path)  # no restart, and not a request later
    assert params["model"]["version"] == 2
    assert params["warnings"] == []
    assert params["segmenter"] == "matchseg"
    assert dice(mask > 0, truth) > max(0.8, before)
    assert site.info()["train_stats"]["matchseg"]["model"]["version"] == 2
    assert site.server.log.count("Started server process") == 1

    url = f"{site.server.url}/train/matchseg?run_sync=true"
    back = requests.post(url, json={"rollback": True}, timeout=120)
    assert back.ok, back.text
    assert back.json()["model"] == 1
    again, params = site.infer(tmp_path)
    assert params["model"]["version"] == 1
    assert dice(again > 0, truth) == before

    # To be beaten is what the figures are of, which has not learned from what is measured on.
    twin = site.store.add(weak, ModelCard(0.9, 0.0, "scratch", ("ball",), (), ()), measured=bundled)
    site.store.use(twin.version)
    task = site.train(start="scratch", max_epochs=6)
    said = "\n".join(task["details"])
    assert re.search(rf"Not published: Dice 0\.\d+ against 0\.9\d+ of model {twin.version},", said)
    stats = site.info()["train_stats"]["matchseg"]
    assert stats["epoch"] == stats["total_epochs"]  # nothing follows
    assert stats["total_time"] != ""
    (site.store.folder / f"{twin.version:04}" / "measured.safetensors").unlink()
    task = site.train(start="scratch", max_epochs=6)
    said = "\n".join(task["details"])
    assert re.search(rf"against 0\.[0-5]\d+ of model {twin.version},", said)  # as it answers


def test_on_a_full_disk_the_training_ends_with_a_sentence_and_the_server_lives(
    labelled: Site,
) -> None:
    site = labelled
    before = site.store.versions()
    options = ["-t", "tmpfs", "-o", "size=3m", "tmpfs", str(site.models)]
    if os.geteuid() or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        assert site.store.versions() == []  # they lie below the small disk for now
        task = site.train(max_epochs=1)
        assert task["status"] == "ERROR"
        assert "Make room" in "\n".join(task["details"])
        assert not list(site.models.rglob("*.part"))
        assert list(site.info()["models"]) == ["refseg"]
        assert site.server.post_infer("p5", {}).ok
    finally:
        subprocess.run(["umount", str(site.models)], check=True)
    assert site.store.versions() == before


def test_a_training_starts_by_itself_when_enough_is_labelled_and_lets_others_first(
    tmp_path: Path,
) -> None:
    studies = pictures(tmp_path, 7)
    models = tmp_path / "models"
    server = Server(tmp_path, studies, {"site_models": str(models), "train_after": "5"}).start()
    try:
        site = Site(server, models)
        tasks = f"{server.url}/train/?all=true"
        for seed in range(4):
            submit(site, f"p{seed}", seed, tmp_path)
        submit(site, "p3", 3, tmp_path)  # the same image once more is no more labels
        time.sleep(1)
        assert requests.get(tasks, timeout=60).status_code == 404
        submit(site, "p4", 4, tmp_path)
        progress = site.store.folder / "training" / "progress.json"
        _wait_for(progress.exists)
        told = json.loads(progress.read_text())
        assert told["images"] == 5
        (child,) = requests.get(tasks, timeout=60).json()
        assert (child["status"], child["request"]["model"]) == ("RUNNING", "matchseg")
        child_now = psutil.Process(_pid(progress))
        assert child_now.nice() == min(19, psutil.Process().nice() + 10)
        submit(site, "p5", 5, tmp_path)  # while it runs
        assert is_training(progress.parent)
        assert requests.delete(f"{server.url}/train/", timeout=60).ok
        _wait_for(lambda: not is_training(progress.parent))
        submit(site, "p6", 6, tmp_path)  # seven are not five more than five
        time.sleep(3)
        assert len(requests.get(tasks, timeout=60).json()) == 1
        assert _serving(studies).nice() == psutil.Process().nice()
    finally:
        server.stop()


def test_labels_saved_during_a_training_start_the_next_when_it_has_ended_well(
    tmp_path: Path,
) -> None:
    studies = pictures(tmp_path, 15)
    models = tmp_path / "models"
    server = Server(tmp_path, studies, {"site_models": str(models), "train_after": "5"}).start()
    try:
        site = Site(server, models)
        for seed in range(4):
            submit(site, f"p{seed}", seed, tmp_path)
        room = site.store.folder / "training"
        site.start(max_epochs=8)
        _wait_for(lambda: (room / "progress.json").exists())
        for seed in range(4, 9):  # five more than it has
            submit(site, f"p{seed}", seed, tmp_path)
        assert is_training(room)
        assert site.task()["request"]["max_epochs"] == 8
        _wait_for(lambda: "max_epochs" not in site.task()["request"])
        _wait_for(lambda: _images(room) == 9)
        first, second = server.get("/train/?all=true").json()
        assert (first["status"], second["status"]) == ("DONE", "RUNNING")
        due = server.log.count("a training is due")
        for seed in range(9, 14):
            submit(site, f"p{seed}", seed, tmp_path)
        _wait_for(lambda: server.log.count("a training is due") > due)
        assert requests.delete(f"{server.url}/train/", timeout=60).ok
        _wait_for(lambda: "no other follows it" in server.log)
        assert len(server.get("/train/?all=true").json()) == 2
    finally:
        server.stop()


def test_a_training_that_started_by_itself_ends_with_its_server_and_is_taken_up_once(
    tmp_path: Path,
) -> None:
    studies = pictures(tmp_path, 7)
    models = tmp_path / "models"
    server = Server(tmp_path, studies, {"site_models": str(models), "train_after": "5"}).start()
    site = Site(server, models)
    room = site.store.folder / "training"
    try:
        for seed in range(5):
            submit(site, f"p{seed}", seed, tmp_path)
        _wait_for(lambda: (room / "progress.json").exists())
        _end_alone(studies, signal.SIGINT)  # it waits for no training, an hour maybe
        server.stop()
        server.start()
        submit(site, "p5", 5, tmp_path)  # six are not five more than five
        _wait_for(lambda: _trains(room))
        _end_alone(studies, signal.SIGKILL)
        assert not is_training(room)
        server.stop()
        server.start()
        submit(site, "p6", 6, tmp_path)
        time.sleep(5)
        assert not is_training(room)
        assert requests.get(f"{server.url}/train/?all=true", timeout=60).status_code == 404
    finally:
        server.stop()


def test_where_models_cannot_be_written_no_training_starts_by_itself(tmp_path: Path) -> None:
    studies = pictures(tmp_path, 5)
    (tmp_path / "a file").write_text("no folder")
    options = {"site_models": str(tmp_path / "a file" / "models"), "train_after": "4"}
    server = Server(tmp_path, studies, options).start()
    try:
        site = Site(server, tmp_path / "a file" / "models")
        for seed in range(5):
            submit(site, f"p{seed}", seed, tmp_path)
        _wait_for(lambda: "no training can start by itself" in server.log)
        assert requests.get(f"{server.url}/train/?all=true", timeout=60).status_code == 404
    finally:
        server.stop()


def _end_alone(studies: Path, how: signal.Signals) -> None:
    """Signal the server, not its training, as a crash or want of memory may; wait for both."""
    serving = _serving(studies)
    (training,) = [one for one in serving.children() if "train" in one.cmdline()]
    serving.send_signal(how)
    _wait_for(lambda: _is_over(serving) and _is_over(training))


def _images(room: Path) -> int:
    told = read_progress(room)
    return told.images if told is not None else 0


def _trains(room: Path) -> bool:
    ended = read_outcome(room)
    return ended is not None and ended.running


def _is_over(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _serving(studies: Path) -> psutil.Process:
    (serving,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if {"start_server", str(studies)} <= set(process.cmdline())
    ]
    return serving


def _pid(progress: Path) -> int:
    """Of the process that a training's file names."""
    return int(json.loads(progress.read_text())["process"].partition(":")[0])


def _wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.2)
