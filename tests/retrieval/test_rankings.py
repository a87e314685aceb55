"""All rankings against brute force, and against themselves made anew."""

import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.retrieval.centers import Centers, RiskCurve
from lib.retrieval.clusters import assign_clusters, pure_radius
from lib.retrieval.herding import Herding
from lib.retrieval.ranking import NAMES, PoolView, make_ranking

EVERY = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True, scope="module")
def one_gain_at_a_time() -> Iterator[None]:
    """Else all gains of such small pools would be computed each time, and no bound be relied on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.retrieval.herding._FIRST_LOOK", 1)
        patch.setattr("lib.retrieval.herding._LOOK_GROWTH", 1)
        yield


def unit(generator: np.random.Generator, count: int, size: int) -> np.ndarray:
    vectors = generator.standard_normal((count, size)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@st.composite
def pools(draw: st.DrawFn, most: int = 9) -> PoolView:
    generator = np.random.default_rng(draw(st.integers(0, 10_000)))
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=most))
    vectors = unit(generator, sum(counts), 5)
    if draw(st.booleans()):  # twins, for ties
        half = len(vectors) // 2
        vectors[len(vectors) - half :] = vectors[:half]
    ends = np.cumsum(counts)
    rows = {f"i{n}": vectors[b - a : b] for n, (a, b) in enumerate(zip(counts, ends, strict=True))}
    return PoolView.of(rows)


def rows(pool: PoolView, image: str) -> np.ndarray:
    number = pool.ids.index(image)
    return pool.vectors[pool.starts[number] : pool.starts[number + 1]].astype(np.float64)


def covered_by(pool: PoolView, images: set[str], kernel: Callable[[float], float]) -> list[float]:
    """Kernel of each slice with the nearest slice of some images, word by word from the paper."""
    centers = [center for name in sorted(images) for center in rows(pool, name)]
    return [
        max((kernel(float(x @ c)) for c in centers), default=0.0)
        for x in pool.vectors.astype(np.float64)
    ]


def smooth(width: float) -> Callable[[float], float]:
    return lambda cosine: float(np.exp(min(0.0, cosine - 1) / width))


def ball(width: float) -> Callable[[float], float]:
    return lambda cosine: float(cosine >= 1 - width)


@settings(max_examples=25, deadline=None)
@given(
    pools(),
    st.sampled_from([0.05, 0.3, 1.0]),
    st.sampled_from([smooth, ball]),
    st.integers(0, 3),
    st.data(),
)
def test_each_pick_is_a_greedy_one_and_its_score_is_the_coverage_it_adds(
    pool, width, kind, seed, data
):
    kernel = kind(width)
    names = st.sets(st.sampled_from(pool.ids), max_size=3)
    excluded = data.draw(names)
    labels = ("a", "b", "c")[: data.draw(st.integers(1, 3))]
    done = {label: data.draw(names) for label in labels}
    ranking = Herding(
        pool, seed, labels=labels, width=width, kernel="ball" if kind is ball else "smooth"
    )
    for label in labels:
        ranking.add_labelled(done[label], [label])
    proposals = ranking.next(excluded, n=4)

    def coverage(of: dict[str, set[str]]) -> float:
        covered = [covered_by(pool, images, kernel) for images in of.values()]
        return float(np.mean(covered))

    for proposal in proposals:
        before = coverage(done)
        gains = {
            name: coverage({label: images | {name} for label, images in done.items()}) - before
            for name in pool.ids
            if name not in excluded and any(name not in images for images in done.values())
        }
        assert proposal.image_id in gains
        assert proposal.score == pytest.approx(gains[proposal.image_id], abs=2e-6)
        assert proposal.score == pytest.approx(max(gains.values()), abs=2e-6)
        done = {label: images | {proposal.image_id} for label, images in done.items()}
    finished = set.intersection(*done.values())
    assert len(proposals) == 4 or finished | excluded == set(pool.ids)


@settings(max_examples=25, deadline=None)
@given(pools(), st.sampled_from([0.1, 0.6]), st.booleans(), st.data())
def test_refseg_weighs_by_risk_as_far_as_the_pool_is_labelled(pool, width, told, data):
    labelled = data.draw(st.sets(st.sampled_from(pool.ids), max_size=4))
    risk = {name: data.draw(st.floats(0.01, 1)) for name in pool.ids} if told else {}
    ranking = Herding(pool, 1, weighting="risk", width=width)
    ranking.add_labelled(labelled)
    ranking.set_risk(risk)
    found = ranking.next(n=1)

    kernel = smooth(width)
    before = np.array(covered_by(pool, labelled, kernel))
    if told:
        slice_risk = np.array([risk[pool.ids[owner]] for owner in pool.owners])
    else:
        slice_risk = 1 - before  # the uncovered share
    share = len(labelled) / len(pool)
    weights = np.ones(len(before))
    if slice_risk.mean() > 0:
        weights = (1 - share) + share * slice_risk / slice_risk.mean()
    gains = {
        name: float(weights @ (np.array(covered_by(pool, labelled | {name}, kernel)) - before))
        / len(before)
        for name in set(pool.ids) - labelled
    }
    assert bool(found) == bool(gains)
    if found:
        assert found[0].score == pytest.approx(max(gains.values()), abs=1e-5)
        assert gains[found[0].image_id] == pytest.approx(max(gains.values()), abs=1e-5)


@EVERY
@settings(max_examples=12, deadline=None)
@given(pools(most=12), st.integers(0, 3), st.data())
def test_what_came_before_does_not_matter_only_what_is_labelled_now(name, pool, seed, data):
    labels = ("a", "b") if data.draw(st.booleans()) else ()
    lived = make_ranking(name, pool, seed, labels=labels)
    now: dict[str, set[str] | None] = {}
    risk: dict[str, float] = {}
    some = st.sets(st.sampled_from(pool.ids), max_size=3)
    for _ in range(data.draw(st.integers(1, 7))):
        act = data.draw(st.sampled_from(["add", "add", "add a", "remove", "risk", "next"]))
        ids = data.draw(some)
        if act == "add":
            lived.add_labelled(ids)
            now |= dict.fromkeys(ids)
        elif act == "add a" and labels:
            ids -= now.keys()
            lived.add_labelled(ids, ["a"])
            now |= {image: {"a"} for image in ids}
        elif act == "remove":
            lived.remove_labelled(ids)
            now = {image: kept for image, kept in now.items() if image not in ids}
        elif act == "risk":
            risk = {image: data.draw(st.floats(0, 1)) for image in ids}
            lived.set_risk(risk)
        elif act == "next":
            lived.next(ids, n=data.draw(st.integers(1, 4)))
    fresh = make_ranking(name, pool, seed, labels=labels)
    fresh.set_risk(risk)
    for image, kept in sorted(now.items()):
        fresh.add_labelled([image], kept)
    excluded = data.draw(some)
    one, other = lived.next(excluded, n=3), fresh.next(excluded, n=3)
    assert [p.image_id for p in one] == [p.image_id for p in other]
    assert [p.score for p in one] == pytest.approx([p.score for p in other], abs=1e-5)
    assert [(p.reason, p.slices) for p in one] == [(p.reason, p.slices) for p in other]


@EVERY
@settings(max_examples=8, deadline=None)
@given(pools(), st.integers(0, 3), st.data())
def test_every_image_comes_once_and_a_batch_is_what_one_by_one_would_be(name, pool, seed, data):
    excluded = data.draw(st.sets(st.sampled_from(pool.ids), max_size=2))
    batch = make_ranking(name, pool, seed).next(excluded, n=len(pool) + 1)
    assert sorted(p.image_id for p in batch) == sorted(set(pool.ids) - excluded)
    single = make_ranking(name, pool, seed)
    for proposal in batch:
        (found,) = single.next(excluded)
        assert found.image_id == proposal.image_id
        own = pool.slices[pool.owners == pool.ids.index(found.image_id)]
        assert set(found.slices) <= set(own.tolist())
        assert found.slices
        assert found.reason
        assert np.isfinite(found.score)
        single.add_labelled([found.image_id])
    assert single.next(excluded) == []


@EVERY
def test_a_deleted_label_brings_its_image_back_and_strangers_do_not_matter(name):
    pool = PoolView.of({f"i{n}": unit(np.random.default_rng(n), 2, 4) for n in range(4)})
    ranking = make_ranking(name, pool, 0)
    ranking.add_labelled(["nobody", *pool.ids])
    ranking.set_risk({"nobody": 1.0})
    assert ranking.next({"nobody"}) == []
    ranking.remove_labelled(["i2", "nobody"])
    assert [p.image_id for p in ranking.next(n=5)] == ["i2"]


@EVERY
def test_an_empty_pool_has_no_next_image(name):
    assert make_ranking(name, PoolView.of({}), 0).next(n=3) == []


@EVERY
def test_an_image_labelled_in_part_stays_in_the_race_until_the_rest_is_there(name):
    pool = PoolView.of({f"i{n}": unit(np.random.default_rng(n), 1, 4) for n in range(3)})
    ranking = make_ranking(name, pool, 0, labels=("liver", "tumor"))
    ranking.add_labelled(["i0"], ["liver", "something else"])
    ranking.add_labelled(["i1", "i2"], ["liver", "tumor"])
    assert [p.image_id for p in ranking.next(n=2)] == ["i0"]
    ranking.add_labelled(["i0"], ["tumor"])
    assert ranking.next() == [] or name in ("first", "random", "foreground")


def test_coverage_comes_first_where_a_label_is_missing():
    """Cluster 0 has both labels, cluster 1 lacks the tumor: an image there is worth more."""
    vectors = np.eye(2, 8, dtype=np.float32)[[0, 0, 0, 1, 1, 1]]
    pool = PoolView.of({f"i{n}": vectors[n : n + 1] for n in range(6)})
    ranking = make_ranking("coverage", pool, 0, labels=("liver", "tumor"))
    ranking.add_labelled(["i0"])
    ranking.add_labelled(["i3"], ["liver"])
    best = ranking.next()[0]
    assert best.image_id in ("i3", "i4", "i5")
    assert best.reason.startswith("covers parts of 2 images that no label is as near to")


def test_the_width_is_that_of_the_distances_in_the_data():
    vectors = unit(np.random.default_rng(2), 60, 16)
    pool = PoolView.of({f"i{n:02d}": vectors[n : n + 1] for n in range(60)})
    ranking = Herding(pool, 0)
    distances = (1 - vectors @ vectors.T)[~np.eye(60, dtype=bool)]
    assert ranking._width == pytest.approx(np.median(distances), rel=1e-3)
    alike = PoolView.of({f"i{n}": vectors[:1] for n in range(3)})
    assert len(Herding(alike, 0).next(n=3)) == 3
    # corners that are empty on all pictures say nothing of how far apart pictures are
    corners = {f"i{n:02d}": vectors[[0, 0, 0, n + 1]] for n in range(40)}
    scores = [one.score for one in Herding(PoolView.of(corners), 0).next(n=5)]
    assert len(set(scores)) == 5


def test_risks_of_many_rows_are_learned_from_some_of_them():
    generator = np.random.default_rng(5)
    vectors = unit(generator, 40 * 80, 6)
    pool = PoolView.of({f"i{n:02d}": vectors[80 * n : 80 * n + 80] for n in range(40)})
    centers = Centers(pool, pool.vectors, ())
    centers.add(["i00", "i01"])
    distances = 1 - centers.nearest[0].reshape(40, 80).mean(axis=1)
    risk = {f"i{n:02d}": float(distances[n]) for n in range(2, 40)}
    curve = RiskCurve(0.3).fit(centers, pool, risk, 0)
    assert curve._x is not None
    assert len(curve._x) == 38
    assert np.abs(curve._x - np.sort(distances[2:])).max() < 0.05


def test_from_zero_labels_one_image_of_each_cluster_comes_first():
    generator = np.random.default_rng(0)
    cluster = generator.integers(0, 5, 300)
    vectors = np.eye(5, 32, dtype=np.float32)[cluster] + 0.02 * unit(generator, 300, 32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = [f"i{n:03d}" for n in range(300)]
    pool = PoolView.of({name: vectors[n : n + 1] for n, name in enumerate(ids)})
    sizes = np.bincount(cluster)
    for name in ("refseg", "coverage", "probcover", "typiclust"):
        ranking = make_ranking(name, pool, 0)
        seen = []
        for _ in range(5):
            (best,) = ranking.next()
            seen.append(int(cluster[ids.index(best.image_id)]))
            ranking.add_labelled([best.image_id])
        assert set(seen) == set(range(5)), name
        if name != "typiclust":
            assert [sizes[c] for c in seen] == sorted(sizes, reverse=True), name
    first = make_ranking("coverage", pool, 0).next()[0]
    assert first.reason.startswith("the most typical of 300 images")
    second = make_ranking("coverage", pool, 0)
    second.add_labelled([first.image_id])
    told = re.fullmatch(
        r"covers parts of (\d+) images that no label is as near to", second.next()[0].reason
    )
    assert told is not None
    assert sorted(sizes)[-2] - 1 <= int(told[1]) < 300 - max(sizes)


def test_the_slices_told_are_those_that_add_most():
    far = np.eye(4, dtype=np.float32)
    pool = PoolView.of(
        {"volume": far[[3, 0, 1]], **{f"a{n}": far[[0]] for n in range(3)}, "b": far[[1]]},
        slices={"volume": (4, 11, 17)},
    )
    (best,) = Herding(pool, 0, width=0.1).next({"a0", "a1", "a2", "b"})
    assert best.slices == (11, 17, 4)


def test_the_likelier_foreground_comes_earlier():
    pool = PoolView.of({f"i{n}": np.eye(1, 3, dtype=np.float32) for n in range(6)})
    weights = dict.fromkeys(("i0", "i1", "i2"), 20.0) | dict.fromkeys(("i3", "i4"), 1.0)
    weights["i5"] = 0.0
    places = np.array(
        [
            [p.image_id for p in make_ranking("foreground", pool, s, foreground=weights).next(n=6)]
            for s in range(200)
        ]
    )
    assert (places[:, 5] == "i5").all()
    share = np.isin(places[:, 0], ["i0", "i1", "i2"]).mean()
    assert share == pytest.approx(60 / 62, abs=0.05)


def test_a_seed_repeats_and_another_orders_ties_anew():
    pool = PoolView.of({f"i{n:02d}": np.eye(1, 3, dtype=np.float32) for n in range(50)})
    for name in set(NAMES) - {"first"}:
        orders = [
            [p.image_id for p in make_ranking(name, pool, seed).next(n=50)] for seed in (1, 1, 2)
        ]
        assert orders[0] == orders[1]
        assert orders[0] != orders[2], name


def test_a_large_pool_is_sampled_and_still_near_the_whole():
    vectors = unit(np.random.default_rng(1), 6_000, 16)
    pool = PoolView.of({f"i{n:03d}": vectors[20 * n : 20 * n + 20] for n in range(300)})
    sampled = Herding(pool, 0, width=0.2, max_targets=1000, max_candidates=3000)
    whole = Herding(pool, 0, width=0.2)
    assert len(sampled.next(n=3)) == 3
    gains = [sum(p.score for p in ranking.next(n=3)) for ranking in (sampled, whole)]
    assert gains[0] == pytest.approx(gains[1], rel=0.1)
    sampled.add_labelled(["i000"])
    assert "about" in sampled.next()[0].reason


@pytest.mark.parametrize("kernel", ["smooth", "ball"])
def test_what_a_deleted_label_had_covered_is_worth_labelling_again(kernel):
    """Gains that were seen to be small while the label was there are not believed any more."""
    far = np.eye(3, 8, dtype=np.float32)
    pool = PoolView.of(
        {"a": far[[0] * 20], "b": far[[0] * 20], "c": far[[1] * 5], "d": far[[2] * 10]}
    )
    ranking = Herding(pool, 0, width=0.1, kernel=kernel)
    ranking.add_labelled(["a"])
    assert ranking.next()[0].image_id == "d"  # b is looked at, too, and is worth nothing
    ranking.remove_labelled(["a"])
    (best,) = ranking.next({"a"})
    assert best.image_id == "b"
    assert best.score == pytest.approx(40 / 55, abs=0.01)


@pytest.mark.parametrize("weighting", ["even", "risk"])
def test_a_long_campaign_is_ranked_as_if_each_answer_were_the_first(weighting):
    """Weights turn, labels come and go: bounds must hold."""
    generator = np.random.default_rng(5)
    vectors = unit(generator, 90, 4)
    vectors[60:] = unit(generator, 3, 4)[generator.integers(0, 3, 30)] + 0.01 * vectors[60:]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pool = PoolView.of({f"i{n:02d}": vectors[n : n + 1] for n in range(90)})
    lived = Herding(pool, 0, weighting=weighting)
    labelled: list[str] = []
    for step in range(36):
        if step % 12 > 6 and labelled:
            gone = [labelled.pop(int(generator.integers(len(labelled)))) for _ in labelled[::3]]
            lived.remove_labelled(gone)
        else:
            labelled.append(lived.next()[0].image_id)
            lived.add_labelled(labelled[-1:])
        risk = {name: float(generator.random() ** 4) for name in pool.ids}
        lived.set_risk(risk)
        fresh = Herding(pool, 0, weighting=weighting)
        fresh.set_risk(risk)
        fresh.add_labelled(labelled)
        one, other = lived.next()[0], fresh.next()[0]
        assert one.score == pytest.approx(other.score, abs=3e-6), step


def test_few_gains_are_computed_for_the_next_image_after_a_submit():
    """The point of the bounds: a submit costs one update, not a rebuild."""
    generator = np.random.default_rng(2)
    vectors = unit(generator, 40, 24)[generator.integers(0, 40, 3000)]
    vectors = vectors + 0.3 * unit(generator, 3000, 24)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pool = PoolView.of({f"i{n:04d}": vectors[n : n + 1] for n in range(3000)})
    looked: list[int] = []
    for weighting in ("even", "risk"):
        ranking = Herding(pool, 0, weighting=weighting)
        kernels = ranking._kernels
        ranking._kernels = lambda images, f=kernels: looked.append(len(images)) or f(images)
        for _ in range(30):
            ranking.add_labelled([ranking.next()[0].image_id])
        assert sum(looked[:1]) > 0
        after_the_first = sum(looked) - 3000
        assert after_the_first < 30 * 3000 / 3, weighting
        looked.clear()


def test_unknown_risks_follow_the_known_ones_by_distance():
    far = np.linspace(0, 1.2, 60)
    vectors = np.stack([np.cos(far), np.sin(far)], axis=1).astype(np.float32)
    pool = PoolView.of({f"i{n:02d}": vectors[n : n + 1] for n in range(60)})
    centers = Centers(pool, pool.vectors, ())
    centers.add(["i00"])
    known = {f"i{n:02d}": n / 60 for n in range(1, 60, 2)}
    curve = RiskCurve(0.3).fit(centers, pool, known, 0)
    found = curve(1 - centers.nearest[0])
    assert (np.diff(found) >= 0).all()
    np.testing.assert_allclose(found[2:58:2], np.arange(2, 58, 2) / 60, atol=0.03)
    few = RiskCurve(0.3).fit(centers, pool, {"i05": 1.0}, 0)
    np.testing.assert_allclose(few(np.array([0.0, 0.3])), [0, 1 - np.exp(-1)])


def test_the_radius_ends_where_clusters_begin():
    generator = np.random.default_rng(0)
    cluster = generator.integers(0, 4, 200)
    vectors = np.eye(4, 16, dtype=np.float32)[cluster] + 0.05 * unit(generator, 200, 16)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = assign_clusters(vectors, 4, 0)
    assert len({(a, b) for a, b in zip(cluster, found, strict=True)}) == 4
    pool = PoolView.of({f"i{n:03d}": vectors[n : n + 1] for n in range(200)})
    assert 0 < pure_radius(pool, 0) < 0.9


def test_names_and_shapes_are_checked():
    with pytest.raises(ValueError, match="there are refseg"):
        make_ranking("best", PoolView.of({}), 0)
    with pytest.raises(ValueError, match="give one each"):
        PoolView.of({"a": np.eye(2, dtype=np.float32)}, {"a": (1,)})
