"""Logs without names: what was known once stays hidden, whatever became of it."""

import errno
import json
import logging
from pathlib import Path

import pytest
import requests

from apps.refseg.server import logs
from apps.refseg.server.answers import translated
from apps.refseg.server.logs import JsonLines, Pseudonyms
from lib.studies.datastore import StudiesDatastore

NAME = "DOE^JANE 1970"


def lines_of(pseudonyms: Pseudonyms, caplog: pytest.LogCaptureFixture) -> str:
    """What a JSON log would hold of all that was told since."""
    form = JsonLines(pseudonyms)
    return "\n".join(json.loads(form.format(record))["message"] for record in caplog.records)


def test_a_name_stays_hidden_when_its_image_is_gone() -> None:
    names = [NAME, "another"]
    pseudonyms = Pseudonyms(lambda: names, [])
    before = pseudonyms.hide(f"new image {NAME}")
    names.remove(NAME)
    assert pseudonyms.hide(f"new image {NAME}") == before
    assert "DOE" not in before
    assert pseudonyms.hide("another") != "another"


def test_only_so_many_names_of_what_is_gone_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "KEPT_NAMES", 2)
    names: list[str] = []
    pseudonyms = Pseudonyms(lambda: names, [])
    for name in ("first", "second", "third", "fourth"):
        names[:] = [name]
        pseudonyms.hide("")
    assert pseudonyms.hide("first") == "first"
    for name in ("second", "third", "fourth"):
        assert name not in pseudonyms.hide(name)


def test_while_the_server_starts_ids_are_hidden_by_the_names_of_files() -> None:
    pseudonyms = Pseudonyms(lambda: ["DOE.JANE.nii.gz", "labels", "DOE"], [])
    assert "JANE" not in pseudonyms.hide("new image DOE.JANE of these labels")
    assert "labels" in pseudonyms.hide("new image DOE.JANE of these labels")


@pytest.mark.parametrize("known", [True, False], ids=["seen before", "never seen"])
def test_an_image_taken_out_of_the_folder_is_not_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, known: bool
) -> None:
    """Never seen: the server was not running, or another process told of it."""
    studies = tmp_path / "studies"
    series = studies / NAME
    series.mkdir(parents=True)
    (series / "1.dcm").write_bytes(bytes(128) + b"DICM")
    (studies / f"{NAME}+2.png").write_bytes(b"")
    store = StudiesDatastore(str(studies), copies=tmp_path / "copies", watch=False)
    assert {NAME, f"{NAME}+2"} <= set(store.list_images())
    pseudonyms = Pseudonyms(store.names_now if known else list, [str(studies)])
    pseudonyms.hide("")
    caplog.clear()
    caplog.set_level(logging.INFO)
    (series / "1.dcm").unlink()
    series.rmdir()
    (studies / f"{NAME}+2.png").unlink()
    store.refresh()
    told = lines_of(pseudonyms, caplog)
    assert told.count("is gone") == 2
    assert "DOE" not in told
    assert "JANE" not in told


@pytest.mark.parametrize(
    "error",
    [
        requests.ConnectionError("no /studies?PatientName=DOE%5EJANE* (Caused by ...)"),
        requests.ReadTimeout("no /studies?PatientName=DOE%5EJANE*"),
        requests.exceptions.ChunkedEncodingError("DOE%5EJANE"),
        requests.exceptions.InvalidHeader("DOE%5EJANE"),
        requests.HTTPError("500 for url: /studies?PatientName=DOE%5EJANE*"),
    ],
)
def test_a_pacs_that_fails_is_told_of_by_kind_and_host(
    error: requests.RequestException, caplog: pytest.LogCaptureFixture
) -> None:
    url = "http://me:secret@pacs.local:8042/dicom-web/studies?PatientName=DOE%5EJANE*"
    error.request = requests.Request("GET", url).prepare()
    error.errno = errno.ENOSPC  # these are OSErrors, too
    answer = translated(error)
    assert answer.status_code == 502
    for told in (caplog.text, answer.detail):
        assert "DOE" not in told
        assert "secret" not in told
    assert f"{type(error).__name__} at pacs.local:8042" in caplog.text
