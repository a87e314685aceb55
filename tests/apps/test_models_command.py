"""`models`: which version of the site's model is in use, and the way back, without a server."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from apps.refseg.cli import app
from lib.models.network import MatchSegNet, NetworkConfig
from lib.settings import RefSegSettings
from lib.site.store import ModelCard, ModelStore
from tests.apps.phantoms import write_picture

SMALL = NetworkConfig(size=64, tokens=32, heads=2, width=16, vote_dim=8)


class Place:
    """A studies folder with a picture, and folders for models and banks."""

    def __init__(self, folder: Path) -> None:
        self.studies, self.models = folder / "studies", folder / "models"
        self.bank = folder / "bank"
        self.studies.mkdir()
        write_picture(self.studies / "p.png", 0)
        settings = RefSegSettings(site_models=self.models)
        self.store = ModelStore.of(settings, folder, str(self.studies.resolve()))

    def add(self) -> ModelCard:
        card = ModelCard(0.8, 0.7, "bundled", ("ball",), ("a", "b"), ("c",))
        return self.store.add(MatchSegNet(SMALL), card)

    def run(self, *words: str, bank: bool = True) -> tuple[int, str, str]:
        where = ["--studies", str(self.studies), "--site-models", str(self.models)]
        where += ["--bank", str(self.bank), "--conf", "device=cpu"] if bank else []
        done = CliRunner().invoke(app, ["models", *words, *where])
        return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def place(tmp_path: Path) -> Place:
    torch.manual_seed(0)
    return Place(tmp_path)


def test_models_are_listed_used_and_rolled_back(place: Place) -> None:
    assert place.run("list", bank=False) == (0, "no model of this site yet\n", "")
    for _ in range(2):
        place.add()
    code, said, _ = place.run("use", "1")
    assert (code, said) == (0, "model 1 is in use\n")
    assert place.run("use", "2")[0] == 0
    code, said, _ = place.run("list", "--json", bank=False)
    rows = json.loads(said)
    assert [(row["model"], row["state"]) for row in rows] == [(1, "before"), (2, "in use")]
    assert rows[1]["trained on"] == 2
    code, said, _ = place.run("rollback", "--json")
    assert json.loads(said) == {"left": 2, "model": 1}
    current = place.store.current()
    assert current is not None
    assert current.version == 1


def test_what_cannot_be_done_is_said_in_one_line(place: Place) -> None:
    code, _, said = place.run("rollback")
    assert code == 1
    assert "nothing to roll back" in said
    code, _, said = place.run("use", "7")
    assert code == 1
    assert "no model 7" in said
    code, _, said = place.run("train", "--option", "max_epochs=1")
    assert code == 1
    assert "0 images are labelled; training needs 4" in said
    code, _, said = place.run("train", "--option", "max_epochs=none")
    assert code == 1
    assert "whole number" in said
