"""A real MONAI Label server with the app RefSeg, as a child process that always ends."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
START_SECONDS = 240.0  # seconds usually; minutes on a busy machine with cold disks
LOG_LINES = 30


class ServerError(RuntimeError):
    """The server did not start, or died; the message carries the end of its log."""


def free_port() -> int:
    """A port on the loopback device that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running_server(studies: Path, bank: Path, log: Path) -> Iterator[str]:
    """Start the server over `studies`, yield its address, stop it whatever happens."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "monailabel.main", "start_server"]
    command += ["--app", str(REPOSITORY / "apps" / "refseg"), "--studies", str(studies)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--conf", "bank", str(bank)]
    with log.open("wb") as output:
        # a session of its own, so that the whole family of processes can be ended together
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_until_up(process, url, log)
        yield url
    finally:
        stop(process)


def wait_until_up(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    """Return when the server answers; raise when it died or took too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            msg = f"The server ended with code {process.returncode}.\n{log_tail(log)}"
            raise ServerError(msg)
        try:
            with urllib.request.urlopen(f"{url}/info/", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    msg = f"The server did not answer within {START_SECONDS:.0f} s.\n{log_tail(log)}"
    raise ServerError(msg)


def log_tail(log: Path) -> str:
    """The end of the server's log, with its place."""
    lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return "\n".join([f"--- the end of {log}", *lines])


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End the server and all its children: asked first, killed after ten seconds."""
    for how, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):  # all of them are gone already
            os.killpg(process.pid, how)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
        return
