"""Which model answers while another one is made ready, fails, or is rolled back."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.errors import ModelStoreError
from lib.imaging.io import read_image
from lib.models.network import MatchSegNet, NetworkConfig
from lib.settings import RefSegSettings
from lib.site.serving import Serving, SiteModel
from lib.site.store import ModelCard, ModelStore
from lib.types import LabelledImage
from tests.apps.phantoms import write_picture, write_picture_labels

SMALL = NetworkConfig(size=64, tokens=32, heads=2, width=16, vote_dim=8)


class Studies:
    """Two labelled pictures; `gate` holds back whoever asks for the labels."""

    def __init__(self, folder: Path) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.rows = []
        for seed in range(2):
            image, label = folder / f"{seed}.png", folder / f"{seed}.label.png"
            write_picture(image, seed)
            write_picture_labels(label, seed)
            self.rows.append(LabelledImage(str(seed), image, label, {1: "ball"}))

    def labels(self) -> list[LabelledImage]:
        assert self.gate.wait(60)
        return self.rows


@pytest.fixture
def studies(tmp_path: Path) -> Iterator[Studies]:
    made = Studies(tmp_path)
    yield made
    made.gate.set()


@pytest.fixture
def site(studies: Studies, tmp_path: Path) -> SiteModel:
    return site_of(studies, tmp_path, patience_s=60)


def site_of(studies: Studies, tmp_path: Path, *, patience_s: float) -> SiteModel:
    return SiteModel(
        ModelStore(tmp_path / "models"),
        RefSegSettings(device="cpu"),
        bank_root=tmp_path / "banks",
        studies="here",
        list_labels=studies.labels,
        patience_s=patience_s,
    )


def stored(site: SiteModel, seed: int) -> ModelCard:
    torch.manual_seed(seed)
    return site.store.add(
        MatchSegNet(SMALL), ModelCard(0.8, 0.7, "bundled", ("ball",), ("0",), ("1",))
    )


def answer(serving: Serving, studies: Studies) -> np.ndarray:
    runtime = serving.runtime
    found = runtime.engine.segment(read_image(studies.rows[0].image_path), runtime.bank)
    assert found.labels == ("ball",)
    return found.label_map


def test_a_request_before_the_first_model_says_what_to_do(site: SiteModel) -> None:
    assert site.card() is None
    site.prepare_soon()  # /info asks all the time
    with pytest.raises(ModelStoreError, match="POST /train/matchseg"):
        site.serving()


def test_a_published_model_answers_the_very_next_request_from_a_bank_of_its_own(
    site: SiteModel, studies: Studies, tmp_path: Path
) -> None:
    site.publish(stored(site, 0))
    first = site.serving()
    assert (first.card.version, first.waiting) == (1, None)
    assert site.serving().runtime is first.runtime  # loaded once
    # Another process publishes the next one: its bank is filled before the pointer moves.
    site.publish(stored(site, 1))
    banks = {path.name for path in (tmp_path / "banks").glob("*/matchseg-*")}
    assert len(banks) == 2
    second = site.serving()
    assert (second.card.version, second.waiting) == (2, None)
    report = second.runtime.sync(studies.labels)[1]
    assert not report.changed  # nothing was left to encode
    answer(second, studies)
    assert second.runtime.fingerprint != first.runtime.fingerprint

    assert site.rollback() == first.card
    assert site.serving().card == first.card
    assert site.rollback() is None
    assert site.card() is None


def test_while_a_models_memories_are_made_the_one_before_answers(
    studies: Studies, tmp_path: Path
) -> None:
    site = site_of(studies, tmp_path, patience_s=0.2)
    site.publish(stored(site, 0))
    old = site.serving()
    studies.gate.clear()  # from now on the bank's update takes as long as we want
    site.store.use(stored(site, 1).version)  # moved by hand: nobody filled its bank
    for _ in range(2):
        meanwhile = site.serving()
        assert meanwhile.runtime is old.runtime
        assert meanwhile.waiting is not None
        assert meanwhile.waiting.version == 2
    answer(meanwhile, studies)
    studies.gate.set()
    end = time.monotonic() + 60
    while (now := site.serving()).waiting is not None:
        assert time.monotonic() < end
    assert now.card.version == 2
    answer(now, studies)


def test_a_damaged_new_model_leaves_the_one_before_in_use(site: SiteModel) -> None:
    site.publish(stored(site, 0))
    old = site.serving()
    broken = stored(site, 1)
    (site.store.folder / "0002" / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelStoreError, match="model 2 are damaged"):
        site.publish(broken)
    assert site.serving().runtime is old.runtime
    site.store.use(2)
    assert site.serving().runtime is old.runtime
    site.rollback()
    assert site.serving().runtime is old.runtime


def test_a_damaged_only_model_is_an_error_that_says_how_to_mend_it(site: SiteModel) -> None:
    site.store.use(stored(site, 0).version)
    (site.store.folder / "0001" / "weights.safetensors").unlink()
    for _ in range(2):
        with pytest.raises(ModelStoreError, match="train again"):
            site.serving()
