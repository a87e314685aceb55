"""Part of the way back: weights between those of the bundled network and those that were trained.

Where labels are few a training goes too far, and where images are unlike those that were learned
from it forgets. A mean of both weights is often better than either, at no cost in use (Wortsman et
al., arXiv 2109.01903, section 3: theta = (1 - a) theta_0 + a theta_1).
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from lib.errors import TrainingError
from lib.models.matchseg import MatchSegSegmenter, load_weights, save_weights
from lib.models.network import MatchSegNet
from lib.trainers.site.validation import Validation, Validator

logger = logging.getLogger(__name__)

BLENDED = "blended.safetensors"
SHARES = (0.25, 0.5, 0.75, 1.0)  # of what was trained


@dataclass(frozen=True)
class Blend:
    """The best of the networks between two.

    Attributes:
        weights: of it.
        trained_share: of the trained weights in it, 0..1.
        measured: how good it is.
    """

    weights: Path
    trained_share: float
    measured: Validation


def blend(start: Path | None, trained: Path, validator: Validator, *, device: str) -> Blend:
    """Measure networks between both, and write the one to keep beside the trained one.

    It is the nearest to the start that no other beats: on few cases one of several looks better by
    chance, and then what was learned from many images is trusted.

    Args:
        start: weights that the training began with; None: it began with nothing, and what it came
            to is measured alone.
        trained: weights that it came to.
        validator: of the cases kept to measure on.
        device: to measure on.

    Raises:
        TrainingError: the disk is full.
    """
    shares = SHARES if start is not None else (1.0,)
    networks = {share: _mixed(start, trained, share) for share in shares}
    found = {}
    for share, net in networks.items():
        segmenter = MatchSegSegmenter(net, digest="blended", device=device)
        found[share] = validator.measure(segmenter)
        told = found[share].dice
        logger.info("Dice %.4f with %.0f %% of what was trained", told, 100 * share)
    kept = next(
        share
        for share, one in found.items()
        if not any(other.beats(one) for other in found.values())
    )
    return Blend(_write(networks[kept], trained.parent / BLENDED), kept, found[kept])


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
