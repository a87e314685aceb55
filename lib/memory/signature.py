"""Has a labelled image changed? A cheap signature answers mostly, a digest of contents else.

The datastore's own time stamps have whole seconds, its watcher misses overwrites and renames, and
a file can be replaced by one of equal size and restored time: only the change time (ctime), which
no program can set, betrays that. So the signature holds size, mtime, ctime and inode.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from lib.types import LabelledImage

# Time stamps tick: a file written twice within one tick looks unchanged. A file changed so shortly
# before it was looked at gets a signature that equals nothing, and is hashed again next time.
# Two seconds are the coarsest tick of a file system in use (FAT).
SETTLED_S = 2.0
_CHUNK = 1 << 20
UNSETTLED = ""


def file_signature(path: Path, settled_s: float = SETTLED_S) -> str:
    """Signature of a file, or of all files in a DICOM folder; "" if they changed just now.

    Raises:
        OSError: it is not there or not readable.
    """
    newest = 0
    parts = []
    for name, file in _files(path):
        status = file.stat()
        newest = max(newest, status.st_ctime_ns, status.st_mtime_ns)
        parts.append(
            f"{name}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_ino}"
        )
    if newest > time.time_ns() - settled_s * 1e9:
        return UNSETTLED
    return parts[0] if len(parts) == 1 else _digest("\n".join(parts))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes and suffix, or of the names and bytes in a DICOM folder.

    Raises:
        OSError: it is not there or not readable.
    """
    digest = hashlib.sha256()
    is_folder = path.is_dir()
    digest.update("".join(path.suffixes[-2:]).lower().encode() if not is_folder else b"/")
    for name, file in _files(path):
        if is_folder:
            digest.update(f"\n{name}\n".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def signature(label: LabelledImage, settled_s: float = SETTLED_S) -> str:
    """Cheap signature of image, label and names; "" (equal to nothing) if they changed just now.

    A missing file has a signature too, so that its absence is noticed once.
    """
    parts = [str(label.image_path), str(label.label_path), names_text(label.label_names)]
    for path in (label.image_path, label.label_path):
        try:
            part = file_signature(path, settled_s)
        except OSError as error:
            part = f"unreadable {error.errno}"
        if part == UNSETTLED:
            return UNSETTLED
        parts.append(part)
    return _digest("\0".join(parts))


def content(label: LabelledImage) -> str:
    """Digest of everything that the references of a labelled image are made from, but its id.

    Raises:
        OSError: a file is not there or not readable.
    """
    parts = (
        file_digest(label.image_path),
        file_digest(label.label_path),
        names_text(label.label_names),
    )
    return _digest("\0".join(parts))


def names_text(names: Mapping[int, str]) -> str:
    """Canonical text of the value -> name mapping."""
    return json.dumps(sorted((int(value), name) for value, name in names.items()))


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """The file itself, or all files below a folder in a fixed order, with their names in it."""
    if not path.is_dir():
        yield "", path
        return
    for folder, subfolders, names in os.walk(path):
        subfolders.sort()
        for name in sorted(names):
            file = Path(folder) / name
            yield file.relative_to(path).as_posix(), file


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
