"""A DICOMweb server of a few lines, over loopback: what the standard says, and faults on demand."""

import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pydicom
from pydicom.dataset import Dataset

BOUNDARY = "part-of-it"


class SmallPacs:
    """Holds data sets in memory.

    Attributes:
        files: content by SOP instance UID.
        stored: UIDs in the order in which they were stored.
        asked: method, path with query, and headers of each request.
        fault: "" or what is wrong: `down` (closes the connection), `refuses` (to store: 409),
            `fails` (says 200, but nothing was stored), `garbage` (no JSON), `breaks off`
            (closes the connection in the middle of its answer).
        broken_at: requests whose path holds this are answered with 500; "": none.
        hangs_at: those whose path holds this wait for `go_on`, once they have set `hangs`.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.stored: list[str] = []
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.fault = self.broken_at = self.hangs_at = ""
        self.hangs, self.go_on = threading.Event(), threading.Event()
        self.url = ""

    def add(self, folder: Path) -> None:
        for file in sorted(folder.iterdir()):
            self._keep(file.read_bytes())

    def drop(self, uid: str) -> None:
        del self.files[uid]

    def _keep(self, content: bytes) -> Dataset:
        found = pydicom.dcmread(io.BytesIO(content))
        self.files[str(found.SOPInstanceUID)] = content
        self.stored.append(str(found.SOPInstanceUID))
        return found

    def sets(self, **wanted: str) -> list[Dataset]:
        found = [
            pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
            for content in list(self.files.values())
        ]
        return [one for one in found if all(str(one.get(k, "")) == v for k, v in wanted.items())]


@contextmanager
def running_pacs() -> Iterator[SmallPacs]:
    pacs = SmallPacs()

    class Handler(_Handler):
        held = pacs

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        pacs.url = f"http://127.0.0.1:{server.server_address[1]}/dicom-web"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield pacs
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    held: SmallPacs

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if not self._begin():
            return
        address = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        path = address.path.removeprefix("/dicom-web")
        if path == "/series":
            self._json(self._series(query))
            return
        found = re.fullmatch(
            r"/studies/([\d.]+)/series/([\d.]+)(?:/instances/([\d.]+))?(/metadata)?", path
        )
        if not found:
            self.send_error(404)
            return
        wanted = {"StudyInstanceUID": found[1], "SeriesInstanceUID": found[2]}
        sets = self.held.sets(**wanted, **({"SOPInstanceUID": found[3]} if found[3] else {}))
        if found[4]:
            self._json([one.to_json_dict() for one in sets])
        else:
            self._parts([self.held.files[str(one.SOPInstanceUID)] for one in sets])

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._begin():
            return
        if self.held.fault == "refuses":
            self.send_error(409)
            return
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
        assert boundary
        answer = Dataset()
        answer.ReferencedSOPSequence, answer.FailedSOPSequence = [], []
        for part in body.split(b"--" + boundary[1].encode())[1:-1]:
            content = part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
            row = Dataset()
            if self.held.fault == "fails":
                row.FailureReason = 272
                answer.FailedSOPSequence.append(row)
            else:
                row.ReferencedSOPInstanceUID = self.held._keep(content).SOPInstanceUID
                answer.ReferencedSOPSequence.append(row)
        for name in ("ReferencedSOPSequence", "FailedSOPSequence"):
            if not answer[name].value:
                del answer[name]
        self._json(answer.to_json_dict())

    def _begin(self) -> bool:
        self.held.asked.append((self.command, self.path, dict(self.headers)))
        if self.held.fault == "down":
            self.close_connection = True
            self.connection.close()
            return False
        if self.held.hangs_at and self.held.hangs_at in self.path:
            self.held.hangs.set()
            self.held.go_on.wait(60)
        if self.held.broken_at and self.held.broken_at in self.path:
            self.send_error(500)
            return False
        return True

    def _series(self, query: dict[str, str]) -> list[dict[str, Any]]:
        if query.get("offset", "0") != "0":
            return []
        fields = ("Modality", "SeriesInstanceUID", "StudyInstanceUID", "PatientID")
        rows: dict[str, Dataset] = {}
        for one in self.held.sets(**{k: v for k, v in query.items() if k in fields}):
            row = rows.setdefault(str(one.SeriesInstanceUID), Dataset())
            for name in fields:
                setattr(row, name, one.get(name))
            row.NumberOfSeriesRelatedInstances = (
                int(row.get("NumberOfSeriesRelatedInstances") or 0) + 1
            )
        return [row.to_json_dict() for row in rows.values()]

    def _json(self, value: object) -> None:
        content = b"<html>" if self.held.fault == "garbage" else json.dumps(value).encode()
        self._send("application/dicom+json", content)

    def _parts(self, contents: list[bytes]) -> None:
        head = f"--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        body = b"".join(head + content + b"\r\n" for content in contents)
        kind = f'multipart/related; type="application/dicom"; boundary={BOUNDARY}'
        self._send(kind, body + f"--{BOUNDARY}--".encode())

    def _send(self, kind: str, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        if self.held.fault == "breaks off":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n" % len(content) + content[: len(content) // 2])
            self.close_connection = True
            return
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
