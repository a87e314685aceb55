"""The reviewer over real pictures and the bundled network: what it measures, when, and forgets."""

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.confidence.calibration import Calibration, Sample
from lib.confidence.evidence import Evidence
from lib.imaging.io import read_image
from lib.reviewing.reviewer import Reviewer, _worst
from lib.runtime import Runtime
from lib.segmentation import Options
from lib.settings import RefSegSettings
from lib.strategies.board import read_board
from lib.studies.datastore import StudiesDatastore, labelled_images
from lib.types import LabelledImage
from tests.apps.phantoms import write_picture, write_picture_labels


class Site:
    def __init__(self, folder: Path) -> None:
        self.studies = folder / "studies"
        (self.studies / "labels" / "final").mkdir(parents=True)
        for seed in range(6):
            write_picture(self.studies / f"p{seed}.png", seed)
        for seed in range(3):
            self.label(seed)
        self.store = StudiesDatastore(str(self.studies), copies=folder / "copies", watch=False)
        settings = RefSegSettings(device="cpu", k=2)
        self.runtime = Runtime(settings, bank_root=folder / "bank", studies=str(self.studies))
        self.reviewer = Reviewer(self.runtime)
        self.left_out: list[str] = []
        leave_out = self.reviewer.leave_out

        def watched(one: LabelledImage, by_id: dict[str, LabelledImage]) -> object:
            self.left_out.append(one.image_id)
            return leave_out(one, by_id)

        self.reviewer.leave_out = watched  # type: ignore[method-assign,assignment]

    def label(self, seed: int, like: int | None = None) -> None:
        path = self.studies / "labels" / "final" / f"p{seed}.png"
        write_picture_labels(path, seed if like is None else like)

    def labelled(self) -> list[LabelledImage]:
        return labelled_images(self.store)

    def calibrate(self) -> list[str]:
        self.left_out.clear()
        labelled, _ = self.runtime.sync(self.labelled)
        self.reviewer.calibrate(labelled)
        return list(self.left_out)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_samples_follow_the_labels_and_nothing_is_measured_twice(site: Site) -> None:
    assert site.calibrate() == ["p0", "p1", "p2"]
    samples = site.reviewer.calibration().samples
    assert [sample.label for sample in samples] == ["label_1"] * 3
    assert min(sample.dice for sample in samples) > 0.5
    assert all(sample.present for sample in samples)
    assert set(samples[0].evidence.signs()) >= {"sharpness", "agreement", "reverse"}
    assert site.calibrate() == []
    good = site.reviewer.confidence({"label_1": samples[0].evidence})["label_1"]

    site.label(1, like=5)  # another's: the mask of the picture is not there
    assert site.calibrate() == ["p1"]
    worse = site.reviewer.confidence({"label_1": samples[0].evidence})["label_1"]
    assert worse < good

    (site.studies / "labels" / "final" / "p1.png").unlink()
    # two labels are not three: what they teach of each other is measured again only at a doubling
    assert site.calibrate() == []
    assert len(site.reviewer.calibration().samples) == 2
    assert len(Reviewer(site.runtime).calibration().samples) == 2  # kept on the disk


def test_an_unlabelled_image_is_judged_in_the_background_and_the_strategies_hear_of_it(
    site: Site,
) -> None:
    board = read_board(site.store)
    left = {name: board.paths[name] for name in board.paths if name not in board.labelled}
    noise = np.random.default_rng(0).integers(0, 255, (56, 64), dtype=np.uint8)
    Image.fromarray(noise).save(left["p5"])
    deadline = time.monotonic() + 300
    while len(site.reviewer.risk()) < 3:
        site.reviewer.work_soon(site.labelled, left, images=2)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    risk = site.reviewer.risk()
    assert risk.keys() == left.keys()
    assert all(0 <= value <= 1 for value in risk.values())
    assert max(risk, key=lambda name: risk[name]) == "p5"


def test_what_was_found_is_recalled_without_looking_again(site: Site) -> None:
    site.calibrate()
    paths, labelled = read_board(site.store).paths, site.labelled()
    calibration = site.reviewer.calibration()
    looked = site.reviewer.review("p3", paths["p3"], labelled, calibration)
    for reviewer in (site.reviewer, site.reviewer, Reviewer(site.runtime)):
        told = reviewer.recall()
        assert told.keys() == {"p3"}
        assert (told["p3"].trust, told["p3"].worst) == (looked.trust, looked.worst)
    site.reviewer.review("p4", paths["p4"], labelled, calibration)
    assert site.reviewer.recall().keys() == {"p3", "p4"}


def test_with_one_label_nothing_can_be_left_out_and_the_belief_is_told(tmp_path: Path) -> None:
    site = Site(tmp_path)
    for seed in (1, 2):
        (site.studies / "labels" / "final" / f"p{seed}.png").unlink()
    assert site.calibrate() == []
    labelled, _ = site.runtime.sync(site.labelled)
    found = site.reviewer.review(
        "p4", site.studies / "p4.png", labelled, site.reviewer.calibration()
    )
    assert found.worst == "label_1"
    assert 0 < found.trust < 1
    assert found.thumbnail == ""


def test_what_the_annotator_drew_is_certain(site: Site) -> None:
    one = {"label_1": Evidence(quality=0.6, area=10), "absent": Evidence(presence=0.1)}
    told = site.reviewer.confidence(one)
    assert told["absent"] > 0.8  # that there is none is as good as certain
    half = site.reviewer.confidence(one, {"label_1": 0.5})
    assert half["label_1"] == pytest.approx(0.5 + 0.5 * told["label_1"], abs=1e-3)


def test_an_answer_and_a_review_of_the_same_slices_rest_on_the_same_figures(site: Site) -> None:
    (site.studies / "labels" / "final" / "p2.png").unlink()
    empty = np.zeros((56, 64), np.uint8)
    Image.fromarray(empty + 90).save(site.studies / "p4.png")  # a picture of nothing
    site.calibrate()
    paths, labelled = read_board(site.store).paths, site.labelled()
    calibration = site.reviewer.calibration()
    for name in ("p3", "p4"):
        answer = site.runtime.engine.segment(
            read_image(paths[name]), site.runtime.bank, options=Options(k=2)
        )
        told = site.reviewer.confidence(answer.evidence, answer.own_share)
        judged = site.reviewer.review(name, paths[name], labelled, calibration)
        signs = answer.evidence["label_1"].signs()
        if name == "p4":
            assert judged.areas["label_1"] == answer.evidence["label_1"].area == 0
            assert signs == judged.signs["label_1"] == {"presence": signs["presence"]}
            assert told == judged.confidence
        else:
            four = {"similarity", "presence", "quality", "sharpness"}
            assert signs.keys() == four  # the two others need the networks again
            assert judged.signs["label_1"].keys() == four | {"agreement", "reverse"}
            seen = {sign: judged.signs["label_1"][sign] for sign in four}
            assert signs == pytest.approx(seen, abs=1e-6)


LEARNED = Calibration([Sample("liver", Evidence(quality=0.9, area=9), 0.9)], images=1)


@pytest.mark.parametrize("calibration", [Calibration(), LEARNED], ids=["fresh", "learned"])
def test_a_label_that_was_missed_is_the_worst_of_its_image(calibration: Calibration) -> None:
    told = {"liver": 0.9, "tumor": 0.05}
    assert _worst(told, {"liver": 500, "tumor": 0}, calibration) == "tumor"
    assert _worst(told, {"liver": 0, "tumor": 0}, calibration) == "tumor"
    assert _worst({"liver": 0.04, "tumor": 0.05}, {"liver": 5, "tumor": 0}, calibration) == "liver"
    assert _worst({}, {}, calibration) == ""


def order(calibration: Calibration) -> list[str]:
    """Images by trust, as `review` lists them: eight labels, of which most are on no image.

    The presences of absent labels are those that the network says of haemorrhages in CT.
    """
    found = Evidence(presence=0.99, quality=0.9, sharpness=0.93, area=400)
    poor = Evidence(presence=0.9, quality=0.5, sharpness=0.55, area=400)
    doubts = [0.25, 0.3, 0.34, 0.4, 0.4, 0.45, 0.48]
    images = {f"good {n}": {"liver": found} for n in range(4)} | {"poor": {"liver": poor}}
    for evidence in images.values():
        evidence |= {f"rare {n}": Evidence(presence=doubt) for n, doubt in enumerate(doubts)}
    images["missed"] = images["good 0"] | {"rare 3": Evidence(presence=0.97)}
    trust = {}
    for name, evidence in images.items():
        told = {label: calibration.confidence(label, one) for label, one in evidence.items()}
        areas = {label: one.area for label, one in evidence.items()}
        trust[name] = told[_worst(told, areas, calibration)]
    return sorted(trust, key=lambda name: (trust[name], name))


def test_where_most_labels_are_absent_the_missed_and_the_poor_come_first() -> None:
    good = Evidence(presence=0.99, quality=0.9, sharpness=0.93, area=400)
    samples = [Sample("liver", good, 0.9)] * 20
    samples += [Sample(f"rare {n}", good, 0.9) for n in range(7)]  # drawn where they are, only
    for calibration in (Calibration(), Calibration(samples, images=20)):
        assert order(calibration)[:2] == ["missed", "poor"]
