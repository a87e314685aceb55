"""Find, fetch and verify published weights. Nothing is ever downloaded except by `fetch`.

Weights are looked for in the folder that the user named (`--conf weights DIR`, `REFSEG_WEIGHTS`),
as `DIR/NAME/FILE`, `DIR/REPOSITORY/FILE` or `DIR/FILE`, and then in Hugging Face's cache.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib.durable import digest_of
from lib.errors import WeightsError
from lib.models.known_weights import KNOWN, KnownWeights, WeightFile

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"  # in the weights folder: what was seen at the first fetch
FETCH = "python apps/refseg/main.py weights fetch"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class WeightsRow:
    """One line of `weights list`.

    Attributes:
        name: what to pass to `weights fetch`.
        use: "segmenter" or "embedder".
        repo: on the Hugging Face hub.
        revision: commit, or "main" where the checksum alone pins the content.
        licence: SPDX name.
        size: bytes of all files, None where not known.
        pinned: whether every file's checksum is in our table.
        path: where the weights are, None if they are not here.
    """

    name: str
    use: str
    repo: str
    revision: str
    licence: str
    size: int | None
    pinned: bool
    path: Path | None


@dataclass(frozen=True)
class FileCheck:
    """What `verify` found out about one file.

    Attributes:
        path: of the file.
        sha256: of its content.
        expected: what it should be, None if nobody ever recorded it.
        source: "table" (ours), "first fetch", "hub cache" or "none".
    """

    path: Path
    sha256: str
    expected: str | None
    source: str

    @property
    def state(self) -> str:
        """`ok`, `damaged`, or `unverified` where there is nothing to compare with."""
        if self.expected is None:
            return "unverified"
        return "ok" if self.sha256 == self.expected else "damaged"


def find(name: str, folder: Path | None = None) -> Path | None:
    """Path of weights that are on this machine: a file (SAM 2) or a folder (DINOv2, CLIP).

    Args:
        name: one of `KNOWN`.
        folder: where the user keeps weights, if anywhere.

    Raises:
        WeightsError: there are no weights of this name.
    """
    paths = _locate(_known(name), folder)
    if paths is None:
        return None
    return paths[0] if len(paths) == 1 else paths[0].parent


def require(name: str, folder: Path | None = None) -> Path:
    """As `find`, but weights that are not here are an error with the command that fetches them."""
    path = find(name, folder)
    if path is not None:
        return path
    weights = _known(name)
    from huggingface_hub import constants

    looked = [str(folder)] if folder else []
    looked.append(f"the Hugging Face cache ({constants.HF_HUB_CACHE})")
    files = " and ".join(file.name for file in weights.files)
    msg = (
        f"Weights {name!r} are not on this machine (looked in {', '.join(looked)}). Fetch them "
        f"with `{FETCH} {name}`, or copy {files} of huggingface.co/{weights.repo} into "
        f"{(folder or Path('WEIGHTS')) / name} and name that folder's parent with "
        "`--conf weights DIR`."
    )
    raise WeightsError(msg)


def fetch(name: str, folder: Path | None = None, *, on_progress: Progress | None = None) -> Path:
    """Download weights, check them, and return their path; an interrupted download goes on.

    Args:
        name: one of `KNOWN`.
        folder: goes to `folder/name`; None: into Hugging Face's cache.
        on_progress: called with (file name, bytes done, bytes in all).

    Raises:
        WeightsError: unknown name, no connection, offline mode, or a wrong checksum; the damaged
            file is removed.
    """
    weights = _known(name)
    from huggingface_hub import hf_hub_download

    target = folder / name if folder else None
    paths = []
    for file in weights.files:
        try:
            path = Path(
                hf_hub_download(
                    weights.repo,
                    file.name,
                    revision=weights.revision,
                    local_dir=target,
                    tqdm_class=_reporter(file.name, on_progress),
                )
            )
        except Exception as error:  # a lost connection is an error of the hub's HTTP library
            msg = (
                f"{file.name} of huggingface.co/{weights.repo} could not be fetched "
                f"({type(error).__name__}: {error}). Check the connection and HF_HUB_OFFLINE, and "
                f"run `{FETCH} {name}` again: it goes on where it stopped. Or copy the file from "
                "another machine."
            )
            raise WeightsError(msg) from error
        check = _check(weights, file, path, folder)
        if check.state == "damaged":
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            msg = (
                f"{path} has SHA-256 {check.sha256}, expected {check.expected} ({check.source}); "
                f"it was removed. Run `{FETCH} {name}` again."
            )
            raise WeightsError(msg)
        if folder and check.state == "unverified":
            _record(folder, f"{name}/{file.name}", check.sha256)
            logger.info("%s: SHA-256 %s recorded, none was known before", path, check.sha256)
        paths.append(path)
    return paths[0] if len(paths) == 1 else paths[0].parent


def verify(name: str, folder: Path | None = None) -> tuple[FileCheck, ...]:
    """Compare the checksums of weights that are on this machine.

    Raises:
        WeightsError: unknown name, or the weights are not here.
    """
    require(name, folder)
    weights = _known(name)
    paths = _locate(weights, folder) or ()
    return tuple(
        _check(weights, file, path, folder) for file, path in zip(weights.files, paths, strict=True)
    )


def list_known(folder: Path | None = None) -> tuple[WeightsRow, ...]:
    """All weights RefSeg knows of, and where those are that are here."""
    rows = []
    for name, weights in KNOWN.items():
        sizes = [file.size for file in weights.files if file.name != "config.json"]
        rows.append(
            WeightsRow(
                name=name,
                use=weights.use,
                repo=weights.repo,
                revision=weights.revision,
                licence=weights.licence,
                size=None if None in sizes else sum(size or 0 for size in sizes),
                pinned=all(file.sha256 for file in weights.files),
                path=find(name, folder),
            )
        )
    return tuple(rows)


def state_digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes, types and values, independent of the file's format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _known(name: str) -> KnownWeights:
    if name not in KNOWN:
        msg = f"There are no weights called {name!r}; known are {', '.join(KNOWN)}."
        raise WeightsError(msg)
    return KNOWN[name]


def _locate(weights: KnownWeights, folder: Path | None) -> tuple[Path, ...] | None:
    """Paths of all files in one place, in the order of `weights.files`."""
    if folder is not None:
        places = [folder / weights.name, folder / weights.repo.split("/")[1]]
        if len(weights.files) == 1:  # config.json lying about alone would not say whose it is
            places.append(folder)
        for place in places:
            paths = [_first(place, file) for file in weights.files]
            if all(paths):
                return tuple(path for path in paths if path)
    for revision in dict.fromkeys((weights.revision, "main")):
        cached = [_cached(weights.repo, file, revision) for file in weights.files]
        if all(cached):
            return tuple(path for path in cached if path)
    return None


def _first(place: Path, file: WeightFile) -> Path | None:
    """The file in a folder, or one that may be there instead."""
    names = (file.name, *file.instead)
    return next((place / name for name in names if (place / name).is_file()), None)


def _cached(repo: str, file: WeightFile, revision: str) -> Path | None:
    """The file in Hugging Face's cache."""
    from huggingface_hub import try_to_load_from_cache

    for name in (file.name, *file.instead):
        path = try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(path, str):
            return Path(path)
    return None


def _check(weights: KnownWeights, file: WeightFile, path: Path, folder: Path | None) -> FileCheck:
    """Compare one file with the best record there is."""
    found = digest_of(path)
    if path.name == file.name and file.sha256:
        return FileCheck(path, found, file.sha256, "table")
    recorded = _recorded(folder).get(f"{weights.name}/{path.name}") if folder else None
    if recorded:
        return FileCheck(path, found, recorded, "first fetch")
    blob = path.resolve()  # the hub's cache names the content of large files by their SHA-256
    if blob.parent.name == "blobs" and len(blob.name) == 64:
        return FileCheck(path, found, blob.name, "hub cache")
    return FileCheck(path, found, None, "none")


def _recorded(folder: Path) -> dict[str, str]:
    """Checksums that were recorded at the first fetch, by `name/file`."""
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read ({error}). Delete it; it is written again by `{FETCH} NAME`."
        raise WeightsError(msg) from error
    return {str(key): str(value) for key, value in content.items()}


def _record(folder: Path, key: str, sha256: str) -> None:
    """Add a checksum; the file is replaced as a whole, never half written."""
    content = {**_recorded(folder), key: sha256}
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=CHECKSUMS)
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2, sort_keys=True)
    Path(temporary).replace(folder / CHECKSUMS)


def _reporter(name: str, on_progress: Progress | None) -> Any:
    """A silent tqdm class for huggingface_hub that tells `on_progress`, not the terminal."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Reporter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self._done = int(kwargs.get("initial") or 0)
            kwargs["disable"] = True
            self._whole = int(kwargs.get("total") or 0)
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            self._done += int(n or 0)
            if on_progress:
                on_progress(name, self._done, max(self._whole, self._done))
            return None

    return Reporter
