"""A real MONAI Label server in a process of its own, on a free port of the loopback address."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import requests

REPOSITORY = Path(__file__).resolve().parents[2]
APP = REPOSITORY / "apps" / "refseg"
PATIENCE_S = 300  # to come up on a box that is busy with other things


class Server:
    """Start with `start`, end with `stop`; `log` is what it said."""

    def __init__(
        self,
        folder: Path,
        studies: Path,
        conf: Mapping[str, str] | None = None,
        *,
        workers: int = 1,
    ) -> None:
        self.studies = studies
        self._folder = folder
        rooms = {"bank": str(folder / "the bank"), "site_models": str(folder / "models")}
        self._conf = {**rooms, "device": "cpu", "train_after": "0", **(conf or {})}
        self._workers = workers
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self.url = ""
        self.seconds_to_start = 0.0

    @property
    def log(self) -> str:
        return (self._folder / "server.log").read_text(errors="replace")

    def start(self) -> "Server":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment = {
            **os.environ,
            "MONAI_LABEL_SESSION_PATH": str(self._folder / "sessions"),
            "HF_HUB_OFFLINE": "1",
        }
        if self._workers == 1:
            command = ["monailabel.main", "start_server", "--app", str(APP)]
            command += ["--studies", str(self.studies), "--host", "127.0.0.1", "--port", port]
            for key, value in self._conf.items():
                command += ["--conf", key, value]
        else:  # the launcher cannot set how long a worker may take to import torch
            environment |= {
                "MONAI_LABEL_APP_DIR": str(APP),
                "MONAI_LABEL_STUDIES": str(self.studies),
                "MONAI_LABEL_APP_CONF": json.dumps(self._conf),
                "PYTHONPATH": str(APP),
            }
            command = ["uvicorn", "--workers", str(self._workers), "--port", port]
            command += ["--timeout-worker-healthcheck", "120", "monailabel.app:app"]
        self._output = (self._folder / "server.log").open("ab")
        start = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=self._folder,
            env=environment,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.url = f"http://127.0.0.1:{port}"
        while True:
            try:
                if requests.get(f"{self.url}/info/", timeout=120).ok:
                    break
            except requests.ConnectionError:
                time.sleep(0.2)
            gone = self._process.poll() is not None
            if gone or time.monotonic() - start > PATIENCE_S:
                self.stop()
                raise AssertionError(f"the server did not come up:\n{self.log[-3000:]}")
        self.seconds_to_start = time.monotonic() - start
        return self

    def stop(self) -> None:
        if self._process is not None:
            try:
                os.killpg(self._process.pid, signal.SIGTERM)
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            except ProcessLookupError:
                self._process.wait()
            self._process = None
        if self._output is not None:
            self._output.close()
            self._output = None

    def get(self, path: str, **params: str) -> requests.Response:
        return requests.get(f"{self.url}{path}", params=params, timeout=120)

    def post_infer(
        self, image: str, params: Mapping[str, object] | None = None, output: str | None = None
    ) -> requests.Response:
        query = {"image": image, **({"output": output} if output else {})}
        form = {"params": (None, json.dumps(params or {}))}
        return requests.post(f"{self.url}/infer/refseg", params=query, files=form, timeout=300)
