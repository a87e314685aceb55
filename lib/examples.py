"""Labelled slices of a bank, each with the references that it would be segmented by."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from lib.memory.bank import MemoryBank
from lib.types import Example, Memory

MOST = 48  # labelled slices that are left out, each in its turn
REFERENCES = 8  # that vote for one


def examples_of(bank: MemoryBank) -> Iterator[Example]:
    """Leave labelled slices out in turn; those of one image never vote for it.

    First one slice of each of some images, then others of the same. Bounded, however large the
    bank.
    """
    for key in bank.spread(MOST):
        (reference,) = bank.references([key])  # one at a time, so that few are held
        names = reference.labels
        matches = bank.nearest(
            reference.embedding[None],
            REFERENCES,
            labels=names,
            exclude_image=reference.key.image_id,
        )[0]
        memories, known = bank.load([match.key for match in matches], names)
        rows = torch.nonzero(known.any(0)).flatten()  # labels that others know, too
        if len(rows):
            yield Example(
                reference.key.image_id,
                tuple(names[row] for row in rows.tolist()),
                _with_rows(reference.memory, rows),
                [_with_rows(memory, rows) for memory in memories],
                known[:, rows],
            )


def _with_rows(memory: Memory, rows: torch.Tensor) -> Memory:
    return replace(memory, labels=memory.labels[rows])
