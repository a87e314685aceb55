"""A campaign is the app at work: same banks, same masks; done once, and goes on after a stop."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.campaign.journal import Journal
from lib.campaign.plan import (
    Plan,
    check_budgets,
    check_strategies,
    draw_part,
    draw_targets,
    source_of,
)
from lib.campaign.remembering import RememberingSegmenter
from lib.campaign.replay import Replay, inner_slices, thinned
from lib.campaign.run import play, seconds_at_most, steps
from lib.errors import RequestError
from lib.imaging.geometry import Geometry
from lib.imaging.io import ImageVolume, read_image, read_label_map
from lib.imaging.slices import cut
from lib.memory.bank import MemoryBank
from lib.segmentation import Options
from lib.segmenter import ReferenceEngine
from lib.types import Correction, Looks, Study

from .studies import NAMES, Averager, Thumbnail, labelled_in, make_studies, runtime_of

BUDGETS = (1, 3, 5)


class Folder:
    """Labelled pictures, prepared to be replayed."""

    def __init__(self, tmp_path: Path) -> None:
        self.studies = make_studies(tmp_path / "studies", 9)
        self.work = tmp_path / "work"
        self.journal_path = tmp_path / "campaign.jsonl"
        self.labelled = labelled_in(self.studies)

    def start(self) -> tuple[Replay, Plan, Journal, Averager, Callable[..., None]]:
        """As a new process would."""
        runtime, averager = runtime_of(self.studies, self.work)
        replay = Replay(runtime, self.labelled)
        pool = replay.prepare(lambda: None)
        plan = Plan(
            strategies=("random", "refseg", "foreground"),
            budgets=BUDGETS,
            seeds=2,
            targets=draw_targets(list(replay.labelled), 6),
            labels=replay.names,
            slices=0,
            part=1.0,
            tolerance_mm=2.0,
            source=source_of(self.labelled, runtime.fingerprint),
        )
        journal = Journal(self.journal_path, plan.protocol)

        def run(advance: Callable[[int], None] = lambda _: None) -> None:
            play(plan, replay, pool, journal, advance=advance)

        return replay, plan, journal, averager, run


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_every_figure_is_what_the_app_gives_with_the_same_labels(
    folder: Folder, tmp_path: Path
) -> None:
    _, plan, journal, _, run = folder.start()
    run()
    by_id = {one.image_id: one for one in folder.labelled}
    engine = ReferenceEngine(Averager(), Thumbnail(), annotation="complete")
    assert len(journal.outcomes) == 3 * 2 * len(BUDGETS)
    for number, outcome in enumerate(journal.outcomes.values()):
        assert len(outcome.picked) == outcome.budget == len(set(outcome.picked))
        assert {c.image_id for c in outcome.cases} == set(plan.targets) - set(outcome.picked)
        if number % 4:
            continue
        bank = MemoryBank(tmp_path / f"bank{number}", "plain", engine.references_of)
        bank.sync([by_id[image_id] for image_id in outcome.picked])
        for case in outcome.cases:
            image = read_image(by_id[case.image_id].image_path)
            truth = read_label_map(by_id[case.image_id].label_path, image)
            answer = engine.segment(image, bank, labels=plan.labels, options=Options(k=3))
            for value, name in NAMES.items():
                here = truth == value
                found = (
                    answer.label_map == answer.labels.index(name) + 1
                    if name in answer.labels
                    else np.zeros_like(here)
                )
                both = int(here.sum() + found.sum())
                score = case.labels[name]
                if here.any():
                    assert score.dice == pytest.approx(2 * int((here & found).sum()) / both)
                    assert score.false_alarm is None
                else:
                    assert np.isnan(score.dice)
                    assert score.false_alarm == bool(found.any())
                assert score.confidence == pytest.approx(answer.confidence.get(name, 0.0), abs=2e-3)


def test_every_picture_is_encoded_once_for_all_strategies_and_seeds_and_runs(
    folder: Folder,
) -> None:
    _, _, _, averager, run = folder.start()
    run()
    blank = np.zeros((averager.size, averager.size), np.float32).tobytes()
    encoded = [one for one in averager.encoded if one != blank]  # asked for to find the device
    assert len(encoded) == len(set(encoded)) == 9
    again = folder.start()[3]
    assert [one for one in again.encoded if one != blank] == []


def test_a_stopped_campaign_goes_on_and_ends_as_if_it_had_not_been_stopped(
    folder: Folder, tmp_path: Path
) -> None:
    class StoppedError(Exception):
        pass

    left = 17

    def stop(done: int) -> None:
        nonlocal left
        left -= done
        if left < 0:
            raise StoppedError

    with pytest.raises(StoppedError):
        folder.start()[4](stop)
    lines = folder.journal_path.read_bytes()
    assert lines.count(b"\n") >= 2
    folder.journal_path.write_bytes(lines + b'{"protocol":"cut sho')  # as a power cut leaves it
    _, plan, journal, _, run = folder.start()
    before = len(journal.outcomes)
    assert 0 < before < 3 * 2 * len(BUDGETS)
    seen = []
    run(seen.append)
    assert sum(seen) == steps(plan)

    whole = Folder(tmp_path / "other")
    _, _, reference, _, run_whole = whole.start()
    run_whole()
    assert {p: (o.picked, _figures(o.cases)) for p, o in journal.outcomes.items()} == {
        p: (o.picked, _figures(o.cases)) for p, o in reference.outcomes.items()
    }
    assert Journal(folder.journal_path, plan.protocol).outcomes.keys() == journal.outcomes.keys()
    assert folder.journal_path.read_bytes().count(b"\n") == len(journal.outcomes)


def _figures(cases: object) -> str:
    return repr(cases)  # NaN is not equal to itself, its text is


def test_the_same_labels_are_not_segmented_again_whoever_chose_them(folder: Folder) -> None:
    _, _, journal, averager, run = folder.start()
    run()
    asked = averager.asked
    place = ("random", 0, 3)
    one = journal.outcomes[place]
    rest = folder.journal_path.read_text().splitlines()
    kept = [
        line
        for line in rest
        if (lambda r: (r["strategy"], r["seed"], r["budget"]))(json.loads(line)) != place
    ]
    doubled = json.loads(next(line for line in rest if line not in kept)) | {"strategy": "kcenter"}
    folder.journal_path.write_text("\n".join([*kept, json.dumps(doubled)]) + "\n")
    _, _, again, second, run_again = folder.start()
    run_again()
    assert asked > 0
    assert second.asked == 0
    assert _figures(again.outcomes[place].cases) == _figures(one.cases)
    assert again.outcomes[place].seconds.slices == 0


def test_the_time_it_takes_is_told_before(folder: Folder) -> None:
    replay, plan, journal, averager, run = folder.start()
    averager.wait = 0.3
    told = seconds_at_most(plan, replay, journal)
    assert 0.3 <= told / steps(plan) < 3  # a busy machine sleeps longer
    averager.wait = 0.0
    run()
    assert seconds_at_most(plan, replay, journal) == 0


def test_another_protocol_does_not_take_the_lines_of_this_one(folder: Folder) -> None:
    _, plan, _, _, run = folder.start()
    run()
    other = replace(plan, targets=plan.targets[:-1])
    assert not Journal(folder.journal_path, other.protocol).outcomes
    assert Journal(folder.journal_path, other.protocol).passed_over == 18
    more = replace(plan, seeds=20, strategies=("kcenter",))
    assert len(Journal(folder.journal_path, more.protocol).outcomes) == 18


def test_an_edited_label_is_another_source(folder: Folder) -> None:
    before = source_of(folder.labelled)
    path = folder.labelled[0].label_path
    content = path.read_bytes()
    path.write_bytes(content + b" ")
    assert source_of(folder.labelled) != before
    path.write_bytes(content)
    os.utime(path, (1, 1))  # as a copy of the folder has
    assert source_of(folder.labelled) == before


def test_targets_are_the_same_for_all_and_budgets_leave_one_to_score() -> None:
    ids = [f"i{n}" for n in range(30)]
    assert draw_targets(ids, 8) == draw_targets(ids[::-1], 8)
    assert len(set(draw_targets(ids, 8))) == 8
    assert draw_targets(ids, 0) == tuple(sorted(ids))
    assert check_budgets([50, 5, 1, 5], 20) == (1, 5)
    with pytest.raises(RequestError, match="too few"):
        check_budgets([5], 5)
    with pytest.raises(RequestError, match="from 1"):
        check_budgets([0, 5], 20)
    with pytest.raises(RequestError, match="luck"):
        check_strategies(["random", "luck"])


def test_a_repetition_labels_its_own_part_only_and_all_strategies_the_same(folder: Folder) -> None:
    replay, plan, _, _, _ = folder.start()
    plan = replace(plan, part=0.6, seeds=6, strategies=("random", "coverage"))
    pool = replay.prepare(lambda: None)
    journal = Journal(folder.journal_path, plan.protocol)
    play(plan, replay, pool, journal, advance=lambda _: None)
    assert len(journal.outcomes) == 6 * 2 * len(BUDGETS)
    for (_, seed, budget), outcome in journal.outcomes.items():
        part = draw_part(pool.ids, 0.6, seed)
        assert len(part) == round(0.6 * len(pool))
        assert len(outcome.picked) == budget
        assert set(outcome.picked) <= set(part)
        assert {case.image_id for case in outcome.cases} == set(plan.targets) - set(outcome.picked)
    firsts = {journal.outcomes["coverage", seed, BUDGETS[0]].picked for seed in range(6)}
    assert len(firsts) > 1  # so that what owes nothing to chance has a spread, too
    assert plan.protocol != replace(plan, part=0.7).protocol
    assert check_budgets([1, 5, 6, 7], 10, 0.6) == (1, 5, 6)
    with pytest.raises(RequestError, match="may label 6"):
        check_budgets([7], 10, 0.6)


def test_thinned_volumes_show_the_same_pictures() -> None:
    rng = np.random.default_rng(0)
    voxels = rng.normal(100, 30, (12, 10, 40)).astype(np.float32)
    geometry = Geometry(voxels.shape, np.diag([1.0, 1.0, 4.0, 1.0]))
    image = ImageVolume(voxels, geometry, geometry, "volume", Path("x.nii.gz"))
    kept = inner_slices(40, 3)
    assert kept == [6, 20, 33]
    few, whole = cut(thinned(image, kept, 2), 2), cut(image, 2)
    assert len(few) == 3
    assert image.adjacent
    assert not thinned(image, kept, 2).adjacent
    for row, index in enumerate(kept):
        np.testing.assert_array_equal(few[row], whole[index])


class Question:
    """A query and references of the averager."""

    def __init__(self, tmp_path: Path, **limits: int) -> None:
        self.averager = Averager()
        self.remembering = RememberingSegmenter(self.averager, tmp_path / "features", **limits)
        rng = np.random.default_rng(0)
        self.pictures = [rng.random((24, 24)).astype(np.float32) for _ in range(4)]
        features = self.remembering.encode(self.pictures)
        self.query = features[0]
        masks = [torch.from_numpy(rng.random((2, 24, 24)) > 0.5) for _ in range(3)]
        self.memories = [
            self.remembering.remember(f, m) for f, m in zip(features[1:], masks, strict=True)
        ]
        self.known = torch.tensor([[True, True], [True, False], [True, True]])


def test_the_same_references_in_another_order_are_the_same_question(tmp_path: Path) -> None:
    q = Question(tmp_path)
    first = q.remembering.segment(q.query, q.memories, q.known)
    plain = q.averager.segment(q.query, q.memories, q.known)
    torch.testing.assert_close(first.scores, plain.scores, atol=1e-3, rtol=1e-3)
    asked = q.averager.asked
    other = q.remembering.segment(q.query, q.memories[::-1], q.known.flip(0))
    assert q.averager.asked == asked
    assert torch.equal(other.scores, first.scores)


@pytest.mark.parametrize("what", ["query", "references", "known", "mask"])
def test_another_question_is_asked(tmp_path: Path, what: str) -> None:
    q = Question(tmp_path)
    q.remembering.segment(q.query, q.memories, q.known)
    asked = q.averager.asked
    query, memories, known = q.query, q.memories, q.known
    if what == "query":
        query = q.remembering.encode(q.pictures[1:2])[0]
    elif what == "references":
        memories, known = memories[:2], known[:2]
    elif what == "known":
        known = torch.ones_like(known)
    else:
        labels = memories[0].labels.clone()
        labels[0, 3, 3] = 1 - labels[0, 3, 3]
        memories = [replace(memories[0], labels=labels), *memories[1:]]
    q.remembering.segment(query, memories, known)
    assert q.averager.asked == asked + 1


def _looks(gain: float) -> Looks:
    return Looks(("a",), Correction(torch.zeros(1, 1), torch.tensor([gain]), torch.zeros(1)))


@pytest.mark.parametrize(
    "study",
    [Study(place=4.0), Study(aligned=True), Study(reach=0.5), Study(looks=_looks(2.0))],
)
def test_another_study_is_another_question(tmp_path: Path, study: Study) -> None:
    q = Question(tmp_path)
    for asked in (Study(), study, Study(), study):
        q.remembering.segment(q.query, q.memories, q.known, asked)
    assert q.averager.asked == 2


def test_what_is_kept_is_bounded(tmp_path: Path) -> None:
    q = Question(tmp_path, answers_bytes=2 * 24 * 24 * 2, features_bytes=2 * 24 * 24 * 4)
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == 2
    for query in q.remembering.encode(q.pictures) * 2:
        q.remembering.segment(query, q.memories, q.known)
    assert len(q.remembering._answers) == 1
    assert q.averager.asked == 8
