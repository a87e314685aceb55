"""What a label was before: versions kept below `labels/.history`, and what the table should say.

    labels/.history/<tag>/<image>/000002.nii.gz   a version that was overwritten or deleted
    labels/.history/<tag>/<image>/000002.json     when, why, its digest and its label info
    labels/.history/<tag>/<image>/current.json    the same of the label that is in use
    labels/.history/pending/<mark>.json           a label that is being saved at this moment

MONAI Label takes the folders of `labels/` for tags and looks at the files right in them: here are
none, so it finds no label. Label info has a second home in `current.json`, because the platform's
table, `datastore_v2.json`, is one file for all labels, which other programs write, too.
"""

import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lib.durable import digest_of, link_or_copy, make_folder, sync_folder, write_json

logger = logging.getLogger(__name__)

FOLDER = ".history"
CURRENT = "current.json"
PENDING = "pending"


@dataclass(frozen=True)
class LabelVersion:
    """One version of a label that is kept.

    Attributes:
        version: 1 is the first that was saved; never used twice for one label.
        file: its bytes.
        info: what the datastore knew of it.
        kept: when it was overwritten or deleted, ISO 8601, UTC.
        why: "overwritten" or "deleted".
        sha256: of its bytes.
    """

    version: int
    file: Path
    info: Mapping[str, Any]
    kept: str
    why: str
    sha256: str


class LabelHistory:
    """Versions of labels below one folder. Not locked: its owner holds the datastore's lock."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Nothing is written yet.

        Args:
            folder: `labels/.history`.
            keep: versions that are kept of each label.
        """
        self._folder = folder
        self._keep = keep

    # -- versions -----------------------------------------------------------------------------

    def versions(self, tag: str, image_id: str) -> list[LabelVersion]:
        """What is kept of a label, oldest first."""
        folder = self._of(tag, image_id)
        if not folder.is_dir():
            return []
        found = []
        for file in sorted(folder.iterdir()):
            number, extension = file.name[:6], file.name[6:]
            if number.isdecimal() and extension != ".json":
                found.append(_version(int(number), file, _read(folder / f"{number}.json")))
        return found

    def labels(self) -> Iterator[tuple[str, str]]:
        """Tag and image of each label of which something is kept."""
        for tag in sorted(self._folder.iterdir()) if self._folder.is_dir() else ():
            if tag.is_dir() and tag.name != PENDING:
                for image in sorted(tag.iterdir()):
                    if image.is_dir():
                        yield tag.name, _unescaped(image.name)

    def next_version(self, tag: str, image_id: str, info: Mapping[str, Any] | None) -> int:
        """The number of a label that is to be saved.

        Args:
            tag: of the label.
            image_id: of the label.
            info: of the label that it takes the place of, if there is one.
        """
        kept = self.versions(tag, image_id)
        newest = kept[-1].version if kept else 0
        if info is None:
            return newest + 1
        return max(newest, _number(info) or newest + 1) + 1

    def keep(
        self, tag: str, image_id: str, file: Path, *, info: Mapping[str, Any], why: str
    ) -> None:
        """Keep a label's bytes and info; the label itself stays where it is.

        To keep the same version again, after a crash in between, changes nothing.
        """
        folder = self._of(tag, image_id)
        make_folder(folder)
        digest = digest_of(file)
        kept = self.versions(tag, image_id)
        newest = kept[-1].version if kept else 0
        version = _number(info) or newest + 1
        if any(entry.version == version and digest_of(entry.file) != digest for entry in kept):
            version = newest + 1
        target = folder / f"{version:06d}{file.name[len(image_id) :]}"
        try:
            link_or_copy(file, target)
        except FileExistsError:
            logger.debug("version %d of a label is kept already", version)
        told = {"version": version, "kept": _now(), "why": why, "sha256": digest, "info": info}
        write_json(folder / f"{version:06d}.json", told)
        sync_folder(folder)

    def prune(self, tag: str, image_id: str) -> None:
        """Delete what is older than the versions to be kept."""
        kept = self.versions(tag, image_id)
        for entry in kept[: max(0, len(kept) - self._keep)]:
            entry.file.unlink(missing_ok=True)
            (self._of(tag, image_id) / f"{entry.version:06d}.json").unlink(missing_ok=True)

    # -- the label in use ---------------------------------------------------------------------

    def announce(self, tag: str, image_id: str, *, info: Mapping[str, Any], sha256: str) -> Path:
        """Note a label that is about to be saved; `settled` says that all of it is on the disk."""
        folder = self._of(tag, image_id)
        make_folder(folder)
        make_folder(self._folder / PENDING)
        mark = self._folder / PENDING / f"{uuid.uuid4().hex}.json"
        write_json(mark, {"tag": tag, "image": image_id, "info": info, "sha256": sha256})
        return mark

    def settled(self, mark: Path, tag: str, image_id: str) -> None:
        """The table has the label: what was announced is its info from now on."""
        mark.replace(self._of(tag, image_id) / CURRENT)

    def withdraw(self, mark: Path) -> None:
        """What was announced did not happen."""
        mark.unlink(missing_ok=True)

    def forget_current(self, tag: str, image_id: str) -> None:
        """The label is deleted."""
        (self._of(tag, image_id) / CURRENT).unlink(missing_ok=True)

    def info_of(self, tag: str, image_id: str, file: Path) -> dict[str, Any] | None:
        """The info that belongs to exactly these bytes, if they were saved here."""
        told = _read(self._of(tag, image_id) / CURRENT)
        info = told.get("info")
        if isinstance(info, dict) and told.get("sha256") == digest_of(file):
            return info
        return None

    def unsettled(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Labels whose saving was interrupted: the note's file, and what it says."""
        folder = self._folder / PENDING
        for mark in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            yield mark, _read(mark)

    def _of(self, tag: str, image_id: str) -> Path:
        return self._folder / tag / _escaped(image_id)


def _version(number: int, file: Path, told: Mapping[str, Any]) -> LabelVersion:
    info = told.get("info")
    return LabelVersion(
        version=number,
        file=file,
        info=info if isinstance(info, Mapping) else {},
        kept=str(told.get("kept", "")),
        why=str(told.get("why", "")),
        sha256=str(told.get("sha256", "")),
    )


def _number(info: Mapping[str, Any]) -> int:
    number = info.get("version")
    good = isinstance(number, int) and not isinstance(number, bool) and 0 < number < 10**6
    return int(str(number)) if good else 0


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _escaped(image_id: str) -> str:
    """An id as a folder's name: only these two mean something else."""
    return image_id.replace(".", "%2E") if image_id in (".", "..") else image_id


def _unescaped(name: str) -> str:
    return name.replace("%2E", ".") if name in ("%2E", "%2E%2E") else name


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
