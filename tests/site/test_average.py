"""Two segmenters as one: the mean of what they say, whatever their sizes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lib.imaging.io import read_image
from lib.memory.bank import MemoryBank
from lib.models.matchseg import BundledEmbedder, MatchSegSegmenter
from lib.models.network import MatchSegNet, NetworkConfig
from lib.segmenter import ReferenceEngine
from lib.site.average import AveragedSegmenter
from lib.types import LabelledImage, Prediction
from tests.apps.phantoms import write_picture, write_picture_labels

KNOWN = torch.ones((2, 2), dtype=torch.bool)


def made(seed: int, size: int) -> MatchSegSegmenter:
    torch.manual_seed(seed)
    net = MatchSegNet(NetworkConfig(size=size, tokens=32, heads=2, width=16, vote_dim=8))
    torch.nn.init.normal_(net.head.weight, std=0.3)
    return MatchSegSegmenter(net, digest=str(seed) * 64, device="cpu")


def answered(segmenter: MatchSegSegmenter | AveragedSegmenter) -> Prediction:
    rng = np.random.default_rng(0)
    pictures = [rng.random((50, 40)).astype(np.float32) for _ in range(3)]
    query, *others = segmenter.encode(pictures)
    masks = torch.from_numpy(rng.random((2, 2, 50, 40)) > 0.6)
    memories = [segmenter.remember(one, own) for one, own in zip(others, masks, strict=True)]
    return segmenter.segment(query, memories, KNOWN)


@pytest.mark.parametrize("size", [64, 96])
def test_the_scores_are_the_mean_of_both(size: int) -> None:
    first, second = made(1, 64), made(2, size)
    both = answered(AveragedSegmenter(first, second))
    one, other = answered(first), answered(second)
    side = (size, size)
    wide = torch.nn.functional.interpolate(one.scores[None], size=side, mode="bilinear")[0]
    assert both.scores.shape == (2, size, size)
    torch.testing.assert_close(both.scores, (wide + other.scores) / 2, atol=0.02, rtol=0.02)
    torch.testing.assert_close(both.presence, (one.presence + other.presence) / 2)
    torch.testing.assert_close(both.quality, (one.quality + other.quality) / 2)


def test_memories_of_both_come_back_from_the_bank(tmp_path: Path) -> None:
    image, label = tmp_path / "p.png", tmp_path / "l.png"
    write_picture(image, 0)
    write_picture_labels(label, 0)
    first = made(1, 64)
    both = AveragedSegmenter(first, made(2, 96))
    assert both.fingerprint != AveragedSegmenter(first, made(3, 96)).fingerprint
    engine = ReferenceEngine(both, BundledEmbedder(first))
    bank = MemoryBank(tmp_path / "bank", both.fingerprint, engine.references_of)
    bank.sync([LabelledImage("p", image, label, {1: "ball"})])
    found = engine.segment(read_image(image), bank)
    assert found.labels == ("ball",)
