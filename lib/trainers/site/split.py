"""Which cases are learned from and which are kept to measure: look-alikes stay on one side."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from lib.errors import TrainingError
from lib.trainers.site.packing import PackedCase

ALIKE = 0.985  # correlation of two thumbnails from which on pictures count as the same
COMPARED = 12  # slices of one case that are compared with others'
FEWEST_CASES = 4


@dataclass(frozen=True)
class Split:
    """Positions in the list of cases."""

    training: tuple[int, ...]
    validation: tuple[int, ...]


def groups_of(cases: Sequence[PackedCase], *, alike: float = ALIKE) -> list[list[int]]:
    """Cases grouped so that no two slices that look the same are in different groups."""
    parent = list(range(len(cases)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    thumbs = [case.thumbnails[_spread(len(case), COMPARED)] for case in cases]
    for row, own in enumerate(thumbs):
        for column in range(row):
            if root(row) != root(column) and float((own @ thumbs[column].T).max()) >= alike:
                parent[root(row)] = root(column)
    groups: dict[int, list[int]] = {}
    for index in range(len(cases)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())


def split(
    cases: Sequence[PackedCase],
    *,
    share: float,
    seed: int,
    learned: Collection[str] = (),
    alike: float = ALIKE,
) -> Split:
    """Keep about `share` of the cases for validation, at least two (of four: one), at most half.

    What the network to be beaten learned from is never measured on: `learned` cases, and what looks
    like them, stay on the training side. A label is not kept from training altogether.

    Raises:
        TrainingError: there are too few cases, or too few that differ.
    """
    if len(cases) < FEWEST_CASES:
        msg = (
            f"{len(cases)} labelled images can be trained on; {FEWEST_CASES} are the least (three "
            "to learn from, one to measure by). Label and submit more."
        )
        raise TrainingError(msg)
    groups = groups_of(cases, alike=alike)
    rng = np.random.default_rng(seed)
    order = [groups[i] for i in rng.permutation(len(groups))]
    free = [g for g in order if not any(cases[i].image_id in learned for i in g)]
    free.sort(key=len)  # stable: a big group of look-alikes makes a poor measure
    # two at least, since one image is soon segmented better by chance; but three are learned from
    wanted = min(max(2, round(share * len(cases))), len(cases) // 2, len(cases) - 3)
    chosen: list[int] = []
    for group in free:
        rest = set(range(len(cases))) - set(chosen) - set(group)
        if len(chosen) + len(group) > wanted and chosen:
            continue
        if len(rest) >= 2 and _labels(cases, group) <= _labels(cases, rest):
            chosen += group
        if len(chosen) >= wanted:
            break
    if not chosen:
        reason = (
            "all of them were learned from by the model in use"
            if not free
            else "they look the same, or each label is on one of them alone"
        )
        msg = (
            f"None of the {len(cases)} labelled images can be kept to measure the new model by: "
            f"{reason}. Label and submit more, different ones."
        )
        raise TrainingError(msg)
    training = [i for i in range(len(cases)) if i not in set(chosen)]
    return Split(tuple(training), tuple(sorted(chosen)))


def _labels(cases: Sequence[PackedCase], group: Collection[int]) -> set[str]:
    """Labels that show on any slice of these cases."""
    return {
        name
        for i in group
        for name, shown in zip(cases[i].labels, cases[i].present.any(0), strict=True)
        if shown
    }


def _spread(length: int, count: int) -> list[int]:
    count = min(length, count)
    return [int((n + 0.5) * length / count) for n in range(count)]
