"""The strategy over real pictures, the bundled network and MONAI Label's own datastore."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lib.datastore import StudiesDatastore, image_paths
from lib.runtime import Runtime
from lib.settings import RefSegSettings
from lib.strategies.refseg import RefSegStrategy


def picture(path: Path, kind: str, seed: int) -> None:
    """Discs, or stripes: two kinds that any network tells apart."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:64, :64]
    if kind == "disc":
        values = 200.0 * ((x - 32 - seed) ** 2 + (y - 32) ** 2 < 300)
    else:
        values = 200.0 * ((x + y + seed) // 8 % 2)
    noisy = np.clip(values + 20 + rng.normal(0, 5, values.shape), 0, 255)
    Image.fromarray(noisy.astype(np.uint8)).save(path)


class Annotation:
    def __init__(self, folder: Path, **settings: Any) -> None:
        self.studies = folder / "studies"
        self.studies.mkdir(exist_ok=True)
        self.store = StudiesDatastore(str(self.studies), copies=folder / "copies", watch=False)
        chosen = RefSegSettings(device="cpu", **settings)
        self.runtime = Runtime(chosen, bank_root=folder / "bank", studies=str(self.studies))
        self.strategy = RefSegStrategy(self.runtime)

    def next(self, client_id: str = "me") -> dict[str, Any] | None:
        """As the endpoint does it: choose, then record who was given what."""
        chosen = self.strategy({"strategy": "refseg", "client_id": client_id}, self.store)
        if chosen:
            given = {"refseg": {"ts": int(time.time()), "client_id": client_id}}
            self.store.update_image_info(chosen["id"], {"strategy": given})
        return chosen

    def label(self, image_id: str, tmp: Path) -> None:
        Image.fromarray(np.ones((64, 64), np.uint8)).save(tmp / "label.png")
        self.store.save_label(image_id, str(tmp / "label.png"), "final", {})


@pytest.fixture
def annotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Annotation:
    # time enough for all, however busy the machine is
    monkeypatch.setattr("lib.strategies.refseg.SECONDS_A_CALL", 300.0)
    (tmp_path / "studies").mkdir()
    for seed in range(3):
        picture(tmp_path / "studies" / f"disc_{seed}.png", "disc", seed)
    for seed in range(3):
        picture(tmp_path / "studies" / f"stripes_{seed}.png", "stripes", seed)
    return Annotation(tmp_path)


def test_the_second_image_is_of_the_kind_that_is_not_labelled_yet(
    annotation: Annotation, tmp_path: Path
) -> None:
    first = annotation.next()
    assert first is not None
    assert (first["embedded"], first["images"], first["message"]) == (6, 6, "")
    annotation.label(first["id"], tmp_path)
    second = annotation.next()
    assert second is not None
    assert second["id"][:4] != first["id"][:4]
    annotation.label(second["id"], tmp_path)
    third = annotation.next()
    assert third is not None
    assert 0 < third["gain"] < second["gain"]


def test_the_choice_depends_on_the_seed_and_the_images_alone(
    annotation: Annotation, tmp_path: Path
) -> None:
    first = annotation.next()
    again = Annotation(tmp_path, lease=0).next()  # another process, a server started anew
    assert first is not None
    assert again is not None
    assert again["id"] == first["id"]


def test_an_image_that_another_client_was_just_given_is_not_given_again(
    annotation: Annotation,
) -> None:
    given = {annotation.next(f"client {n}")["id"] for n in range(6)}  # type: ignore[index]
    assert len(given) == 6
    assert annotation.next("client 6") is None


def test_to_ask_again_is_to_skip(annotation: Annotation, tmp_path: Path) -> None:
    order = []
    for count in range(6):
        chosen = annotation.next()
        assert chosen is not None
        order.append(chosen["id"])
        given = {"refseg": {"ts": int(time.time()) - 60 + count, "client_id": "me"}}
        annotation.store.update_image_info(chosen["id"], {"strategy": given})
    assert len(set(order)) == 6
    again = annotation.next()  # nothing else is free
    assert again is not None
    assert again["id"] == order[0]
    annotation.label(order[1], tmp_path)
    third = annotation.next()
    assert third is not None
    assert third["id"] == order[2]
    assert annotation.next("another") is None


def test_a_lease_ends(annotation: Annotation, tmp_path: Path) -> None:
    first = annotation.next("one")
    soon = Annotation(tmp_path, lease=0).next("two")
    assert first is not None
    assert soon is not None
    assert soon["id"] == first["id"]


def test_nothing_is_left_when_all_is_labelled(annotation: Annotation, tmp_path: Path) -> None:
    for image_id in annotation.store.list_images():
        annotation.label(image_id, tmp_path)
    assert annotation.next() is None


def test_images_are_embedded_once_and_a_broken_one_does_not_stop_the_others(
    annotation: Annotation,
) -> None:
    (annotation.studies / "broken.png").write_bytes(b"no picture")
    annotation.next()
    engine = annotation.runtime.engine
    calls: list[int] = []
    encode = engine.segmenter.encode

    def counted(images: Any) -> Any:
        calls.append(len(images))
        return encode(images)

    engine.segmenter.encode = counted  # type: ignore[method-assign]
    chosen = annotation.next()
    assert chosen is not None
    assert chosen["id"] != "broken"
    assert (chosen["embedded"], chosen["images"]) == (6, 7)
    assert calls == []


def test_what_does_not_fit_the_time_of_a_call_is_done_in_the_background(
    annotation: Annotation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.strategies.refseg.SECONDS_A_CALL", 0.0)
    first = annotation.next()
    assert first is not None
    assert first["embedded"] < 6
    assert "not compared yet" in first["message"]
    deadline = time.monotonic() + 300
    paths = image_paths(annotation.store)
    while len(annotation.runtime.pool.embeddings(paths, seconds=0)) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    later = annotation.next()
    assert later is not None
    assert (later["embedded"], later["message"]) == (6, "")
