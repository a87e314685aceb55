"""A pool without labels: the order that would be proposed, and a map of its images."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib.evaluation.charts import Points, scatter
from lib.retrieval.ranking import PoolView, Proposal, make_ranking
from lib.types import FloatArray

FAR_SHARE = 0.05  # of the images: the farthest from all that is labelled or would be


@dataclass(frozen=True, eq=False)
class Atlas:
    """What would be labelled, and where everything lies.

    Attributes:
        ids: M images.
        places: (M, 2) on the two main axes of the image vectors.
        explained: share of all variance that these two axes show, 0..1: how far to trust the map.
        labelled: images that have a label.
        order: proposals, first to be labelled first.
        far: images least like any that is labelled or proposed, the farthest first.
        likeness: (M,) highest cosine with those.
    """

    ids: tuple[str, ...]
    places: FloatArray
    explained: float
    labelled: tuple[str, ...]
    order: tuple[Proposal, ...]
    far: tuple[str, ...]
    likeness: FloatArray


def survey(
    pool: PoolView,
    labelled: Collection[str],
    strategy: str,
    count: int,
    *,
    seed: int = 0,
    held: Collection[str] = (),
    exclude: Collection[str] = (),
    risk: Mapping[str, float] | None = None,
) -> Atlas:
    """Ask a strategy for the next images and lay out the pool.

    Args:
        pool: all images.
        labelled: those that have a label already.
        strategy: name of a ranking.
        count: how many proposals.
        seed: of the ranking.
        held: images that somebody is at work on, as good as labelled.
        exclude: images that are not to be proposed.
        risk: see `Ranking.set_risk`.
    """
    ranking = make_ranking(strategy, pool, seed)
    pool = pool.whole()  # a map of pictures
    if risk is not None:
        ranking.set_risk(risk)
    ranking.add_labelled(sorted({*labelled, *held}))
    order = tuple(ranking.next(exclude, n=count))
    known = {*labelled, *held, *(proposal.image_id for proposal in order)}
    likeness = _likeness(pool, known)
    others = [row for row in np.argsort(likeness, kind="stable") if pool.ids[row] not in known]
    far = others[: int(np.ceil(FAR_SHARE * len(pool)))]
    places, explained = project(_image_vectors(pool))
    return Atlas(
        ids=pool.ids,
        places=places,
        explained=explained,
        labelled=tuple(image_id for image_id in pool.ids if image_id in set(labelled)),
        order=order,
        far=tuple(pool.ids[row] for row in far),
        likeness=likeness,
    )


def project(vectors: FloatArray) -> tuple[FloatArray, float]:
    """Principal components: (M, E) -> (M, 2) and the share of variance that these show.

    The sign of each axis is fixed, so that the same pool gives the same map.
    """
    centered = vectors - vectors.mean(0)
    covariance = centered.T @ centered  # E x E: a large pool costs no more
    values, axes = np.linalg.eigh(covariance.astype(np.float64))
    main = axes[:, ::-1][:, :2]
    if main.shape[1] < 2:
        main = np.pad(main, ((0, 0), (0, 2 - main.shape[1])))
    main *= np.where(main[np.abs(main).argmax(0), range(2)] < 0, -1, 1)
    total = float(np.maximum(values, 0).sum())
    share = float(np.maximum(values[-2:], 0).sum() / total) if total > 0 else 0.0
    return (centered @ main).astype(np.float32), share


def chart(atlas: Atlas, *, most: int | None = None) -> str:
    """The map as SVG.

    Args:
        atlas: of `survey`.
        most: points drawn of each group, evenly spread over the names; None: all.
    """
    row = {image_id: number for number, image_id in enumerate(atlas.ids)}
    following = [proposal.image_id for proposal in atlas.order]
    special = {*atlas.labelled, *following, *atlas.far}

    def points(name: str, ids: Sequence[str], *look: Any) -> Points:
        rows = [row[image_id] for image_id in ids]
        if most is not None and len(rows) > most:
            name = f"{name}: {len(rows)}, drawn"
            rows = [rows[int((n + 0.5) * len(rows) / most)] for n in range(most)]
        return Points(name, atlas.places[rows], *look)

    numbers = tuple(str(place) for place in range(1, len(following) + 1))
    return scatter(
        [
            points("others", [i for i in atlas.ids if i not in special], "#87919a", 26),
            points("far from everything", atlas.far, "#D55E00", 60, "X"),
            points("labelled", atlas.labelled, "#009E73", 60, "s"),
            points("next, in order", following, "#0072B2", 70, "o", numbers),
        ],
        title=f"The pool; both axes together show {atlas.explained:.0%} of its variance",
    )


def _image_vectors(pool: PoolView) -> FloatArray:
    """(M, E): the mean of each image's slices."""
    sums = np.add.reduceat(pool.vectors, pool.starts[:-1], axis=0)
    means: FloatArray = (sums / np.diff(pool.starts)[:, None]).astype(np.float32)
    return means


def _likeness(pool: PoolView, known: Collection[str]) -> FloatArray:
    """(M,) of each image the mean over its slices of the highest cosine with a known slice."""
    chosen = np.array([image_id in known for image_id in pool.ids])[pool.owners]
    if not chosen.any():
        return np.zeros(len(pool), np.float32)
    centers = pool.vectors[chosen]
    best = np.concatenate(
        [(part @ centers.T).max(1) for part in np.array_split(pool.vectors, len(pool) // 500 + 1)]
    )
    sums = np.add.reduceat(best, pool.starts[:-1])
    return (sums / np.diff(pool.starts)).astype(np.float32)
