"""Options: the environment, then `--conf`, then a clear refusal."""

from pathlib import Path

import pytest

from lib.errors import RequestError
from lib.settings import RefSegSettings, from_conf


def test_conf_strings_become_typed_options() -> None:
    chosen = from_conf(
        {
            "k": "4",
            "labels": "liver, left kidney,liver",
            "window": "-160,240",
            "axis": "coronal",
            "own_labels": "false",
        }
    )
    assert chosen.k == 4
    assert chosen.labels == ("liver", "left kidney")
    assert chosen.window == (-160.0, 240.0)
    assert chosen.axis_index == 1
    assert chosen.own_labels is False


def test_conf_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REFSEG_K", "5")
    monkeypatch.setenv("REFSEG_LABELS", "a,b")
    monkeypatch.setenv("REFSEG_BANK", str(tmp_path))
    assert from_conf({}).k == 5
    assert from_conf({}).labels == ("a", "b")
    assert from_conf({}).bank == tmp_path
    assert from_conf({"k": "6"}).k == 6


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RequestError, match="colour.*annotation.*own_labels"):
        from_conf({"colour": "blue"})


def test_keys_of_the_platform_are_let_pass() -> None:
    assert from_conf({"server_mode": "true", "models": "refseg"}) == RefSegSettings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", "0"),
        ("k", "many"),
        ("segmenter", "unet"),
        ("window", "240,-160"),
        ("window", "bright"),
        ("axis", "diagonal"),
        ("annotation", "some"),
    ],
)
def test_a_value_that_is_not_allowed_is_named(name: str, value: str) -> None:
    with pytest.raises(RequestError, match=name):
        from_conf({name: value})


def test_options_cannot_be_changed_later() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RefSegSettings().k = 3


def test_the_readme_lists_every_option() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    listed = {line.split("`")[1] for line in readme.splitlines() if line.startswith("| `")}
    assert listed >= RefSegSettings.model_fields.keys()
