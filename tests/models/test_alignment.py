"""References are laid over what looks like them in the query."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib.models.alignment import displacements
from lib.models.matchseg import MatchSegSegmenter
from lib.types import FloatArray

SIDE, CHANNELS = 32, 24


def scene(seed: int) -> torch.Tensor:
    """Unit descriptors (C, 3 * SIDE, 3 * SIDE) of a landscape larger than a picture."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, CHANNELS, 24, 24, generator=generator)
    fine = F.interpolate(coarse, size=(3 * SIDE, 3 * SIDE), mode="bicubic")
    return F.normalize(fine[0], dim=0)


def view(landscape: torch.Tensor, *, x: int, y: int) -> torch.Tensor:
    """A picture (C, SIDE, SIDE) of it; what lies at p in `view(x=0, y=0)` is at p - (x, y) here."""
    return landscape[:, SIDE + y : 2 * SIDE + y, SIDE + x : 2 * SIDE + x]


def rows(picture: torch.Tensor) -> torch.Tensor:
    return picture.flatten(1).mT


def box(x: slice, y: slice) -> torch.Tensor:
    share = torch.zeros(SIDE, SIDE)
    share[y, x] = 1
    return share.flatten()


@pytest.mark.parametrize(("x", "y"), [(0, 0), (6, 0), (0, -8), (-4, 8)])
def test_a_structure_that_lies_elsewhere_is_followed(x: int, y: int) -> None:
    landscape = scene(0)
    reference, query = view(landscape, x=0, y=0), view(landscape, x=-x, y=-y)
    share = box(slice(11, 20), slice(11, 20))
    moved = displacements(query, rows(reference)[None], share[None])[0]
    expected = torch.tensor([x, y]) * 2 / SIDE
    assert moved.shape == (SIDE * SIDE, 2)
    assert (moved[share > 0] - expected).abs().max() < 1.5 / SIDE  # less than a cell


def test_two_structures_move_apart() -> None:
    left, right = view(scene(1), x=0, y=0), view(scene(2), x=0, y=0)
    reference = torch.cat([left[:, :, :16], right[:, :, 16:]], 2)
    query = torch.cat([left[:, :, 4:20], right[:, :, 12:28]], 2)
    ours, theirs = (box(part, slice(8, 24)) for part in (slice(5, 12), slice(20, 27)))
    moved = displacements(query, rows(reference)[None], (ours + theirs)[None])[0]
    assert moved[ours > 0, 0].mean() < -1 / SIDE
    assert moved[theirs > 0, 0].mean() > 1 / SIDE


def test_each_reference_for_itself_and_none_without_a_label() -> None:
    landscape = scene(3)
    query, share = view(landscape, x=0, y=0), box(slice(10, 22), slice(10, 22))
    pictures = [view(landscape, x=4, y=0), view(landscape, x=0, y=4), view(landscape, x=4, y=4)]
    references = torch.stack([rows(p) for p in pictures])
    shares = torch.stack([share, share, torch.zeros_like(share)])
    together = displacements(query, references, shares)
    for row in range(3):
        alone = displacements(query, references[row : row + 1], shares[row : row + 1])[0]
        assert torch.allclose(together[row], alone, atol=1e-5)
    assert not together[2].any()
    assert together[:2].abs().amax((1, 2)).min() > 1 / SIDE


@pytest.mark.parametrize("side", [4, 8, 12, 20])
def test_any_working_size(side: int) -> None:
    query = F.normalize(torch.randn(CHANNELS, side, side), dim=0)
    moved = displacements(query, rows(query)[None], torch.ones(1, side * side))
    assert moved.shape == (1, side * side, 2)
    assert moved.isfinite().all()


def test_a_heart_elsewhere_is_found_although_place_counts() -> None:
    """The network itself: aligned votes keep the structure where plain ones lose a part of it."""
    segmenter = MatchSegSegmenter.load_bundled(device="cpu")
    rng = np.random.default_rng(0)

    def picture(x: int) -> tuple[FloatArray, torch.Tensor]:
        image = 0.4 + 0.05 * rng.standard_normal((128, 128)).astype(np.float32)
        line = np.arange(128, dtype=np.float32)
        radius = np.hypot(line[:, None] - 64, line[None] - x)
        image[radius < 26] += 0.25  # the wall looks like its twin on the other side, but for place
        image[radius < 16] -= 0.3
        image[:, : max(0, x - 44)] += 0.25
        return image.clip(0, 1), torch.from_numpy((radius < 26) & (radius >= 16))[None]

    references = [picture(x) for x in (44, 46, 48)]
    image, truth = picture(84)
    features = segmenter.encode([image for image, _ in references])
    memories = [
        segmenter.remember(f, mask) for f, (_, mask) in zip(features, references, strict=True)
    ]
    query = segmenter.encode([image])[0]
    net = segmenter._net
    memory = segmenter._remembered(memories)
    known = torch.ones(3, 1, dtype=torch.bool)
    side = segmenter.size // 8
    small = F.adaptive_avg_pool2d(truth.float()[None], side)[0, 0]
    with torch.inference_mode():
        moves = displacements(query.maps[0], memory.descriptor, memory.mask8[:, 0])
        votes = [
            net.vote(
                query.maps[0][None],
                memory.descriptor[None],
                memory.mask8[None],
                known[None],
                torch.zeros(1, 3),
                16.0,
                m,
            )[0, :, 0].mean(0)
            for m in (None, moves[None])
        ]
    plain, aligned = ((v * small).sum() / small.sum() for v in votes)
    assert aligned > plain + 0.1
