"""Whether a bank on the disk is what a bank made anew from the same studies would be."""

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from lib.memory.bank import MemoryBank
from lib.runtime import Runtime
from lib.settings import from_conf
from lib.studies.datastore import StudiesDatastore, labelled_images

TOLERANCE = 0.02  # networks add in another order when slices come in other batches


def differences(studies: Path, bank: Path, anew: Path) -> list[str]:
    """How a bank differs from one that is made here; nothing if it does not.

    Args:
        studies: images and labels, with no server at work.
        bank: folder as of `--conf bank`.
        anew: where the other one is made.
    """
    held, made = _open(studies, bank), _open(studies, anew)
    store = StudiesDatastore(str(studies.resolve()), copies=made.folder / "copies", watch=False)
    made.bank.rebuild(labelled_images(store))
    found = _other_rows(_rows(held.bank), _rows(made.bank))
    return found + (_other_memories(held.bank, made.bank) if not found else [])


def _open(studies: Path, bank: Path) -> Runtime:
    settings = from_conf({"bank": str(bank.resolve()), "device": "cpu"})
    return Runtime(settings, bank_root=bank, studies=str(studies.resolve()))


def _rows(bank: MemoryBank) -> dict[str, tuple[str, ...]]:
    """Image -> names of its labels, digest of what it was made from, what was wrong with it."""
    query = "SELECT image_id, label_names, content, error FROM images WHERE removed_at IS NULL"
    with closing(sqlite3.connect(bank.folder / "catalogue.sqlite")) as connection:
        return {row[0]: tuple(map(str, row[1:])) for row in connection.execute(query)}


def _other_rows(held: dict[str, tuple[str, ...]], made: dict[str, tuple[str, ...]]) -> list[str]:
    found = [f"{image}: the bank still has it" for image in held.keys() - made.keys()]
    found += [f"{image}: the bank does not have it" for image in made.keys() - held.keys()]
    for image in held.keys() & made.keys():
        if held[image] != made[image]:
            found.append(f"{image}: the bank has {held[image]}, made anew {made[image]}")
    return sorted(found)


def _other_memories(held: MemoryBank, made: MemoryBank) -> list[str]:
    (keys, vectors), (others, wanted) = held.embeddings(), made.embeddings()
    if keys != others:
        return [f"the bank has {len(keys)} slices, made anew {len(others)}, or other ones"]
    found = []
    for place, key in enumerate(keys):
        one, other = held.references([key])[0], made.references([key])[0]
        if (one.present, one.absent) != (other.present, other.absent):
            found.append(f"{key}: {one.present} {one.absent}, anew {other.present} {other.absent}")
        alike = np.allclose(vectors[place], wanted[place], atol=TOLERANCE)
        for ours, theirs in (
            (one.memory.image, other.memory.image),
            (one.memory.labels, other.memory.labels),
        ):
            alike &= ours.shape == theirs.shape
            alike = alike and torch.allclose(ours.float(), theirs.float(), atol=TOLERANCE, rtol=0.1)
        if not alike:
            found.append(f"{key}: another memory than one made anew")
    return found
