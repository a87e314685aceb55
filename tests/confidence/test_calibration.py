"""Confidence out of evidence: sensible without samples, fitted with some, monotone always."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from lib.confidence.calibration import Calibration, Sample
from lib.confidence.evidence import SIGNS, Evidence, EvidenceTally
from lib.confidence.store import ConfidenceStore, Estimate

shares = st.floats(0, 1)


@st.composite
def evidence(draw: st.DrawFn) -> Evidence:
    kept = draw(st.sets(st.sampled_from(SIGNS), min_size=1))
    return Evidence(area=draw(st.integers(1, 500)), **{name: draw(shares) for name in kept})


samples = st.lists(
    st.builds(Sample, st.sampled_from(["liver", "tumor"]), evidence(), shares), max_size=12
)


@settings(max_examples=60, deadline=None)
@given(samples, evidence(), st.sampled_from(["liver", "tumor", "never seen"]), st.data())
def test_more_of_any_sign_never_means_less(known, one, label, data):
    calibration = Calibration(known)
    before = calibration.confidence(label, one)
    assert 0 <= before <= 1
    sign = data.draw(st.sampled_from(sorted(one.signs())))
    more = data.draw(st.floats(getattr(one, sign), 1))
    better = Evidence(area=one.area, **{**one.signs(), sign: more})
    assert calibration.confidence(label, better) >= before


def test_without_samples_equal_signs_are_taken_at_their_word():
    for value in (0.1, 0.5, 0.8, 0.9):
        one = Evidence(presence=value, quality=value, agreement=value, area=3)
        # similarity has no scale of its own: it changes nothing yet
        same = Evidence(similarity=0.3, quality=value, area=3)
        assert Calibration().confidence("liver", one) == pytest.approx(value, abs=0.02)
        assert Calibration().confidence("liver", same) == pytest.approx(value, abs=0.02)


def test_an_empty_mask_is_trusted_as_far_as_the_label_is_thought_absent():
    assert Calibration().confidence("liver", Evidence(presence=0.2)) == 0.8
    assert Calibration().confidence("liver", Evidence()) == 1.0
    always = [Sample("liver", Evidence(presence=0.9), 0.0, present=True)] * 8
    # 9 of 10 show it: odds of absence 4 to 1 become 4 to 9
    found = Calibration(always).confidence("liver", Evidence(presence=0.2))
    assert found == pytest.approx(4 / 13, abs=1e-3)
    assert Calibration(always).confidence("tumor", Evidence(presence=0.2)) == 0.8
    never = [Sample("liver", Evidence(presence=0.1), 1.0, present=False)] * 8
    assert Calibration(never).confidence("liver", Evidence(presence=0.2)) > 0.95


def test_a_label_that_few_of_the_labelled_images_show_is_thought_absent_from_the_others():
    # partial labels: an image teaches of what is drawn on it, so all five samples show the tumor
    shown = [Sample("tumor", Evidence(presence=0.9, quality=0.9, area=9), 0.8)] * 5
    empty = Evidence(presence=0.3)
    alone = Calibration(shown).confidence("tumor", empty)
    assert alone == pytest.approx(0.7 * 1 / (0.7 * 1 + 0.3 * 6), abs=1e-3)
    # of 28 images: odds of 6 to 24 that it is there, times 3 to 7 by the network
    among_others = Calibration(shown, images=28).confidence("tumor", empty)
    assert among_others == pytest.approx(0.7 * 24 / (0.7 * 24 + 0.3 * 6), abs=1e-3)
    assert Calibration(shown, images=28).confidence("liver", empty) > 0.95  # shown by none


def measured(count: int, seed: int) -> list[Sample]:
    """Dice follows agreement and similarity; quality is optimistic noise; tumors are worse."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        label = ("liver", "tumor")[number % 2]
        truth = generator.uniform(-2, 3) - 1.5 * (label == "tumor")
        own = Evidence(
            similarity=1 - np.exp(-3 - 0.3 * truth + generator.normal(0, 0.2)),
            quality=generator.uniform(0.85, 0.95),
            agreement=float(1 / (1 + np.exp(-truth - 1 + generator.normal(0, 0.5)))),
            area=100,
        )
        found.append(Sample(label, own, float(1 / (1 + np.exp(-truth)))))
    return found


def test_a_fit_foretells_what_was_not_in_it():
    calibration = Calibration(measured(24, 0))
    held = measured(200, 1)
    told = np.array([calibration.confidence(s.label, s.evidence) for s in held])
    true = np.array([s.dice for s in held])
    assert spearmanr(told, true).statistic > 0.85
    assert np.abs(told - true).mean() < 0.1
    beforehand = np.array([Calibration().confidence(s.label, s.evidence) for s in held])
    assert np.abs(told - true).mean() < 0.6 * np.abs(beforehand - true).mean()
    # and the liver of which nothing is known but its name is trusted more than such a tumor
    same = held[0].evidence
    assert calibration.confidence("liver", same) >= calibration.confidence("tumor", same)


def test_few_samples_move_the_belief_and_do_not_throw_it_over():
    good = Evidence(quality=0.9, agreement=0.9, area=10)
    alone = Calibration().confidence("liver", good)
    once = Calibration([Sample("liver", good, 0.2)]).confidence("liver", good)
    often = Calibration([Sample("liver", good, 0.2)] * 30).confidence("liver", good)
    assert 0.2 < once < alone
    assert often == pytest.approx(0.2, abs=0.05)


def test_samples_without_a_sign_do_not_spoil_the_fit_of_those_with_it():
    partial = [Sample("liver", Evidence(quality=0.5, area=5), 0.1)] * 20
    full = Evidence(quality=0.9, agreement=0.9, area=5)
    assert Calibration(partial).confidence("liver", full) == Calibration().confidence("liver", full)


def test_signs_are_means_over_the_area():
    tally = EvidenceTally()
    tally.add("liver", area=30, similarity=0.9, presence=1.0, quality=0.8)
    tally.add("liver", area=10, similarity=0.5, presence=0.6, quality=0.4)
    tally.add("liver", area=0, similarity=0.0, presence=0.1, quality=0.0)
    tally.add("tumor", area=0, similarity=0.9, presence=0.3, quality=0.8)
    tally.set("liver", "reverse", 0.7)
    liver = tally.of("liver")
    assert liver.signs() == pytest.approx(
        {"similarity": 0.8, "presence": 0.9, "quality": 0.7, "reverse": 0.7}
    )
    assert liver.area == 40
    assert tally.of("tumor").signs() == {"presence": 0.3}


def test_samples_and_estimates_come_back_as_they_were(tmp_path):
    rows = [*measured(4, 0), Sample("none", Evidence(presence=0.5), 1.0, present=False)]
    store = ConfidenceStore(tmp_path, "net")
    store.put_samples("b", "mark b", rows[2:])
    store.put_samples("a", "mark a", [])
    store.put_samples("a", "mark a2", rows[:2])
    seen = {"liver": rows[0].evidence, "tumor": Evidence(presence=0.1)}
    store.put_estimate(Estimate("c", 7, seen))
    again = ConfidenceStore(tmp_path, "net")
    assert repr(again.samples()) == repr(rows)  # NaN is not equal to itself
    assert again.marks() == {"a": "mark a2", "b": "mark b"}
    assert repr(again.estimates()) == repr({"c": Estimate("c", 7, seen)})
    assert again.images() == 2
    again.put_samples("d", "mark d", [])  # its label could not be read: it teaches nothing
    assert again.images() == 2
    again.forget(["d"])
    again.forget(["b"])
    assert store.marks() == {"a": "mark a2"}
    assert ConfidenceStore(tmp_path, "other net").samples() == []


def test_a_damaged_file_of_evidence_starts_empty_and_goes_on(tmp_path, caplog):
    store = ConfidenceStore(tmp_path, "f")
    known = Sample("liver", Evidence(similarity=0.5, area=9), 0.25)
    store.put_samples("one", "mark", [known])
    (file,) = tmp_path.rglob("confidence.sqlite")
    file.write_bytes(b"garbage" * 1000)
    assert store.samples() == []
    store.put_samples("one", "mark", [known])
    assert [sample.dice for sample in store.samples()] == [0.25]
    assert [sample.dice for sample in ConfidenceStore(tmp_path, "f").samples()] == [0.25]
    assert len([r for r in caplog.records if "is damaged" in r.getMessage()]) == 1
