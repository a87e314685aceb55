"""The server that the benchmarks of bad input, sudden ends and load talk to."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import requests

from benchmarks.fuzz_files import picture, volume

MAIN = Path(__file__).resolve().parents[1] / "apps" / "refseg" / "main.py"
PATIENCE_S = 900


class FuzzServer:
    """Started when entered, and again after it has died.

    Args:
        folder: of its studies, banks, models and log.
        options: of `main.py serve`.
        seeds: whether it begins with a few images that may be used up.
        conf: options of the app.
        plain: MONAI Label's own `start_server`, which knows no `options`.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        seeds: bool = True,
        conf: Mapping[str, str] | None = None,
        plain: bool = False,
    ) -> None:
        self._folder = folder.resolve()
        self._options = options
        self._seeds = seeds
        self._plain = plain
        folder = self._folder
        rooms = {"bank": str(folder / "bank"), "site_models": str(folder / "site models")}
        self._conf = {**rooms, "device": "cpu", "train_after": "0", **(conf or {})}
        self._studies = folder / "studies"
        self._log = folder / "server.log"
        self.url = ""

    def __enter__(self) -> "FuzzServer":
        self._studies.mkdir(parents=True, exist_ok=True)
        for number in range(2 if self._seeds else 0):
            (self._studies / f"seed{number}.png").write_bytes(picture(number))
            (self._studies / f"volume{number}.nii.gz").write_bytes(volume(number))
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def rss(self) -> int:
        """Bytes of memory that the server holds."""
        try:
            return int(psutil.Process(self.process.pid).memory_info().rss)
        except psutil.NoSuchProcess:
            return 0

    def log(self) -> str:
        """What it said."""
        return self._log.read_text(errors="replace")

    def alive(self) -> bool:
        """Whether it lives; if not, another one is started."""
        if self.process.poll() is None:
            return True
        self._start()
        return False

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment = {**os.environ, "MONAI_LABEL_SESSION_PATH": str(self._folder / "sessions")}
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                self._command(port), env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        self.url = f"http://127.0.0.1:{port}"
        ready = "/info/" if self._plain else "/readyz"
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if requests.get(f"{self.url}{ready}", timeout=30).ok:
                    return
            except requests.RequestException:
                time.sleep(0.3)
        self.process.send_signal(signal.SIGUSR1)  # it tells where each thread is
        time.sleep(2)
        msg = f"the server did not come up: {self.log()[-6000:]}"
        raise RuntimeError(msg)

    def _command(self, port: str) -> list[str]:
        where = ["--studies", str(self._studies), "--port", port]
        if self._plain:
            command = [sys.executable, "-m", "monailabel.main", "start_server", *where]
            command += ["--app", str(MAIN.parent), "--host", "127.0.0.1"]
            for name, value in self._conf.items():
                command += ["--conf", name, value]
            return command
        command = [sys.executable, str(MAIN), "serve", *where]
        for name, value in self._conf.items():
            command += ["--conf", f"{name}={value}"]
        return [*command, "--body-timeout", "5", "--max-upload-mb", "64", *self._options]
