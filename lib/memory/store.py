"""Memories on disk: safetensors files named by their content, read lazily through a bounded cache.

A labelled image becomes one file, or several where its memories are large: a writer holds at most
about `SHARD_BYTES` of them at a time.
"""

import hashlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lib.memory.packing import Shard, StoredSlice, pack, split, unpack
from lib.types import Memory, Reference

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 << 20
SUFFIX = ".safetensors"
_CHUNK = 1 << 20


class DamagedFileError(Exception):
    """A file of memories is missing or not what its name says."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file}{SUFFIX}: {reason}")
        self.file = file


class MemoryFiles:
    """The folder of files, and the cache of what was read from them.

    Args:
        folder: where the files lie; it is made.
        cache_bytes: of memories kept in RAM, the least recently used go first.
    """

    def __init__(self, folder: Path, *, cache_bytes: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._cache = _Cache(cache_bytes)

    def path(self, file: str) -> Path:
        """Where a file of this name lies."""
        return self.folder / f"{file}{SUFFIX}"

    def names(self) -> list[str]:
        """All files that are there."""
        return [path.name[: -len(SUFFIX)] for path in self.folder.glob(f"*{SUFFIX}")]

    def stage(
        self, references: Iterable[Reference], content: str, staging: Path
    ) -> tuple[list[StoredSlice], list[str]]:
        """Write references into files in a folder of the writer's own; nothing can see them yet.

        Args:
            references: of one labelled image; consumed one by one.
            content: digest of what they were made from, kept in the files.
            staging: folder of this writer alone, on the same disk.

        Returns:
            What to put into the catalogue, and the names of the files to publish.
        """
        staging.mkdir(parents=True, exist_ok=True)
        stored: list[StoredSlice] = []
        names: list[str] = []
        for part, is_last in split(references, SHARD_BYTES):
            slices, data = pack(part, content, len(names), is_last)
            name = hashlib.sha256(data).hexdigest()
            with (staging / f"{name}{SUFFIX}").open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            names.append(name)
            stored += [replace(item, file=name) for item in slices]
        return stored, names

    def publish(self, names: Sequence[str], staging: Path) -> None:
        """Move staged files into place. To be called inside the catalogue's write transaction."""
        for name in names:
            (staging / f"{name}{SUFFIX}").replace(self.path(name))
        if names:
            _sync_folder(self.folder)

    def sweep(self, wanted: set[str]) -> int:
        """Delete files that no row names. To be called inside the write transaction.

        Files are published inside such a transaction too, so that none is deleted on its way.
        """
        swept = 0
        for name in self.names():
            if name not in wanted:
                self.path(name).unlink(missing_ok=True)
                swept += 1
        return swept

    def load(self, item: StoredSlice, labels: Sequence[str]) -> tuple[Memory, list[bool]]:
        """The memory of a slice with one row per label, and which labels it knows.

        Raises:
            DamagedFileError: its file is missing or not readable.
        """
        row_of = dict(zip(item.labels, item.rows, strict=True))
        known = [label in row_of for label in labels]
        with _Opened(self.path(item.file), item) as opened:
            image = self._cache.get((item.file, item.position, -1), opened.image)
            found = {
                row: self._cache.get((item.file, item.position, row), partial(opened.row, row))
                for row in {row_of[label] for label in labels if label in row_of}
            }
            if found:
                blank = torch.zeros_like(next(iter(found.values())))
            else:
                blank = opened.blank()
        rows = [found[row_of[label]] if label in row_of else blank for label in labels]
        stacked = torch.stack(rows) if rows else blank.new_zeros((0, *blank.shape))
        return Memory(image=image, labels=stacked), known

    def reason_damaged(self, file: str) -> str | None:
        """Why a file is not what its name says, or None; reads all of it."""
        digest = hashlib.sha256()
        try:
            with self.path(file).open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            return error.strerror or str(error)
        same = digest.hexdigest() == file
        return None if same else "its bytes do not have the digest that its name says"

    def put_aside(self, file: str) -> None:
        """Take a damaged file out of the way, for whoever wants to look at it."""
        try:
            self.path(file).replace(self.folder / f"{file}.damaged")
        except FileNotFoundError:
            logger.debug("%s is gone already", file)
        self._cache.forget(file)

    def recoverable(self) -> dict[str, list[StoredSlice]]:
        """The slices of every labelled image of which all files are whole, by content digest.

        This brings a bank back whose catalogue was lost, without encoding anything again.
        """
        shards: dict[str, dict[int, Shard]] = {}
        for name in sorted(self.names()):
            if self.reason_damaged(name) is not None:
                self.put_aside(name)
                continue
            try:
                with safe_open(self.path(name), framework="np") as opened:
                    shard = unpack(opened.metadata(), opened.get_tensor("embeddings"), name)
            except (SafetensorError, OSError, ValueError, KeyError) as error:
                logger.warning("%s is not used: %s", name, error)
                continue
            shards.setdefault(shard.content, {})[shard.number] = shard
        whole = {}
        for content, parts in shards.items():
            ordered = [parts[number] for number in sorted(parts)]
            if sorted(parts) == list(range(len(parts))) and ordered[-1].is_last:
                whole[content] = [item for shard in ordered for item in shard.slices]
        return whole


class _Opened:
    """A file that is opened only if something has to be read from it."""

    def __init__(self, path: Path, item: StoredSlice) -> None:
        self._path = path
        self._item = item
        self._handle: Any = None

    def __enter__(self) -> "_Opened":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._handle is not None:
            self._handle.__exit__(None, None, None)

    def image(self) -> torch.Tensor:
        return self._read(lambda handle: handle.get_tensor(f"{self._item.position}.image").clone())

    def row(self, row: int) -> torch.Tensor:
        name = f"{self._item.position}.labels"
        return self._read(lambda handle: handle.get_slice(name)[row].clone())

    def blank(self) -> torch.Tensor:
        name = f"{self._item.position}.labels"

        def zeros(handle: Any) -> torch.Tensor:
            part = handle.get_slice(name)[0:0]
            return part.new_zeros(part.shape[1:])

        return self._read(zeros)

    def _read(self, read: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        try:
            if self._handle is None:
                self._handle = safe_open(self._path, framework="pt", device="cpu").__enter__()
            return read(self._handle)
        except (SafetensorError, OSError) as error:
            raise DamagedFileError(self._item.file, str(error)) from error


class _Cache:
    """Tensors by key, at most so many bytes, least recently used out first; thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._held = 0
        self._tensors: OrderedDict[tuple[str, int, int], torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int, int], read: Callable[[], torch.Tensor]) -> torch.Tensor:
        with self._lock:
            if key in self._tensors:
                self._tensors.move_to_end(key)
                return self._tensors[key]
        tensor = read()
        with self._lock:
            if key not in self._tensors and tensor.nbytes <= self._limit:
                self._tensors[key] = tensor
                self._held += tensor.nbytes
                while self._held > self._limit:
                    self._held -= self._tensors.popitem(last=False)[1].nbytes
        return tensor

    def forget(self, file: str) -> None:
        with self._lock:
            for key in [key for key in self._tensors if key[0] == file]:
                self._held -= self._tensors.pop(key).nbytes


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
