"""Dice, HD95 and NSD against figures made another way, and what empty masks count as."""

import warnings

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist

from lib.campaign.scoring import Truth, score_case
from lib.evaluation.metrics import dice, surface

Mask = npt.NDArray[np.bool_]


def edge_points(mask: Mask, spacing: tuple[float, ...]) -> npt.NDArray[np.float64]:
    """Voxels with a face towards the outside (or the border), in mm."""
    edge = mask & ~binary_erosion(mask, border_value=0)
    return np.argwhere(edge) * np.asarray(spacing)


def by_brute_force(
    one: Mask, other: Mask, spacing: tuple[float, ...], tolerance: float
) -> tuple[float, float]:
    distances = cdist(edge_points(one, spacing), edge_points(other, spacing))
    there, back = distances.min(1), distances.min(0)
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    near = (there <= tolerance).sum() + (back <= tolerance).sum()
    return float(hd95), float(near / (len(there) + len(back)))


def blob(rng: np.random.Generator, shape: tuple[int, ...]) -> Mask:
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    center = [rng.uniform(0.2 * n, 0.8 * n) for n in shape]
    radii = [rng.uniform(1.2, 0.4 * n + 1) for n in shape]
    mask = (((grid - center) / radii) ** 2).sum(-1) < 1
    mask &= rng.random(shape) > 0.1
    mask[tuple(int(c) for c in center)] = True
    return mask


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spacing=st.tuples(*[st.sampled_from([0.7, 1.0, 1.5, 6.0])] * 3),
    tolerance=st.sampled_from([0.5, 1.0, 2.0, 5.0]),
)
def test_surface_distances_are_those_of_brute_force(
    seed: int, spacing: tuple[float, float, float], tolerance: float
) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(4, 12, 3))
    one, other = blob(rng, shape), blob(rng, shape)
    found = surface(one, other, spacing, tolerance_mm=tolerance)
    hd95, nsd = by_brute_force(one, other, spacing, tolerance)
    assert found.hd95_mm == pytest.approx(hd95, rel=1e-5, abs=1e-5)
    assert found.nsd == pytest.approx(nsd, abs=1e-6)


def test_a_square_moved_by_two_voxels_of_half_a_millimetre_is_a_millimetre_away() -> None:
    one = np.zeros((20, 20, 1), bool)
    other = one.copy()
    one[5:10, 5:10], other[7:12, 5:10] = True, True
    found = surface(one, other, (0.5, 0.5, 9.0), tolerance_mm=0.9)
    assert found.hd95_mm == pytest.approx(1.0)
    assert dice(one, other) == pytest.approx(2 * 15 / 50)


def test_a_volume_of_one_slice_is_a_plane() -> None:
    """Its neighbours above and below are not outside of the mask: there are none."""
    mask = np.zeros((9, 9, 1), bool)
    mask[2:7, 2:7] = True
    smaller = mask.copy()
    smaller[2] = False
    flat = surface(mask[..., 0], smaller[..., 0], (1.0, 1.0), tolerance_mm=0.5)
    assert surface(mask, smaller, (1.0, 1.0, 5.0), tolerance_mm=0.5) == flat
    assert flat.nsd < 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_dice_is_that_of_monai(seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.metrics import compute_dice
    rng = np.random.default_rng(seed)
    one, other = blob(rng, (8, 9, 5)), blob(rng, (8, 9, 5))
    pair = [torch.from_numpy(mask)[None, None] for mask in (one, other)]
    assert dice(one, other) == pytest.approx(float(compute_dice(*pair)), abs=1e-6)


def score(
    found: npt.NDArray[np.int32], truth: npt.NDArray[np.int32]
) -> dict[str, tuple[object, ...]]:
    case = score_case(
        "case",
        found,
        Truth(truth, ("liver", "spleen"), (1.0, 1.0, 2.0)),
        {"liver": 0.5},
        tolerance_mm=1.0,
    )
    return {n: (s.dice, s.hd95_mm, s.nsd, s.false_alarm) for n, s in case.labels.items()} | {
        "case": (case.dice, case.confidence)
    }


def test_a_structure_that_was_missed_counts_as_badly_as_can_be() -> None:
    truth = np.zeros((9, 4, 4), np.int32)
    truth[1:3, 1:3, 1:3] = 1
    found = score(np.zeros_like(truth), truth)
    diagonal = np.sqrt(8**2 + 3**2 + 6**2)
    assert found["liver"] == (0.0, pytest.approx(diagonal), 0.0, None)


def test_what_is_not_there_is_no_measurement_and_a_false_alarm_if_found() -> None:
    truth = np.zeros((4, 4, 4), np.int32)
    truth[1:3, 1:3, 1:3] = 1
    found = truth.copy()
    found[0, 0, 0] = 2
    scores = score(found, truth)
    assert scores["liver"] == (1.0, 0.0, 1.0, None)
    overlap, hd95, nsd, alarm = scores["spleen"]
    assert np.isnan([overlap, hd95, nsd]).all()  # type: ignore[arg-type]
    assert alarm is True
    assert scores["case"] == (1.0, 0.5)  # over the label that is there alone
    assert score(truth, truth)["spleen"][3] is False


def test_cropping_to_the_masks_changes_no_distance() -> None:
    rng = np.random.default_rng(3)
    truth, found = np.zeros((2, 30, 30, 8), np.int32)
    truth[18:24, 4:9, 2:6], found[17:23, 5:12, 0:6] = 1, 1
    found[rng.random(found.shape) > 0.995] = 1
    _, hd95, nsd, _ = score(found, truth)["liver"]
    assert (hd95, nsd) == pytest.approx(
        by_brute_force(found == 1, truth == 1, (1.0, 1.0, 2.0), 1.0), rel=1e-5
    )
