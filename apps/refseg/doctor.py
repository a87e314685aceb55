"""What `doctor` looks at, one function a subject; each finding says what to do."""

import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from lib.errors import RefSegError
from lib.settings import RefSegSettings

OK, NOTE, FAIL = "ok", "note", "fail"
LEAST_FREE = 2 << 30  # bytes; 50 labelled slices of the bundled network take some 30 MB

_PACKAGES = {  # name: (first version that does not work, what needs it)
    "torch": (None, "the networks"),
    "monai": (None, "MONAI Label"),
    "monailabel": (None, "the server"),
    "pydicom": ("3", "pydicom-seg, which MONAI Label imports at start"),
    "numpy": ("2", "pydicom-seg"),
    "dicomweb-client": ("0.60", "pydicom before 3"),
    "SimpleITK": (None, "volumes"),
    "nibabel": (None, "NIfTI"),
    "safetensors": (None, "weights and memories"),
    "setuptools": (None, "MONAI Label on Python 3.12"),
}
_OPTIONAL = {"sam2": "segmenter sam2", "transformers": "DINOv2 and CLIP"}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    state: str
    found: str
    advice: str = ""

    def row(self) -> dict[str, str]:
        """For a table or JSON."""
        return {
            "what": self.what,
            "state": self.state,
            "found": self.found,
            "what to do": self.advice,
        }


def examine(settings: RefSegSettings, studies: Path | None, app_folder: Path) -> list[Finding]:
    """Look at everything; nothing is changed and nothing is fetched."""
    return [
        *_python(),
        *_packages(),
        *_devices(settings),
        *_weights(settings),
        *_datastore(studies),
        *_disk(settings, app_folder),
    ]


def _python() -> Iterator[Finding]:
    good = (3, 10) <= sys.version_info[:2] <= (3, 12)
    advice = "" if good else "MONAI Label 0.8.5 needs Python 3.10, 3.11 or 3.12"
    yield Finding("python", OK if good else FAIL, platform.python_version(), advice)


def _packages() -> Iterator[Finding]:
    advice = "run `make setup`"
    for name, (below, why) in _PACKAGES.items():
        version = _version(name)
        if version is None:
            yield Finding(name, FAIL, "not installed", f"{advice}; needed by {why}")
        elif below is not None and _numbers(version) >= _numbers(below):
            yield Finding(name, FAIL, version, f"{advice}: below {below} is needed for {why}")
        else:
            yield Finding(name, OK, version)
    faiss = [f"{name} {_version(name)}" for name in ("faiss-cpu", "faiss-gpu") if _version(name)]
    if len(faiss) == 1:
        yield Finding("faiss", OK, faiss[0])
    else:
        yield Finding("faiss", FAIL, ", ".join(faiss) or "not installed", "install exactly one")
    for name, why in _OPTIONAL.items():
        version = _version(name)
        more = "" if version else f"only needed for {why}: {advice}"
        yield Finding(name, OK if version else NOTE, version or "not installed", more)


def _devices(settings: RefSegSettings) -> Iterator[Finding]:
    import torch

    from lib.models.devices import choose_device

    try:
        device = choose_device(settings.device)
    except RefSegError as error:
        yield Finding("device", FAIL, settings.device, str(error))
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    advice = "" if device.type != "cpu" else "works; the segmenter sam2 wants a GPU"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    yield Finding("device", OK, f"{name}{threads}", advice)


def _weights(settings: RefSegSettings) -> Iterator[Finding]:
    from lib.models.matchseg import MatchSegSegmenter
    from lib.models.weights import list_known

    try:
        network = MatchSegSegmenter.load_bundled(device="cpu")
        yield Finding("bundled network", OK, network.fingerprint)
    except RefSegError as error:
        yield Finding("bundled network", FAIL, "unusable", str(error))
    here = [row.name for row in list_known(settings.weights) if row.path]
    advice = "" if here else "`weights fetch sam2.1-tiny`, only if you want SAM 2"
    yield Finding("fetched weights", OK if here else NOTE, ", ".join(here) or "none", advice)


def _datastore(studies: Path | None) -> Iterator[Finding]:
    if studies is None:
        yield Finding("studies", NOTE, "not given", "--studies DIR looks at it, too")
        return
    if not studies.is_dir():
        yield Finding("studies", FAIL, f"{studies} is no folder", "name the folder with the images")
        return
    from lib.imaging.formats import ITK, NIFTI, PICTURES, extension_of

    known = PICTURES | NIFTI | ITK
    images = [p for p in studies.iterdir() if p.is_file() and extension_of(p) in known]
    folders = [p for p in studies.iterdir() if p.is_dir() and p.name != "labels"]
    labels = [p for p in (studies / "labels" / "final").glob("*") if extension_of(p) in known]
    found = f"{len(images)} images, {len(folders)} subfolders, {len(labels)} final labels"
    advice = "" if images or folders else f"put images here: {', '.join(sorted(known))}"
    yield Finding("studies", OK if images or folders else FAIL, found, advice)
    stems = {p.name.removesuffix(extension_of(p)) for p in images} | {p.name for p in folders}
    lost = [p.name for p in labels if p.name.removesuffix(extension_of(p)) not in stems]
    if lost:
        advice = "a label has the name of its image; rename these"
        yield Finding("labels without image", NOTE, ", ".join(lost[:5]), advice)
    if " " in str(studies.resolve()):
        advice = "start by `python -m monailabel.main start_server ...`: the launcher splits paths"
        yield Finding("studies", NOTE, "a space in the path", advice)


def _disk(settings: RefSegSettings, app_folder: Path) -> Iterator[Finding]:
    folder = settings.bank or app_folder / "model" / "bank"
    place = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(place).free
    advice = "" if free >= LEAST_FREE else "make room, or move the bank: --conf bank DIR"
    yield Finding("disk", OK if free >= LEAST_FREE else NOTE, f"{free / 2**30:.1f} GB free", advice)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdecimal())
