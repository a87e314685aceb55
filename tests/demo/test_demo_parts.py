"""The demo's own parts; the demo as a whole is run by `make demo`."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.annotator import label_values
from demo.images import ORIENTATIONS, save_oriented
from demo.picture import load, references_of, richest_slice
from demo.server import free_port, log_tail
from demo.study import dice, same_grid


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_pictures_show_every_orientation_the_same_way(tmp_path: Path, codes: str) -> None:
    voxels = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)  # axes to R, A, S
    save_oriented(voxels, np.diag([1.0, 2.0, 3.0, 1.0]), codes, tmp_path / "v.nii.gz")
    slices = load(tmp_path / "v.nii.gz")
    assert slices.shape == (3, 2, 4)
    # (row, column, slice): from the front, from the right, from the top
    assert slices[0, 0, 0] == voxels[1, 2, 3]
    assert slices[0, 1, 0] == voxels[0, 2, 3]
    assert slices[1, 0, 0] == voxels[1, 1, 3]


def test_same_grid_tells_a_flipped_volume_from_its_original(tmp_path: Path) -> None:
    cube = np.zeros((4, 4, 4), np.uint8)
    for name, codes in (("a", "RAS"), ("b", "RAS"), ("c", "LPS")):
        save_oriented(cube, np.eye(4), codes, tmp_path / f"{name}.nii.gz")
    assert same_grid(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")
    assert not same_grid(tmp_path / "a.nii.gz", tmp_path / "c.nii.gz")


def test_same_grid_tells_pictures_of_other_sizes(tmp_path: Path) -> None:
    Image.new("L", (5, 4)).save(tmp_path / "a.png")
    Image.new("L", (4, 5)).save(tmp_path / "b.png")
    assert same_grid(tmp_path / "a.png", tmp_path / "a.png")
    assert not same_grid(tmp_path / "a.png", tmp_path / "b.png")


def test_dice_of_known_overlaps() -> None:
    first = np.array([1, 1, 1, 0, 0, 0], bool)
    second = np.array([0, 1, 1, 1, 0, 0], bool)
    assert dice(first, second) == pytest.approx(4 / 6)
    assert dice(first, ~first) == 0
    assert dice(first & False, first & False) == 1


def test_values_of_labels_come_by_name_or_by_order() -> None:
    assert label_values({"label_names": {"liver": 2, "spleen": 1}}) == {"liver": 2, "spleen": 1}
    assert label_values({"label_names": ["liver", "spleen"]}) == {"liver": 1, "spleen": 2}
    assert label_values({}) == {}


def test_the_references_shown_are_those_at_the_height_of_the_slice() -> None:
    rows = [
        {"image": "a", "slice": 9, "similarity": 0.9},
        {"image": "b", "slice": 4, "similarity": 0.5},
        {"image": "c", "slice": 4, "similarity": 0.8},
    ]
    params = {"references": {"liver": rows[:2], "spleen": rows[1:]}}
    assert references_of(params, 4) == [("c", 4), ("b", 4), ("a", 9)]


def test_the_richest_slice_holds_every_label() -> None:
    truth = np.zeros((4, 4, 3), np.uint8)
    truth[..., 0] = 1
    truth[:2, :, 1], truth[2:, :, 1] = 1, 2
    truth[0, 0, 2] = 2
    assert richest_slice(truth, set()) == 1
    assert richest_slice(truth, {2, 7}) == 2


def test_a_failed_server_is_told_by_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("\n".join(f"line {number}" for number in range(100)))
    assert log_tail(log).splitlines()[-1] == "line 99"
    assert len(log_tail(log).splitlines()) < 40
    assert 1024 <= free_port() <= 65535
