"""The benchmarks of bad input and of sudden ends, in short; the long runs are made by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.server


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *options],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def test_bad_files_and_requests_are_refused_and_the_server_lives(tmp_path: Path) -> None:
    done = run("fuzz.py", "--requests", "150", "--seed", "7", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "150 requests" in done.stdout
    assert " 0 findings" in done.stdout
    again = run("fuzz.py", "--requests", "150", "--seed", "7", "--out", str(tmp_path))
    assert "150 requests" in again.stdout, "it goes on where it was"


def test_no_acknowledged_label_is_lost_when_the_server_is_killed(tmp_path: Path) -> None:
    done = run("faults.py", "--kills", "2", "--longest", "3", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 findings" in done.stdout
    assert ", 0 submits" not in done.stdout
