"""An image that was submitted in place of its label map teaches nothing, and slows nobody."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.annotation import MOST_LABELS, read_annotation
from lib.errors import LabelError
from lib.imaging.io import read_image
from lib.types import LabelledImage


@pytest.mark.parametrize("labels", [MOST_LABELS, MOST_LABELS + 1])
def test_so_many_labels_are_learned_and_no_more(labels: int, tmp_path: Path) -> None:
    image, label = tmp_path / "a.png", tmp_path / "l.png"
    values = (np.arange(30 * 30) % (labels + 1)).reshape(30, 30)
    Image.fromarray(np.zeros((30, 30), np.uint8)).save(image)
    Image.fromarray(values.astype(np.uint16)).save(label)
    labelled = LabelledImage("a", image, label, {})
    if labels == MOST_LABELS:
        assert len(read_annotation(labelled, read_image(image)).labels) == labels
    else:
        with pytest.raises(LabelError, match=f"holds {labels} labels"):
            read_annotation(labelled, read_image(image))
