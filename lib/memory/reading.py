"""Memories come back from their files: lazily, row by row, through a bounded cache."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lib.memory.packing import StoredSlice
from lib.types import Memory

_FILES_OPEN = 32


class DamagedFileError(Exception):
    """A file of memories is missing or not what its name says."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.file = file


class Reader:
    """Reads references; files are memory-mapped, opened when first needed, and kept open.

    Args:
        path: where the file of a name lies.
        cache: holds what was read.
    """

    def __init__(self, path: Callable[[str], Path], cache: "TensorCache") -> None:
        self._path = path
        self._cache = cache
        self._handles: OrderedDict[str, Any] = OrderedDict()

    def close(self) -> None:
        """Close all files."""
        for handle in self._handles.values():
            handle.__exit__(None, None, None)
        self._handles.clear()

    def load(self, item: StoredSlice, labels: Sequence[str]) -> tuple[Memory, list[bool]]:
        """The memory of a slice with one row per label, and which labels it knows.

        Raises:
            DamagedFileError: its file is missing or not readable.
        """
        row_of = dict(zip(item.labels, item.rows, strict=True))
        found = {
            row: self._get(item, row, partial(self._row, item, row))
            for row in {row_of[label] for label in labels if label in row_of}
        }
        blank = torch.zeros_like(next(iter(found.values()))) if found else self._blank(item)
        rows = [found[row_of[label]] if label in row_of else blank for label in labels]
        stacked = torch.stack(rows) if rows else blank.new_zeros((0, *blank.shape))
        image = self._get(item, -1, partial(self._image, item))
        return Memory(image=image, labels=stacked), [label in row_of for label in labels]

    def _get(self, item: StoredSlice, row: int, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        return self._cache.get((item.file, item.position, row), read)

    def _image(self, item: StoredSlice) -> torch.Tensor:
        return self._read(item, lambda h: _copy(h.get_tensor(f"{item.position}.image")))

    def _row(self, item: StoredSlice, row: int) -> torch.Tensor:
        return self._read(item, lambda h: _copy(h.get_slice(f"{item.position}.labels")[row]))

    def _blank(self, item: StoredSlice) -> torch.Tensor:
        part = self._read(item, lambda h: _copy(h.get_slice(f"{item.position}.labels")[0:0]))
        return part.new_zeros(part.shape[1:])

    def _read(self, item: StoredSlice, read: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        try:
            return read(self._open(item.file))
        except (SafetensorError, OSError) as error:
            raise DamagedFileError(item.file, str(error)) from error

    def _open(self, file: str) -> Any:
        if file in self._handles:
            self._handles.move_to_end(file)
            return self._handles[file]
        handle = safe_open(self._path(file), framework="pt", device="cpu").__enter__()
        self._handles[file] = handle
        if len(self._handles) > _FILES_OPEN:
            self._handles.popitem(last=False)[1].__exit__(None, None, None)
        return handle


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of its own, so that it keeps no file mapped that may be swept.

    NumPy's, of one thread: torch's copy waits for all threads, which takes milliseconds where
    another request computes.
    """
    if not tensor.numel():
        return tensor.clone()
    data = tensor.reshape(-1).view(torch.uint8).numpy().copy()
    return torch.from_numpy(data).view(tensor.dtype).view(tensor.shape)


class TensorCache:
    """Tensors by key, at most so many bytes, least recently used out first; thread-safe.

    Banks may share one, as files are named by their content.
    """

    def __init__(self, limit_bytes: int = 64 << 20) -> None:
        self._limit = limit_bytes
        self._held = 0
        self._tensors: OrderedDict[tuple[str, int, int], torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int, int], read: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor of a key (file, slice, row), read if it is not held."""
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
        """Drop what was read from a file."""
        with self._lock:
            for key in [key for key in self._tensors if key[0] == file]:
                self._held -= self._tensors.pop(key).nbytes
