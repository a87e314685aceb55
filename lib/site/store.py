"""The site's models on disk: versions that appear whole, one pointer that says which is current.

`MODELS/<studies>/0003/` holds `weights.safetensors`, `measured.safetensors` and `card.json`;
`current.json` names the versions that were current, the last one is. All writing is done beside the
place and renamed.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lib.durable import write_json
from lib.errors import ModelStoreError, WeightsError
from lib.memory.catalogue import fingerprint_folder
from lib.models.matchseg import MatchSegSegmenter, save_weights
from lib.models.network import MatchSegNet
from lib.runtime import studies_name
from lib.settings import RefSegSettings

WEIGHTS, MEASURED = "weights.safetensors", "measured.safetensors"
CARD, BANKS, POINTER = "card.json", "banks.json", "current.json"
KEPT = 3  # versions that stay on the disk: the current one and two to go back to
LOCK_TIMEOUT_S = 10.0  # another process holds it for the time of renaming a file


@dataclass(frozen=True)
class ModelCard:
    """What is known of one version.

    Attributes:
        version: its number; 0 before it is stored.
        sha256: of the weights file.
        sha256_measured: of the weights that were measured, before the validation cases were learned
            from, too; empty: they were not, and both are the same.
        date: UTC, ISO 8601.
        parent: the version that was current when it was trained; None: the bundled network.
        start: what its training started from, "bundled" or "scratch".
        dice: mean Dice on the validation cases, 0..1.
        dice_before: of the one that it was measured against, on the same cases.
        labels: names that it was trained on.
        training: ids of the images that it had learned from when it was measured.
        validation: ids of the images that it was measured on.
        epochs: how many were trained, on all images, too.
        seconds: how long these took.
        options: of the training.
    """

    dice: float
    dice_before: float
    start: str
    labels: tuple[str, ...]
    training: tuple[str, ...]
    validation: tuple[str, ...]
    epochs: int = 0
    seconds: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    parent: int | None = None
    version: int = 0
    sha256: str = ""
    sha256_measured: str = ""
    date: str = ""

    @property
    def learned(self) -> tuple[str, ...]:
        """Ids of all images that the network that answers has learned from."""
        return (*self.training, *(self.validation if self.sha256_measured else ()))


class ModelStore:
    """Versions of one studies folder's model; safe to be used by several processes at once."""

    def __init__(self, folder: Path) -> None:
        """Nothing is read or written yet."""
        self.folder = folder

    @classmethod
    def of(cls, settings: RefSegSettings, root: Path, studies: str) -> "ModelStore":
        """The store of a datastore's folder or URL, below the settings' folder or else `root`."""
        return cls((settings.site_models or root) / studies_name(studies))

    # -- reading ----------------------------------------------------------------------------------

    def current(self) -> ModelCard | None:
        """The version to answer with, or None; reads two small files, so ask at every request.

        Raises:
            ModelStoreError: the pointer or the card is damaged.
        """
        history = self.history()
        return self.card(history[-1]) if history else None

    def history(self) -> list[int]:
        """Versions that were current, oldest first; the last one is."""
        path = self.folder / POINTER
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["history"]
            return [int(version) for version in found]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            msg = (
                f"{path} cannot be read ({error}), so no model is current; delete it, then choose "
                "one with `models use`."
            )
            raise ModelStoreError(msg) from error

    def card(self, version: int) -> ModelCard:
        """What is known of a version.

        Raises:
            ModelStoreError: there is no such version, or its card is damaged.
        """
        path = self._place(version) / CARD
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            lists = {name: tuple(raw[name]) for name in ("labels", "training", "validation")}
            return ModelCard(**{**raw, **lists})
        except FileNotFoundError:
            numbers = ", ".join(str(v) for v in self._numbers()) or "none"
            msg = f"There is no model {version} in {self.folder}; there are: {numbers}."
            raise ModelStoreError(msg) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            msg = f"The card of model {version} is damaged ({error}); roll back or train again."
            raise ModelStoreError(msg) from error

    def versions(self) -> list[ModelCard]:
        """All versions on the disk, oldest first."""
        return [self.card(version) for version in self._numbers()]

    def load(self, card: ModelCard, *, device: str | None = None) -> MatchSegSegmenter:
        """Load a version's network, checked against the SHA-256 on its card.

        Raises:
            ModelStoreError: the file is absent, damaged, or of a network that is no more.
        """
        return self._load(card, WEIGHTS, card.sha256, device)

    def load_measured(self, card: ModelCard, *, device: str | None = None) -> MatchSegSegmenter:
        """Load the network that the card's figures are of, which never saw `validation`.

        Raises:
            ModelStoreError: as `load`.
        """
        if not card.sha256_measured:
            return self.load(card, device=device)
        return self._load(card, MEASURED, card.sha256_measured, device)

    def _load(
        self, card: ModelCard, name: str, wanted: str, device: str | None
    ) -> MatchSegSegmenter:
        path = self._place(card.version) / name
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "absent"
        if found != wanted:
            msg = (
                f"The weights of model {card.version} are damaged ({name}): SHA-256 {found[:16]}, "
                f"{wanted[:16]} was expected. Roll back (`models rollback`) or train again."
            )
            raise ModelStoreError(msg)
        try:
            return MatchSegSegmenter.load(path, device=device)
        except WeightsError as error:
            msg = f"Model {card.version} is of another version of RefSeg; train again ({error})."
            raise ModelStoreError(msg) from error

    # -- writing ----------------------------------------------------------------------------------

    def add(
        self, net: MatchSegNet, card: ModelCard, *, measured: MatchSegNet | None = None
    ) -> ModelCard:
        """Store a version without making it current: all of it appears, or nothing.

        Args:
            net: that answers.
            card: what is known of it.
            measured: that the card's figures are of, if it is another one.

        Returns:
            the card with version, parent, date and SHA-256.

        Raises:
            ModelStoreError: the disk is full or cannot be written.
        """
        beside = self.folder / f".{uuid.uuid4().hex}.part"
        try:
            beside.mkdir(parents=True)
            digest = _save(net, beside / WEIGHTS)
            other = _save(measured, beside / MEASURED) if measured is not None else ""
            with self._lock():
                history = self.history()
                card = replace(
                    card,
                    version=max([*self._numbers(), *history, 0]) + 1,
                    parent=history[-1] if history else None,
                    sha256=digest,
                    sha256_measured=other,
                    date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                )
                _write(beside / CARD, asdict(card))
                beside.rename(self._place(card.version))
        except ModelStoreError:
            raise
        except Exception as error:  # safetensors has an error of its own for a full disk
            msg = (
                f"The new model could not be stored in {self.folder}: {error}. Make room (about "
                "20 MB) or name another folder (--conf site_models DIR), then train again."
            )
            raise ModelStoreError(msg) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return card

    def use(self, version: int) -> ModelCard:
        """Make a version the current one; servers see it at their next request."""
        card = self.card(version)
        with self._lock():
            self._point([*(v for v in self.history() if v != version), version])
        return card

    def previous(self) -> ModelCard | None:
        """What `rollback` would make current; None: the site would have no model again.

        Raises:
            ModelStoreError: there is nothing to roll back.
        """
        history = self.history()
        if not history:
            msg = f"No model of this site is in use ({self.folder}): nothing to roll back."
            raise ModelStoreError(msg)
        return self.card(history[-2]) if len(history) > 1 else None

    def rollback(self) -> ModelCard | None:
        """Make the previous version current again; the one left stays on the disk for `use`."""
        with self._lock():
            before = self.previous()
            self._point(self.history()[:-1])
        return before

    def note_bank(self, card: ModelCard, fingerprint: str) -> None:
        """Remember that a bank of this fingerprint was made by this version."""
        path = self._place(card.version) / BANKS
        known = _banks(path)
        if fingerprint not in known:
            _write(path, [*known, fingerprint])

    def prune(self, banks: Path) -> list[int]:
        """Delete versions that can no longer be rolled back to, and the banks that they made.

        Args:
            banks: folder of the studies' banks.

        Returns:
            the versions deleted.
        """
        with self._lock():
            history = self.history()
            kept = set(history[-KEPT:])
            gone = [v for v in self._numbers() if v not in kept and v < max(kept, default=0)]
            if len(history) > KEPT:
                self._point(history[-KEPT:])
            still = {bank for v in self._numbers() if v not in gone for bank in self._banks_of(v)}
            for version in gone:
                for bank in set(self._banks_of(version)) - still:
                    shutil.rmtree(fingerprint_folder(banks, bank), ignore_errors=True)
                shutil.rmtree(self._place(version), ignore_errors=True)
        return gone

    def _banks_of(self, version: int) -> list[str]:
        return _banks(self._place(version) / BANKS)

    def _place(self, version: int) -> Path:
        return self.folder / f"{version:04d}"

    def _numbers(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        names = (path.name for path in self.folder.iterdir() if (path / CARD).is_file())
        return sorted(int(name) for name in names if re.fullmatch(r"\d{4,}", name))

    def _point(self, history: list[int]) -> None:
        _write(self.folder / POINTER, {"history": history})

    def _lock(self) -> "_Locked":
        return _Locked(self.folder / ".lock")


def state_of(version: int, history: Sequence[int]) -> str:
    """What a person calls it: in use, one that was before it, or one that was never used."""
    if version not in history:
        return "set aside"
    return "in use" if version == history[-1] else "before"


class _Locked:
    """The store's lock, with an error that says what to do."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = FileLock(path, timeout=LOCK_TIMEOUT_S)

    def __enter__(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            msg = f"{self._path} is held by another process; try again when it is done."
            raise ModelStoreError(msg) from error
        except OSError as error:
            msg = f"{self._path.parent} cannot be written ({error}); name another folder."
            raise ModelStoreError(msg) from error

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _save(net: MatchSegNet, path: Path) -> str:
    digest = save_weights(net, path)
    with path.open("rb+") as weights:
        os.fsync(weights.fileno())
    return digest


def _banks(path: Path) -> list[str]:
    with suppress(OSError, ValueError):
        return [str(name) for name in json.loads(path.read_text(encoding="utf-8"))]
    return []


def _write(path: Path, value: Any) -> None:
    """Write JSON; the file appears whole or not at all."""
    try:
        write_json(path, value)
    except OSError as error:
        msg = f"{path} cannot be written ({error}); the models stay as they were."
        raise ModelStoreError(msg) from error
