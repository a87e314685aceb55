"""The command line as a process: exit codes, JSON on stdout, no tracebacks for user errors."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.apps.phantoms import ball, dice, write_picture, write_picture_labels
from tests.apps.server_process import APP


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cwd / "hub")}
    environment |= {"REFSEG_DEVICE": "cpu", "COLUMNS": "200", "NO_COLOR": "1"}
    command = [sys.executable, str(APP / "main.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def answer(*arguments: object, cwd: Path) -> Any:
    done = run(*arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    folder = tmp_path / "my studies"
    (folder / "labels" / "final").mkdir(parents=True)
    for seed in range(2):
        write_picture(folder / f"p{seed}.png", seed)
    write_picture_labels(folder / "labels" / "final" / "p0.png", 0)
    return folder


def test_help_names_the_commands_without_loading_a_network(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in ("weights", "bank", "infer", "doctor"):
        assert command in done.stdout
    code = "import sys, apps.refseg.cli; print('torch' in sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=APP.parents[1], capture_output=True, text=True
    )
    assert told.stdout.strip() == "False", told.stderr


def test_files_are_segmented_by_a_studies_folder_and_then_by_its_bank(
    studies: Path, tmp_path: Path
) -> None:
    bank, out = tmp_path / "bank", tmp_path / "out"
    rows = answer(
        "infer", studies, "--studies", studies, "--bank", bank, "--out", out, cwd=tmp_path
    )
    assert [Path(row["image"]).name for row in rows] == ["p0.png", "p1.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(rows[0]["mask"])).T, ball(0)[:, :, 0])
    found = np.asarray(Image.open(rows[1]["mask"])).T > 0
    assert dice(found, ball(1)[:, :, 0]) > 0.5
    assert rows[1]["label_names"] == {"label_1": 1}

    status = answer("bank", "status", "--studies", studies, "--bank", bank, cwd=tmp_path)
    assert (status["images"], status["slices"]) == (1, 1)
    assert status["labels"] == {"label_1": {"present": 1, "absent": 0}}
    assert answer("bank", "verify", "--studies", studies, "--bank", bank, cwd=tmp_path) == {
        "problems": []
    }
    rebuilt = answer("bank", "rebuild", "--studies", studies, "--bank", bank, cwd=tmp_path)
    assert (rebuilt["images"], rebuilt["failed"]) == (1, {})

    (again,) = answer(
        "infer", studies / "p1.png", "--bank", bank, "--out", tmp_path / "two", cwd=tmp_path
    )
    np.testing.assert_array_equal(np.asarray(Image.open(again["mask"])).T > 0, found)


def test_a_file_that_cannot_be_segmented_is_told_and_the_others_are_done(
    studies: Path, tmp_path: Path
) -> None:
    (studies / "broken.png").write_bytes(b"no picture")
    done = run(
        "infer", studies, "--studies", studies, "--bank", tmp_path / "b", "--out", tmp_path / "out",
        "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    rows = {Path(row["image"]).name: row for row in json.loads(done.stdout)}
    assert "mask" not in rows["broken.png"]
    assert "broken.png" in rows["broken.png"]["message"]
    assert Path(rows["p1.png"]["mask"]).is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["infer", "nowhere.png", "--out", "o", "--bank", "b"], 1, "does not exist"),
        (["infer", ".", "--out", "o"], 1, "Where are the references"),
        (["infer", "."], 2, "--out"),
        (["bank", "status", "--studies", "nowhere"], 1, "does not exist"),
        (["doctor", "--conf", "colour=blue"], 1, "own_labels"),
        (["doctor", "--conf", "k"], 1, "NAME=VALUE"),
        (["weights", "fetch", "sam9"], 1, "sam2.1-tiny"),
        (["weights", "verify", "sam2.1-tiny"], 1, "weights fetch sam2.1-tiny"),
        (["segment"], 2, "No such command"),
    ],
)
def test_errors_of_the_user_are_a_sentence_and_a_code(
    arguments: list[str], code: int, sentence: str, tmp_path: Path
) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert sentence in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_brackets_in_names_are_printed_as_they_are(studies: Path, tmp_path: Path) -> None:
    missing = run("infer", "a[/b]c.png", "--out", "o", "--bank", "b", cwd=tmp_path)
    assert missing.returncode == 1
    assert "error: a[/b]c.png does not exist" in " ".join(missing.stderr.split())
    (studies / "scan[ax].png").write_bytes(b"no picture")
    told = run(
        "infer", studies / "scan[ax].png", "--studies", studies, "--bank", tmp_path / "bank",
        "--out", tmp_path / "out", cwd=tmp_path,
    )  # fmt: skip
    assert told.returncode == 1
    assert "scan[ax].png" in "".join(told.stdout.split())
    assert "Traceback" not in missing.stderr + told.stderr


def test_weights_are_listed_with_what_is_here(tmp_path: Path) -> None:
    rows = answer("weights", "list", "--weights", tmp_path, cwd=tmp_path)
    assert {"sam2.1-tiny", "dinov2-small", "clip"} <= {row["name"] for row in rows}
    assert all(row["path"] is None for row in rows)
    assert answer("weights", "verify", "--weights", tmp_path, cwd=tmp_path) == []


def test_the_doctor_looks_at_everything_and_says_what_to_do(studies: Path, tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(studies / "labels" / "final" / "nobody.png")
    done = run("doctor", "--studies", studies, "--json", cwd=tmp_path)
    rows = {row["what"]: row for row in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    assert {"python", "torch", "pydicom", "device", "bundled network", "disk"} <= rows.keys()
    assert rows["labels without image"]["found"] == "nobody.png"
    assert rows["fetched weights"]["state"] == "note"
    assert not (studies / "datastore_v2.json").exists()  # looking changes nothing
