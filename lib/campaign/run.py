"""Plays campaigns: next image, label, bank, segmentation of what is left, score; line by line."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from lib.campaign.journal import Journal, Outcome, Seconds
from lib.campaign.plan import Plan, draw_part
from lib.campaign.replay import Replay
from lib.campaign.scoring import CaseScore, score_case
from lib.retrieval.ranking import PoolView, Proposal, Ranking, make_ranking

logger = logging.getLogger(__name__)

DEPTHS_LOOKED_AT = 5

Advance = Callable[[int], None]


def steps(plan: Plan) -> int:
    """How many segmentations a campaign has at most: the length of its progress bar."""
    return len(plan.strategies) * plan.seeds * len(plan.budgets) * len(plan.targets)


def seconds_at_most(plan: Plan, replay: Replay, journal: Journal) -> float:
    """How long what is not measured yet will take, if no answer were remembered.

    Depths are those of a few targets. A strategy that always chooses the same images, and
    references that stay the nearest, make it shorter.
    """
    missing = sum(
        len(plan.targets)
        for strategy in plan.strategies
        for seed in range(plan.seeds)
        for budget in plan.budgets
        if (strategy, seed, budget) not in journal.outcomes
    )
    if not missing:
        return 0.0
    some = plan.targets[:: max(1, len(plan.targets) // DEPTHS_LOOKED_AT)]
    depth = float(np.mean([len(replay.case(image_id).slices) for image_id in some]))
    return missing * depth * replay.seconds_a_slice(plan.targets[0])


def play(plan: Plan, replay: Replay, pool: PoolView, journal: Journal, *, advance: Advance) -> None:
    """Play what the journal does not hold yet; to be interrupted at any time.

    Args:
        plan: the campaign.
        replay: prepared.
        pool: what `Replay.prepare` gave.
        journal: gets a line for each strategy, seed and budget.
        advance: called with the number of segmentations done since the last call.
    """
    weights = replay.foreground() if "foreground" in plan.strategies else {}
    for seed in range(plan.seeds):
        part = pool.part(draw_part(pool.ids, plan.part, seed))
        for strategy in plan.strategies:
            places = [(strategy, seed, budget) for budget in plan.budgets]
            if all(place in journal.outcomes for place in places):
                advance(len(places) * len(plan.targets))
                continue
            ranking = make_ranking(strategy, part, seed, foreground=weights)
            _one_campaign(plan, replay, journal, ranking, places, advance)


def _one_campaign(
    plan: Plan,
    replay: Replay,
    journal: Journal,
    ranking: Ranking,
    places: Sequence[tuple[str, int, int]],
    advance: Advance,
) -> None:
    picked: list[Proposal] = []
    for strategy, seed, budget in places:
        start = time.perf_counter()
        picked += _choose(ranking, budget - len(picked))
        choosing = time.perf_counter() - start
        # No ranking is told how sure RefSeg was of a mask: it is known of the scored images alone,
        # and a strategy that labels the worst of them would gain by what it leaves to be scored.
        if (strategy, seed, budget) in journal.outcomes:
            advance(len(plan.targets))
        else:
            place = strategy, seed, budget
            journal.add(_line(plan, replay, journal, place, picked, choosing, advance))


def _choose(ranking: Ranking, count: int) -> list[Proposal]:
    """The next images, one by one as an annotator asks for them."""
    chosen = []
    for _ in range(count):
        offered = ranking.next(n=1)
        if not offered:
            break
        ranking.add_labelled([offered[0].image_id])
        chosen += offered
    return chosen


def _line(
    plan: Plan,
    replay: Replay,
    journal: Journal,
    place: tuple[str, int, int],
    picked: Sequence[Proposal],
    choosing: float,
    advance: Advance,
) -> Outcome:
    strategy, seed, budget = place
    labelled = frozenset(proposal.image_id for proposal in picked)
    same = _same_labels(journal.outcomes.values(), labelled)
    segmenter = replay.runtime.segmenter
    asked, answered, network = segmenter.asked, segmenter.answered, segmenter.seconds
    start = time.perf_counter()
    learning = 0.0
    if same is not None:  # the same labels in the bank give the same masks, whoever chose them
        cases = same.cases
        advance(len(plan.targets))
    else:
        replay.learn([proposal.image_id for proposal in picked])
        learning = time.perf_counter() - start
        rows = []
        for image_id in plan.targets:
            if image_id not in labelled:
                rows.append(_score(plan, replay, image_id))
            advance(1)
        cases = tuple(rows)
    logger.info("%s, seed %d, %d labels: %d cases", strategy, seed, budget, len(cases))
    return Outcome(
        strategy=strategy,
        seed=seed,
        budget=budget,
        picked=tuple(proposal.image_id for proposal in picked),
        reasons=tuple(proposal.reason for proposal in picked),
        cases=cases,
        seconds=Seconds(
            choosing=choosing,
            learning=learning,
            segmenting=time.perf_counter() - start - learning,
            slices=segmenter.asked - asked,
            answered=segmenter.answered - answered,
            network=segmenter.seconds - network,
        ),
    )


def _score(plan: Plan, replay: Replay, image_id: str) -> CaseScore:
    found, answer = replay.segment(image_id)
    truth = replay.case(image_id).truth
    return score_case(image_id, found, truth, answer.confidence, tolerance_mm=plan.tolerance_mm)


def _same_labels(outcomes: Iterable[Outcome], labelled: frozenset[str]) -> Outcome | None:
    return next((one for one in outcomes if labelled == set(one.picked)), None)
