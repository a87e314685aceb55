"""Exactly what 3D Slicer's MONAI Label module does, call by call, from an empty bank on.

Order and parameters are those of plugins/slicer/MONAILabel/MONAILabel.py: a new client for each
call, which first asks GET /auth/; all of a model's config goes along with a run.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import SimpleITK
from monailabel.client import MONAILabelClient

from tests.apps.phantoms import ball, box, dice, write_labels, write_volume
from tests.apps.server_process import Server

pytestmark = [
    pytest.mark.server,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # the client never closes a socket
]


@pytest.fixture(scope="module")
def slicer(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Slicer"]:
    folder = tmp_path_factory.mktemp("slicer")
    studies = folder / "my studies"
    studies.mkdir()
    for seed in range(3):
        write_volume(studies / f"patient {seed}.nii.gz", seed)
    server = Server(folder, studies).start()
    client = Slicer(server, folder / "slicer's own")
    client.folder.mkdir()
    yield client
    server.stop()


class Slicer:
    """The module's state: the last /info and the open volume."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.info: dict[str, Any] = {}

    def client(self) -> MONAILabelClient:
        client = MONAILabelClient(self.server.url, str(self.folder), client_id="user-xyz")
        assert not client.auth_enabled()
        return client

    def connect(self) -> None:
        self.info = self.client().info()
        assert (
            requests.get(f"{self.server.url}/train/?check_if_running=true", timeout=30).status_code
            == 404
        )

    def config(self) -> dict[str, Any]:
        """The option table read back: lists send their selected item, here the first."""
        config = self.info["models"]["refseg"]["config"]
        return {
            key: value[0] if isinstance(value, list) else value for key, value in config.items()
        }

    def next_sample(self) -> dict[str, Any]:
        strategy = next(iter(self.info["strategies"]))  # the first is the default
        return self.client().next_sample(strategy, {})

    def run(self, image_id: str) -> tuple[np.ndarray, list[str]]:
        params = {**self.config(), "result_extension": ".nrrd", "result_dtype": "uint8"}
        file, answer = self.client().infer("refseg", image_id, params)
        names = answer.get("label_names") or self.info["models"]["refseg"]["labels"]
        ordered = [name for name, _ in sorted(names.items(), key=lambda item: item[1])]
        labels = [name for name in ordered if name != "background"]
        mask = SimpleITK.ReadImage(file)
        assert mask.GetPixelID() == SimpleITK.sitkUInt8
        return SimpleITK.GetArrayFromImage(mask).T, labels

    def submit(self, image_id: str, segments: dict[str, np.ndarray]) -> dict[str, Any]:
        """Export: voxel value = position among the exported segments, plus one."""
        image = self.server.studies / f"{image_id}.nii.gz"
        hidden = ("background", "foreground_scribbles", "background_scribbles")
        exported = [name for name in segments if name not in hidden]
        values = np.zeros(next(iter(segments.values())).shape, np.uint8)
        for value, name in enumerate(exported, start=1):
            values[segments[name]] = value
        label = write_labels(self.folder / "label.nii.gz", values, image)
        listed = [{"name": name, "idx": n} for n, name in enumerate(segments, start=1)]
        answer = self.client().save_label(image_id, str(label), "final", {"label_info": listed})
        self.info = self.client().info()
        return answer


def test_a_first_session_in_slicer(slicer: Slicer) -> None:
    # Connect: what the module reads of /info, or it says "please upgrade".
    slicer.connect()
    info = slicer.info
    assert {"models", "labels", "strategies", "trainers", "train_stats", "datastore"} <= info.keys()
    assert "config" not in info
    assert info["labels"] == []
    assert info["models"]["refseg"]["type"] == "segmentation"
    assert next(iter(info["strategies"])) == "refseg"
    assert info["datastore"]["total"] == 3

    # Next sample; the option "run segmentation on next sample" is on, and nothing is known yet.
    sample = slicer.next_sample()
    assert Path(sample["path"]).is_file()
    first = sample["id"]
    mask, labels = slicer.run(first)
    assert not mask.any()
    assert labels == []  # Slicer empties every segment that is named here

    # The person draws two segments and submits; scribbles are listed, but not exported.
    seed = int(first[-1])
    empty = np.zeros_like(ball(seed))
    answer = slicer.submit(first, {"background_scribbles": empty, "ball": ball(seed), "box": box()})
    assert answer["label"] == first
    assert slicer.info["datastore"]["completed"] == 1

    # Slicer runs a model by itself on the next sample only if it has one of these labels.
    assert {"ball", "box"} <= set(slicer.info["labels"])
    assert {"ball", "box"} <= slicer.info["models"]["refseg"]["labels"].keys()

    # The next sample is another one, and it comes segmented, value i + 1 for the i-th name.
    sample = slicer.next_sample()
    second = sample["id"]
    assert second != first
    mask, labels = slicer.run(second)
    assert labels == ["ball", "box"]
    assert dice(mask == 1, ball(int(second[-1]))) > 0.7
    assert dice(mask == 2, box()) > 0.7

    # Labels that Slicer shows for the model are numbered in the same way.
    slicer.connect()
    assert slicer.info["models"]["refseg"]["labels"] == {"ball": 1, "box": 2}
    assert slicer.info["labels"] == ["ball", "box"]


def test_slicer_is_told_that_all_is_labelled(slicer: Slicer) -> None:
    slicer.connect()
    for seed in range(3):
        slicer.submit(f"patient {seed}", {"ball": ball(seed), "box": box()})
    assert slicer.next_sample() == {}  # then the module says so, in a box


def test_slicer_shows_the_reason_when_a_run_cannot_work(slicer: Slicer) -> None:
    slicer.connect()
    (slicer.server.studies / "broken.nii.gz").write_bytes(b"\x1f\x8b not an image")
    response = slicer.server.post_infer("no such image")
    assert response.status_code == 404
    assert "datastore" in response.json()["detail"]
