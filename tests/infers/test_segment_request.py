"""From a request's dictionary to a checked request, and how labels are numbered."""

from pathlib import Path
from typing import Any

import pytest
from fastapi import HTTPException

from lib.errors import RequestError
from lib.infers.refseg import RefSeg
from lib.infers.request import SegmentRequest, chosen_labels
from lib.runtime import Runtime
from lib.segmentation import Options
from lib.settings import RefSegSettings


def parse(**request: Any) -> SegmentRequest:
    return SegmentRequest.parse({"image": "/x/a.png", **request}, Options(k=5))


def test_what_is_not_said_is_as_the_server_was_started() -> None:
    assert parse().options == Options(k=5)
    assert parse(k="", own_labels=None, axis="").options == Options(k=5)


def test_clients_send_numbers_and_switches_in_many_shapes() -> None:
    assert parse(k="3").options.k == 3
    assert parse(k=3.0).options.k == 3  # OHIF knows no whole numbers
    assert parse(own_labels="False").options.own_labels is False
    assert parse(window="-160, 240").options.window == (-160.0, 240.0)
    assert parse(window=[0, 80]).options.window == (0.0, 80.0)
    assert parse(axis="sagittal").options.axis == 0


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
    assert list(tmp_path.iterdir()) == []  # asking for it loads and writes nothing


def test_missing_weights_are_told_with_the_command_that_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nothing"))
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    settings = RefSegSettings(segmenter="sam2", weights=tmp_path, device="cpu")
    task = RefSeg(Runtime(settings, bank_root=tmp_path, studies="x"), list)
    with pytest.raises(HTTPException) as told:
        task({"image": str(tmp_path / "a.png")})
    assert told.value.status_code == 503
    assert "weights fetch sam2.1-tiny" in told.value.detail
