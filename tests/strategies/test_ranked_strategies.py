"""The strategies over real pictures, the bundled network and MONAI Label's own datastore."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import HTTPException
from PIL import Image

from lib.memory.leases import Leases
from lib.runtime import Runtime
from lib.settings import RefSegSettings
from lib.strategies.ranked import PEERS, Desk, RankedStrategy
from lib.studies.datastore import StudiesDatastore, image_paths, labelled_images


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
        self.desk = Desk(self.runtime)

    def next(self, client_id: str = "me", name: str = "refseg", **more: Any) -> dict[str, Any]:
        """As the endpoint does it; {} where nothing is left."""
        request = {"strategy": name, "client_id": client_id, **more}
        return RankedStrategy(name, self.desk)(request, self.store) or {}

    def label(self, image_id: str, tmp: Path, names: Sequence[str] = ("disc",)) -> None:
        Image.fromarray(np.ones((64, 64), np.uint8)).save(tmp / "label.png")
        info = {"label_info": [{"name": name, "idx": idx} for idx, name in enumerate(names, 1)]}
        self.store.save_label(image_id, str(tmp / "label.png"), "final", info)


@pytest.fixture
def annotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Annotation:
    # time enough for all, however busy the machine is
    monkeypatch.setattr("lib.strategies.ranked.SECONDS_A_CALL", 300.0)
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
    assert (first["embedded"], first["images"], first["message"]) == (6, 6, "")
    assert "most typical of 6 images" in first["reason"]
    assert first["slices"] == [0]
    annotation.label(first["id"], tmp_path)
    second = annotation.next()
    assert second["id"][:4] != first["id"][:4]
    assert "no label is as near to" in second["reason"]
    annotation.label(second["id"], tmp_path)
    assert 0 < annotation.next()["score"] < second["score"]


def test_an_image_that_another_process_has_just_labelled_is_not_given(
    annotation: Annotation, tmp_path: Path
) -> None:
    first = annotation.next()["id"]
    annotation.desk.leases.release([first])
    with annotation.desk._looking:
        time.sleep(0.5)  # so that the disk is not looked at in the next five seconds
    assert not annotation.desk._looking.due
    folder = annotation.studies / "labels" / "final"
    Image.fromarray(np.ones((64, 64), np.uint8)).save(folder / f"{first}.png")
    assert annotation.next("other")["id"] != first
    assert not annotation.desk._looking.due


@pytest.mark.parametrize("name", ["coverage", "uncertainty", "random", "first", *PEERS])
def test_every_strategy_gives_each_image_once(
    name: str, annotation: Annotation, tmp_path: Path
) -> None:
    seen = []
    while chosen := annotation.next(name=name):
        seen.append(chosen["id"])
        annotation.label(chosen["id"], tmp_path)
    assert sorted(seen) == sorted(annotation.store.list_images())


def test_the_choice_depends_on_the_seed_and_the_images_alone(
    annotation: Annotation, tmp_path: Path
) -> None:
    first = annotation.next(lease=0)
    again = Annotation(tmp_path).next()  # another process, a server started anew
    assert again["id"] == first["id"]


def test_an_image_that_another_client_was_just_given_is_not_given_again(
    annotation: Annotation, tmp_path: Path
) -> None:
    other_process = Annotation(tmp_path)
    at = [annotation, other_process]
    given = {at[n % 2].next(f"client {n}")["id"] for n in range(6)}
    assert len(given) == 6
    assert annotation.next("client 6") == other_process.next("client 6") == {}


def test_two_processes_that_choose_at_once_do_not_choose_the_same(
    annotation: Annotation, tmp_path: Path
) -> None:
    other = Annotation(tmp_path)
    annotation.desk.board(annotation.store)
    take = Leases.take

    def as_the_other_is_quicker(self: Leases, image_id: str, *more: Any) -> bool:
        assert take(other.desk.leases, image_id, "the quicker", 60)
        Leases.take = take  # type: ignore[method-assign]
        return take(self, image_id, *more)

    Leases.take = as_the_other_is_quicker  # type: ignore[method-assign]
    try:
        chosen = annotation.next()
    finally:
        Leases.take = take  # type: ignore[method-assign]
    (theirs,) = [i for i, x in other.desk.leases.active().items() if x.client_id == "the quicker"]
    assert chosen["id"] != theirs


def test_to_ask_again_is_to_skip(annotation: Annotation, tmp_path: Path) -> None:
    order = [annotation.next()["id"] for _ in range(6)]
    assert len(set(order)) == 6
    assert annotation.next()["id"] == order[0]  # nothing else is free
    annotation.label(order[1], tmp_path)
    assert annotation.next()["id"] == order[2]
    assert annotation.next("another") == {}


def test_a_lease_ends(annotation: Annotation) -> None:
    first = annotation.next("one", lease=0)
    assert annotation.next("two")["id"] == first["id"]


def test_a_skipped_image_is_another_clients_and_comes_back_last(annotation: Annotation) -> None:
    first = annotation.next()["id"]
    order = [annotation.next(skip=[first])["id"]] + [annotation.next()["id"] for _ in range(4)]
    assert first not in order
    assert len(set(order)) == 5
    assert annotation.next("another")["id"] == first


def test_a_flagged_image_is_given_only_to_who_asks_for_it(annotation: Annotation) -> None:
    for image_id in annotation.store.list_images():
        if image_id != "disc_1":
            annotation.store.update_image_info(image_id, {"flagged": "motion"})
    assert annotation.next()["id"] == "disc_1"
    assert annotation.next("another") == {}
    assert annotation.next("another", flagged=True)["id"] != "disc_1"


def test_a_work_list_is_leased_as_a_whole(annotation: Annotation) -> None:
    batch = annotation.next(images=4)
    rows = batch["work_list"]
    assert rows[0]["id"] == batch["id"]
    assert len({row["id"] for row in rows}) == 4
    assert {rows[0]["id"][:4], rows[1]["id"][:4]} == {"disc", "stri"}
    rest = annotation.next("another", images=10)["work_list"]
    assert len(rest) == 2
    assert not {row["id"] for row in rest} & {row["id"] for row in rows}


def test_an_image_labelled_in_part_is_offered_until_it_is_saved_again(
    annotation: Annotation, tmp_path: Path
) -> None:
    for image_id in annotation.store.list_images():
        annotation.label(image_id, tmp_path, ["disc"])
    annotation.runtime.sync(lambda: labelled_images(annotation.store))
    assert annotation.next() == {}
    given = [annotation.next(labels="disc,ring") for _ in range(6)]
    assert len({chosen["id"] for chosen in given}) == 6
    assert all("in part" in chosen["reason"] for chosen in given)
    assert annotation.next("another", labels="disc,ring") == {}, "all are on a screen"
    again = annotation.next(labels="disc,ring")
    assert again["id"] == given[0]["id"], "nobody has saved it"
    for image_id in annotation.store.list_images():
        annotation.desk.leases.saved(image_id)  # as they were: there is no ring
    assert annotation.next(labels="disc,ring") == {}


def test_a_deleted_label_brings_its_image_back(annotation: Annotation, tmp_path: Path) -> None:
    for image_id in annotation.store.list_images():
        annotation.label(image_id, tmp_path)
    assert annotation.next() == {}
    (annotation.studies / "labels" / "final" / "disc_2.png").unlink()
    deadline = time.monotonic() + 30  # the disk is not looked at again before it has rested
    while not (chosen := annotation.next()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert chosen["id"] == "disc_2"


def test_a_wrong_option_is_told_in_a_sentence(annotation: Annotation) -> None:
    for wrong, sentence in (
        ({"images": 0}, "1 to 1000"),
        ({"images": "many"}, "whole number"),
        ({"lease": -1}, "from 0 to 604800"),
        ({"flagged": "perhaps"}, "true or false"),
    ):
        with pytest.raises(HTTPException) as caught:
            annotation.next(**wrong)
        assert caught.value.status_code == 422
        assert sentence in caught.value.detail


def test_the_options_are_shown_to_clients_with_what_they_are_by_default(
    annotation: Annotation,
) -> None:
    config = RankedStrategy("refseg", annotation.desk).info()["config"]
    assert config == {"images": 1, "labels": "", "flagged": False, "lease": 600}
    assert annotation.next(**config)["id"]


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
    assert chosen["id"] != "broken"
    assert (chosen["embedded"], chosen["images"]) == (6, 7)
    assert calls == []


def test_what_does_not_fit_the_time_of_a_call_is_done_in_the_background(
    annotation: Annotation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.strategies.ranked.SECONDS_A_CALL", 0.0)
    first = annotation.next()
    assert first["embedded"] < 6
    assert "not compared yet" in first["message"]
    deadline = time.monotonic() + 300
    paths = image_paths(annotation.store)
    while len(annotation.runtime.pool.embeddings(paths, seconds=0)) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    while (later := annotation.next())["message"]:
        assert time.monotonic() < deadline
    assert later["embedded"] == 6


def test_where_enough_images_are_embedded_nobody_waits_for_more(
    annotation: Annotation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.strategies.proposer._ENOUGH", 2)
    monkeypatch.setattr("lib.strategies.ranked.SECONDS_A_CALL", 300.0)
    pool, paths = annotation.runtime.pool, image_paths(annotation.store)
    pool._embed_soon = lambda paths: None  # type: ignore[method-assign] # the background rests
    while len(pool.missing(paths)) > 4:  # files that changed just now are not trusted yet
        for image_id in sorted(paths)[:2]:
            pool.embed(image_id, paths[image_id])
        time.sleep(0.2)
    assert annotation.next()["embedded"] == 3, "one more in the request, no more"
