"""How many labels reach a Dice, and areas under curves: against laws and sums made by hand."""

import numpy as np
import pytest

from lib.campaign.forecast import fit, forecast
from lib.campaign.scoring import CaseScore, LabelScore
from lib.campaign.summary import Spread, _bad_first, _rank, area, curve, gain_over_images, in_common

BUDGETS = (1, 2, 5, 10, 20, 50)


def law(ceiling: float, drop: float, rate: float) -> np.ndarray:
    return ceiling - drop * np.array(BUDGETS, float) ** -rate


def campaigns(means: np.ndarray, *, seeds: int = 10, cases: int = 30, noise: float) -> np.ndarray:
    """(S, B, C) around a curve: some cases are harder than others, some campaigns luckier."""
    rng = np.random.default_rng(0)
    hard = rng.normal(0, noise, (1, 1, cases))
    lucky = rng.normal(0, noise / 3, (seeds, 1, 1))
    table = means[None, :, None] + hard - hard.mean() + lucky - lucky.mean()
    return table + rng.normal(0, noise / 5, table.shape)


@pytest.mark.parametrize(("ceiling", "drop", "rate"), [(0.9, 0.6, 0.7), (0.75, 0.3, 1.5)])
def test_a_curve_that_is_a_power_law_is_found_again(
    ceiling: float, drop: float, rate: float
) -> None:
    found = fit(BUDGETS, law(ceiling, drop, rate))
    assert found is not None
    assert found.at(BUDGETS) == pytest.approx(law(ceiling, drop, rate), abs=2e-3)
    assert found.ceiling == pytest.approx(ceiling, abs=0.02)


def test_the_number_of_labels_is_the_one_the_law_says_and_lies_in_its_interval() -> None:
    table = campaigns(law(0.92, 0.6, 0.6), noise=0.05)
    (wished,) = forecast(BUDGETS, table, [0.85])
    true = (0.6 / (0.92 - 0.85)) ** (1 / 0.6)  # 36 labels
    assert wished.labels == pytest.approx(true, rel=0.25)
    assert wished.low is not None
    assert wished.high is not None
    assert wished.low < true < wished.high
    assert str(wished.labels) in wished.verdict


def test_one_way_through_the_images_is_not_taken_for_sure() -> None:
    true = (0.6 / (0.92 - 0.85)) ** (1 / 0.6)
    within = 0
    for seed in range(30):
        strays = np.random.default_rng(seed).normal(0, 0.01, len(BUDGETS))
        table = campaigns(law(0.92, 0.6, 0.6) + strays, seeds=1, noise=0.02)
        (wished,) = forecast(BUDGETS, np.repeat(table, 10, axis=0), [0.85])
        within += (wished.low or 0) < true < (wished.high or np.inf)
    assert within >= 26


def test_a_dice_that_was_reached_is_never_said_to_be_out_of_reach() -> None:
    means = np.array([0.5, 0.8, 0.86, 0.88, 0.91, 0.885])
    (wished,) = forecast(BUDGETS, campaigns(means, noise=0.001), [0.9])
    assert wished.labels == 20
    assert wished.verdict.startswith("reached with 20 labels")


def test_a_dice_above_the_ceiling_is_said_not_to_be_reached() -> None:
    (wished,) = forecast(BUDGETS, campaigns(law(0.7, 0.4, 1.5), noise=0.02), [0.85])
    assert wished.labels is None
    assert wished.high is None
    assert "not reached" in wished.verdict
    assert "0.70" in wished.verdict


def test_what_cannot_be_told_is_said_so() -> None:
    rising = campaigns(np.linspace(0.1, 0.3, len(BUDGETS)), seeds=2, cases=4, noise=0.3)
    (far,) = forecast(BUDGETS, rising, [0.95])
    assert far.labels is None or far.high is None
    assert "cannot" in far.verdict or "no upper bound" in far.verdict
    (few,) = forecast(BUDGETS[:2], rising[:, :2], [0.8])
    assert (few.labels, few.low, few.high) == (None, None, None)
    assert few.verdict.startswith("cannot tell: at least 3")


def test_a_curve_that_falls_gives_no_number() -> None:
    (wished,) = forecast(BUDGETS, campaigns(law(0.5, -0.2, 1.0), noise=0.01), [0.9])
    assert wished.labels is None


def test_the_area_counts_each_doubling_alike() -> None:
    assert area((1, 2, 4), np.array([0.0, 1.0, 1.0])) == pytest.approx(0.75)
    assert area((1, 2, 4), np.array([0.0, 1.0, 1.0]), doublings=False) == pytest.approx(2.5 / 3)
    assert area((1, 50), np.array([[0.4, 0.6], [0.2, 0.2]])) == pytest.approx([0.5, 0.2])
    assert area((5,), np.array([0.3])) == pytest.approx(0.3)


def test_the_curve_is_the_mean_of_what_was_scored() -> None:
    table = np.array([[[0.2, 0.4], [np.nan, 0.6], [np.nan, np.nan]]])
    found = curve(table)[0]
    assert found[:2] == pytest.approx([0.3, 0.6])
    assert np.isnan(found[2])


def test_a_strategy_that_is_better_on_every_image_gains_and_its_interval_is_above_zero() -> None:
    rng = np.random.default_rng(1)
    baseline = rng.uniform(0.2, 0.8, (6, 3, 20))
    better = baseline + 0.05
    gain = gain_over_images((1, 2, 4), better, baseline)
    assert gain.mean == pytest.approx(0.05)
    assert (gain.low, gain.high) == pytest.approx((0.05, 0.05))
    noise = gain_over_images((1, 2, 4), baseline[::-1], baseline)
    assert noise.low < 0 < noise.high


def test_who_labels_the_hard_images_gains_nothing_by_what_is_left_to_be_scored() -> None:
    nan = np.nan
    picks_hard = np.array([[[nan, 0.5, 0.7]], [[nan, 0.5, 0.7]]])
    picks_easy = np.array([[[0.1, 0.5, nan]]])
    ours, theirs = in_common(picks_hard, picks_easy)
    assert curve(ours).tolist() == curve(theirs).tolist() == [[0.5]]


def test_bad_masks_among_the_least_confident_are_counted() -> None:
    def case(number: int, confidence: float, dice: float) -> CaseScore:
        nan = float("nan")
        return CaseScore(str(number), {"a": LabelScore(dice, nan, nan, None, confidence)})

    dices = [0.1, 0.9, 0.3, 0.9, 0.8, 0.7, 0.2, 0.9, 0.9, 0.4]
    cases = [case(n, n / 10, dice) for n, dice in enumerate(dices)]
    assert _bad_first(cases) == pytest.approx(1 / 4)  # of four bad ones, one is among 0 and 1
    assert np.isnan(_bad_first([case(0, 0.1, 0.9)]))
    rising = [case(n, n / 10, n / 10) for n in range(10)]
    assert _rank(rising) == pytest.approx(1)
    assert _rank([case(n, n / 10, 1 - n / 10) for n in range(10)]) == pytest.approx(-1)


def test_a_spread_leaves_out_what_is_no_number() -> None:
    assert Spread.of([0.2, float("nan"), 0.4]) == Spread(
        pytest.approx(0.3), pytest.approx(0.1), 0.2, 0.4
    )
    assert np.isnan(Spread.of([]).mean)
