"""`main.py serve` in a process of its own, on a free port of the loopback address."""

import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import requests

from tests.apps.server_process import APP, PATIENCE_S


class ServeProcess:
    """Starts at once; `wait` until it answers, so that several can start together."""

    def __init__(
        self, folder: Path, studies: Path | str, *options: str, scheme: str = "http"
    ) -> None:
        self.studies = Path(studies)
        self.temporary = folder / "temporary"
        self.temporary.mkdir(exist_ok=True)
        self._log = folder / "serve.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        command = [sys.executable, str(APP / "main.py"), "serve", "--studies", str(studies)]
        command += ["--port", str(self.port), "--conf", f"bank={folder / 'bank'}"]
        command += ["--conf", f"site_models={folder / 'models'}", "--conf", "train_after=0"]
        command += ["--conf", "device=cpu", *options]
        environment = {
            **os.environ,
            "MONAI_LABEL_SESSION_PATH": str(folder / "sessions"),
            "TMPDIR": str(self.temporary),
            "HF_HUB_OFFLINE": "1",
            # no tool is found on any machine: what the platform says of one is an error to look for
            "PATH": str(Path(sys.executable).parent),
            "OMP_NUM_THREADS": "1",
        }
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def has_no_temporary_files(self) -> bool:
        """Whether its own folder for them, the only one there, becomes empty at once."""
        (own,) = self.temporary.glob("refseg-serve-*")
        end = time.monotonic() + 5  # an answer that succeeds is sent before they are removed
        while any(own.iterdir()) and time.monotonic() < end:
            time.sleep(0.05)
        return not any(own.iterdir())

    def wait(self) -> "ServeProcess":
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if requests.get(f"{self.url}/readyz", timeout=30, verify=False).ok:
                    return self
            except requests.RequestException:
                time.sleep(0.2)
        self.stop()
        raise AssertionError(f"the server did not come up:\n{self.log[-3000:]}")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def request(self, method: str, path: str, **more: object) -> requests.Response:
        return requests.request(method, self.url + path, timeout=120, **more)  # type: ignore[arg-type]

    def metric(self, name: str) -> float:
        """One figure of /metrics, by its whole name with labels."""
        text = self.request("GET", "/metrics").text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)
        return float(found.group(1)) if found else 0.0

    @contextmanager
    def connection(self, head: Sequence[str], body: bytes = b"") -> Iterator[socket.socket]:
        """A raw connection on which a request was sent."""
        raw = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        if self.url.startswith("https"):
            raw = ssl._create_unverified_context().wrap_socket(raw)
        with raw:
            raw.sendall("\r\n".join([*head, "", ""]).encode("latin-1") + body)
            yield raw
