"""A tiny datastore of .npy volumes and a segmenter of one multiplication, for the bank tests."""

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from lib.errors import LabelError
from lib.types import LabelledImage, Memory, Reference, SliceKey

SIZE = 8
WORDS = {1: "liver", 2: "kidney", 3: "spleen"}


def embedding_of(picture: np.ndarray) -> np.ndarray:
    vector = picture.astype(np.float64).ravel() + 1e-3
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def encode(label: LabelledImage) -> Iterator[Reference]:
    """Every slice with a label is a reference; labels seen elsewhere in the volume are absent."""
    volume = read_array(label.image_path)
    masks = read_array(label.label_path)
    if masks.shape != volume.shape:
        raise LabelError(f"label of shape {masks.shape} for an image of {volume.shape}")
    values = [int(v) for v in np.unique(masks) if v]
    names = {v: label.label_names.get(v, f"label_{v}") for v in values}
    for index, (picture, mask) in enumerate(zip(volume, masks, strict=True)):
        if not mask.any():
            continue
        present = {names[v] for v in values if (mask == v).any()}
        by_name = {names[v]: mask == v for v in values}
        rows = [torch.from_numpy(by_name[n] * picture).float() for n in sorted(by_name)]
        yield Reference(
            key=SliceKey(label.image_id, 2, index),
            embedding=embedding_of(picture),
            present=frozenset(present),
            absent=frozenset(names.values()) - present,
            memory=Memory(
                image=torch.from_numpy(picture).to(torch.bfloat16), labels=torch.stack(rows)
            ),
        )


def read_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise LabelError(f"{path.name} is not an array: {error}") from error


class CountingEncode:
    """`encode`, leaving a line per call in a file, so that processes can be counted together."""

    def __init__(self, log: Path, *, seconds: float = 0.0) -> None:
        self.log = log
        self.seconds = seconds

    def __call__(self, label: LabelledImage) -> Iterator[Reference]:
        with self.log.open("a", encoding="utf-8") as stream:
            stream.write(f"{os.getpid()} {label.image_id}\n")
        time.sleep(self.seconds)
        yield from encode(label)

    @property
    def calls(self) -> list[str]:
        if not self.log.exists():
            return []
        return [line.split(" ", 1)[1] for line in self.log.read_text(encoding="utf-8").splitlines()]


class PhantomStore:
    """Images and labels in a folder, as MONAI Label's local datastore keeps them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.labels_folder = folder / "labels" / "final"
        self.labels_folder.mkdir(parents=True, exist_ok=True)
        self.names: dict[str, Mapping[int, str]] = {}

    def image(self, image_id: str) -> Path:
        return self.folder / f"{image_id}.npy"

    def label(self, image_id: str) -> Path:
        return self.labels_folder / f"{image_id}.npy"

    def submit(
        self,
        image_id: str,
        seed: int,
        *,
        slices: int = 3,
        names: Mapping[int, str] = WORDS,
        label_seed: int | None = None,
        values: int = 3,
    ) -> None:
        generator = np.random.default_rng(seed)
        np.save(self.image(image_id), generator.random((slices, SIZE, SIZE)).astype(np.float32))
        generator = np.random.default_rng(seed if label_seed is None else label_seed)
        masks = generator.integers(0, values + 1, (slices, SIZE, SIZE)).astype(np.uint8)
        for mask in masks:  # each slice misses a label, some miss all
            mask[mask == generator.integers(0, values + 1)] = 0
        np.save(self.label(image_id), masks)
        self.names[image_id] = dict(names)

    def adopt_what_is_there(self) -> None:
        """List the labels that another process wrote."""
        self.names = {path.stem: dict(WORDS) for path in self.labels_folder.glob("*.npy")}

    def delete(self, image_id: str) -> None:
        self.label(image_id).unlink()
        del self.names[image_id]

    def rename(self, old: str, new: str) -> None:
        self.image(old).rename(self.image(new))
        self.label(old).rename(self.label(new))
        self.names[new] = self.names.pop(old)

    def listing(self) -> list[LabelledImage]:
        return [
            LabelledImage(image_id, self.image(image_id), self.label(image_id), names)
            for image_id, names in sorted(self.names.items())
        ]


def expected(listing: list[LabelledImage]) -> dict[SliceKey, Reference]:
    """What a bank must hold, straight from the files."""
    found = {}
    for label in listing:
        try:
            found |= {reference.key: reference for reference in encode(label)}
        except (LabelError, OSError):
            continue
    return found


def difference(bank, listing: list[LabelledImage]) -> str:
    """How a bank differs from the files; "" if it does not."""
    wanted = expected(listing)
    keys, vectors = bank.embeddings()
    if keys != sorted(wanted):
        return f"keys {keys} instead of {sorted(wanted)}"
    for key, vector, held in zip(keys, vectors, bank.references(keys), strict=True):
        reference = wanted[key]
        if not np.array_equal(vector, reference.embedding):
            return f"{key}: embedding"
        if (held.present, held.absent) != (reference.present, reference.absent):
            return f"{key}: labels"
        for ours, theirs in (
            (held.memory.image, reference.memory.image),
            (held.memory.labels, reference.memory.labels),
        ):
            if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
                return f"{key}: memory"
    return ""
