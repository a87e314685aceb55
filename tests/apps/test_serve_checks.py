"""What `serve` lets through to the platform, and how errors are told."""

import asyncio
import io
import shutil
import struct
import threading
import zipfile
import zlib
from typing import Any

import pytest
import requests
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.datastructures import UploadFile

from apps.refseg.server import platform
from apps.refseg.server.answers import request_id, translated
from apps.refseg.server.checks import LONGEST_LIST, check_arguments, client_of, not_served
from apps.refseg.server.lanes import Lane
from apps.refseg.server.platform import _in_lane
from lib.errors import RequestError

ENDINGS = [".nii.gz", ".png", ".nrrd", ".mhd"]


def upload(name: str, data: bytes = b"") -> UploadFile:
    return UploadFile(io.BytesIO(data), filename=name)


def archive(**members: bytes) -> UploadFile:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name.replace("__", "../"), data)
    return upload("x.zip", buffer.getvalue())


def bomb() -> UploadFile:
    """A zip archive whose list of members says that one unpacks to 4 GB."""
    data = bytearray(archive(a=b"1").file.read())
    entry = data.index(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = b"\xf0\xff\xff\xff"
    return upload("x.zip", bytes(data))


def listing(files: int) -> UploadFile:
    """A zip archive that is a list of files alone."""
    data = archive(a=b"1").file.read()
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    told = data[start:end] * files
    record = bytearray(data[end:])
    record[12:20] = struct.pack("<LL", len(told), 0)
    return upload("x.zip", told + bytes(record))


def future() -> UploadFile:
    """A zip archive that says that a later version of zip is needed to unpack it."""
    data = bytearray(archive(a=b"1").file.read())
    entry = data.index(b"PK\x01\x02")
    data[entry + 6] = 99
    return upload("x.zip", bytes(data))


def label(name: str, data: bytes = b"", **more: object) -> dict[str, Any]:
    return {"image": "a", "label": upload(name, data), "params": "{}", "tag": "final", **more}


class Output:
    def __init__(self, value: str) -> None:
        self.value = value


@pytest.mark.parametrize(
    ("path", "given"),
    [
        ("/activelearning/{strategy}", {"strategy": "refseg", "params": {"strategy": [1]}}),
        ("/activelearning/{strategy}", {"strategy": "refseg", "params": {"client_id": [1]}}),
        ("/datastore/image/info", {"image": "a", "info": '{"strategy": 5}'}),
        ("/datastore/image/info", {"image": "a", "info": '{"strategy": {"refseg": 5}}'}),
        ("/datastore/image", {"image": "a", "check_sum": "CRC:zz"}),
        ("/infer/{model}", {"image": "a", "params": "{}", "output": Output("dicom_seg")}),
        (
            "/infer/{model}",
            {"image": "a", "params": '{"result_write_to_file": "no"}', "output": Output("image")},
        ),
        ("/datastore/label", label("x.nrrd", b"NRRD0004\ndata file: /etc/passwd\n\n")),
        ("/datastore/label", label("x.mhd", b"ElementDataFile = x.raw\r\n")),
        ("/datastore/label", label("x.gif")),
        ("/datastore/label", label("../x.png")),
        ("/datastore/label", label("x.png", tag=".history")),
        ("/session/", {"uncompress": True, "files": [upload("x.zip", b"no zip")]}),
        ("/session/", {"uncompress": True, "files": [upload("x.tar.gz")]}),
        ("/session/", {"uncompress": True, "files": [archive(__x=b"1")]}),
        ("/session/", {"uncompress": True, "files": [bomb()]}),
        ("/session/", {"uncompress": True, "files": [future()]}),
        ("/session/", {"uncompress": True, "files": [listing(100_001)]}),
        ("/session/", {"uncompress": True, "files": [upload("x.zip", b"no PK\x05\x06 zip")]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_platform_could_not_bear_is_refused(path: str, given: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        check_arguments(path, given, lambda: ENDINGS)


@pytest.mark.parametrize(
    ("path", "given"),
    [
        ("/datastore/label", label("x.nii.gz", params='{"label_info": [{"name": "é", "idx": 1}]}')),
        ("/datastore/label", label("a b.c.NII.GZ", image="a b.c %é+")),
        ("/datastore/label", label("x.mhd", b"ElementDataFile = LOCAL\n")),
        ("/infer/{model}", {"image": "a", "params": '{"image": "a"}', "session_id": ""}),
        ("/infer/{model}", {"image": "", "params": "", "session_id": "1f-2"}),
        ("/activelearning/{strategy}", {"strategy": "refseg", "params": None}),
        ("/datastore/image/info", {"image": "a", "info": '{"strategy": {"refseg": {"ts": 1}}}'}),
        ("/datastore/image", {"image": None, "file": upload("x.png"), "params": "{}"}),
        ("/session/", {"uncompress": True, "files": [archive(a=b"1", b=b"2")]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_clients_send_passes(path: str, given: dict[str, Any]) -> None:
    check_arguments(path, given, lambda: ENDINGS)


def test_a_list_of_files_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_: object) -> None:
        raise AssertionError

    long = listing(LONGEST_LIST // 46)  # each has a name of one letter
    monkeypatch.setattr(zipfile, "ZipFile", read)
    with pytest.raises(RequestError, match=str(LONGEST_LIST)):
        check_arguments("/session/", {"uncompress": True, "files": [long]}, lambda: ENDINGS)


def test_a_request_is_checked_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive of many files would hold up everybody else."""
    threads = []

    def check(*_: object) -> None:
        threads.append(threading.current_thread())

    async def endpoint() -> dict[str, str]:
        return {}

    async def stays() -> dict[str, str]:
        await asyncio.Event().wait()
        return {}

    async def scene() -> int:
        lane = Lane("x", at_once=1, waiting=1)
        call = _in_lane(APIRoute("/x", endpoint), lane)
        request = Request({"type": "http", "client": None}, stays)
        return (await call(refseg_request=request)).status_code

    monkeypatch.setattr(platform, "check_arguments", check)
    assert asyncio.run(scene()) == 200
    assert threads
    assert threading.main_thread() not in threads


def test_an_upload_is_as_it_was_after_its_header_was_looked_at() -> None:
    given = label("x.nrrd", b"NRRD0004\ntype: short\n\nvoxels")
    check_arguments("/datastore/label", given, lambda: ENDINGS)
    assert given["label"].file.read() == b"NRRD0004\ntype: short\n\nvoxels"


def test_routes_without_anything_behind_them_say_so() -> None:
    assert "whole-slide" in not_served("/infer/wsi/{model}", {}, "/x")
    assert "weights" in not_served("/model/{model}", {}, "/x")
    assert "folder" in not_served("/proxy/dicom/{path:path}", {"path": "a"}, "/x")
    assert not not_served("/proxy/dicom/{path:path}", {"path": "a"}, "http://pacs/dicom-web")
    assert not_served("/ohif/{path:path}", {"path": "assets"}, "/x")
    assert not not_served("/ohif/{path:path}", {"path": ""}, "/x")


def test_turns_go_by_the_clients_id_then_by_its_address() -> None:
    assert client_of({"params": '{"client_id": "me"}'}, "10.0.0.1") == "10.0.0.1 me"
    assert client_of({"params": {"client_id": "me"}}, "10.0.0.1") == "10.0.0.1 me"
    assert client_of({"params": "no JSON"}, "10.0.0.1") == "10.0.0.1"
    assert client_of({}, "10.0.0.1") == "10.0.0.1"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OverflowError("x"), 422),
        (zlib.error("x"), 422),
        (zipfile.BadZipFile("x"), 422),
        (shutil.ReadError("x"), 422),
        (requests.ConnectionError("x"), 502),
        (FileNotFoundError("x"), 404),
        (OSError(28, "full"), 507),
        (OSError(36, "name too long"), 422),
        (OSError(30, "read-only"), 503),
        (RequestError("x"), 422),
    ],
)
def test_an_error_has_the_status_of_its_cause(error: Exception, status: int) -> None:
    assert translated(error).status_code == status


def test_what_nobody_expected_is_told_by_its_id_alone(caplog: pytest.LogCaptureFixture) -> None:
    token = request_id.set("0123456789ab")
    try:
        answer = translated(ValueError("secret"))
    finally:
        request_id.reset(token)
    assert answer.status_code == 500
    assert "0123456789ab" in answer.detail
    assert "secret" not in answer.detail
    assert "0123456789ab" in caplog.text
    assert "secret" in caplog.text
