"""Files that are there whole or not at all, also after a power cut: staged, synced, renamed."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

CHUNK = 1 << 20


def stage(target: Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Write a file beside its place and wait until it is on the disk; `publish` renames it.

    Nothing is left behind if it cannot be written.
    """
    beside = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with beside.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return beside


def stage_copy(target: Path, source: Path) -> Path:
    """As `stage`, with the bytes of another file."""

    def copy(file: IO[bytes]) -> None:
        with source.open("rb") as original:
            shutil.copyfileobj(original, file, CHUNK)

    return stage(target, copy)


def publish(staged: Path, target: Path) -> None:
    """Give a staged file its name, in place of one that has it; the folder is synced, too."""
    staged.replace(target)
    sync_folder(target.parent)


def write_json(target: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    data = json.dumps(value, indent=1, default=str).encode()
    publish(stage(target, lambda file: file.write(data)), target)


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    publish(stage(target, lambda file: file.write(text.encode())), target)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system knows no second names."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        publish(stage_copy(target, source), target)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each synced into the one that holds it."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk; a no-op where folders cannot be synced."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError:  # some network shares
        pass
    finally:
        os.close(handle)


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
