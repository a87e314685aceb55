"""Part of the way back: weights between those of the bundled network and those that were trained.

Where labels are few a training goes too far, and where images are unlike those that were learned
from it forgets. A mean of both weights is often better than either, at no cost in use (Wortsman et
al., arXiv 2109.01903, section 3: theta = (1 - a) theta_0 + a theta_1).
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from lib.errors import TrainingError
from lib.models.matchseg import MatchSegSegmenter, load_weights, save_weights
from lib.models.network import MatchSegNet
from lib.trainers.site.validation import Validation, Validator

logger = logging.getLogger(__name__)

BLENDED = "blended.safetensors"
USUAL, BACK = 0.75, 8  # of the last weights at least; all but so many images' part of the way
SHARES = (0.25, 0.5, 0.75, 1.0)  # of what was best in between, if that is clearly better


@dataclass(frozen=True)
class Blend:
    """The best of the networks between two.

    Attributes:
        weights: of it.
        trained: weights that it was mixed from.
        trained_share: of these in it, 0..1.
        measured: how good it is.
    """

    weights: Path
    trained: Path
    trained_share: float
    measured: Validation


def usual_share(learned: int) -> float:
    """Of the weights that so many images have led to: of very many, less of the way back."""
    return max(USUAL, 1 - BACK / learned)


def blend(
    start: Path | None, last: Path, best: Path, validator: Validator, *, learned: int, device: str
) -> Blend:
    """Measure networks between both, and write the one to keep beside the trained ones.

    Few cases say little, and less of which epoch was best: so it is the usual share of the last
    weights, unless a share of those of the best epoch is clearly better.

    Args:
        start: weights that the training began with; None: it began with nothing, and there is no
            way back.
        last: weights that it came to.
        best: those of the epoch that was measured to be best.
        validator: of the cases kept to measure on.
        learned: number of cases that it learned from.
        device: to measure on.

    Raises:
        TrainingError: the disk is full.
    """
    usual, shares = (usual_share(learned), SHARES) if start is not None else (1.0, (1.0,))
    again = last.read_bytes() == best.read_bytes()
    tried = [(last, usual), *((best, one) for one in shares if not (again and one == usual))]
    first, *others = (_measured(start, *one, validator, device) for one in tried)
    better = [one for one in others if one.measured.beats(first.measured)]
    kept = max(better, key=lambda one: one.measured.dice, default=first)
    target = last.parent / BLENDED
    return replace(kept, weights=mix(start, kept.trained, kept.trained_share, target))


def _measured(
    start: Path | None, trained: Path, share: float, validator: Validator, device: str
) -> Blend:
    net = _mixed(start, trained, share)
    found = validator.measure(MatchSegSegmenter(net, digest="blended", device=device))
    which = trained.stem
    logger.info("Dice %.4f with %.0f %% of the %s weights", found.dice, 100 * share, which)
    return Blend(trained, trained, share, found)


def mix(start: Path | None, trained: Path, share: float, target: Path) -> Path:
    """Write the weighted mean of two networks' weights.

    Args:
        start: weights that a training began with; None: with nothing, and its end is written.
        trained: weights that it came to.
        share: of the latter, 0..1.
        target: file to write.

    Raises:
        TrainingError: the disk is full.
    """
    return _write(_mixed(start, trained, share), target)


def _mixed(start: Path | None, trained: Path, share: float) -> MatchSegNet:
    net = load_weights(trained)
    if start is not None:
        old, end = load_weights(start).state_dict(), net.state_dict()
        # rounded as it is kept
        net.load_state_dict({name: old[name].lerp(end[name], share).half() for name in end})
    return net.eval()


def _write(net: MatchSegNet, path: Path) -> Path:
    try:
        save_weights(net, path)
    except OSError as error:
        msg = (
            f"The training cannot write to {path.parent} ({error}). Make room (about 10 MB), then "
            "train again: it goes on after the last whole epoch."
        )
        raise TrainingError(msg) from error
    return path
