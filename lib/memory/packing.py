"""How references become the bytes of a safetensors file, and their description comes back."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from lib.types import FloatArray, Reference, Shape

LAYOUT = 2  # raised when a reference is described otherwise; banks of another are made anew
_METADATA = "refseg"


@dataclass(frozen=True, eq=False)
class StoredSlice:
    """A reference as the catalogue holds it: everything but the memory, which lies in a file.

    Attributes:
        axis: of the slice.
        index: of the slice.
        embedding: (E,) unit float32.
        present: labels with a pixel here, sorted.
        absent: labels annotated and not here, sorted.
        rows: for each label of `sorted(present + absent)`, its row in the stored tensor.
        file: name of the file without suffix (digest of its bytes); "" before it is written.
        position: of the slice in the file.
        shapes: of the labels that are present, where they were looked at.
    """

    axis: int
    index: int
    embedding: FloatArray
    present: tuple[str, ...]
    absent: tuple[str, ...]
    rows: tuple[int, ...]
    file: str
    position: int
    shapes: Mapping[str, Shape] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        """All labels that the slice knows, in the order of `rows`."""
        return sorted((*self.present, *self.absent))

    def text(self) -> str:
        """Everything but embedding and place in a file, as JSON."""
        return json.dumps(
            {
                "axis": self.axis,
                "index": self.index,
                "present": self.present,
                "absent": self.absent,
                "rows": self.rows,
                "shapes": {name: astuple(self.shapes[name]) for name in sorted(self.shapes)},
            }
        )


@dataclass(frozen=True)
class Shard:
    """What a file says of itself: whose references, and which part of them."""

    content: str
    number: int
    is_last: bool
    slices: tuple[StoredSlice, ...]


def from_text(text: str, embedding: FloatArray, file: str, position: int) -> StoredSlice:
    """The inverse of `StoredSlice.text`."""
    fields = json.loads(text)
    return StoredSlice(
        axis=fields["axis"],
        index=fields["index"],
        embedding=embedding,
        present=tuple(fields["present"]),
        absent=tuple(fields["absent"]),
        rows=tuple(fields["rows"]),
        file=file,
        position=position,
        shapes={name: Shape(*values) for name, values in fields["shapes"].items()},
    )


def split(
    references: Iterable[Reference], limit_bytes: int
) -> Iterator[tuple[list[Reference], bool]]:
    """References in lists of about so many bytes, each with whether it is the last."""
    part: list[Reference] = []
    held = 0
    for reference in references:
        if held >= limit_bytes:
            yield part, False
            part, held = [], 0
        part.append(reference)
        held += reference.memory.image.nbytes + reference.memory.labels.nbytes
    if part:
        yield part, True


def pack(
    references: list[Reference], content: str, number: int, is_last: bool
) -> tuple[list[StoredSlice], bytes]:
    """Describe references and serialize them into one file's bytes.

    Rows that are equal bit by bit (the empty masks of all labels that are not on a slice) are
    stored once.
    """
    slices = []
    tensors = {}
    for position, reference in enumerate(references):
        labels = reference.memory.labels.detach().cpu()
        if len(labels) != len(reference.labels):
            message = f"{reference.key} has {len(labels)} memory rows for {len(reference.labels)}"
            message += " labels; rows follow `Reference.labels`"
            raise ValueError(message)
        seen: dict[bytes, int] = {}
        rows = [
            seen.setdefault(row.contiguous().view(torch.uint8).numpy().tobytes(), len(seen))
            if row.ndim
            else index
            for index, row in enumerate(labels)
        ]
        first = [rows.index(row) for row in range(max(rows, default=-1) + 1)]
        tensors[f"{position}.image"] = reference.memory.image.detach().cpu().contiguous()
        tensors[f"{position}.labels"] = labels[first].contiguous()
        slices.append(
            StoredSlice(
                axis=reference.key.axis,
                index=reference.key.index,
                embedding=np.asarray(reference.embedding, dtype=np.float32),
                present=tuple(sorted(reference.present)),
                absent=tuple(sorted(reference.absent)),
                rows=tuple(rows),
                file="",
                position=position,
                shapes=dict(reference.shapes),
            )
        )
    tensors["embeddings"] = torch.from_numpy(np.stack([item.embedding for item in slices]))
    about = {
        "content": content,
        "number": number,
        "last": is_last,
        "slices": [item.text() for item in slices],
    }
    return slices, save(tensors, metadata={_METADATA: json.dumps(about)})


def unpack(metadata: Mapping[str, str] | None, embeddings: Any, file: str) -> Shard:
    """The description of a file from its metadata and its embeddings (n, E).

    Raises:
        ValueError: the file is not one of ours.
    """
    if not metadata or _METADATA not in metadata:
        message = "it does not describe itself"
        raise ValueError(message)
    about = json.loads(metadata[_METADATA])
    slices = (
        from_text(text, np.array(embeddings[position], dtype=np.float32), file, position)
        for position, text in enumerate(about["slices"])
    )
    return Shard(about["content"], about["number"], about["last"], tuple(slices))
