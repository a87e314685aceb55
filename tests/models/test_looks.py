"""Looks of labels, learned from slices left out: when they help, when not, and of whose labels."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from lib.models.looks import FEWEST_IMAGES, LeftOut, corrected, learn_looks
from lib.types import Correction, Looks, Study

SIDE, CHANNELS = 12, 16


def slices_of(
    seed: int,
    images: int,
    *,
    told: float = 3.0,
    labels: Sequence[str] = ("polyp",),
    per_image: int = 1,
) -> list[LeftOut]:
    """Label n shows where channel n of a descriptor is high; the references guess.

    Args:
        seed: of all.
        images: how many.
        told: how much the descriptors tell of the truth; 0: nothing.
        labels: names.
        per_image: slices.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(images * per_image):
        truth = torch.rand(SIDE**2, len(labels), generator=generator) < 0.2
        truth = truth & (truth.cumsum(1) == 1)
        descriptors = torch.randn(SIDE**2, CHANNELS, generator=generator)
        descriptors[:, : len(labels)] += told * truth
        descriptors = torch.nn.functional.normalize(descriptors, dim=1)
        guess = torch.randn(SIDE**2, len(labels), generator=generator) - 1.5
        image = f"image {number // per_image:02d}"
        found.append(LeftOut(image, tuple(labels), descriptors, guess, truth.float()))
    return found


def apply(one: LeftOut, looks: Looks, labels: Sequence[str]) -> torch.Tensor:
    """Corrected scores (P, L)."""
    picture = one.descriptors.T.unflatten(1, (SIDE, SIDE))
    scores = one.scores.T.unflatten(1, (SIDE, SIDE))
    return corrected(scores, picture, looks.of(labels).correction).flatten(1).T


def overlap(scores: torch.Tensor, truth: torch.Tensor) -> float:
    found = scores > 0
    return float(2 * (found * truth).sum() / (found.sum() + truth.sum()))


def test_what_descriptors_tell_is_added_to_what_references_guess() -> None:
    looks = learn_looks(slices_of(0, 10))
    assert looks is not None
    assert looks.corrected == ("polyp",)
    (new,) = slices_of(99, 1)
    assert overlap(new.scores, new.truth) < 0.3
    assert overlap(apply(new, looks, ["polyp"]), new.truth) > 0.7


@pytest.mark.parametrize("seed", range(4))
def test_what_is_right_already_stays_right(seed: int) -> None:
    told = [
        replace(one, scores=torch.where(one.truth > 0, 6.0, -6.0)) for one in slices_of(seed, 10)
    ]
    looks = learn_looks(told)
    assert looks is not None  # surer than it was
    for one in told:
        assert overlap(apply(one, looks, ["polyp"]), one.truth) == 1


@pytest.mark.parametrize("seed", range(4))
def test_looks_that_tell_nothing_are_not_believed(seed: int) -> None:
    slices = slices_of(seed, 10, told=0)
    share = torch.logit(torch.full((SIDE**2, 1), 0.2))  # as much as there is to be known
    assert learn_looks([replace(one, scores=share) for one in slices]) is None


def test_references_that_are_wrong_are_not_turned_round() -> None:
    wrong = [replace(one, scores=2 - 4 * one.truth) for one in slices_of(0, 10, told=0)]
    looks = learn_looks(wrong)
    assert looks is not None
    assert float(looks.correction.gain) == 0


def test_few_images_and_labels_on_few_say_nothing() -> None:
    assert learn_looks(slices_of(0, FEWEST_IMAGES - 1, per_image=4)) is None
    assert learn_looks([]) is None
    both = slices_of(0, 12, labels=("lesion", "polyp"))
    rare = [
        one
        if number < FEWEST_IMAGES - 1
        else replace(one, truth=one.truth * torch.tensor([0.0, 1.0]))
        for number, one in enumerate(both)
    ]
    looks = learn_looks(rare)
    assert looks is not None
    assert looks.corrected == ("polyp",)
    learned = looks.of(["lesion"]).correction
    assert not learned.weights.any()
    assert (learned.gain.item(), learned.offset.item()) == (1, 0)


def test_what_is_thinner_than_a_cell_is_left_to_the_network() -> None:
    slices = slices_of(0, 10)
    for share, looks in ((0.6, True), (0.4, False)):
        thin = [replace(one, truth=share * one.truth) for one in slices]
        assert (learn_looks(thin) is not None) == looks


def test_who_did_not_know_a_label_says_nothing_of_it() -> None:
    both = slices_of(1, 16, labels=("lesion", "polyp"))
    ignorant = [
        replace(one, labels=("polyp",), scores=one.scores[:, 1:], truth=one.truth[:, 1:])
        for one in both[:8]
    ]
    looks = learn_looks([*ignorant, *both[8:]])
    assert looks is not None
    assert looks.corrected == ("lesion", "polyp")
    (new,) = slices_of(99, 1, labels=("lesion", "polyp"))
    scores = apply(new, looks, new.labels)
    for row in range(2):
        assert overlap(scores[:, row], new.truth[:, row]) > 0.65


def test_what_is_foretold_of_an_image_owes_nothing_to_its_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # which of three penalties is common to all; and scores of others may rest on its memory
    monkeypatch.setattr("lib.models.looks.PENALTIES", (1e-2,))
    slices = slices_of(2, 10)
    name = slices[0].image_id
    other = [replace(slices[0], truth=slices[0].truth.roll(1, 0)), *slices[1:]]
    one, two = learn_looks(slices), learn_looks(other)
    assert one is not None
    assert two is not None
    for looks in (one, two):
        assert set(looks.without) == {one.image_id for one in slices}
    assert torch.allclose(one.without[name].weights, two.without[name].weights)
    last = slices[-1].image_id
    assert not torch.allclose(one.without[last].weights, two.without[last].weights)
    assert not torch.allclose(one.correction.weights, two.correction.weights)


def test_the_same_slices_give_the_same_looks() -> None:
    one, two = learn_looks(slices_of(3, 8)), learn_looks(slices_of(3, 8))
    assert one is not None
    assert two is not None
    assert torch.equal(one.correction.weights, two.correction.weights)


def test_looks_are_told_for_the_labels_that_are_asked_for() -> None:
    weights = torch.arange(6.0).view(2, 3) + 1
    whole = Correction(weights, torch.tensor([2.0, 3.0]), torch.tensor([4.0, 5.0]))
    without = Correction(-weights, torch.tensor([6.0, 7.0]), torch.tensor([8.0, 9.0]))
    study = Study(looks=Looks(("liver", "spleen"), whole, {"a": without}))
    asked = study.of(["spleen", "kidney", "liver"]).looks
    assert asked is not None
    assert asked.labels == ("spleen", "kidney", "liver")
    assert asked.corrected == ("spleen", "liver")
    assert asked.correction.weights.tolist() == [[4, 5, 6], [0, 0, 0], [1, 2, 3]]
    assert asked.correction.gain.tolist() == [3, 1, 2]
    assert asked.correction.offset.tolist() == [5, 0, 4]
    again = study.of(["spleen", "liver"], without="a").of(["liver"]).looks  # as slices ask for less
    assert again is not None
    assert again.correction.weights.tolist() == [[-1, -2, -3]]
    stranger = study.of(["liver"], without="b").looks
    assert stranger is not None
    assert stranger.correction.offset.tolist() == [4]
    assert Study(place=4).of(["liver"]) == Study(place=4)
    assert whole.weights.tolist() == weights.tolist()


def test_a_correction_of_nothing_changes_nothing() -> None:
    scores, picture = torch.randn(2, 48, 48), torch.randn(CHANNELS, SIDE, SIDE)
    nothing = Correction(torch.zeros(1, CHANNELS), torch.ones(1), torch.zeros(1)).of([None, 0])
    assert torch.equal(corrected(scores, picture, nothing), scores)
