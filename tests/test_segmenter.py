"""The engine: which references are asked, whose labels win, and what is given back."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from lib.annotation import put_back, read_annotation
from lib.confidence.calibration import Calibration
from lib.errors import MemoryStoreError, RequestError
from lib.imaging.io import ImageVolume, read_image
from lib.imaging.slices import cut, through_plane_axis
from lib.memory.bank import MemoryBank
from lib.models.protocol import AS_TRAINED
from lib.segmentation import Options, Segmentation
from lib.segmenter import ReferenceEngine
from lib.types import (
    Correction,
    Example,
    Features,
    FloatArray,
    LabelledImage,
    Looks,
    Memory,
    Prediction,
    Shape,
    Study,
)

SIZE = 16
SHAPE = (SIZE, SIZE, 6)
NAMES = {1: "liver", 2: "spleen", 3: "kidney"}


class Averager:
    """A segmenter whose answer is plain: the mean of the known masks, less one half."""

    name = "averager"
    fingerprint = "averager-1"
    size = SIZE

    def __init__(self) -> None:
        self.encoded = 0
        self.asked: list[tuple[int, list[list[bool]]]] = []

    def encode(self, images: Sequence[FloatArray]) -> list[Features]:
        self.encoded += len(images)
        return [Features((torch.from_numpy(image),), None, self.fingerprint) for image in images]

    def remember(self, features: Features, masks: torch.Tensor) -> Memory:
        assert masks.shape[1:] == features.maps[0].shape[:2]
        return Memory(torch.zeros(1), masks.float())

    def study_of(self, examples: Iterable[Example]) -> Study:
        return Study()

    def looks_of(
        self, examples: Iterable[Example], study: Study, make_way: Callable[[], None]
    ) -> Study:
        return study

    def segment(
        self,
        query: Features,
        references: Sequence[Memory],
        known: torch.Tensor,
        study: Study = AS_TRAINED,
    ) -> Prediction:
        assert known.any(0).all(), "each label must be known to a reference"
        self.asked.append((len(references), known.tolist()))
        masks = torch.stack([memory.labels for memory in references])  # (R, L, S, S)
        weights = known.float()[:, :, None, None]
        share = (masks * weights).sum(0) / weights.sum(0)
        scores = torch.logit(share.clamp(1e-3, 1 - 1e-3))
        labels = scores.shape[0]
        return Prediction(scores, torch.ones(labels), torch.full((labels,), 0.75))


class Thumbnail:
    """Slices with the same pixels are nearest."""

    name = "thumbnail"
    fingerprint = "thumbnail-1"

    def embed(
        self, images: Sequence[FloatArray], features: Sequence[Features] | None = None
    ) -> FloatArray:
        vectors = np.stack([image.reshape(-1) - image.mean() + 1e-3 for image in images])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def regions(
        self, images: Sequence[FloatArray], features: Sequence[Features] | None = None
    ) -> FloatArray:
        return self.embed(images, features)[:, None]


@pytest.fixture
def studio(tmp_path: Path) -> "Studio":
    return Studio(tmp_path)


class Studio:
    """Images and label maps on disk, an engine and a bank over them."""

    def __init__(self, folder: Path, averager: Averager | None = None) -> None:
        self.folder = folder
        self.averager = averager or Averager()
        self.labelled: list[LabelledImage] = []
        self.engine = ReferenceEngine(self.averager, Thumbnail(), batch=4)
        self.bank = MemoryBank(folder / "bank", "test", self.engine.references_of)
        self.thickness_mm = 3.0

    def image(self, name: str, seed: int = 0) -> Path:
        values = np.random.default_rng(seed).integers(0, 1000, SHAPE).astype(np.int16)
        path = self.folder / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(values, np.diag([-1.0, -1.0, self.thickness_mm, 1.0])), path)
        return path

    def label(
        self,
        name: str,
        draw: Callable[[np.ndarray], None],
        seed: int = 0,
        names: dict[int, str] = NAMES,
    ) -> LabelledImage:
        path = self.image(name, seed)
        values = np.zeros(SHAPE, np.uint8)
        draw(values)
        label_path = self.folder / f"{name}-label.nii.gz"
        nib.save(nib.Nifti1Image(values, np.diag([-1.0, -1.0, self.thickness_mm, 1.0])), label_path)
        labelled = LabelledImage(name, path, label_path, names)
        self.labelled.append(labelled)
        return labelled

    def segment(
        self,
        path: Path,
        labels: Sequence[str] = (),
        own: LabelledImage | None = None,
        **options: object,
    ) -> Segmentation:
        self.bank.sync(self.labelled)
        chosen = Options(**options)  # type: ignore[arg-type]
        return self.engine.segment(
            read_image(path), self.bank, labels=labels, options=chosen, own=own
        )


def on_file_grid(found: Segmentation, image: ImageVolume) -> np.ndarray:
    from lib.imaging.io import source_label_map

    return source_label_map(found.label_map, image)


def annotate(index: int, value: int = 1) -> Callable[[np.ndarray], None]:
    def draw(values: np.ndarray) -> None:
        values[2:8, 3:9, index] = value

    return draw


def test_an_empty_bank_answers_with_nothing_and_says_what_to_do(studio: Studio) -> None:
    found = studio.segment(studio.image("query"))
    assert found.label_map.shape == read_image(studio.folder / "query.nii.gz").voxels.shape
    assert not found.label_map.any()
    assert found.labels == ()
    assert "label this one first" in found.message
    assert studio.averager.encoded == 0


def test_an_unlabelled_slice_teaches_nothing_by_default(studio: Studio) -> None:
    labelled = studio.label("a", annotate(2))
    references = list(studio.engine.references_of(labelled))
    assert [reference.key.index for reference in references] == [len_minus(labelled, 2)]
    assert references[0].present == {"liver"}
    assert references[0].absent == frozenset()  # spleen and kidney were never drawn: unknown


def len_minus(labelled: LabelledImage, index: int) -> int:
    """The file's k grows to Superior, the canonical axis to Inferior."""
    return SHAPE[2] - 1 - index


def test_a_label_drawn_elsewhere_in_the_volume_is_absent_on_a_labelled_slice(
    studio: Studio,
) -> None:
    def draw(values: np.ndarray) -> None:
        annotate(1, 1)(values)
        annotate(4, 2)(values)

    first, second = studio.engine.references_of(studio.label("a", draw))
    assert {first.present, second.present} == {frozenset({"liver"}), frozenset({"spleen"})}
    assert first.present == second.absent
    assert second.present == first.absent


def test_a_complete_map_teaches_absence_on_every_slice(studio: Studio) -> None:
    engine = ReferenceEngine(Averager(), Thumbnail(), annotation="complete")
    references = list(engine.references_of(studio.label("a", annotate(0))))
    assert len(references) == SHAPE[2]
    assert all(reference.labels == ("kidney", "liver", "spleen") for reference in references)
    assert sum("liver" in reference.present for reference in references) == 1


def test_an_empty_map_says_that_no_named_label_is_there(studio: Studio) -> None:
    references = list(studio.engine.references_of(studio.label("a", lambda _: None)))
    assert len(references) == SHAPE[2]
    assert all(reference.absent == set(NAMES.values()) for reference in references)
    assert list(studio.engine.references_of(studio.label("b", lambda _: None, names={}))) == []


def test_a_value_without_a_name_is_named_by_its_number(studio: Studio) -> None:
    (reference,) = studio.engine.references_of(studio.label("a", annotate(0, 9), names={}))
    assert reference.present == {"label_9"}


def test_a_mask_comes_from_the_reference_and_values_follow_the_order_asked_for(
    studio: Studio,
) -> None:
    def draw(values: np.ndarray) -> None:
        values[2:6, :, :] = 1
        values[9:14, :, :] = 2

    studio.label("a", draw, seed=1)
    image = read_image(studio.image("query", seed=2))
    found = studio.segment(image.path, ["spleen", "liver"], k=3)
    truth = np.zeros(SHAPE, np.int32)
    draw(truth)
    expected = np.select([truth == 1, truth == 2], [2, 1])
    np.testing.assert_array_equal(on_file_grid(found, image), expected)
    assert found.labels == ("spleen", "liver")
    assert {used.key.image_id for used in found.references["liver"]} == {"a"}
    signs = found.evidence["liver"].signs()
    assert (signs["presence"], signs["quality"]) == (1.0, 0.75)
    assert signs["sharpness"] > 0.99  # the one reference leaves no pixel in doubt
    assert 0.75 < found.confidence["liver"] < 1
    assert all(references == 3 for references, _ in studio.averager.asked)


def test_a_label_that_no_reference_knows_is_named_in_the_message(studio: Studio) -> None:
    studio.label("a", annotate(0))
    found = studio.segment(studio.image("query", 5), ["kidney", "liver"])
    assert found.labels == ("liver",)
    assert "kidney" in found.message


def test_a_reference_is_not_asked_about_a_label_it_was_not_annotated_for(studio: Studio) -> None:
    studio.label("a", lambda v: v.__setitem__(np.s_[:], 1), seed=1)
    studio.label("b", lambda v: v.__setitem__(np.s_[:8], 2), seed=2)
    image = read_image(studio.image("query", 3))
    found = studio.segment(image.path, ["liver", "spleen"], k=4)
    # had "b" counted as "no liver here", the mean would be one half, and nothing would win
    assert (on_file_grid(found, image)[8:] == 1).all()
    for _, known in studio.averager.asked:
        assert all(sum(row) == 1 for row in known)


def test_own_slices_come_first_and_come_back_voxel_for_voxel(studio: Studio) -> None:
    studio.label("other", lambda v: v.__setitem__(np.s_[10:, 10:, :], 1), seed=1)

    def draw(values: np.ndarray) -> None:
        values[2:8, 3:9, 1] = 1
        values[5, 5, 1] = 0
        values[2:8, 3:9, 4] = 1

    own = studio.label("query", draw, seed=2)
    image = read_image(own.image_path)
    found = studio.segment(own.image_path, own=own, k=2)
    result, truth = on_file_grid(found, image), np.zeros(SHAPE, np.int32)
    draw(truth)
    np.testing.assert_array_equal(result[:, :, [1, 4]], truth[:, :, [1, 4]])
    assert result[2, 3, 0] == 1  # by its own slices, not by the other image's corner
    assert not result[12, 12].any()
    assert {used.key.image_id for used in found.references["liver"]} == {"query"}
    assert found.own_slices == 2
    # 36 and 35 own voxels are certain; on the other four slices the two masks agree on 35, and
    # the hole may be closed between them
    own_area, area = 36 + 35, int((result == 1).sum())
    assert own_area + 4 * 35 <= area <= own_area + 4 * 36
    assert found.own_share["liver"] == pytest.approx(own_area / area)
    signs = found.evidence["liver"].signs()
    assert (signs["quality"], signs["presence"]) == (0.75, 1.0)
    believed = Calibration().confidence("liver", found.evidence["liver"])
    assert found.confidence["liver"] == pytest.approx(
        (own_area + (area - own_area) * believed) / area, abs=1e-4
    )
    assert studio.averager.asked == [(2, [[True], [True]])] * 4  # own slices are not computed


def everywhere(values: np.ndarray) -> None:
    values[2:12, 3:13] = 1


def test_thin_slices_between_two_that_agree_are_not_segmented(studio: Studio) -> None:
    studio.thickness_mm = 1.0
    studio.label("a", everywhere)
    query = studio.image("query", seed=1)
    studio.bank.sync(studio.labelled)
    before, steps = studio.averager.encoded, list[tuple[int, int]]()
    found = studio.engine.segment(
        read_image(query), studio.bank, on_progress=lambda done, total: steps.append((done, total))
    )
    assert (found.slices, found.between) == (6, 2)
    assert studio.averager.encoded - before == 4
    assert steps == [(4, 6), (6, 6)]
    whole = studio.segment(query, every_slice=True)
    assert whole.between == 0
    np.testing.assert_array_equal(found.label_map, whole.label_map)
    assert found.confidence == pytest.approx(whole.confidence)
    some = replace(read_image(query), adjacent=False)
    assert studio.engine.segment(some, studio.bank).between == 0


def test_thick_slices_are_all_segmented(studio: Studio) -> None:
    studio.label("a", everywhere)
    assert studio.segment(studio.image("query", seed=1)).between == 0


def test_a_slice_is_mended_by_its_neighbors_unless_they_are_none(studio: Studio) -> None:
    def hurt(values: np.ndarray) -> None:
        everywhere(values)
        values[5:9, 5:9, 3] = 0

    labelled = studio.label("a", hurt)
    image = read_image(studio.image("query"))  # the same pixels: each slice finds its like
    studio.bank.sync(studio.labelled)
    whole, apart = (
        studio.engine.segment(one, studio.bank, options=Options(k=1)).label_map
        for one in (image, replace(image, adjacent=False))
    )
    plane = len_minus(labelled, 3)
    assert (apart == 1).sum() == 6 * 100 - 16
    assert (apart[..., plane] == 1).sum() == 100 - 16
    assert (whole == 1).sum() == 6 * 100


def test_own_labels_can_be_left_out_for_measuring(studio: Studio) -> None:
    studio.label("other", lambda v: v.__setitem__(np.s_[10:, 10:, :], 1), seed=1)
    own = studio.label("query", annotate(1), seed=2)
    found = studio.segment(own.image_path, own=own, own_labels=False)
    assert {used.key.image_id for used in found.references["liver"]} == {"other"}
    assert found.own_slices == 0
    result = on_file_grid(found, read_image(own.image_path))
    assert not result[2, 3, 1]


def test_a_label_that_the_annotator_did_not_use_is_still_found_on_his_slices(
    studio: Studio,
) -> None:
    studio.label("other", lambda v: v.__setitem__(np.s_[10:, 10:, :], 2), seed=1)
    own = studio.label("query", annotate(1, 1), seed=2)
    image = read_image(own.image_path)
    found = studio.segment(own.image_path, ["liver", "spleen"], own=own)
    result = on_file_grid(found, image)
    assert result[12, 12, 1] == 2
    assert (result[2:8, 3:9, 1] == 1).all()


def test_put_back_never_draws_over_a_label_that_was_not_asked_for(studio: Studio) -> None:
    own = studio.label("query", annotate(1, 3))
    image = read_image(own.image_path)
    annotation = read_annotation(own, image)
    full = np.ones(image.geometry.shape, np.int32)
    result = put_back(full, annotation, ["liver"])
    assert not result[annotation.label_map == 3].any()
    assert result[annotation.label_map == 0].all()


def test_a_label_asked_for_twice_is_refused(studio: Studio) -> None:
    with pytest.raises(RequestError, match="twice"):
        studio.segment(studio.image("query"), ["liver", "liver"])


def test_progress_reaches_the_end_once_for_each_batch(studio: Studio) -> None:
    studio.label("a", annotate(0))
    studio.bank.sync(studio.labelled)
    seen: list[tuple[int, int]] = []
    image = read_image(studio.image("query", 4))
    studio.engine.segment(image, studio.bank, on_progress=lambda *step: seen.append(step))
    assert seen == [(4, 6), (6, 6)]


def test_the_pool_sees_an_image_by_inner_slices(studio: Studio) -> None:
    image = read_image(studio.image("query"))
    rows, numbers = studio.engine.regions_of(image)
    assert rows.shape == (5, 1, SIZE * SIZE)
    pictures = cut(image, through_plane_axis(image))
    assert numbers == [int((n + 0.5) * len(pictures) / 5) for n in range(5)]
    wanted = Thumbnail().embed([pictures[number] for number in numbers])
    np.testing.assert_allclose(rows[:, 0], wanted, atol=1e-5)


def label_three(studio: Studio) -> None:
    for n, name in enumerate("abc"):
        studio.label(name, annotate(2), n)


class Surveyor(Averager):
    """Counts how often it was asked for a study, and notes by which study it segments."""

    def __init__(self) -> None:
        super().__init__()
        self.examples: list[list[Example]] = []
        self.studies: list[Study] = []

    def study_of(self, examples: Iterable[Example]) -> Study:
        self.examples.append(list(examples))
        return Study(place=float(1 + len(self.examples)))

    def segment(
        self,
        query: Features,
        references: Sequence[Memory],
        known: torch.Tensor,
        study: Study = AS_TRAINED,
    ) -> Prediction:
        self.studies.append(study)
        return super().segment(query, references, known, study)


def test_the_study_is_learned_once_for_each_state_of_the_labels(tmp_path: Path) -> None:
    studio = Studio(tmp_path, Surveyor())
    surveyor = studio.averager
    assert isinstance(surveyor, Surveyor)
    label_three(studio)
    query = studio.image("query", 9)
    first = studio.segment(query)
    assert studio.segment(query).study == first.study
    assert first.study.place == 2.0
    assert len(surveyor.examples) == 1
    assert len(surveyor.examples[0]) == 3
    for example in surveyor.examples[0]:  # an image never votes for itself
        assert len(example.references) == 2
        assert example.known.all()
    studio.label("d", annotate(3), 4)
    assert studio.segment(query).study.place == 3.0
    assert {study.place for study in surveyor.studies} == {2.0, 3.0}


def gain_of(study: Study) -> float:
    return float(study.looks.correction.gain) if study.looks is not None else 0.0


class Ponderer(Surveyor):
    """Learns looks only when it may; their gain tells how often it did."""

    def __init__(self) -> None:
        super().__init__()
        self.may, self.begun = threading.Event(), threading.Event()
        self.fails = False
        self.pondered = 0

    def looks_of(
        self, examples: Iterable[Example], study: Study, make_way: Callable[[], None]
    ) -> Study:
        assert list(examples)
        make_way()
        self.begun.set()
        assert self.may.wait(20)
        if self.fails:
            raise MemoryStoreError("it was removed")
        self.pondered += 1
        gain = Correction(torch.ones(1, 1), torch.tensor([float(self.pondered)]), torch.zeros(1))
        return replace(study, looks=Looks(("liver",), gain))


def test_who_wants_a_mask_does_not_wait_for_how_labels_look(tmp_path: Path) -> None:
    studio = Studio(tmp_path, Ponderer())
    ponderer = studio.averager
    assert isinstance(ponderer, Ponderer)
    label_three(studio)
    query = read_image(studio.image("query", 9))

    def told(*, wait: bool = False) -> tuple[float, float]:
        studio.bank.sync(studio.labelled)
        study = studio.engine.segment(query, studio.bank, wait=wait).study
        return study.place, gain_of(study)

    def learned() -> None:
        end = time.monotonic() + 20
        while studio.engine._learning.locked():
            assert time.monotonic() < end
            time.sleep(0.01)

    assert told() == (2, 0)  # nothing is known of looks yet
    ponderer.may.set()
    learned()
    assert told() == (2, 1)
    ponderer.may.clear()
    studio.label("d", annotate(3), 4)
    assert [told(), told()] == [(3, 1), (3, 1)]  # all else is as the labels are now
    ponderer.may.set()
    learned()
    assert told() == (3, 2)
    assert len(ponderer.examples) == ponderer.pondered == 2  # two asked, one learned
    ponderer.fails = True
    studio.label("e", annotate(3), 5)
    assert told() == (4, 2)
    learned()
    ponderer.fails = False
    assert told() == (4, 2)  # it is tried again
    learned()
    assert told() == (4, 3)
    studio.label("f", annotate(3), 6)
    assert told(wait=True) == (5, 4)


def test_looks_are_learned_between_requests(tmp_path: Path) -> None:
    studio = Studio(tmp_path, Ponderer())
    ponderer = studio.averager
    assert isinstance(ponderer, Ponderer)
    ponderer.may.set()
    free, asked = threading.Event(), threading.Event()

    def make_way() -> None:
        asked.set()
        assert free.wait(20)

    studio.engine = ReferenceEngine(ponderer, Thumbnail(), batch=4, make_way=make_way)
    label_three(studio)
    studio.bank.sync(studio.labelled)
    studio.engine.study(studio.bank, wait=False)
    assert asked.wait(20)
    time.sleep(0.2)
    assert not ponderer.begun.is_set()
    free.set()
    assert gain_of(studio.engine.study(studio.bank)) == 1


def test_what_is_labelled_while_looks_are_learned_is_learned_next(tmp_path: Path) -> None:
    studio = Studio(tmp_path, Ponderer())
    ponderer = studio.averager
    assert isinstance(ponderer, Ponderer)
    label_three(studio)
    studio.bank.sync(studio.labelled)
    studio.engine.study(studio.bank, wait=False)
    assert ponderer.begun.wait(20)
    studio.label("d", annotate(3), 4)
    studio.bank.sync(studio.labelled)
    ponderer.may.set()
    end = time.monotonic() + 20
    while ponderer.pondered < 2 or studio.engine._learning.locked():  # nobody asks again
        assert time.monotonic() < end
        time.sleep(0.01)
    assert gain_of(studio.engine.study(studio.bank, wait=False)) == 2
    assert ponderer.pondered == 2


class Painter(Surveyor):
    """Says of looks that liver counts double, or threefold where image a is not to be known."""

    def looks_of(
        self, examples: Iterable[Example], study: Study, make_way: Callable[[], None]
    ) -> Study:
        assert {one.labels for one in examples} <= {("liver",), ("liver", "spleen")}
        twice, thrice = (
            Correction(torch.ones(1, 1), torch.tensor([gain]), torch.zeros(1))
            for gain in (2.0, 3.0)
        )
        return replace(study, looks=Looks(("liver",), twice, {"a": thrice}))


def test_looks_are_those_of_the_labels_at_hand_and_not_of_the_image_left_out(
    tmp_path: Path,
) -> None:
    studio = Studio(tmp_path, Painter())
    painter = studio.averager
    assert isinstance(painter, Painter)
    for n, name in enumerate("ab"):
        studio.label(name, annotate(2), n)

    def both(values: np.ndarray) -> None:
        annotate(2)(values)
        values[10, 10, 2] = 2

    studio.label("c", both, 3)

    def gains(
        path: Path, own: LabelledImage | None = None, **options: object
    ) -> set[tuple[tuple[str, ...], tuple[float, ...]]]:
        painter.studies.clear()
        studio.segment(path, own=own, **options)
        looks = [study.looks for study in painter.studies]
        return {(one.labels, tuple(one.correction.gain.tolist())) for one in looks if one}

    query = studio.image("query", 9)
    assert gains(query) == {(("liver", "spleen"), (2.0, 1.0))}
    studio.segment(query, labels=["spleen"])
    last = painter.studies[-1].looks
    assert last is not None
    assert (last.labels, last.correction.gain.tolist()) == (("spleen",), [1.0])
    own = studio.labelled[0]
    assert gains(own.image_path, own, own_labels=False) == {(("liver", "spleen"), (3.0, 1.0))}
    assert gains(own.image_path, own) == {(("liver", "spleen"), (2.0, 1.0))}
    assert gains(studio.labelled[1].image_path, studio.labelled[1], own_labels=False) == {
        (("liver", "spleen"), (2.0, 1.0))
    }


def test_what_is_always_drawn_in_one_piece_is_found_in_one_piece(studio: Studio) -> None:
    def left(values: np.ndarray) -> None:
        values[2:8, 3:9, 2] = 1

    def right(values: np.ndarray) -> None:
        values[10:15, 3:9, 2] = 1

    def both(values: np.ndarray) -> None:
        left(values)
        right(values)

    def long(values: np.ndarray) -> None:
        values[2:15, 3:9, 2] = 1

    def rows(draws: Sequence[Callable[[np.ndarray], None]]) -> tuple[Segmentation, int]:
        for draw in draws:
            name = f"case {len(studio.labelled)}"
            studio.label(name, draw, len(studio.labelled))
        found = studio.segment(studio.image("query", 99), ["liver"])
        return found, int(found.label_map.any((1, 2)).sum())

    found, wide = rows([left, right, long])
    assert wide == 6 + 5  # three labels say nothing yet
    found, wide = rows([left, right])
    assert found.study.shapes["liver"] == Shape(1, closed=True)
    assert wide == 6
    found, wide = rows([both])
    assert found.study.shapes["liver"].pieces == 2
    assert wide == 6 + 5


def test_what_lies_between_own_slices_follows_their_contours(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A square that widens; the references alone paint a mean of all own slices."""

    def squares(values: np.ndarray, slices: Sequence[int]) -> None:
        for index in slices:
            reach = 2 + index
            values[8 - reach : 8 + reach, 8 - reach : 8 + reach, index] = 1

    own = studio.label("query", lambda v: squares(v, (0, 2, 4)), seed=2)
    image = read_image(own.image_path)
    truth = np.zeros(SHAPE, np.int32)
    squares(truth, (1, 3))

    def dice() -> float:
        found = on_file_grid(studio.segment(own.image_path, own=own, k=3), image)[..., [1, 3]] == 1
        drawn = truth[..., [1, 3]] == 1
        return float(2 * (found & drawn).sum() / (found.sum() + drawn.sum()))

    assert dice() > 0.88
    monkeypatch.setattr("lib.segmenter._contours", lambda *_: None)
    assert dice() < 0.85
