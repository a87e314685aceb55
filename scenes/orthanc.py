"""Orthanc with its DICOMweb plug-in, as Debian packs it, on free ports with a throw-away folder."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

from demo.server import ServerError, free_port, log_tail, stop

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
START_SECONDS = 60.0
PACKAGES = "orthanc orthanc-dicomweb"


def program() -> str:
    """Path of Orthanc; empty where it, or its plug-in, is not installed."""
    found = shutil.which("Orthanc", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    return found if found and PLUGIN.is_file() else ""


class Orthanc:
    """A PACS for as long as it is needed.

    Args:
        folder: for its files; nothing of them is kept by anyone else.
        port: of HTTP; 0: a free one.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self._folder = folder
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.dicomweb = f"{self.url}/dicom-web"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Orthanc":
        """Start it and wait until it answers; what it held before is there again."""
        self._folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "Name": "RefSeg",
            "StorageDirectory": str(self._folder / "storage"),
            "IndexDirectory": str(self._folder / "index"),
            "HttpPort": self.port,
            "DicomServerEnabled": False,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "Plugins": [str(PLUGIN)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }
        file = self._folder / "orthanc.json"
        file.write_text(json.dumps(settings, indent=1))
        log = self._folder / "orthanc.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [program(), str(file)], stdout=output, stderr=output, start_new_session=True
            )
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.dicomweb}/studies", timeout=5).ok:
                    return self
            time.sleep(0.2)
        self.stop()
        msg = f"Orthanc did not answer within {START_SECONDS:.0f} s.\n{log_tail(log)}"
        raise ServerError(msg)

    def stop(self) -> None:
        """End it; its files stay."""
        if self._process is not None:
            stop(self._process)
            self._process = None

    def send(self, folder: Path) -> None:
        """Send it all files of a folder."""
        for file in sorted(folder.iterdir()):
            requests.post(
                f"{self.url}/instances", data=file.read_bytes(), timeout=60
            ).raise_for_status()

    def find(self, **query: str) -> list[str]:
        """Orthanc's own ids of the series that fit, such as Modality="SEG"."""
        wanted: dict[str, Any] = {"Level": "Series", "Query": query}
        answer = requests.post(f"{self.url}/tools/find", json=wanted, timeout=60)
        answer.raise_for_status()
        return [str(found) for found in answer.json()]

    def files(self, series: str) -> list[bytes]:
        """The files of one series."""
        instances = requests.get(f"{self.url}/series/{series}/instances", timeout=60).json()
        return [
            requests.get(f"{self.url}/instances/{entry['ID']}/file", timeout=60).content
            for entry in instances
        ]

    def delete(self, series: str) -> None:
        """Delete a series."""
        requests.delete(f"{self.url}/series/{series}", timeout=60).raise_for_status()


@contextlib.contextmanager
def running_orthanc(folder: Path) -> Iterator[Orthanc]:
    """An Orthanc that ends with the block."""
    orthanc = Orthanc(folder).start()
    try:
        yield orthanc
    finally:
        orthanc.stop()
