"""What labelled slices say of their study, with the bundled weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lib.models.looks import FOLDS, PENALTIES
from lib.models.matchseg import MatchSegSegmenter, _embedding
from lib.models.network import AROUND, MOST_CELLS, Remembered
from lib.types import Correction, Example, FloatArray, Looks, Memory, Study

SIDE = 96
BLOB = 30


@pytest.fixture(scope="module")
def segmenter() -> MatchSegSegmenter:
    return MatchSegSegmenter.load_bundled(device="cpu")


def noise(rng: np.random.Generator) -> FloatArray:
    """Soft noise, in which no place looks like another."""
    coarse = torch.from_numpy(rng.random((1, 1, 12, 12), dtype=np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic")[0, 0]
    return (0.3 + 0.3 * smooth.numpy()).astype(np.float32)


def learned(
    segmenter: MatchSegSegmenter, images: list[FloatArray], masks: list[torch.Tensor]
) -> list[Memory]:
    found = segmenter.encode(images)
    return [segmenter.remember(f, m) for f, m in zip(found, masks, strict=True)]


def left_out(memories: list[Memory]) -> list[Example]:
    examples = []
    for row, memory in enumerate(memories):
        others = memories[:row] + memories[row + 1 :]
        known = torch.ones(len(others), len(memory.labels), dtype=torch.bool)
        names = tuple(f"label {n}" for n in range(len(memory.labels)))
        examples.append(Example(f"image {row}", names, memory, others, known))
    return examples


def study_where(segmenter: MatchSegSegmenter, *, aligned: bool, seed: int) -> Study:
    """Images where a structure is at one place and looks like all else, or the other way round."""
    rng = np.random.default_rng(seed)
    images, masks = [], []
    for _ in range(6):
        image, mask = noise(rng), torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
        y, x = (33, 33) if aligned else rng.integers(2, SIDE - BLOB - 2, 2)
        mask[0, y : y + BLOB, x : x + BLOB] = True
        if not aligned:
            image[y : y + BLOB, x : x + BLOB] += 0.4
        images.append(image)
        masks.append(mask)
    return segmenter.study_of(left_out(learned(segmenter, images, masks)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_place_counts_more_where_structures_lie_at_one_place_and_less_where_they_wander(
    segmenter: MatchSegSegmenter, seed: int
) -> None:
    assert study_where(segmenter, aligned=True, seed=seed).place > 1
    assert study_where(segmenter, aligned=False, seed=seed).place < 1


def patient(rng: np.random.Generator, y: int, x: int) -> tuple[FloatArray, torch.Tensor]:
    """Of two bars that look alike the left one is the structure."""
    image, mask = noise(rng), torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    image[y - 8 : y + 32, x - 8 : x + 32] -= 0.25
    for step in (0, 14):
        image[y : y + 24, x + step : x + step + 10] += 0.5
    mask[0, y : y + 24, x : x + 10] = True
    return image, mask


def test_references_are_aligned_with_a_patient_who_lies_differently(
    segmenter: MatchSegSegmenter,
) -> None:
    rng = np.random.default_rng(4)
    seen = [patient(rng, *(36 + rng.integers(-7, 8, 2)).tolist()) for _ in range(8)]
    memories = learned(segmenter, [image for image, _ in seen], [mask for _, mask in seen])
    study = segmenter.study_of(left_out(memories))
    assert study.place > 1
    assert study.aligned
    image, mask = patient(rng, 50, 54)
    query = segmenter.encode([image])[0]
    known = torch.ones(8, 1, dtype=torch.bool)

    def dice(study: Study) -> float:
        scores = segmenter.segment(query, memories, known, study).scores
        found = torch.nn.functional.interpolate(scores[None], size=(SIDE, SIDE))[0] > 0
        return float(2 * (found & mask).sum() / (found.sum() + mask.sum()))

    assert dice(study) > dice(Study(study.place)) + 0.1


def test_one_labelled_image_and_slices_without_a_label_say_nothing(
    segmenter: MatchSegSegmenter,
) -> None:
    rng = np.random.default_rng(0)
    images = [noise(rng) for _ in range(4)]
    empty = [torch.zeros(1, SIDE, SIDE, dtype=torch.bool) for _ in images]
    assert segmenter.study_of([]) == Study()
    memories = learned(segmenter, images, empty)
    assert segmenter.study_of(left_out(memories)) == Study()
    assert segmenter.study_of(left_out(memories[:2])[:1]) == Study()


@pytest.mark.parametrize("still", [True, False])
def test_the_losses_are_those_of_the_vote_that_segments(
    segmenter: MatchSegSegmenter, *, still: bool
) -> None:
    rng = np.random.default_rng(3)
    images = [noise(rng) for _ in range(4)]
    masks = [torch.from_numpy(noise(rng)[None].repeat(2, 0) > 0.45) for _ in images]
    for mask in masks:
        mask[1] = ~mask[0] & torch.roll(mask[1], 9, 1)
    query, *others = learned(segmenter, images, masks)
    known = torch.tensor([[True, True], [True, False], [False, True]])
    places = torch.tensor([0.25, 1.0, 9.0])
    moves = None if still else 0.4 * torch.randn(3, (segmenter.size // 8) ** 2, 2)
    net = segmenter._net
    with torch.inference_mode():
        one, many = segmenter._remembered([query]), segmenter._remembered(others)
        cells = one.descriptor.shape[1]
        similarity = segmenter._similarity(others, _embedding(query, cells))
        trust, _ = net.trust(similarity[None])
        flat = Remembered(one.descriptor[0], one.mask8[0], one.tokens, one.sums4, one.sums2)
        found = net.vote_losses(flat, many, known, trust[0], places, moves)
        side = round(cells**0.5)
        descriptor = one.descriptor.transpose(1, 2).unflatten(2, (side, side))
        truth = torch.cat([one.mask8[0], (1 - one.mask8[0].sum(0, keepdim=True)).clamp(0, 1)])
        near = torch.nn.functional.max_pool2d(
            one.mask8.amax(1).view(1, 1, side, side), AROUND, 1, AROUND // 2
        ).flatten()
        rows = torch.nonzero(near > 0).flatten()
        rows = rows[:: -(-len(rows) // MOST_CELLS)]
        for place, loss in zip(places.tolist(), found.tolist(), strict=True):
            votes = net.vote(
                descriptor,
                many.descriptor[None],
                many.mask8[None],
                known[None],
                trust,
                place,
                None if moves is None else moves[None],
            )
            mean = votes[0].mean(0).flatten(1)[:, rows]
            expected = -(truth[:, rows] * (mean + 0.01).log()).sum(0).mean()
            assert loss == pytest.approx(float(expected), abs=2e-3)


def test_a_query_unlike_all_that_the_study_was_learned_on_is_segmented_as_trained(
    segmenter: MatchSegSegmenter,
) -> None:
    study = study_where(segmenter, aligned=True, seed=0)
    assert study.reach is not None
    rng = np.random.default_rng(7)
    images = [noise(rng) for _ in range(3)]
    masks = [torch.zeros(1, SIDE, SIDE, dtype=torch.bool) for _ in images]
    for mask in masks:
        mask[0, 33:63, 33:63] = True
    memories = learned(segmenter, images, masks)
    known = torch.ones(3, 1, dtype=torch.bool)
    stripes = np.zeros((SIDE, SIDE), np.float32)
    stripes[::6] = stripes[1::6] = 1.0
    for image, alike in ((noise(rng), True), (stripes, False)):
        query = segmenter.encode([image])[0]
        found = segmenter.segment(query, memories, known, study).scores
        plain = segmenter.segment(query, memories, known).scores
        everywhere = segmenter.segment(
            query, memories, known, Study(study.place, study.aligned)
        ).scores
        assert torch.equal(found, everywhere if alike else plain)
        assert not torch.equal(everywhere, plain)


def test_a_study_changes_the_answer_and_the_usual_one_does_not(
    segmenter: MatchSegSegmenter,
) -> None:
    rng = np.random.default_rng(5)
    images = [noise(rng) for _ in range(4)]
    masks = [torch.from_numpy(noise(rng)[None] > 0.45) for _ in images]
    memories = learned(segmenter, images, masks)[1:]
    query = segmenter.encode(images[:1])[0]
    known = torch.ones(3, 1, dtype=torch.bool)
    plain = segmenter.segment(query, memories, known).scores
    assert torch.equal(plain, segmenter.segment(query, memories, known, Study()).scores)
    assert not torch.allclose(plain, segmenter.segment(query, memories, known, Study(16.0)).scores)


def mottled(rng: np.random.Generator) -> tuple[FloatArray, torch.Tensor]:
    """A structure anywhere, hardly to be told from the noise around it."""
    image, mask = noise(rng), torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    y, x = rng.integers(2, SIDE - 26, 2)
    image[y : y + 24, x : x + 24] += 0.02 * (np.indices((24, 24)).sum(0) % 4 < 2)
    mask[0, y : y + 24, x : x + 24] = True
    return image, mask


def mottled_memories(
    segmenter: MatchSegSegmenter, rng: np.random.Generator, count: int
) -> list[Memory]:
    seen = [mottled(rng) for _ in range(count)]
    return learned(segmenter, [image for image, _ in seen], [mask for _, mask in seen])


def test_a_memory_is_as_good_a_query_as_the_image(segmenter: MatchSegSegmenter) -> None:
    rng = np.random.default_rng(0)
    seen = [mottled(rng) for _ in range(6)]
    memories = learned(segmenter, [image for image, _ in seen], [mask for _, mask in seen])
    exact = segmenter.encode([seen[0][0]])[0]
    known = torch.ones(5, 1, dtype=torch.bool)
    query = segmenter._as_query(memories[0])
    assert exact.embedding is not None
    assert query.embedding is not None
    np.testing.assert_allclose(query.embedding, exact.embedding, atol=1e-3)
    assert [one.shape for one in query.maps] == [one.shape for one in exact.maps]
    one, other = (
        segmenter.segment(features, memories[1:], known).scores[0] for features in (exact, query)
    )
    pooled = torch.nn.functional.avg_pool2d(torch.stack([one, other]), 8).flatten(1)
    assert float(torch.corrcoef(pooled)[0, 1]) > 0.97


def test_looks_are_learned_where_references_do_not_say_enough(
    segmenter: MatchSegSegmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    memories = mottled_memories(segmenter, rng, 12)
    examples = left_out(memories)
    steps: list[int] = []
    study = segmenter.looks_of(examples, segmenter.study_of(examples), lambda: steps.append(1))
    assert study.looks is not None
    assert len(steps) == 12 + (FOLDS + 1) * len(PENALTIES)  # slices and fits
    assert study.looks.corrected == ("label 0",)
    assert study.reach is not None
    known = torch.ones(12, 1, dtype=torch.bool)

    def dice(study: Study) -> float:
        rng = np.random.default_rng(2)
        values = []
        for image, mask in (mottled(rng) for _ in range(4)):
            query = segmenter.encode([image])[0]
            scores = segmenter.segment(query, memories, known, study.of(["label 0"])).scores
            found = torch.nn.functional.interpolate(scores[None], size=(SIDE, SIDE))[0] > 0
            values.append(float(2 * (found & mask).sum() / (found.sum() + mask.sum())))
        return float(np.mean(values))

    assert dice(study) > dice(replace(study, looks=None)) + 0.03

    def refuse(*_: object) -> None:
        raise AssertionError("it was segmented a second time")

    monkeypatch.setattr(segmenter, "_segment", refuse)
    again = segmenter.looks_of(examples, study)  # nothing has changed
    assert again.looks is not None
    assert torch.equal(again.looks.correction.weights, study.looks.correction.weights)
    fewer = [*examples[:-1], replace(examples[-1], references=examples[-1].references[1:],
                                     known=known[:10])]  # fmt: skip
    with pytest.raises(AssertionError, match="a second time"):
        segmenter.looks_of(fewer, study)


def test_a_network_that_was_trained_on_the_labels_learns_no_looks_of_them(
    segmenter: MatchSegSegmenter,
) -> None:
    rng = np.random.default_rng(1)
    memories = mottled_memories(segmenter, rng, 12)
    own = MatchSegSegmenter(segmenter._net, digest=segmenter.digest, device="cpu")
    (query,) = mottled_memories(own, rng, 1)
    assert len(query.image) < len(memories[0].image)  # queries are kept for looks alone
    assert own.fingerprint != segmenter.fingerprint
    study = own.study_of(left_out(memories))
    assert own.looks_of(left_out(memories), study) is study
    assert study.place == segmenter.study_of(left_out(memories)).place


def test_a_full_device_learns_no_looks_and_segments_all_the_same(
    segmenter: MatchSegSegmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(4)
    memories = mottled_memories(segmenter, rng, 7)
    examples = left_out(memories)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(segmenter, "_segment", full)
    study = Study(4.0)
    assert segmenter.looks_of(examples, study) is study

    def broken(*_: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(segmenter, "_segment", broken)
    with pytest.raises(RuntimeError, match="something else"):
        segmenter.looks_of(examples, study)


def test_a_query_unlike_all_labelled_slices_is_not_corrected(
    segmenter: MatchSegSegmenter,
) -> None:
    rng = np.random.default_rng(3)
    memories = mottled_memories(segmenter, rng, 3)
    known = torch.ones(3, 1, dtype=torch.bool)
    channels = memories[0].image.shape[1]
    more = Correction(torch.zeros(1, channels), torch.ones(1), torch.full((1,), 2.0))
    stripes = np.zeros((SIDE, SIDE), np.float32)
    stripes[::6] = stripes[1::6] = 1.0
    for image, added in ((mottled(rng)[0], 2.0), (stripes, 0.0)):
        query = segmenter.encode([image])[0]
        looks = Study(reach=0.6, looks=Looks(("label 0",), more))
        found = segmenter.segment(query, memories, known, looks).scores
        plain = segmenter.segment(query, memories, known).scores
        assert torch.allclose(found, plain + added, atol=1e-4)


def test_looks_of_other_labels_than_those_segmented_are_refused(
    segmenter: MatchSegSegmenter,
) -> None:
    rng = np.random.default_rng(3)
    image, mask = mottled(rng)
    (memory,) = learned(segmenter, [image], [mask])
    query, known = segmenter.encode([image])[0], torch.ones(1, 1, dtype=torch.bool)
    weights = torch.zeros(2, query.maps[0].shape[0])
    two = Looks(("a", "b"), Correction(weights, torch.ones(2), torch.zeros(2)))
    with pytest.raises(ValueError, match="looks of 2 labels for 1"):
        segmenter.segment(query, [memory], known, Study(looks=two))
