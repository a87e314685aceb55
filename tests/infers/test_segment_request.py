"""From a request's dictionary to a checked request, and how labels are numbered."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import HTTPException
from PIL import Image

from lib.errors import RequestError
from lib.infers.refseg import RefSeg
from lib.infers.request import SegmentRequest, chosen_labels
from lib.memory.records import SyncReport
from lib.runtime import ListLabels, Runtime
from lib.segmentation import Options
from lib.settings import RefSegSettings
from lib.types import LabelledImage


def parse(settings: RefSegSettings | None = None, **request: Any) -> SegmentRequest:
    return SegmentRequest.parse(
        {"image": "/x/a.png", **request}, settings or RefSegSettings(k=5, device="cpu")
    )


def test_what_is_not_said_is_as_the_server_was_started() -> None:
    assert parse().options == Options(k=5)
    assert parse(k="", own_labels=None, axis="").options == Options(k=5)


def test_clients_send_numbers_and_switches_in_many_shapes() -> None:
    assert parse(k="3").options.k == 3
    assert parse(k=3.0).options.k == 3  # OHIF knows no whole numbers
    assert parse(own_labels="False").options.own_labels is False
    assert parse(every_slice="true").options.every_slice is True


def test_slices_are_cut_and_windowed_as_the_references_were() -> None:
    server = RefSegSettings(window=(-160.0, 240.0), axis="sagittal")
    for same in ({"window": "-160, 240"}, {"window": [-160, 240]}, {"axis": "sagittal"}):
        parse(server, **same)
    parse(window="", axis="auto")
    for settings, other, option in (
        (server, {"window": "0,80"}, "--conf window"),
        (None, {"window": [0, 80]}, "--conf window"),
        (server, {"axis": "auto"}, "--conf axis"),
        (None, {"axis": "axial"}, "--conf axis"),
    ):
        with pytest.raises(RequestError, match=option):
            parse(settings, **other)


def test_keys_of_other_tasks_and_of_the_platform_are_let_pass() -> None:
    parse(device="NVIDIA H200", logging="INFO", client_id="me", foreground=[], model="refseg")


@pytest.mark.parametrize(
    ("request_", "prompt"),
    [
        ({}, ()),
        ({"label_prompt": []}, ()),
        ({"label_prompt": ["liver"]}, ("liver",)),
        ({"label_prompt": [2, "3"]}, (2, 3)),
        ({"label_prompt": "liver, spleen"}, ("liver", "spleen")),
    ],
)
def test_a_prompt_is_a_list_of_names_or_numbers(
    request_: dict[str, Any], prompt: tuple[str | int, ...]
) -> None:
    assert parse(**request_).prompt == prompt


@pytest.mark.parametrize(
    "request_",
    [
        {"k": 65},
        {"k": True},
        {"k": float("nan")},
        {"k": [8]},
        {"cap_per_case": -1},
        {"own_labels": "maybe"},
        {"window": "1"},
        {"axis": "oblique"},
        {"label_prompt": {"liver": 1}},
        {"result_dtype": "float32"},
        {"result_dtype": "no type"},
        {"result_dtype": "i4,,"},
        {"result_dtype": ["uint8"]},
        {"result_compress": "a bit"},
    ],
)
def test_what_is_not_allowed_is_named(request_: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(request_))):
        parse(**request_)


def test_a_type_is_one_that_clients_send() -> None:
    assert parse(result_dtype="uint8").largest == 255
    assert parse(result_dtype="int16").largest == 32767
    for name in ("uint16", "int32", "int64", "", None):
        assert parse(result_dtype=name).largest == 65535


def test_chosen_labels_keep_the_order_of_their_numbers() -> None:
    numbers = {"liver": 1, "spleen": 2, "kidney": 3}
    assert chosen_labels((), numbers) == ("liver", "spleen", "kidney")
    assert chosen_labels((3, "liver"), numbers) == ("liver", "kidney")
    with pytest.raises(RequestError, match="2 spleen"):
        chosen_labels((4,), numbers)


def test_an_image_that_the_datastore_does_not_know_is_not_found(tmp_path: Path) -> None:
    runtime = Runtime(RefSegSettings(), bank_root=tmp_path, studies="x")
    with pytest.raises(HTTPException) as told:
        RefSeg(runtime, list)({"image": ""})
    assert told.value.status_code == 404
    with pytest.raises(HTTPException) as told:
        RefSeg(runtime, list)({"image": str(tmp_path / "gone.png")})
    assert told.value.status_code == 422


def test_labels_by_option_are_known_before_anything_is_labelled(tmp_path: Path) -> None:
    settings = RefSegSettings(labels="spleen,liver")  # type: ignore[arg-type]
    task = RefSeg(Runtime(settings, bank_root=tmp_path, studies="x"), list)
    assert task.info()["labels"] == {"spleen": 1, "liver": 2}
    assert not list(tmp_path.rglob("*.sqlite"))  # asking for it opens no bank


def test_info_names_what_is_being_learned_and_forgets_a_name_that_is_gone(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (24, 24)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    drawn = np.zeros((24, 24), np.uint8)
    drawn[4:12, 4:12] = 1
    Image.fromarray(drawn).save(tmp_path / "l.png")
    label = LabelledImage("a", tmp_path / "a.png", tmp_path / "l.png", {1: "Livr"})
    labelled, saved = [label], threading.Event()

    def wait_and_list() -> list[LabelledImage]:
        assert saved.wait(60)
        return labelled

    settings = RefSegSettings(segmenter="matchseg", embedder="bundled", device="cpu")
    runtime = Runtime(settings, bank_root=tmp_path / "bank", studies="x")
    task = RefSeg(runtime, lambda: labelled)
    runtime.sync_soon(wait_and_list)
    task.announce("a", ["Livr"])
    assert task.info()["labels"] == {"Livr": 1}
    task.announce("a", ["Liver"])  # submitted again, before the first was learned
    assert task.info()["labels"] == {"Liver": 2}
    labelled[0] = replace(label, label_names={1: "Liver"})
    saved.set()
    while runtime.learning:
        time.sleep(0.02)
    assert task.info()["labels"] == {"Liver": 2}

    labelled[0] = replace(label, label_names={1: "liver"})  # renamed once more
    file, answer = task({"image": str(tmp_path / "a.png"), "result_write_to_file": False})
    assert file is None
    assert answer["message"] == ""
    assert task.info()["labels"] == {"liver": 3}
    again = RefSeg(Runtime(settings, bank_root=tmp_path / "bank", studies="x"), lambda: labelled)
    again({"image": str(tmp_path / "a.png"), "result_write_to_file": False})
    assert again.info()["labels"] == {"liver": 3}


class Hurried(Runtime):
    """The image's own label is deleted right after it was listed and learned."""

    def sync(self, list_labels: ListLabels) -> tuple[list[LabelledImage], SyncReport]:
        labelled, report = super().sync(list_labels)
        for one in labelled:
            one.label_path.unlink()
        return labelled, report


def test_a_label_that_is_deleted_while_its_image_is_segmented_is_no_error(tmp_path: Path) -> None:
    Image.new("L", (24, 24)).save(tmp_path / "a.png")
    Image.new("L", (24, 24), 1).save(tmp_path / "l.png")
    label = LabelledImage("a", tmp_path / "a.png", tmp_path / "l.png", {1: "liver"})
    settings = RefSegSettings(segmenter="matchseg", embedder="bundled", device="cpu")
    runtime = Hurried(settings, bank_root=tmp_path / "bank", studies="x")
    task = RefSeg(runtime, lambda: [label] if label.label_path.exists() else [])
    _, answer = task({"image": str(tmp_path / "a.png"), "result_write_to_file": False})
    assert (answer["own_slices"], answer["warnings"]) == (0, [])
    assert answer["label_names"] == {"background": 0}


def test_missing_weights_are_told_with_the_command_that_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nothing"))
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    settings = RefSegSettings(segmenter="sam2", weights=tmp_path, device="cpu")
    task = RefSeg(Runtime(settings, bank_root=tmp_path, studies="x"), list)
    with pytest.raises(HTTPException) as told:
        task({"image": str(tmp_path / "a.png")})
    assert told.value.status_code == 503
    assert "weights fetch sam2.1-tiny" in told.value.detail
