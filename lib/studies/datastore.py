"""MONAI Label's datastore as RefSeg sees it: final labels and images."""

import fnmatch
import hashlib
import logging
import os
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from monailabel.config import Settings
from monailabel.config import settings as platform
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore
from monailabel.interfaces.datastore import Datastore
from monailabel.utils.others.generic import file_ext

from lib.errors import RefSegError
from lib.imaging.volumes import is_dicom, read_dicom_folder, write_nifti
from lib.studies.label_store import KEPT_VERSIONS, LabelStore
from lib.types import LabelledImage

logger = logging.getLogger(__name__)

MORE_EXTENSIONS = ("*.jpeg", "*.tiff", "*.bmp", "*.mha", "*.mhd")
NOT_EXPORTED = ("background", "foreground_scribbles", "background_scribbles")  # 3D Slicer leaves
FINAL = "final"

T = TypeVar("T")


def extensions() -> list[str]:
    """File patterns to serve: MONAI Label's, and more, unless its setting was changed."""
    chosen = list(platform.MONAI_LABEL_DATASTORE_FILE_EXT)
    default = Settings.model_fields["MONAI_LABEL_DATASTORE_FILE_EXT"].default
    return [*chosen, *MORE_EXTENSIONS] if chosen == default else chosen


def _locked(name: str) -> Any:
    base = getattr(LabelStore, name)

    def method(self: "StudiesDatastore", *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return base(self, *args, **kwargs)

    method.__name__ = name
    method.__doc__ = base.__doc__
    return method


class StudiesDatastore(LabelStore):
    """MONAI Label's folder of studies, with DICOM folders, and safe to be read at any time.

    The platform's watcher thread empties the table of images and fills it again; a request that
    reads in between finds no image. Here each call holds one lock, so that no call sees that.

    A subfolder with DICOM files is one image. Clients can load files only, so they are given a
    NIfTI copy, made when it is first asked for; the studies folder itself is not written to.

    Args:
        folder: images; labels below `labels/`.
        copies: folder for the NIfTI copies.
        watch: look for changes on the disk all the time, as a server does.
        keep: versions of each label that its history holds.
    """

    def __init__(
        self, folder: str, *, copies: Path, watch: bool = True, keep: int = KEPT_VERSIONS
    ) -> None:
        self._copies = copies
        super().__init__(
            folder,
            extensions=extensions(),
            auto_reload=watch and platform.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=platform.MONAI_LABEL_DATASTORE_READ_ONLY,
            keep=keep,
        )

    def get_image_uri(self, image_id: str) -> str:
        """The image's file; of a DICOM folder its copy, or the folder where none can be made."""
        source = self.source(image_id)
        if not source or not Path(source).is_dir():
            return source
        try:
            return str(self._copy(Path(source)))
        except (RefSegError, OSError) as error:
            logger.warning("DICOM folder %s has no NIfTI copy: %s", image_id, error)
            return source

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """As the platform's, with the path that a client can load."""
        info = self.stored_info(image_id)
        if "path" in info:
            info["path"] = self.get_image_uri(image_id)
        return info

    def stored_info(self, image_id: str) -> dict[str, Any]:
        """The platform's own: quick, because no copy of a DICOM folder is made."""
        with self.lock:
            info: dict[str, Any] = super().get_image_info(image_id)
        return info

    def at_hand(self, image_id: str) -> bool:  # noqa: ARG002
        """Whether an image's file is on this machine."""
        return True

    def wait_for_choice(self) -> None:
        """Wait until the images and labels from which the next image is chosen are here."""

    def source(self, image_id: str) -> str:
        """The file or DICOM folder itself; "" where there is no such image."""
        with self.lock:
            return str(super().get_image_uri(image_id))

    def _copy(self, folder: Path) -> Path:
        target = self._copies / f"{folder.name}-{self._mark(folder)}.nii.gz"
        if not target.exists():
            volume = read_dicom_folder(folder)
            if volume.values.ndim > 3:  # color has no place in a NIfTI that all clients read
                return folder
            self._copies.mkdir(parents=True, exist_ok=True)
            beside = target.with_name(f".{uuid.uuid4().hex}.nii.gz")
            try:
                write_nifti(beside, volume)
                beside.replace(target)
            finally:
                beside.unlink(missing_ok=True)
        return target

    def _mark(self, folder: Path) -> str:
        """Something that is another one when the files of a folder are."""
        looks = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in folder.iterdir())
        return hashlib.sha256(repr(looks).encode()).hexdigest()[:16]

    def _list_files(self, path: str, patterns: Sequence[str]) -> dict[str, str]:
        """Names of image files, whatever the case of extensions, and of folders with DICOM files.

        A later pattern's files come later, as the platform has it.
        """
        with os.scandir(path) as listing:
            entries = list(listing)
        matchers = [re.compile(fnmatch.translate(p), re.IGNORECASE).match for p in patterns]
        files = {e.name: e.name for matches in matchers for e in entries if matches(e.name)}
        for name in [name for name in files if not _is_text(name)]:
            logger.warning("%r is left out: no text of UTF-8, which no client could ask for", name)
            del files[name]
        if Path(path) == Path(self._datastore.image_path()):
            for entry in entries:
                if entry.name != self._datastore.labels_dir and _holds_dicom(entry):
                    files[entry.name] = entry.name
        return files

    def _to_id(self, file: str) -> tuple[str, str]:
        """Id and extension. A DICOM folder's name is its id: UIDs are full of dots."""
        if Path(self._datastore.image_path(), file).is_dir():
            return file, ""
        served = (pattern.replace("*", "").lower() for pattern in self._extensions)
        # the end alone: the platform removes the extension wherever it occurs in the name
        ends = [file[-len(end) :] for end in served if end and file[-len(end) :].lower() == end]
        extension = max(ends, key=len) if ends else file_ext(file)
        return file.removesuffix(extension), extension

    def _add_non_existing_images(self) -> int:
        """Add new files; how many. The platform looks each up in a list: minutes for 100,000."""
        self._init_from_datastore_file()
        known = set(self._datastore.objects)
        added = 0
        for file in self._list_files(self._datastore.image_path(), self._extensions):
            image_id, extension = self._to_id(file)
            if image_id not in known:
                self._datastore.objects[image_id] = ImageLabelModel(
                    image=self._new(image_id, extension)
                )
                logger.info("new image %s: %s", image_id, file)
                added += 1
        return added

    def _add_non_existing_labels(self, tag: str) -> int:
        """Add new label files of one tag; how many."""
        self._init_from_datastore_file()
        added = 0
        for file in self._list_files(self._datastore.label_path(tag), self._extensions):
            image_id, extension = self._to_id(file)
            image = self._datastore.objects.get(image_id)
            if image is None:
                logger.warning("label %s (%s) is ignored: no image has its name", file, tag)
            elif not image.labels.get(tag):
                logger.info("new label %s of %s: %s", tag, image_id, file)
                info = self._info_of_file(image_id, tag, extension)
                image.labels[tag] = DataModel(info=info, ext=extension)
                added += 1
        return added

    def _remove_non_existing(self) -> int:
        """Forget images and labels whose file is gone; how many. Looks at each file once."""
        self._init_from_datastore_file()
        objects = self._datastore.objects
        gone = [i for i, image in objects.items() if not self._is_there("", i, image.image)]
        files = [self._file("", image_id, objects.pop(image_id).image) for image_id in gone]
        for image_id, image in objects.items():
            for tag in [
                t for t, label in image.labels.items() if not self._is_there(t, image_id, label)
            ]:
                files.append(self._file(tag, image_id, image.labels.pop(tag)))
        for file in files:  # a path, not an id: logs without names know those of the folder
            logger.info("is gone: %s", file)
        return len(files)

    def _is_there(self, tag: str, image_id: str, data: DataModel) -> bool:
        return self._file(tag, image_id, data).exists()

    def _file(self, tag: str, image_id: str, data: DataModel) -> Path:
        """Of a label, or with the tag "" of the image itself."""
        folder = self._datastore.label_path(tag) if tag else self._datastore.image_path()
        return Path(folder, self._filename(image_id, data.ext))

    def _new(self, image_id: str, extension: str) -> DataModel:
        name = self._filename(image_id, extension)
        return DataModel(info={"ts": int(time.time()), "name": name}, ext=extension)

    refresh = _locked("refresh")
    datalist = _locked("datalist")
    get_label_uri = _locked("get_label_uri")
    get_labels_by_image_id = _locked("get_labels_by_image_id")
    get_label_info = _locked("get_label_info")
    get_labeled_images = _locked("get_labeled_images")
    get_unlabeled_images = _locked("get_unlabeled_images")
    list_images = _locked("list_images")
    status = _locked("status")
    json = _locked("json")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _holds_dicom(entry: os.DirEntry[str]) -> bool:
    try:
        if not entry.is_dir():
            return False
        first = sorted(file for file in Path(entry.path).iterdir() if file.is_file())[:3]
        return any(is_dicom(file) for file in first)
    except OSError as error:  # such as lost+found
        logger.warning("folder %s is left out: %s", entry.path, error)
        return False


def labelled_images(datastore: Datastore, tags: Sequence[str] = (FINAL,)) -> list[LabelledImage]:
    """List every image with a label of one of the tags (the first that it has), sorted by id.

    A local store looks at the disk again, so that what was renamed or dropped into the folder is
    seen. An image whose file or label is missing is left out.
    """
    if isinstance(datastore, LocalDatastore):
        datastore.refresh()
    found = [labelled_image(datastore, image_id, tags) for image_id in datastore.list_images()]
    rows = [row for row in found if row is not None]
    return sorted(rows, key=lambda row: row.image_id)


def labelled_image(
    datastore: Datastore, image_id: str, tags: Sequence[str] = (FINAL,)
) -> LabelledImage | None:
    """One image with its label of one of the tags, the first that it has; None without one."""
    present = datastore.get_labels_by_image_id(image_id)
    tag = next((tag for tag in tags if tag in present), None)
    if tag is None:
        return None
    image_path = Path(datastore.get_image_uri(image_id))
    label_path = Path(datastore.get_label_uri(present[tag], tag))
    if not image_path.exists() or not label_path.is_file():
        return None
    info = datastore.get_label_info(present[tag], tag)
    return LabelledImage(image_id, image_path, label_path, label_names(info))


def label_names(info: Mapping[str, Any]) -> dict[int, str]:
    """Value -> name, from what was stored with a label; empty where nothing usable was.

    Two shapes are read. 3D Slicer and OHIF send `label_info`, a list of {"name", "idx"}: value k
    is the k-th entry, leaving out the segments that Slicer does not export; `idx` counts those
    too, so it is not the value. RefSeg's own results (batch inference) carry `params.label_names`.
    """
    listed = info.get("label_info")
    if isinstance(listed, list):
        names = [str(entry.get("name") or "") for entry in listed if isinstance(entry, Mapping)]
        kept = enumerate((name for name in names if name not in NOT_EXPORTED), start=1)
        return {value: name if name.strip() else f"label_{value}" for value, name in kept}
    params = info.get("params")
    own = params.get("label_names") if isinstance(params, Mapping) else info.get("label_names")
    if isinstance(own, Mapping):
        pairs = ((str(name), value) for name, value in own.items())
        return {
            int(value): name
            for name, value in pairs
            if isinstance(value, int) and value > 0 and name not in NOT_EXPORTED
        }
    return {}


def find_by_path(labelled: Sequence[LabelledImage], path: str) -> LabelledImage | None:
    """The labelled image whose file this is, if any: a request names files, not ids."""
    wanted = Path(path).resolve()
    return next((row for row in labelled if row.image_path.resolve() == wanted), None)


def image_paths(datastore: Datastore) -> dict[str, Path]:
    """Every image that is there now, by id; a local store looks at the disk again."""
    if isinstance(datastore, LocalDatastore):
        datastore.refresh()
    find = datastore.source if isinstance(datastore, StudiesDatastore) else datastore.get_image_uri
    paths = {image_id: Path(find(image_id)) for image_id in sorted(datastore.list_images())}
    return {image_id: path for image_id, path in paths.items() if path.exists()}
