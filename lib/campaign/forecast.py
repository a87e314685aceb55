"""How many labels reach a wished Dice: a power law through the curve, and what it cannot tell.

d(n) = a - b n^(-c): learning curves of few labels follow it closely, and it has a ceiling a that
may lie below the wish. The interval is of resampling campaigns and images together: both another
order of labelling and other images would have given another curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_RATES = np.geomspace(0.05, 4.0, 80)  # c: from hardly falling to steep; a grid has no local minimum
FEWEST_BUDGETS = 3  # as many as the law has numbers
FARTHEST = 10.0  # times the largest budget: beyond, the law is a guess
SURE = 0.95
DRAWS = 400


@dataclass(frozen=True)
class PowerLaw:
    """d(n) = ceiling - drop * n ** -rate."""

    ceiling: float
    drop: float
    rate: float

    def at(self, labels: Sequence[float]) -> Array:
        """Dice expected of so many labels."""
        return self.ceiling - self.drop * np.asarray(labels, float) ** -self.rate

    def needed(self, dice: float) -> float:
        """Labels that reach a Dice; infinite where the ceiling is not above it."""
        if self.ceiling <= dice:
            return float("inf")
        if self.drop <= 0:
            return 1.0
        return max(1.0, float((self.drop / (self.ceiling - dice)) ** (1 / self.rate)))


@dataclass(frozen=True)
class Forecast:
    """What one wish takes.

    Attributes:
        wish: Dice.
        labels: how many; None where that cannot be told or is never reached.
        low: 2.5 % of the draws lie below; None as `labels`.
        high: 97.5 % lie below; None where no upper bound can be told.
        verdict: one sentence for a person.
    """

    wish: float
    labels: int | None
    low: int | None
    high: int | None
    verdict: str


def fit(budgets: Sequence[float], means: Sequence[float] | Array) -> PowerLaw | None:
    """The law through one curve; None where it has fewer than three points."""
    return fit_all(budgets, np.asarray(means, float)[None])[0]


def fit_all(budgets: Sequence[float], means: Array) -> list[PowerLaw | None]:
    """Least squares over ceiling <= 1, drop >= 0 and a grid of rates.

    Args:
        budgets: B numbers of labels.
        means: (D, B) curves; points that are no number do not count.
    """
    there = np.isfinite(means)
    y = np.where(there, means, 0.0)[:, None]  # (D, 1, B)
    w = there[:, None].astype(float)
    x = np.asarray(budgets, float)[None, None] ** -_RATES[None, :, None]  # (1, R, B)
    count = np.maximum(w.sum(-1), 1)
    mean_x, mean_y = (w * x).sum(-1) / count, (w * y).sum(-1) / count  # (D, R)
    off_x, off_y = x - mean_x[..., None], y - mean_y[..., None]
    spread = np.maximum((w * off_x**2).sum(-1), 1e-12)
    drop = -(w * off_x * off_y).sum(-1) / spread
    ceiling = mean_y + drop * mean_x
    # where the best line leaves what a Dice can be, the best one on that border
    capped = (w * x * (1 - y)).sum(-1) / np.maximum((w * x * x).sum(-1), 1e-12)
    drop = np.where(ceiling > 1, capped, drop)
    ceiling = np.minimum(ceiling, 1)
    ceiling = np.where(drop < 0, np.minimum(mean_y, 1), ceiling)
    drop = np.maximum(drop, 0)
    errors = (w * (ceiling[..., None] - drop[..., None] * x - y) ** 2).sum(-1)
    best = errors.argmin(1)
    return [
        PowerLaw(float(ceiling[row, rate]), float(drop[row, rate]), float(_RATES[rate]))
        if there[row].sum() >= FEWEST_BUDGETS
        else None
        for row, rate in enumerate(best)
    ]


def forecast(
    budgets: Sequence[int], dice: Array, wishes: Sequence[float], *, seed: int = 0
) -> list[Forecast]:
    """Forecast each wish.

    Args:
        budgets: B numbers of labels, rising.
        dice: (S, B, C) Dice of S campaigns over C cases; NaN where a case was not scored.
        wishes: Dice, each in 0..1.
        seed: of the resampling.
    """
    means = _curve(dice)
    law = fit(budgets, means)
    if law is None:
        text = f"cannot tell: at least {FEWEST_BUDGETS} numbers of labels are needed"
        return [Forecast(wish, None, None, None, text) for wish in wishes]
    rng = np.random.default_rng(seed)
    seeds, _, cases = dice.shape
    drawn = [
        _curve(dice[rng.integers(seeds, size=seeds)][:, :, rng.integers(cases, size=cases)])
        for _ in range(DRAWS)
    ]
    curves = np.stack(drawn)
    if np.array_equal(dice, np.broadcast_to(dice[:1], dice.shape), equal_nan=True):
        # One way through the images says nothing of others: how far it strays from the law does.
        free = max(1, len(budgets) - FEWEST_BUDGETS)
        strays = (means - law.at(budgets)) * np.sqrt(len(budgets) / free)
        curves = curves + rng.choice(strays[np.isfinite(strays)], size=curves.shape)
    draws = [one for one in fit_all(budgets, curves) if one is not None]
    return [_one(wish, law, draws, budgets, means) for wish in wishes]


def _one(
    wish: float, law: PowerLaw, draws: Sequence[PowerLaw], budgets: Sequence[int], means: Array
) -> Forecast:
    largest = max(budgets)
    needed = np.sort([one.needed(wish) for one in draws]) if draws else np.array([np.inf])
    # by rank, since quantiles between numbers are not defined where some are infinite
    low = float(needed[int(0.025 * (len(needed) - 1))])
    high = float(needed[int(np.ceil(0.975 * (len(needed) - 1)))])
    here = law.needed(wish)
    never = float(np.mean(np.isinf(needed)))
    top = float(np.nanmax(means))
    seen = next((b for b, mean in zip(budgets, means, strict=True) if mean >= wish), None)
    if seen is not None and (np.isinf(here) or never > 0.5):
        text = f"reached with {seen} labels, though the curve seems to level off below"
        return Forecast(wish, seen, _whole(low), None, text)
    if np.isinf(here) and never > SURE:
        text = f"not reached: the curve levels off near {law.ceiling:.2f} (best seen {top:.2f})"
        return Forecast(wish, None, None, None, text)
    if np.isinf(here):
        text = f"cannot tell: it may level off near {law.ceiling:.2f}; at least {_whole(low)}"
        return Forecast(wish, None, _whole(low), None, text)
    if never > 0.5:
        text = f"cannot tell: the curves of single draws disagree (best seen {top:.2f})"
        return Forecast(wish, None, _whole(low), None, text)
    if here > FARTHEST * largest:
        text = f"cannot tell: more than {FARTHEST * largest:.0f} labels, far beyond what was seen"
        return Forecast(wish, None, _whole(low), None, text)
    if high > FARTHEST * largest:
        text = f"about {_whole(here)} labels, at least {_whole(low)}; no upper bound can be told"
        return Forecast(wish, _whole(here), _whole(low), None, text)
    text = f"about {_whole(here)} labels ({_whole(low)} to {_whole(high)})"
    if here > largest:
        text += f"; beyond the {largest} that were tried"
    return Forecast(wish, _whole(here), _whole(low), _whole(high), text)


def _curve(dice: Array) -> Array:
    """(S, B, C) -> (B,) mean over campaigns of the mean over cases."""
    there = np.isfinite(dice)
    count = there.sum(-1)
    means = np.where(there, dice, 0).sum(-1) / np.maximum(count, 1)  # (S, B)
    runs = (count > 0).sum(0)
    total = np.where(count > 0, means, 0).sum(0)
    return np.where(runs > 0, total / np.maximum(runs, 1), np.nan)


def _whole(labels: float) -> int | None:
    return int(np.ceil(labels - 1e-9)) if np.isfinite(labels) else None
