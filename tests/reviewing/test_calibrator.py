"""Which labelled images are left out, when they are measured again, and what is never forgotten."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from lib.confidence.calibration import Sample
from lib.confidence.evidence import Evidence
from lib.reviewing.calibrator import MOST_SAMPLES, Calibrator, _draw
from lib.runtime import Runtime
from lib.settings import RefSegSettings
from lib.types import LabelledImage


class Counting(Calibrator):
    """Measures nothing: notes who was left out, with as many labels as there were."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self.left_out: list[str] = []

    def leave_out(self, one: LabelledImage, by_id: Mapping[str, LabelledImage]) -> list[Sample]:
        self.left_out.append(one.image_id)
        return [Sample(one.image_id, Evidence(quality=0.5, area=1), len(by_id) / 1000)]


class Site:
    def __init__(self, folder: Path, **options: int) -> None:
        self.folder = folder
        (folder / "files").mkdir(exist_ok=True)
        settings = RefSegSettings(device="cpu", **options)
        self.calibrator = Counting(Runtime(settings, bank_root=folder / "bank", studies="s"))

    def labelled(self, count: int) -> list[LabelledImage]:
        found = []
        for number in range(count):
            image = self.folder / "files" / f"{number}.png"
            label = self.folder / "files" / f"{number} label.png"
            if not label.exists():
                image.write_bytes(b"image")
                label.write_bytes(b"label")
            found.append(LabelledImage(f"case {number}", image, label))
        return found

    def calibrate(self, count: int, images: int | None = None) -> list[str]:
        """Who was left out."""
        self.calibrator.left_out.clear()
        self.calibrator.calibrate(self.labelled(count), images=images)
        return list(self.calibrator.left_out)

    def taught_by(self) -> set[str]:
        return {sample.label for sample in self.calibrator.calibration().samples}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def drawn(count: int) -> set[str]:
    nowhere = Path("nowhere")
    labelled = [LabelledImage(f"case {n}", nowhere, nowhere) for n in range(count)]
    found = {one.image_id for one in _draw(labelled[::-1], MOST_SAMPLES)}
    assert found == {one.image_id for one in _draw(labelled, MOST_SAMPLES)}
    assert len(found) == min(count, MOST_SAMPLES)
    return found


def test_one_label_more_takes_the_place_of_one_at_most() -> None:
    before = drawn(MOST_SAMPLES)
    changes = []
    for count in range(MOST_SAMPLES + 1, 301):
        after = drawn(count)
        changes.append(len(after - before))
        assert after - before <= {f"case {count - 1}"}
        before = after
    # a random draw of 60 takes the n-th of n with probability 60 / n: 60 ln(300 / 60) = 97 in all
    assert 70 < sum(changes) < 125


def test_a_label_more_makes_one_be_left_out_at_most(site: Site) -> None:
    assert len(site.calibrate(61)) == MOST_SAMPLES
    before = site.taught_by()
    again = site.calibrate(62)
    assert set(again) <= {"case 61"}
    assert len(site.taught_by()) == MOST_SAMPLES
    assert site.taught_by() - before == set(again)


def test_samples_do_not_get_fewer_however_slowly_they_are_measured(site: Site) -> None:
    known = 0
    for count in range(40, 160):  # past 64 and 128 labels; a site that measures one at a time
        site.calibrate(count, images=1)
        found = len(site.taught_by())
        assert found >= min(known, MOST_SAMPLES)
        known = found
    assert known >= MOST_SAMPLES
    site.calibrate(160)
    assert site.taught_by() == drawn(160)


def test_a_sudden_heap_of_labels_costs_no_sample_before_it_is_replaced(site: Site) -> None:
    site.calibrate(80)
    before = site.taught_by()
    site.calibrate(300, images=4)
    assert before <= site.taught_by()
    site.calibrate(300)
    assert site.taught_by() == drawn(300)


def test_who_was_measured_with_half_as_many_labels_is_measured_again_after_what_is_new(
    site: Site,
) -> None:
    site.calibrate(20)
    site.calibrate(30)  # those ten are measured with 30
    old = {f"case {n}" for n in range(20)}
    assert site.calibrate(39) == sorted(f"case {n}" for n in range(30, 39))
    again = site.calibrate(40)
    assert again[0] == "case 39"
    assert set(again[1:]) == old
    assert site.calibrate(33) == []  # a few less are not half
    samples = {s.label: s.dice for s in site.calibrator.calibration().samples}
    assert (samples["case 0"], samples["case 25"]) == (0.04, 0.03)


def test_only_the_samples_of_labels_that_are_gone_are_forgotten_at_once(site: Site) -> None:
    site.calibrate(6)
    site.calibrate(4, images=0)
    assert site.taught_by() == {f"case {n}" for n in range(4)}
    site.calibrate(1)  # nothing is left that it could be segmented by
    assert site.taught_by() == set()


def test_with_other_references_for_each_slice_masks_are_others_and_measured_again(
    site: Site,
) -> None:
    site.calibrate(5)
    assert Site(site.folder).calibrate(5) == []
    assert len(Site(site.folder, k=3).calibrate(5)) == 5
    assert len(Site(site.folder, k=3, cap_per_case=1).calibrate(5)) == 5
