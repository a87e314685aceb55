"""Masks that RefSeg made: by the page's button, or stored by a batch; and what they came from."""

import logging
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import HTTPException

from apps.refseg.server.page_parts import Parts, Shelf, looks
from lib.imaging.io import ImageVolume, read_image, read_label_map
from lib.types import IntArray

logger = logging.getLogger(__name__)

SHELF_BYTES = 64 << 20
SHOWN = 8  # references side by side


@dataclass(frozen=True)
class Used:
    """A slice that a mask came from.

    Attributes:
        image_id: whose slice.
        axis: across the slices.
        number: of the slice.
        similarity: highest cosine with a slice of the mask's image.
        slices: how many slices it voted for, of the label for which it did so most.
        labels: for which labels it voted.
    """

    image_id: str
    axis: int
    number: int
    similarity: float
    slices: int
    labels: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Mask:
    """One mask.

    Attributes:
        image_id: of which image.
        values: label -> its value in the map.
        confidence: label -> expected Dice, 0..1; of one that was not found the probability that it
            is not there.
        found: the labels that were found.
        references: what it came from, the nearest of each image first.
        bank: fingerprint of the bank that it came from; empty where that is not told.
        generation: of that bank.
        maker: names of the networks, and the model of the site.
        made: UTC, or empty.
        message: what a person should know.
        shape: (I, J, K) on the canonical grid.
        mark: another for each mask.
    """

    image_id: str
    values: Mapping[str, int]
    confidence: Mapping[str, float]
    found: frozenset[str]
    references: tuple[Used, ...]
    bank: str
    generation: int
    maker: str
    made: str
    message: str
    shape: tuple[int, ...]
    mark: str
    packed: bytes

    def label_map(self) -> IntArray:
        """(I, J, K) int32."""
        flat = np.frombuffer(zlib.decompress(self.packed), np.uint16)
        return flat.astype(np.int32).reshape(self.shape)


class Masks:
    """The last masks; bounded, in memory."""

    def __init__(self, parts: Parts) -> None:
        """There is none."""
        self._parts = parts
        self._shelf: Shelf[Mask] = Shelf(SHELF_BYTES, lambda mask: len(mask.packed) + 4096)

    def make(self, image_id: str) -> Mask:
        """Segment an image as a client would have it, and keep the mask; takes its time.

        Raises:
            HTTPException: of the task, with a sentence.
        """
        path = str(self._parts.datastore.get_image_uri(image_id))
        file, params = self._parts.segment({"image": path})
        if file is None:
            raise HTTPException(500, "The segmentation has left no file.")
        try:
            mask = _mask_of(image_id, Path(file), params, read_image(Path(path)))
        finally:
            Path(file).unlink(missing_ok=True)
        return self._shelf.put(image_id, mask)

    def find(self, image_id: str, image: ImageVolume) -> Mask | None:
        """The last that was made here, else one that is stored with its references."""
        return self._shelf.get(image_id) or self._stored(image_id, image)

    def _stored(self, image_id: str, image: ImageVolume) -> Mask | None:
        store = self._parts.datastore
        for tag, label_id in store.get_labels_by_image_id(image_id).items():
            params = store.get_label_info(label_id, tag).get("params")
            if isinstance(params, Mapping) and isinstance(params.get("references"), Mapping):
                path = Path(store.get_label_uri(label_id, tag))
                key = (tag, looks(path))
                try:
                    return self._shelf.get(key) or self._shelf.put(
                        key, _mask_of(image_id, path, params, image)
                    )
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    # clients may store what they like with a label
                    logger.warning("what label %s of %s came from: %s", tag, image_id, error)
        return None


def _mask_of(image_id: str, file: Path, params: Mapping[str, Any], image: ImageVolume) -> Mask:
    values = {str(n): int(v) for n, v in dict(params.get("label_names") or {}).items() if v}
    label_map = read_label_map(file, image)
    drawn = set(np.unique(label_map).tolist())
    told, bank = params.get("provenance") or {}, params.get("bank") or {}
    return Mask(
        image_id=image_id,
        values=values,
        confidence={str(n): float(v) for n, v in dict(params.get("confidence") or {}).items()},
        found=frozenset(name for name, value in values.items() if value in drawn),
        references=_references(params.get("references") or {}),
        bank=str(bank.get("fingerprint", "")),
        generation=int(bank.get("generation", -1)),
        maker=_maker(params),
        made=str(told.get("time") or time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())),
        message=" ".join(filter(None, [str(params.get("message") or ""), *_warnings(params)])),
        shape=label_map.shape,
        mark=uuid.uuid4().hex,
        packed=zlib.compress(label_map.astype(np.uint16).tobytes(), 1),
    )


def _warnings(params: Mapping[str, Any]) -> list[str]:
    told = params.get("warnings")
    return [str(one) for one in told] if isinstance(told, list) else []


def _maker(params: Mapping[str, Any]) -> str:
    model = params.get("model")
    version = f", model {model.get('version')}" if isinstance(model, Mapping) else ""
    return f"{params.get('segmenter', '')}{version}, {params.get('embedder', '')}"


def _references(told: Mapping[str, Any]) -> tuple[Used, ...]:
    """Those of all labels, each slice once; the nearest of each image, then the second ones."""
    found: dict[tuple[str, int, int], Used] = {}
    for label, rows in told.items():
        for row in rows:
            key = (str(row["image"]), int(row["axis"]), int(row["slice"]))
            before = found.get(key, Used(*key, -1.0, 0, ()))
            found[key] = Used(
                *key,
                similarity=max(before.similarity, float(row["similarity"])),
                slices=max(before.slices, int(row["slices"])),
                labels=(*before.labels, str(label)),
            )
    rows = sorted(found.values(), key=lambda used: -used.similarity)
    seen: Counter[str] = Counter()
    turns = []
    for used in rows:
        turns.append(seen[used.image_id])
        seen[used.image_id] += 1
    order = sorted(range(len(rows)), key=lambda n: (turns[n], n))
    return tuple(rows[n] for n in order[:SHOWN])
