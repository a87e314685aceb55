"""The server's own folder for temporary files, and what a request leaves in it."""

import contextvars
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from apps.refseg.server.temporary import PREFIX, TemporaryFolder, note_temporary_files, remove

OTHER_SERVER = """
import sys
from apps.refseg.server.temporary import TemporaryFolder
folder = TemporaryFolder()
(folder.path / "image.nii.gz").write_bytes(b"a patient")
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def other(base: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another server of this user, which lives."""
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER_SERVER],
        env={**os.environ, "TMPDIR": str(base)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        process.kill()


def test_all_temporary_files_go_to_a_folder_that_others_cannot_open(base: Path) -> None:
    folder = TemporaryFolder()
    assert folder.path.parent == base
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    with tempfile.NamedTemporaryFile(delete=False) as file:
        assert Path(file.name).parent == folder.path
    folder.close()
    folder.close()
    assert not list(base.iterdir())


def test_a_killed_servers_folder_is_swept_and_a_living_ones_is_not(
    base: Path, other: "subprocess.Popen[str]"
) -> None:
    assert other.stdout is not None
    path = Path(other.stdout.readline().strip())
    assert path.parent == base
    TemporaryFolder().close()
    tempfile.tempdir = str(base)
    assert (path / "image.nii.gz").exists()
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (path / "image.nii.gz").exists()
    TemporaryFolder().close()
    assert not path.exists()


def test_what_only_has_such_a_name_is_left_alone(base: Path) -> None:
    (base / "elsewhere").mkdir()
    (base / "elsewhere" / "kept").touch()
    (base / f"{PREFIX}link").symlink_to(base / "elsewhere")
    (base / f"{PREFIX}file").touch()
    (base / "refseg-other").mkdir()
    before = sorted(base.rglob("*"))
    TemporaryFolder().close()
    assert sorted(base.rglob("*")) == before


def test_a_request_removes_what_it_made_there_and_nothing_else(base: Path) -> None:
    folder = TemporaryFolder()
    by_others = tempfile.mkdtemp()

    def request() -> None:
        made = note_temporary_files()
        with tempfile.NamedTemporaryFile(suffix=".nii.gz") as file:
            name = file.name  # the platform takes the name, and writes once the file is gone
        Path(name).write_bytes(b"half a cop")
        (Path(tempfile.mkdtemp()) / "x.png").touch()
        handle, beside = tempfile.mkstemp(dir=base)
        os.close(handle)
        remove(made)
        assert Path(beside).exists()

    contextvars.copy_context().run(request)
    assert list(folder.path.iterdir()) == [Path(by_others)]
    folder.close()
