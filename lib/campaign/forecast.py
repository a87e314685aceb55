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
    """Least squares over ceiling <= 1, drop >= 0 and a grid of rates; None below three points."""
    n, y = np.asarray(budgets, float), np.asarray(means, float)
    kept = np.isfinite(y)
    n, y = n[kept], y[kept]
    if len(np.unique(n)) < FEWEST_BUDGETS:
        return None
    best, least = None, np.inf
    for rate in _RATES:
        x = n**-rate
        spread = ((x - x.mean()) ** 2).sum()
        drop = -((x - x.mean()) * (y - y.mean())).sum() / spread
        ceiling = y.mean() + drop * x.mean()
        if ceiling > 1:
            ceiling, drop = 1.0, (x * (1 - y)).sum() / (x * x).sum()
        if drop < 0:
            ceiling, drop = min(1.0, float(y.mean())), 0.0
        error = float(((ceiling - drop * x - y) ** 2).sum())
        if error < least:
            best, least = PowerLaw(float(ceiling), float(drop), float(rate)), error
    return best


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
    draws = []
    seeds, _, cases = dice.shape
    for _ in range(DRAWS):
        chosen = dice[rng.integers(seeds, size=seeds)][:, :, rng.integers(cases, size=cases)]
        drawn = fit(budgets, _curve(chosen))
        if drawn is not None:
            draws.append(drawn)
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
    flat = np.full(dice.shape[1], np.nan)
    for budget in range(dice.shape[1]):
        per_seed = [row[np.isfinite(row)].mean() for row in dice[:, budget] if _any(row)]
        if per_seed:
            flat[budget] = float(np.mean(per_seed))
    return flat


def _any(row: Array) -> bool:
    return bool(np.isfinite(row).any())


def _whole(labels: float) -> int | None:
    return int(np.ceil(labels - 1e-9)) if np.isfinite(labels) else None
