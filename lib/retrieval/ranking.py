"""Which image to label next: the rankings by name, all behind one protocol.

The contract between strategies and the campaign simulator, pure: ids and vectors, no MONAI Label.

    pool = PoolView.of({"case 1": vectors_of_its_slices, ...}, slices={"case 1": (4, 9, 14), ...})
    ranking = make_ranking("refseg", pool, seed=0)
    ranking.add_labelled(["case 1"])                  # or (..., labels=["liver"]): partly labelled
    ranking.remove_labelled(["case 1"])               # its label was deleted
    ranking.set_risk({"case 2": 0.4})                 # 1 - expected Dice, where it is known
    for proposal in ranking.next(exclude={"case 3"}, n=5):
        proposal.image_id, proposal.score, proposal.reason, proposal.slices

`Ranking` and `Proposal` tell the rest. Names:

| name | next image |
|---|---|
| random, first | drawn by the seed; by name |
| foreground | drawn, likelier where `foreground` is (ids -> weight; a simulator knows it) |
| typiclust | the most typical of the largest cluster without a label (Hacohen 2022) |
| probcover | covers most of the pool within a radius (Yehuda 2022) |
| kcenter | the farthest from all labels (core-set, Sener 2018) |
| coverage | greedy kernel coverage (MaxHerding, Bae 2024) |
| uncertainty | the highest risk: where the references would do worst |
| refseg | coverage, then coverage of what is at risk, as more is labelled (after Bae 2025) |
"""

from collections.abc import Mapping, Sequence

from lib.retrieval import peers
from lib.retrieval.clusters import TypiClust, pure_radius
from lib.retrieval.distance import Farthest, Riskiest
from lib.retrieval.herding import Herding
from lib.retrieval.poolview import PoolView, Proposal, Ranking

__all__ = ["NAMES", "PoolView", "Proposal", "Ranking", "make_ranking"]

NAMES = (
    "refseg",
    "coverage",
    "uncertainty",
    "random",
    "first",
    "foreground",
    "typiclust",
    "probcover",
    "kcenter",
)


def make_ranking(
    name: str,
    pool: PoolView,
    seed: int = 0,
    *,
    labels: Sequence[str] = (),
    foreground: Mapping[str, float] | None = None,
) -> Ranking:
    """Make a ranking over a pool, with nothing labelled yet.

    Args:
        name: one of `NAMES`.
        pool: the images; to add some, make a new ranking.
        seed: of draws, samples and ties. Same pool, labels, risk and seed: same answer.
        labels: names that an image must be annotated for to be done; empty: any label will do.
        foreground: image id -> weight, for the ranking of that name alone.

    Raises:
        ValueError: the name is unknown.
    """
    if name == "first":
        return peers.first(pool, labels)
    if name == "random":
        return peers.random(pool, seed, labels)
    if name == "foreground":
        return peers.foreground_random(pool, seed, foreground or {}, labels)
    if name == "coverage":
        return Herding(pool, seed, labels=labels)
    if name == "refseg":
        return Herding(pool, seed, labels=labels, weighting="risk")
    pool = pool.whole()  # the others compare pictures, as their papers do
    if name == "kcenter":
        return Farthest(pool, seed, labels)
    if name == "uncertainty":
        return Riskiest(pool, seed, labels)
    if name == "typiclust":
        return TypiClust(pool, seed, labels=labels)
    if name == "probcover":
        radius = pure_radius(pool, seed)
        return Herding(pool, seed, labels=labels, kernel="ball", width=radius)
    msg = f"ranking {name!r} is unknown; there are {', '.join(NAMES)}."
    raise ValueError(msg)
