"""What a label map says: names given twice, and which numbers it holds."""

from pathlib import Path

import numpy as np
from PIL import Image

from lib.annotation import put_back, read_annotation
from lib.imaging.io import read_image
from lib.types import LabelledImage


def test_two_segments_of_one_name_are_one_label_and_both_come_back(tmp_path: Path) -> None:
    values = np.zeros((40, 50), np.uint16)
    values[5:10, 5:10] = 1
    values[20:30, 20:30] = 700
    values[33:36, 3:9] = 3  # of no name
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "l.png")
    names = {1: "cyst", 700: "cyst", 2: "liver"}
    labelled = LabelledImage("a", tmp_path / "a.png", tmp_path / "l.png", names)
    annotation = read_annotation(labelled, read_image(labelled.image_path))
    assert annotation.labels == {"cyst", "label_3"}
    number = annotation.values["cyst"]
    cyst = np.equal(annotation.label_map[:, :, 0].T, number)
    np.testing.assert_array_equal(cyst, np.isin(values, (1, 700)))
    empty = np.zeros(annotation.label_map.shape, np.int32)
    back = put_back(empty, annotation, ["label_3", "cyst"])[:, :, 0].T
    np.testing.assert_array_equal(back, 2 * np.isin(values, (1, 700)) + (values == 3))
