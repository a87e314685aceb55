"""Curves, areas and intervals of a campaign's outcomes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lib.campaign.forecast import Forecast, forecast
from lib.campaign.journal import Outcome, Place
from lib.campaign.plan import Plan
from lib.campaign.scoring import CaseScore, mean_of
from lib.evaluation.metrics import Mean

Array = npt.NDArray[np.float64]

BASELINE = "random"
DRAWS = 2000
BAD = 0.5  # a Dice below calls for a new mask rather than a correction


@dataclass(frozen=True)
class Spread:
    """Over seeds: mean, standard deviation, lowest and highest."""

    mean: float
    deviation: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of those that are numbers; all NaN of none."""
        kept = [value for value in values if not np.isnan(value)]
        if not kept:
            return cls(*[float("nan")] * 4)
        return cls(float(np.mean(kept)), float(np.std(kept)), min(kept), max(kept))


@dataclass(frozen=True)
class Level:
    """One strategy at one budget; means over cases, spread over seeds.

    Attributes:
        budget: labelled images.
        dice: mean over what is not labelled of the mean over its labels.
        labels: the same, label by label.
        hd95_mm, nsd: mean over cases and labels; NaN where the images have no place in space.
        false_alarms: share of (case, label) where a label that is not there was found.
        finished: Dice of all targets with the labelled ones counted as 1: the data set as it
            would be handed over, had nobody corrected anything.
        calibration: Spearman's correlation of confidence and Dice over cases.
        bad_first: of the cases below a Dice of .5, the share among the fifth with the lowest
            confidence: what a person finds who looks at that fifth only.
        scored: cases that were scored, mean over seeds.
    """

    budget: int
    dice: Spread
    labels: Mapping[str, Spread]
    hd95_mm: Spread
    nsd: Spread
    false_alarms: Spread
    finished: Spread
    calibration: Spread
    bad_first: Spread
    scored: float


@dataclass(frozen=True)
class Summary:
    """One strategy.

    Attributes:
        strategy: its name.
        levels: one for each budget.
        seeds: campaigns that were played to the end.
        area: under the curve of Dice over log2(labels), by its width: 0..1, each doubling of
            labels counts alike; mean and 95 % bootstrap interval over seeds.
        area_linear: the same over labels as they are.
        gain: area less the area of random, seed by seed; None without random.
        gain_images: the same difference, with the interval of resampling images as well.
        forecasts: of the wishes.
        picked: the images in the order of seed 0.
        reasons: why each was proposed.
        seconds_choosing: mean time of one next image.
        seconds_learning: mean time of one label's way into the bank, out of the library; NaN where
            all was taken from campaigns with the same labels.
        seconds_a_slice: mean time of the network for one slice at the largest budget; NaN where
            every answer was remembered.
    """

    strategy: str
    levels: tuple[Level, ...]
    seeds: int
    area: Mean
    area_linear: Mean
    gain: Mean | None
    gain_images: Mean | None
    forecasts: tuple[Forecast, ...]
    picked: tuple[str, ...]
    reasons: tuple[str, ...]
    seconds_choosing: float
    seconds_learning: float
    seconds_a_slice: float


def summarize(
    plan: Plan, outcomes: Mapping[Place, Outcome], wishes: Sequence[float]
) -> list[Summary]:
    """Summaries of all strategies that have at least one whole campaign."""
    whole = {
        strategy: [
            seed
            for seed in range(plan.seeds)
            if all((strategy, seed, budget) in outcomes for budget in plan.budgets)
        ]
        for strategy in plan.strategies
    }
    dice = {
        strategy: dice_table(plan, outcomes, strategy, seeds)
        for strategy, seeds in whole.items()
        if seeds
    }
    return [_summary(plan, outcomes, strategy, whole[strategy], dice, wishes) for strategy in dice]


def dice_table(
    plan: Plan, outcomes: Mapping[Place, Outcome], strategy: str, seeds: Sequence[int]
) -> Array:
    """(S, B, C) Dice of each target; NaN where it was labelled or shows no label."""
    table = np.full((len(seeds), len(plan.budgets), len(plan.targets)), np.nan)
    column = {image_id: number for number, image_id in enumerate(plan.targets)}
    for row, seed in enumerate(seeds):
        for level, budget in enumerate(plan.budgets):
            for case in outcomes[strategy, seed, budget].cases:
                table[row, level, column[case.image_id]] = case.dice
    return table


def in_common(one: Array, other: Array) -> tuple[Array, Array]:
    """Two tables with only what both have: images that neither of two campaigns has labelled yet.

    A strategy that labels hard images leaves easy ones to be scored; here it gains nothing by that.
    """
    runs = min(len(one), len(other))  # one may have been interrupted
    both = np.isfinite(one[:runs]) & np.isfinite(other[:runs])
    return np.where(both, one[:runs], np.nan), np.where(both, other[:runs], np.nan)


def curve(table: Array) -> Array:
    """(..., B, C) -> (..., B): mean over the cases that were scored."""
    there = np.isfinite(table)
    count = there.sum(-1)
    total = np.where(there, table, 0).sum(-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def area(budgets: Sequence[int], curves: Array, *, doublings: bool = True) -> Array:
    """(..., B) -> (...): trapezoids under each curve by its width; of one budget its value."""
    if len(budgets) == 1:
        return curves[..., 0]
    x = np.log2(budgets) if doublings else np.asarray(budgets, float)
    parts = (curves[..., 1:] + curves[..., :-1]) / 2 * np.diff(x)
    return parts.sum(-1) / (x[-1] - x[0])


def gain_over_images(
    budgets: Sequence[int], table: Array, baseline: Array, *, seed: int = 0
) -> Mean:
    """Difference of areas; interval of resampling campaigns and images, the same in both."""
    rng = np.random.default_rng(seed)
    runs, _, cases = table.shape

    def difference(rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> float:
        both = [area(budgets, curve(t[rows][:, :, columns])) for t in (table, baseline)]
        return mean_of((both[0] - both[1]).tolist())

    drawn = [
        difference(rng.integers(runs, size=runs), rng.integers(cases, size=cases))
        for _ in range(DRAWS // 4)
    ]
    kept = [value for value in drawn if not np.isnan(value)] or [float("nan")]
    low, high = np.quantile(kept, [0.025, 0.975])
    return Mean(difference(np.arange(runs), np.arange(cases)), float(low), float(high), runs)


def _summary(
    plan: Plan,
    outcomes: Mapping[Place, Outcome],
    strategy: str,
    seeds: Sequence[int],
    dice: Mapping[str, Array],
    wishes: Sequence[float],
) -> Summary:
    table = dice[strategy]
    curves = curve(table)
    areas = area(plan.budgets, curves)
    linear = area(plan.budgets, curves, doublings=False)
    gain = gain_images = None
    baseline = dice.get(BASELINE)
    if baseline is not None and strategy != BASELINE:
        ours, theirs = in_common(table, baseline)
        gains = area(plan.budgets, curve(ours)) - area(plan.budgets, curve(theirs))
        gain = Mean.of(gains.tolist(), draws=DRAWS)
        gain_images = gain_over_images(plan.budgets, ours, theirs)
    lines = [outcomes[strategy, seed, b] for seed in seeds for b in plan.budgets]
    last = outcomes[strategy, seeds[0], plan.budgets[-1]]
    answered = sum(line.seconds.answered for line in lines if line.budget == plan.budgets[-1])
    network = sum(line.seconds.network for line in lines if line.budget == plan.budgets[-1])
    labels = len(seeds) * plan.budgets[-1]
    learned = {}  # seed -> labels brought in; where others had the same, nothing was learned
    for line in lines:
        if line.seconds.learning > 0:
            learned[line.seed] = line.budget
    return Summary(
        strategy=strategy,
        levels=tuple(
            _level(plan, [outcomes[strategy, seed, budget] for seed in seeds], budget)
            for budget in plan.budgets
        ),
        seeds=len(seeds),
        area=Mean.of(areas.tolist(), draws=DRAWS),
        area_linear=Mean.of(linear.tolist(), draws=DRAWS),
        gain=gain,
        gain_images=gain_images,
        forecasts=tuple(forecast(plan.budgets, table, wishes)),
        picked=last.picked,
        reasons=last.reasons,
        seconds_choosing=sum(line.seconds.choosing for line in lines) / labels,
        seconds_learning=sum(line.seconds.learning for line in lines) / sum(learned.values())
        if learned
        else float("nan"),
        seconds_a_slice=network / answered if answered else float("nan"),
    )


def _level(plan: Plan, lines: Sequence[Outcome], budget: int) -> Level:
    def spread(values: Sequence[Sequence[float]]) -> Spread:
        return Spread.of([mean_of(one) for one in values])

    scores = [[s for case in line.cases for s in case.labels.values()] for line in lines]
    there = [[case for case in line.cases if not np.isnan(case.dice)] for line in lines]
    return Level(
        budget=budget,
        dice=spread([[case.dice for case in line.cases] for line in lines]),
        labels={
            name: spread([[case.labels[name].dice for case in line.cases] for line in lines])
            for name in plan.labels
        },
        hd95_mm=spread([[s.hd95_mm for s in row] for row in scores]),
        nsd=spread([[s.nsd for s in row] for row in scores]),
        false_alarms=spread(
            [[float(s.false_alarm) for s in row if s.false_alarm is not None] for row in scores]
        ),
        finished=spread(
            [
                [case.dice for case in line.cases] + [1.0] * len(set(line.picked) & {*plan.targets})
                for line in lines
            ]
        ),
        calibration=Spread.of([_rank(cases) for cases in there]),
        bad_first=Spread.of([_bad_first(cases) for cases in there]),
        scored=float(np.mean([len(cases) for cases in there])),
    )


def _bad_first(cases: Sequence[CaseScore]) -> float:
    """Share of the bad masks in the fifth of least confidence; NaN where no mask is bad."""
    ordered = sorted(cases, key=lambda case: (case.confidence, case.image_id))
    bad = [case.dice < BAD for case in ordered]
    first = bad[: int(np.ceil(len(bad) / 5))]
    return sum(first) / sum(bad) if any(bad) else float("nan")


def _rank(cases: Sequence[CaseScore]) -> float:
    """Spearman's correlation of confidence and Dice; NaN below five cases or without spread."""
    from scipy.stats import rankdata

    pairs = np.array([(c.confidence, c.dice) for c in cases])
    if len(pairs) < 5 or (pairs == pairs[0]).all(0).any():
        return float("nan")
    one, other = rankdata(pairs[:, 0]), rankdata(pairs[:, 1])
    return float(np.corrcoef(one, other)[0, 1])
