"""Memories on disk: safetensors files named by their content, published and swept as a whole.

A labelled image becomes one file, or several where its memories are large: a writer holds at most
about `SHARD_BYTES` of them at a time.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lib.memory.packing import Shard, StoredSlice, pack, split, unpack
from lib.memory.reading import Reader, TensorCache
from lib.types import Reference

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 << 20
SUFFIX = ".safetensors"
_CHUNK = 1 << 20


class MemoryFiles:
    """The folder of files, and the cache of what was read from them.

    Args:
        folder: where the files lie; it is made.
        cache: holds what was read.
    """

    def __init__(self, folder: Path, *, cache: TensorCache) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._cache = cache

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
        self.folder.mkdir(parents=True, exist_ok=True)
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
                self._cache.forget(name)
                swept += 1
        return swept

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        """A reader that keeps files open from one reference to the next."""
        reader = Reader(self.path, self._cache)
        try:
            yield reader
        finally:
            reader.close()

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


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
