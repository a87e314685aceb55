"""What speaks for a mask: gathered slice by slice, the larger the area the more it counts."""

from collections import defaultdict
from dataclasses import dataclass
from math import isfinite, nan

SIGNS = ("similarity", "presence", "quality", "sharpness", "agreement", "reverse")


@dataclass(frozen=True)
class Evidence:
    """What is known of one label's mask on one image; NaN where a sign was not looked for.

    Attributes:
        similarity: cosine of the slices to their nearest reference.
        presence: probability that the label is there at all, by the network; where nothing was
            found, the highest of all slices.
        quality: Dice that the network expects of its own mask.
        sharpness: expected Dice by the probabilities of the pixels, 2 sum(p m) / sum(p + m).
        agreement: Dice between the masks by two disjoint halves of the references.
        reverse: Dice of known references segmented back by the mask as the only reference.
        area: pixels of the mask, at the network's working size.
    """

    similarity: float = nan
    presence: float = nan
    quality: float = nan
    sharpness: float = nan
    agreement: float = nan
    reverse: float = nan
    area: int = 0

    def signs(self) -> dict[str, float]:
        """Those that were looked for."""
        values = {name: float(getattr(self, name)) for name in SIGNS}
        return {name: value for name, value in values.items() if isfinite(value)}


class EvidenceTally:
    """Evidence of one image's labels, slice by slice."""

    def __init__(self) -> None:
        self._area: dict[str, int] = defaultdict(int)
        self._sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._likeliest: dict[str, float] = defaultdict(float)
        self._whole: dict[str, dict[str, float]] = defaultdict(dict)

    def add(
        self, label: str, *, area: int, similarity: float, presence: float, quality: float
    ) -> None:
        """Count one slice.

        Args:
            label: of the mask.
            area: pixels that were painted.
            similarity: cosine with the nearest reference that knows the label.
            presence: probability of the label on the slice.
            quality: expected Dice of the slice's mask.
        """
        self._area[label] += area
        self._likeliest[label] = max(self._likeliest[label], presence)
        sums = self._sums[label]
        for name, value in (
            ("similarity", similarity),
            ("presence", presence),
            ("quality", quality),
        ):
            sums[name] += area * value

    def set(self, label: str, sign: str, value: float) -> None:
        """Note a sign that is one figure for the whole image."""
        self._whole[label][sign] = value

    def of(self, label: str) -> Evidence:
        """What is known of a label; presence alone where nothing was painted."""
        area = self._area[label]
        if not area:
            return Evidence(presence=self._likeliest[label])
        means = {name: value / area for name, value in self._sums[label].items()}
        return Evidence(area=area, **means, **self._whole[label])
