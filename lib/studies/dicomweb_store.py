"""A PACS as the studies: its series are the images, its DICOM SEGs the final labels.

What was fetched lies in a folder that is a datastore of its own, so that all else works as it does
for a folder of studies. The PACS is the truth: each submitted label is stored there, as one more
SEG, before anyone is told so; none is ever changed or deleted. The newest is the label.
"""

import logging
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.config import settings as platform
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.local import DataModel, LocalDatastore
from monailabel.interfaces.exception import ImageNotFoundException, MONAILabelException

from lib.errors import ImageError, LabelError, PacsError, RefSegError
from lib.imaging.dicom_seg import SegIdentity, write_seg
from lib.imaging.dicom_seg_reading import read_seg
from lib.imaging.io import ImageVolume, read_image, read_label_map, write_label_map
from lib.studies.datastore import FINAL, StudiesDatastore, label_names
from lib.studies.dicomweb import Pacs, SegRow, SeriesRow
from lib.studies.dicomweb_files import FetchedSeries, Locks
from lib.studies.label_store import KEPT_VERSIONS

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
SETTLE_S = 10.0  # a PACS may list what it stored a moment later
ASKED = "asked"  # in an image's info: it was asked for by its UID, and is no image by the filter
NOTE = "dicom"  # in a label's info: which SEG it is, and which others were there

NOT_HERE = (RefSegError, MONAILabelException, HTTPException, OSError)  # and may be here later


class _LikeLocal(DICOMWebDatastore):
    """MONAI Label's endpoints ask whether a store is of this class; its methods are a folder's."""

    __init__ = LocalDatastore.__init__
    name = LocalDatastore.name
    datalist = LocalDatastore.datalist
    get_image_uri = LocalDatastore.get_image_uri
    get_label_uri = LocalDatastore.get_label_uri
    get_labeled_images = LocalDatastore.get_labeled_images
    get_unlabeled_images = LocalDatastore.get_unlabeled_images
    list_images = LocalDatastore.list_images
    save_label = LocalDatastore.save_label
    _to_id = LocalDatastore._to_id


class DicomwebStore(StudiesDatastore, _LikeLocal):
    """The series of a PACS, fetched when they are needed, and their labels.

    Args:
        pacs: where they are.
        folder: for what was fetched.
        copies: for NIfTI copies.
        ahead: series without a label that are fetched in the background, to choose the next from;
            0: none.
        keep: versions of each label that the history holds, beside those in the PACS.
    """

    def __init__(
        self,
        pacs: Pacs,
        *,
        folder: Path,
        copies: Path,
        ahead: int = 0,
        keep: int = KEPT_VERSIONS,
    ) -> None:
        self._pacs = pacs
        self._rows: dict[str, SeriesRow] | None = None  # None: the PACS has not answered yet
        self._asked: dict[str, SeriesRow] = {}  # by clients, though no image by the filter
        self._segs: dict[str, list[SegRow]] = {}
        self._unusable: dict[str, int | None] = {}  # SEGs, and files that their series had then
        self._looked = float("-inf")
        self._asking = threading.Lock()  # held while the PACS is asked what it has
        self._following = threading.Lock()  # held while labels are fetched
        self._saving = Locks()  # of an image's label
        self._saved: dict[str, float] = {}  # when a label was last submitted here
        self._owed: dict[str, dict[str, Any]] = {}  # notes of submitted labels only the PACS has
        self._files = FetchedSeries(pacs, folder)
        self._ahead = ahead
        super().__init__(str(folder), copies=copies, watch=False, keep=keep)
        for image_id, image in self._datastore.objects.items():
            told = image.image.info
            if told.get(ASKED):
                self._asked[image_id] = SeriesRow(image_id, told["StudyInstanceUID"], None, told)

    # -- reading ------------------------------------------------------------------------------

    def name(self) -> str:
        """The address."""
        return self._pacs.url

    def refresh(self) -> None:
        """Look at the PACS again, unless that was a moment ago; what it lacks, is forgotten.

        Who comes while somebody else fetches labels goes on with those that are here.
        """
        asked_at = time.monotonic()
        if self._look() and self._following.acquire(blocking=False):
            try:
                self._follow(asked_at)
            finally:
                self._following.release()
            self._fetch_ahead()

    def wait_for_choice(self) -> None:
        """Wait for labels under way, and for one image without a label if none is here."""
        with self._following:  # else an image whose label is being fetched would be proposed
            here, missing = self._unlabelled()
            if missing and not here and self._ahead:
                self._files.bring_quietly(missing[:1])

    def get_image_uri(self, image_id: str) -> str:
        """The image's NIfTI copy; fetched now if need be.

        Raises:
            HTTPException: 503, the PACS does not give it.
        """
        with _told():
            self._bring(image_id)
        return super().get_image_uri(image_id)

    def at_hand(self, image_id: str) -> bool:
        """Whether it was fetched."""
        return self._files.at_hand(image_id)

    # -- writing ------------------------------------------------------------------------------

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: Mapping[str, Any]
    ) -> str:
        """Save a label: a final one is in the PACS, as DICOM SEG, when this returns.

        Raises:
            HTTPException: 422 for a label map that does not fit, 503 where the PACS refuses.
        """
        if label_tag != FINAL:
            return super().save_label(image_id, label_filename, label_tag, label_info)
        info = dict(label_info or {})
        with _told():
            image = self._volume(image_id)
            label_map = read_label_map(Path(label_filename), image)
            names = label_names(info)
            machine = "model" in info and "params" in info  # as batches and `save_label` tell
            with (
                tempfile.TemporaryDirectory(prefix="refseg-") as work,
                self._saving.of(image_id),
            ):
                file = Path(work, "label.dcm")
                seg = write_seg(file, label_map, image, names, by_machine=machine)
                self._pacs.store(file)
                logger.info("label of %s is in the PACS: series %s", image_id, seg.series)
                self._saved[image_id] = time.monotonic()
                others = [row.instance for row in self._segs.get(image_id, ())]
                info[NOTE] = _note(seg, [*others, seg.instance])
                mirrored = Path(work, "label.nii.gz")
                try:
                    write_label_map(mirrored, label_map, image)
                    super().save_label(image_id, str(mirrored), FINAL, info)
                except NOT_HERE as error:  # no failure for the client: the PACS has the label
                    logger.error("label of %s is fetched from the PACS later: %s", image_id, error)
                    self._owed[image_id], self._looked = info[NOTE], float("-inf")
        return image_id

    def seg_of(self, image_id: str, label_file: Path, info: Mapping[str, Any]) -> Path:
        """A label map as DICOM SEG in a temporary file; nothing is stored.

        Raises:
            HTTPException: 422 or 503 with a sentence.
        """
        with _told():
            image = self._volume(image_id)
            with tempfile.NamedTemporaryFile(suffix=".dcm", delete=False) as file:
                target = Path(file.name)
            label_map = read_label_map(label_file, image)
            write_seg(target, label_map, image, label_names(info), by_machine=True)
        return target

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Delete a label; final ones can be deleted in the PACS alone."""
        if label_tag == FINAL:
            msg = (
                "Labels of a PACS are deleted there, not here: delete the SEG series, and it is "
                "forgotten with the next request. Or submit another label: the newest counts."
            )
            raise HTTPException(409, msg)
        super().remove_label(label_id, label_tag)

    def add_image(
        self,
        image_id: str,  # noqa: ARG002
        image_filename: str,  # noqa: ARG002
        image_info: Mapping[str, Any],  # noqa: ARG002
    ) -> str:
        """Refused."""
        msg = "Images of a PACS are sent to the PACS; they are found there with the next request."
        raise HTTPException(409, msg)

    def remove_image(self, image_id: str) -> None:  # noqa: ARG002
        """Refused."""
        msg = "Images of a PACS are deleted there, not here."
        raise HTTPException(409, msg)

    # -- following the PACS -------------------------------------------------------------------

    def _look(self) -> bool:
        """Ask what the PACS has; False if there is nothing new to know.

        Only who knows nothing yet waits for somebody else's question.
        """
        if not self._asking.acquire(blocking=self._rows is None):
            return False
        try:
            if time.monotonic() - self._looked < LOOK_EVERY_S:
                return False
            try:
                rows, segs = self._pacs.images(), self._pacs.segs()
            except PacsError as error:
                logger.warning("labels and images are as they were: %s", error)
                return False
            finally:
                self._looked = time.monotonic()
            by_image: dict[str, list[SegRow]] = {}
            for row in segs:
                by_image.setdefault(row.image, []).append(row)
            self._rows, self._segs = rows, by_image
            super().refresh()
        finally:
            self._asking.release()
        return True

    def _follow(self, asked_at: float) -> None:
        """Make the newest SEG of each image its label.

        Args:
            asked_at: before the PACS was asked: what was submitted since, is newer.
        """
        segs = self._segs
        for image_id in self.list_images():
            self._follow_one(image_id, segs.get(image_id, []), asked_at)

    def _follow_one(self, image_id: str, rows: Sequence[SegRow], asked_at: float) -> None:
        info = self.get_label_info(image_id, FINAL)
        note = info.get(NOTE, {})
        current, seen = note.get("instance"), set(note.get("seen", ()))
        present = {row.instance for row in rows}
        if not rows and info and time.time() - float(info.get("ts", 0)) > SETTLE_S:
            self._forget(image_id, asked_at)
        if current in present:
            rows = [row for row in rows if row.instance == current or row.instance not in seen]
        owed = self._owed.get(image_id, {})
        last = owed.get("instance")
        order = sorted(rows, key=lambda row: (row.instance == last, row.made_at, row.instance))
        for row in reversed(order):
            if row.instance == current:
                return
            if self._cannot_use(row):
                continue
            judged = sorted(present - self._unusable.keys())
            try:
                self._mirror(row, owed if row.instance == last else _note(row, judged), asked_at)
            except (ImageError, LabelError) as error:
                logger.warning("segmentation %s is not used: %s", row.series, error)
                self._unusable[row.instance] = self._files_in(image_id)
                continue
            except NOT_HERE as error:
                logger.warning("segmentation %s is looked at later: %s", row.series, error)
            return  # an older one would be the label for good

    def _cannot_use(self, row: SegRow) -> bool:
        """Whether a SEG did not fit; it may fit once more of its series has arrived."""
        known = row.instance in self._unusable
        return known and self._unusable[row.instance] == self._files_in(row.image)

    def _files_in(self, image_id: str) -> int | None:
        row = (self._listed() or {}).get(image_id)
        return row.instances if row else None

    def _forget(self, image_id: str, asked_at: float) -> None:
        with self._saving.of(image_id):
            if self._saved.get(image_id, 0.0) < asked_at:
                logger.info("the PACS has no label of %s any more", image_id)
                super().remove_label(image_id, FINAL)

    def _mirror(self, row: SegRow, note: Mapping[str, Any], asked_at: float) -> None:
        """Take over a SEG as the label of its image, unless one was submitted meanwhile."""
        image = self._volume(row.image)
        with tempfile.TemporaryDirectory(prefix="refseg-") as work:
            self._pacs.fetch_seg(row, Path(work, "seg.dcm"))
            label_map, names = read_seg(Path(work, "seg.dcm"), image)
            file = Path(work, "label.nii.gz")
            write_label_map(file, label_map, image)
            numbers = {name: number for number, name in names.items()}
            with self._saving.of(row.image):
                if self._saved.get(row.image, 0.0) >= asked_at:
                    return
                info = {"label_names": numbers, NOTE: dict(note)}
                super().save_label(row.image, str(file), FINAL, info)
                if self._owed.get(row.image, {}).get("instance") == row.instance:
                    del self._owed[row.image]
        logger.info("label of %s is segmentation %s of the PACS", row.image, row.series)

    def _volume(self, image_id: str) -> ImageVolume:
        self._bring(image_id)
        if image_id not in self._datastore.objects or not self.at_hand(image_id):
            msg = f"Image {image_id} not found"
            raise ImageNotFoundException(msg)
        return read_image(self._files.folder(image_id))

    def _bring(self, image_id: str) -> None:
        """Fetch a series if need be; of one that is not listed the PACS is asked.

        OHIF can open any series and ask for its segmentation, also those that the filter leaves
        out. From then on they are images here, too.
        """
        if self._rows is None:
            self.refresh()
        row = (self._listed() or {}).get(image_id)
        known = image_id in self._datastore.objects
        if row is None and not (known and self.at_hand(image_id)):
            row = self._pacs.series(image_id)
            if row is not None and not known:
                row = replace(row, told={**row.told, ASKED: "true"})
                self._asked = {**self._asked, image_id: row}
                super().refresh()
        if row is not None:
            self._files.bring(row)

    def _fetch_ahead(self) -> None:
        """Some images without a label must be here, for the next to be chosen from."""
        here, missing = self._unlabelled()
        self._files.bring_soon(missing[: max(0, self._ahead - here)])

    def _unlabelled(self) -> tuple[int, list[SeriesRow]]:
        """Images without a label: how many are here, and those that are not."""
        listed = self._listed() or {}
        waiting = [listed[i] for i in self.get_unlabeled_images() if i in listed]
        missing = [row for row in waiting if not self.at_hand(row.series)]
        return len(waiting) - len(missing), missing

    # -- the platform's table: the PACS's list instead of the disk's ----------------------------

    def _listed(self) -> dict[str, SeriesRow] | None:
        return None if self._rows is None else {**self._asked, **self._rows}

    def _list_files(self, path: str, patterns: Sequence[str]) -> dict[str, str]:
        if Path(path) != Path(self._datastore.image_path()):
            return super()._list_files(path, patterns)
        listed = self._listed()
        ids = self._datastore.objects if listed is None else listed
        return {image_id: image_id for image_id in ids}

    def _to_id(self, file: str) -> tuple[str, str]:
        listed = self._listed()
        if file in (self._datastore.objects if listed is None else listed):
            return file, ""
        return super()._to_id(file)

    def _is_there(self, tag: str, image_id: str, data: DataModel) -> bool:
        listed = self._listed()
        if tag:
            return super()._is_there(tag, image_id, data)
        return listed is None or image_id in listed

    def _new(self, image_id: str, extension: str) -> DataModel:
        made = super()._new(image_id, extension)
        row = (self._listed() or {}).get(image_id)
        made.info.update(row.told if row else {})
        return made

    def _mark(self, folder: Path) -> str:
        """A folder is never changed once it is here, so that its files need not be looked at."""
        status = folder.stat()
        return f"{status.st_ino:x}-{status.st_mtime_ns:x}"


def open_dicomweb(url: str, folder: Path, *, ahead: int, keep: int) -> DicomwebStore:
    """The store of a PACS; it is not asked yet.

    Args:
        url: of its DICOMweb root.
        folder: for all that can be fetched again.
        ahead: series that are fetched in the background by a server.
        keep: versions of labels in the history.
    """
    store = DicomwebStore(
        Pacs(url, platform.MONAI_LABEL_DICOMWEB_SEARCH_FILTER),
        folder=folder / "dicomweb",
        copies=folder / "copies",
        ahead=ahead if platform.MONAI_LABEL_DATASTORE_AUTO_RELOAD else 0,
        keep=keep,
    )
    _without_dcmqi(store)
    return store


def _note(seg: SegIdentity | SegRow, seen: Sequence[str]) -> dict[str, Any]:
    return {
        "study": seg.study,
        "series": seg.series,
        "instance": seg.instance,
        "seen": list(seen),
    }


@contextmanager
def _told() -> Iterator[None]:
    """Sentences reach the client also where MONAI Label's own server runs."""
    try:
        yield
    except (ImageError, LabelError) as error:
        raise HTTPException(422, str(error)) from error
    except PacsError as error:
        raise HTTPException(503, str(error), {"Retry-After": "10"}) from error


def _without_dcmqi(store: DicomwebStore) -> None:
    """Let `POST /infer?output=dicom_seg` make its SEG here, not with a tool that is downloaded."""
    from monailabel.endpoints import infer

    def seg_of_result(folder: str, label: str, info: Any, **_: Any) -> str:
        image_id = Path(folder).name.split("-")[0]  # of the NIfTI copy, see `_copy`
        return str(store.seg_of(image_id, Path(label), {"label_info": info}))

    infer.nifti_to_dicom_seg = seg_of_result
