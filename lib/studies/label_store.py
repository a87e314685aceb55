"""MONAI Label's folder of studies, with labels that are on the disk before anyone is told so.

The platform copies a label over the old one, which is gone, and half gone after a crash.
"""

import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.datastore.local import DataModel, ImageLabelModel
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException

from lib.durable import digest_of, make_folder, publish, stage_copy, sync_folder, write_json
from lib.errors import RequestError
from lib.names import check_name
from lib.studies.label_history import FOLDER, LabelHistory, LabelVersion
from lib.studies.table import TableStore

logger = logging.getLogger(__name__)

KEPT_VERSIONS = 20
PROVENANCE = ".provenance.json"
FOUND = ("label_names", "confidence", "references", "own_slices", "message")


class LabelStore(TableStore):
    """Writes labels whole or not at all, and keeps what a label was before."""

    def __init__(
        self,
        folder: str,
        *,
        extensions: Sequence[str],
        auto_reload: bool,
        read_only: bool,
        keep: int = KEPT_VERSIONS,
    ) -> None:
        self._history = LabelHistory(Path(folder) / "labels" / FOLDER, keep=keep)
        super().__init__(
            folder, extensions=list(extensions), auto_reload=auto_reload, read_only=read_only
        )

    # -- reading ------------------------------------------------------------------------------

    def versions(self, image_id: str, tag: str) -> list[LabelVersion]:
        """What is kept of a label, oldest first."""
        with self.lock:
            return self._history.versions(tag, image_id)

    def kept_labels(self) -> list[tuple[str, str]]:
        """Tag and image of each label of which something is kept."""
        with self.lock:
            return list(self._history.labels())

    # -- writing ------------------------------------------------------------------------------

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: Mapping[str, Any]
    ) -> str:
        """Save a label: on the disk when this returns, and the one before it in the history."""
        _refuse_paths(image=image_id, tag=label_tag)
        extension = self._served_extension(label_filename)
        with self._table():
            self._image(image_id)
        folder = Path(self._datastore.label_path(label_tag))
        make_folder(folder)
        target = folder / self._filename(image_id, extension)
        # a large file is copied before the table is held: all other requests need it
        with _staged(target, Path(label_filename)) as staged, self._table():
            image = self._image(image_id)
            before = image.labels.get(label_tag)
            older = self._files_of(image_id, label_tag)
            replaced = before.info if before else {} if older else None
            info = {
                **(label_info or {}),
                "ts": int(time.time()),
                "name": target.name,
                "version": self._history.next_version(label_tag, image_id, replaced),
            }
            mark = self._history.announce(label_tag, image_id, info=info, sha256=staged.sha256)
            publishing = False
            try:
                for file in older:
                    self._keep(image_id, label_tag, file, before, "overwritten")
                image.labels[label_tag] = DataModel(info=info, ext=extension)
                with self._staged_table(undo=lambda: _put_back(image, label_tag, before)):
                    publishing = True
                    publish(staged.file, target)
                    for file in older:
                        if file != target:
                            file.unlink(missing_ok=True)
            except Exception:
                if not publishing:  # or the label that is there got these names, if it is the same
                    self._history.withdraw(mark)
                raise
            self._history.settled(mark, label_tag, image_id)
            self._history.prune(label_tag, image_id)
            self._tell_provenance(image_id, label_tag, info)
        logger.info("saved label %s of %s, version %d", label_tag, image_id, info["version"])
        return image_id

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Delete a label; the history keeps it."""
        _refuse_paths(label=label_id, tag=label_tag)
        with self._table():
            image = self._datastore.objects.get(label_id)
            before = image.labels.get(label_tag) if image else None
            files = self._files_of(label_id, label_tag)
            for file in files:
                self._keep(label_id, label_tag, file, before, "deleted")
            if image is not None and before is not None:
                del image.labels[label_tag]
            with self._staged_table(undo=lambda: _put_back(image, label_tag, before)):
                for file in files:
                    file.unlink(missing_ok=True)
                    sync_folder(file.parent)
            self._history.forget_current(label_tag, label_id)
            self._history.prune(label_tag, label_id)
            self._tell_provenance(label_id, label_tag, {})
        logger.info("removed label %s of %s", label_tag, label_id)

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        """All labelled images with their labels, as a zip file."""
        if not self.get_labeled_images():
            raise HTTPException(404, "No image is labelled yet: there is nothing to download.")
        return str(super().get_dataset_archive(limit_cases))

    def restore_label(self, image_id: str, tag: str, version: int) -> int:
        """Make a kept version the label again; the present one goes to the history.

        Returns:
            the number of the new version.

        Raises:
            RequestError: this version is not kept.
        """
        kept = {entry.version: entry for entry in self.versions(image_id, tag)}
        if version not in kept:
            numbers = ", ".join(map(str, kept)) or "none"
            msg = (
                f"Version {version} of label {tag} of {image_id} is not kept; there are: {numbers}."
            )
            raise RequestError(msg)
        entry = kept[version]
        info = {k: v for k, v in entry.info.items() if k not in ("ts", "name", "version")}
        self.save_label(image_id, str(entry.file), tag, {**info, "restored": version})
        return int(self.get_label_info(image_id, tag)["version"])

    def add_image(self, image_id: str, image_filename: str, image_info: Mapping[str, Any]) -> str:
        """Add an image. One that is there stays as it is: to add the same again changes nothing.

        Raises:
            HTTPException: 409, another image has this id.
        """
        extension = self._served_extension(image_filename)
        image_id = image_id or self._to_id(Path(image_filename).name)[0]
        _refuse_paths(image=image_id)
        target = Path(self._datastore.image_path(), self._filename(image_id, extension))
        with _staged(target, Path(image_filename)) as staged, self._table():
            info = {**(image_info or {}), "ts": int(time.time()), "name": target.name}
            objects = self._datastore.objects
            present = objects.get(image_id)
            if present is not None:  # whatever its ending
                target = target.with_name(self._filename(image_id, present.image.ext))
            if present is not None or target.exists():
                _refuse_another(image_id, target, staged.sha256)
                return image_id
            objects[image_id] = ImageLabelModel(image=DataModel(info=info, ext=extension))
            with self._staged_table(undo=lambda: objects.pop(image_id, None)):
                publish(staged.file, target)
        logger.info("added image %s", image_id)
        return image_id

    def remove_image(self, image_id: str) -> None:
        """Delete an image and its labels; the history keeps the labels."""
        _refuse_paths(image=image_id)
        with self._table():
            image = self._datastore.objects.get(image_id)
            if image is None:
                msg = f"Image {image_id} not found"
                raise ImageNotFoundException(msg)
            for tag in list(image.labels):
                self.remove_label(image_id, tag)
            path = Path(self._datastore.image_path(), self._filename(image_id, image.image.ext))
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:  # of a link the link: what it leads to is not in this folder
                path.unlink(missing_ok=True)
            self.refresh()

    def update_image_info(self, image_id: str, info: Mapping[str, Any]) -> None:
        """Add to an image's info."""
        with self._table():
            super().update_image_info(image_id, info)

    def update_label_info(self, label_id: str, label_tag: str, info: Mapping[str, Any]) -> None:
        """Add to a label's info."""
        _refuse_paths(label=label_id, tag=label_tag)
        with self._table():
            label = self._datastore.label(label_id, label_tag)
            if not label:
                msg = f"Label: {label_id} Tag: {label_tag} not found"
                raise LabelNotFoundException(msg)
            before = label.info
            label.info = {**before, **{k: v for k, v in info.items() if k != "version"}}
            file = Path(self.get_label_uri(label_id, label_tag))
            mark = self._history.announce(
                label_tag, label_id, info=label.info, sha256=digest_of(file)
            )
            with self._staged_table(undo=lambda: setattr(label, "info", before)):
                pass
            self._history.settled(mark, label_tag, label_id)

    def _finish_interrupted(self) -> None:
        """Labels whose saving was cut off: if the new bytes are there, so must be their info."""
        for mark, told in self._history.unsettled():
            try:
                image_id, tag, info = str(told["image"]), str(told["tag"]), dict(told["info"])
                file = Path(self._datastore.label_path(tag), str(info["name"]))
                whole = digest_of(file) == told["sha256"]
            except (KeyError, TypeError, ValueError, OSError):
                whole = False
            try:
                if not whole:  # it was not replaced yet: the old label and its info are in place
                    mark.unlink(missing_ok=True)
                    continue
                image = self._datastore.objects.get(image_id)
                if image is not None:  # else it is found by its file, and takes its info with it
                    image.labels[tag] = DataModel(info=info, ext=file.name[len(image_id) :])
                    with self._staged_table(undo=lambda: None):
                        pass
                self._history.settled(mark, tag, image_id)
            except OSError as error:
                self._complain(error)
                return
            logger.warning("a label whose saving was interrupted is complete again")

    # -- files --------------------------------------------------------------------------------

    def _info_of_file(self, image_id: str, tag: str, extension: str) -> dict[str, Any]:
        """Info of a label file that the table does not have: its own, if it was saved here."""
        name = self._filename(image_id, extension)
        file = Path(self._datastore.label_path(tag), name)
        try:
            known = self._history.info_of(tag, image_id, file)
        except OSError:
            known = None
        return known or {"ts": int(time.time()), "name": name}

    def _image(self, image_id: str) -> ImageLabelModel:
        image: ImageLabelModel | None = self._datastore.objects.get(image_id)
        if image is None:
            msg = f"Image {image_id} not found"
            raise ImageNotFoundException(msg)
        return image

    def _files_of(self, image_id: str, tag: str) -> list[Path]:
        """All files that are, or would be taken for, this label."""
        folder = Path(self._datastore.label_path(tag))
        label = self._datastore.label(image_id, tag)
        endings = [label.ext] if label else []
        endings += [pattern.replace("*", "") for pattern in self._extensions]
        found = [folder / self._filename(image_id, ending) for ending in dict.fromkeys(endings)]
        return [file for file in found if file.is_file()]

    def label_files(self, image_id: str, tags: Sequence[str]) -> list[Path]:
        """Files that are labels of an image by their names, whoever put them there; a few stats."""
        with self.lock:
            return [file for tag in tags for file in self._files_of(image_id, tag)]

    def _served_extension(self, filename: str) -> str:
        extension: str = self._to_id(Path(filename).name)[1]
        served = {pattern.replace("*", "").lower() for pattern in self._extensions}
        if extension.lower() not in served:
            listed = ", ".join(sorted(served))
            msg = f"The file's extension {extension!r} is not served; allowed are {listed}."
            raise HTTPException(422, msg)
        return extension

    def _keep(self, image_id: str, tag: str, file: Path, label: DataModel | None, why: str) -> None:
        own = label is not None and file.name == self._filename(image_id, label.ext)
        self._history.keep(tag, image_id, file, info=label.info if label and own else {}, why=why)

    def _tell_provenance(self, image_id: str, tag: str, info: Mapping[str, Any]) -> None:
        """Where a mask of RefSeg's own came from, in a file beside it; none beside a person's."""
        path = Path(self._datastore.label_path(tag), f"{image_id}{PROVENANCE}")
        params = info.get("params")
        made = params.get("provenance") if isinstance(params, Mapping) else None
        if isinstance(params, Mapping) and isinstance(made, Mapping):
            found = {key: params[key] for key in FOUND if key in params}
            try:
                write_json(path, {"image": image_id, **made, **found})
            except OSError as error:  # the label itself is saved, and its info has all of it, too
                logger.warning("no provenance beside a label: %s", error)
        else:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Staged:
    """A copy beside its place, to be renamed."""

    file: Path
    sha256: str


@contextmanager
def _staged(target: Path, source: Path) -> Iterator[_Staged]:
    file = stage_copy(target, source)
    try:
        yield _Staged(file, digest_of(file))
    finally:
        file.unlink(missing_ok=True)  # it is gone where it was renamed


def _refuse_another(image_id: str, file: Path, sha256: str) -> None:
    """Labels belong to an image: what is there is not replaced by what has its name."""
    if not file.is_file() or digest_of(file) != sha256:
        msg = (
            f"There is another image {image_id} already: nothing was stored. Choose another "
            "name, or delete the image first."
        )
        raise HTTPException(409, msg)


def _refuse_paths(**named: str) -> None:
    for what, value in named.items():
        try:
            check_name(what, str(value or ""))  # clients' JSON may hold anything
        except RequestError as error:
            raise HTTPException(422, str(error)) from error


def _put_back(image: ImageLabelModel | None, tag: str, before: DataModel | None) -> None:
    if image is not None and before is not None:
        image.labels[tag] = before
    elif image is not None:
        image.labels.pop(tag, None)
