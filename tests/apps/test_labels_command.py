"""`labels history` and `labels restore`, as a person calls them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.studies.datastore import StudiesDatastore
from tests.apps.server_process import APP


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(APP / "main.py"), "labels", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    folder = tmp_path / "my studies"
    folder.mkdir()
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(folder / "a b.png")
    store = StudiesDatastore(str(folder), copies=tmp_path / "copies", watch=False)
    for value in (1, 2):
        file = tmp_path / f"{value}.png"
        Image.fromarray(np.full((4, 5), value, np.uint8)).save(file)
        info = {"label_info": [{"name": f"name {value}", "idx": 1}], "client_id": "me"}
        store.save_label("a b", str(file), "final", info)
    return folder


def test_a_version_is_listed_and_brought_back(studies: Path) -> None:
    listed = json.loads(run("history", "a b", "--studies", studies, "--json").stdout)
    assert [(row["version"], row["state"]) for row in listed] == [(1, "overwritten"), (2, "in use")]
    assert [row["labels"] for row in listed] == ["name 1", "name 2"]
    done = run("restore", "a b", "1", "--studies", studies, "--json")
    assert json.loads(done.stdout) == {"image": "a b", "tag": "final", "restored": 1, "now": 3}
    now = Image.open(studies / "labels/final/a b.png")
    assert np.asarray(now).max() == 1
    all_labels = json.loads(run("history", "--studies", studies, "--json").stdout)
    assert all_labels == [{"image": "a b", "tag": "final", "versions": 2}]


def test_what_is_not_kept_is_said(studies: Path) -> None:
    done = run("restore", "a b", "9", "--studies", studies)
    assert done.returncode == 1
    assert "there are: 1" in " ".join(done.stderr.split())
    assert run("restore", "../x", "1", "--studies", studies).returncode == 1
