"""What OHIF asks the PACS through the server: with its query, without our token, and no more."""

import logging
from collections.abc import Iterator

import numpy as np
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from apps.refseg.server.pacs_proxy import proxy_routes
from tests.dicom_series import write_series
from tests.small_pacs import SmallPacs, running_pacs


@pytest.fixture
def pacs(tmp_path) -> Iterator[SmallPacs]:
    with running_pacs() as running:
        voxels = np.zeros((4, 5, 2), np.uint16)
        for n in range(2):
            folder = tmp_path / f"s{n}"
            write_series(folder, voxels, spacing_mm=(1, 1, 2), modality="CT", patient=f"P{n}^A")
            running.add(folder)
        yield running


@pytest.fixture
def client(pacs: SmallPacs) -> TestClient:
    app = FastAPI()
    app.include_router(proxy_routes(pacs.url))
    return TestClient(app)


def test_a_search_finds_what_it_asks_for_and_not_everything(client: TestClient) -> None:
    found = client.get("/proxy/dicom/qido/series", params={"PatientID": "P1^A", "limit": 10})
    assert found.status_code == 200
    assert found.headers["content-type"] == "application/dicom+json"
    assert [row["00100020"]["Value"] for row in found.json()] == [["P1^A"]]


def test_files_come_back_as_the_pacs_sends_them(client: TestClient, pacs: SmallPacs) -> None:
    first = pacs.sets()[0]
    path = f"studies/{first.StudyInstanceUID}/series/{first.SeriesInstanceUID}"
    found = client.get(f"/proxy/dicom/wado/{path}")
    assert found.headers["content-type"].startswith("multipart/related")
    assert pacs.files[str(first.SOPInstanceUID)] in found.content
    assert client.get(f"/proxy/dicom/qido/{path}/metadata").json()[0]["00080060"]


def test_our_token_and_cookies_stay_with_us(client: TestClient, pacs: SmallPacs) -> None:
    secrets = {"Authorization": "Bearer secret", "Cookie": "refseg=secret"}
    assert client.get("/proxy/dicom/qido/series", headers=secrets).status_code == 200
    assert "secret" not in str(pacs.asked)


@pytest.mark.parametrize("service", ["stow", "wado"])
def test_what_ohif_stores_is_in_the_pacs(client: TestClient, pacs: SmallPacs, service: str) -> None:
    content = next(iter(pacs.files.values()))
    pacs.files.clear()
    kind = 'multipart/related; type="application/dicom"; boundary=b'
    body = b"--b\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n--b--"
    answer = client.post(
        f"/proxy/dicom/{service}/studies", content=body, headers={"Content-Type": kind}
    )
    assert answer.status_code == 200
    assert list(pacs.files.values()) == [content]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/proxy/dicom/wado/%2e%2e/instances"),
        ("GET", "/proxy/dicom/wado/studies/%2e%2e/%2e%2e/system"),
        ("GET", "/proxy/dicom/wado/studies/..%5c..%5csystem"),
        ("POST", "/proxy/dicom/stow/instances"),
        ("POST", "/proxy/dicom/qido/studies"),
        ("DELETE", "/proxy/dicom/wado/studies/1.2"),
        ("GET", "/proxy/dicom/other/studies"),
    ],
)
def test_nothing_but_dicomweb_can_be_reached(
    client: TestClient, pacs: SmallPacs, method: str, path: str
) -> None:
    assert 400 <= client.request(method, path).status_code < 500
    assert not pacs.asked


def test_a_pacs_that_is_away_is_a_502_and_no_patient_is_named_in_the_log(
    client: TestClient, pacs: SmallPacs, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pacs.fault = "down"
    answer = client.get("/proxy/dicom/qido/studies", params={"PatientName": "DOE^JANE*"})
    assert answer.status_code == 502
    assert "does not answer" in answer.json()["detail"]
    ours = [line.getMessage() for line in caplog.records if "httpx" not in line.name]  # the client
    assert any("ConnectionError" in line for line in ours)
    assert not any("DOE" in line or "JANE" in line for line in ours)


def test_a_pacs_that_dies_in_its_answer_is_a_502(client: TestClient, pacs: SmallPacs) -> None:
    pacs.fault = "breaks off"
    answer = client.get("/proxy/dicom/qido/series")
    assert answer.status_code == 502
    assert "broke off (ChunkedEncodingError)" in answer.json()["detail"]
