"""From evidence to expected Dice, learned from the user's own labels.

A ridge regression of the logit of Dice on the logits of the signs, no sign with a negative weight,
one offset for each label; all are pulled towards what is believed before any label is there, as
strongly as some samples would. So two labels give a sensible figure and fifty a fitted one, every
step is monotone, and there is nothing to tune. A sample is a labelled image that was segmented by
the other labelled images: leave one out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.optimize import lsq_linear

from lib.confidence.evidence import Evidence

Floats = npt.NDArray[np.float64]

# What is believed without samples: a weighted mean of logits. Where signs are missing the weights
# of the others grow. Similarity has no scale of its own, so it counts only once there are samples.
_BELIEF = {
    "similarity": 0.0,
    "presence": 0.05,
    "quality": 0.15,
    "sharpness": 0.45,
    "agreement": 0.25,
    "reverse": 0.1,
}
# Samples that the belief in the weights is worth: weights fitted to a dozen labels foretold less
# than these; a few offsets are learned much sooner. Set on bus_bra, prostate_mr_t2, busi, dsb2018.
_WEIGHT_WORTH = 20.0
_OFFSET_WORTH = 2.0  # the same of a label's being like the others
_EDGE = 0.02  # Dice of 0 and 1 have no logit


@dataclass(frozen=True)
class Sample:
    """One mask whose Dice is known.

    Attributes:
        label: of the mask.
        evidence: that was found for it.
        dice: with the truth; 1 where both are empty.
        present: whether the truth shows the label.
    """

    label: str
    evidence: Evidence
    dice: float
    present: bool = True


@dataclass(frozen=True)
class _Fit:
    """One regression: for the signs that a mask has."""

    names: tuple[str, ...]
    means: Floats
    weights: Floats
    offset: float
    labels: Mapping[str, float]

    def expect(self, label: str, signs: Mapping[str, float]) -> float:
        values = np.array([_scaled(name, signs[name]) for name in self.names])
        logit = float((values - self.means) @ self.weights) + self.offset
        return _dice(logit + self.labels.get(label, 0.0))


@dataclass
class Calibration:
    """Expected Dice of masks; made from samples, unchanging, cheap to make anew.

    Args:
        samples: leave-one-out; those without any area teach nothing but presence.
        images: that they come from; 0: that is not known, as many as know a label.
    """

    samples: Sequence[Sample] = ()
    images: int = 0
    _fits: dict[tuple[str, ...], _Fit] = field(default_factory=dict, init=False, repr=False)

    def confidence(self, label: str, evidence: Evidence) -> float:
        """Expected Dice of a mask, 0..1; of an empty one the probability that empty is right."""
        if not evidence.area:
            return round(self._absence(label, evidence.signs().get("presence", 0.0)), 4)
        signs = evidence.signs()
        names = tuple(sorted(signs))
        if names not in self._fits:
            self._fits[names] = self._fit(names)
        return round(self._fits[names].expect(label, signs), 4)

    def expect(
        self, evidence: Mapping[str, Evidence], own_share: Mapping[str, float]
    ) -> dict[str, float]:
        """As `confidence`, of each label of an image that the annotator may have drawn in part.

        Args:
            evidence: for each label, of what was segmented.
            own_share: of each label's area what the annotator drew, of which nothing is in doubt.
        """
        told = {}
        for label, one in evidence.items():
            share = own_share.get(label, 0.0)
            told[label] = round(share + (1 - share) * self.confidence(label, one), 4)
        return told

    def _absence(self, label: str, presence: float) -> float:
        """Probability that a label is not there, where the network says so of its presence.

        By Bayes' rule with how often the labelled images show it; the network's word is of a label
        that is there as often as not. Of partial labels most are known where they are alone: an
        image that does not show a rare one counts, though it does not say that there is none.
        """
        seen = [sample.present for sample in self.samples if sample.label == label]
        share = (sum(seen) + 1) / (max(len(seen), self.images) + 2)
        here, gone = presence * share, (1 - presence) * (1 - share)
        return gone / (here + gone) if here + gone else 1.0

    def _fit(self, names: tuple[str, ...]) -> _Fit:
        usable = [
            sample
            for sample in self.samples
            if sample.evidence.area and set(names) <= sample.evidence.signs().keys()
        ]
        belief = np.array([_BELIEF[name] for name in names])
        if belief.sum():
            belief = belief / belief.sum()
        labels = sorted({sample.label for sample in usable})
        means = np.zeros(len(names))
        if not usable:
            return _Fit(names, means, belief, 0.0, {})
        signs = np.array(
            [[_scaled(n, sample.evidence.signs()[n]) for n in names] for sample in usable]
        )
        means = signs.mean(axis=0)
        target = np.array([_logit(sample.dice) for sample in usable])
        member = np.array([[float(s.label == name) for name in labels] for s in usable])
        # Unknown: weights, the shared offset, each label's own; below the samples, the beliefs.
        size, count = len(names), len(labels)
        rows = np.concatenate([signs - means, np.ones((len(usable), 1)), member], axis=1)
        pull = np.sqrt(np.array([_WEIGHT_WORTH] * size + [_OFFSET_WORTH] + [_OFFSET_WORTH] * count))
        # Before any sample the offset is what the belief says of the mean evidence.
        prior = np.concatenate([belief, [float(means @ belief)], np.zeros(count)])
        lowest = np.concatenate([np.zeros(size), np.full(1 + count, -np.inf)])
        found = lsq_linear(
            np.concatenate([rows, np.diag(pull)]),
            np.concatenate([target, pull * prior]),
            bounds=(lowest, np.full(len(lowest), np.inf)),
        ).x
        return _Fit(
            names,
            means,
            found[:size],
            float(found[size]),
            dict(zip(labels, found[size + 1 :].tolist(), strict=True)),
        )


def _scaled(name: str, value: float) -> float:
    if name == "similarity":  # of cosines near 1 the distance counts
        return float(-np.log(max(1 - value, 1e-4)))
    return _logit(value)


def _logit(share: float) -> float:
    inner = min(max(share, _EDGE), 1 - _EDGE)
    return float(np.log(inner / (1 - inner)))


def _dice(logit: float) -> float:
    """The logit's share, with the edges given back to 0 and 1."""
    share = 1 / (1 + np.exp(-logit))
    return float(min(1.0, max(0.0, (share - _EDGE) / (1 - 2 * _EDGE))))
