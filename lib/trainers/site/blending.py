"""Part of the way back: weights between those of the bundled network and those that were trained.

Where labels are few a training goes too far, and where images are unlike those that were learned
from it forgets. A mean of both weights is often better than either, at no cost in use (Wortsman et
al., arXiv 2109.01903, section 3: theta = (1 - a) theta_0 + a theta_1).
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
        share: of the trained weights in it, 0..1.
        measured: how good it is.
    """

    weights: Path
    share: float
    measured: Validation


def blend(start: Path | None, trained: Path, validator: Validator, *, device: str) -> Blend:
    """Measure networks between both, and write the best one beside the trained one.

    Args:
        start: weights that the training began with; None: it began with nothing, and what it came
            to is measured alone.
        trained: weights that it came to.
        validator: of the cases kept to measure on.
        device: to measure on.
    """
    best: Blend | None = None
    path = trained.parent / BLENDED
    for share, net in _between(start, trained):
        found = validator.measure(MatchSegSegmenter(net, digest="blended", device=device))
        logger.info("Dice %.4f with %.0f %% of what was trained", found.dice, 100 * share)
        if best is None or found.dice > best.measured.dice:
            save_weights(net.cpu(), path)
            best = Blend(path, share, found)
    assert best is not None
    return best


def _between(start: Path | None, trained: Path) -> Iterator[tuple[float, MatchSegNet]]:
    new = load_weights(trained)
    if start is None:
        yield 1.0, new
        return
    old, end = load_weights(start).state_dict(), new.state_dict()
    for share in SHARES:
        net = MatchSegNet(new.config)
        net.load_state_dict({name: old[name].lerp(end[name], share).half() for name in end})
        yield share, net.eval()  # rounded as it is kept
