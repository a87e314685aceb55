"""A PACS over DICOMweb: which series and segmentations it has; to fetch and to store them."""

import logging
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from dicomweb_client.session_utils import create_session_from_user_pass
from monailabel.config import settings as platform
from monailabel.datastore.dicom import DICOMwebClientX
from requests.adapters import HTTPAdapter

from lib.errors import PacsError
from lib.imaging.dicom_seg import instance_of

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]  # one result as DICOM JSON: tag -> {"vr", "Value"}

TIMEOUT_S = (5.0, 60.0)  # to connect, and between two packets
UID = re.compile(r"[0-9][0-9.]{0,63}")
# What clients are told of a series, as MONAI Label's own store tells it; OHIF finds it by these.
TOLD = {
    "SeriesInstanceUID": "0020000E",
    "StudyInstanceUID": "0020000D",
    "StudyDate": "00080020",
    "StudyTime": "00080030",
    "Modality": "00080060",
    "RetrieveURL": "00081190",
    "PatientID": "00100020",
}
FIELDS = ("NumberOfSeriesRelatedInstances", "StudyDate", "StudyTime", "PatientID", "Modality")
REFERENCED_SERIES, INSTANCE, COUNT = "00081115", "00080018", "00201209"
MADE_AT = (("00080023", "00080033"), ("00080012", "00080013"), ("00080021", "00080031"))


@dataclass(frozen=True)
class SeriesRow:
    """A series as the PACS lists it.

    Attributes:
        series: its UID.
        study: UID of its study.
        instances: how many files it has, or None where the PACS does not say.
        told: what clients are told of it.
    """

    series: str
    study: str
    instances: int | None
    told: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SegRow:
    """A segmentation as the PACS lists it.

    Attributes:
        image: UID of the series that it is of.
        study: UID of its study.
        series: of its own series.
        instance: its own UID.
        made_at: date and time as it says itself, to be compared as text.
    """

    image: str
    study: str
    series: str
    instance: str
    made_at: str


class Pacs:
    """One DICOMweb server.

    Args:
        url: of its DICOMweb root.
        search: filter of the series that are images, such as {"Modality": "CT"}.
    """

    def __init__(self, url: str, search: Mapping[str, Any]) -> None:
        self.url = url.rstrip("/")
        self._search = dict(search)
        self._segs: dict[tuple[str, int | None], list[SegRow]] = {}
        self._client = DICOMwebClientX(
            url=self.url,
            session=open_session(self.url),
            qido_url_prefix=platform.MONAI_LABEL_QIDO_PREFIX,
            wado_url_prefix=platform.MONAI_LABEL_WADO_PREFIX,
            stow_url_prefix=platform.MONAI_LABEL_STOW_PREFIX,
        )
        self._client.set_http_retry_params(retry=False)

    def images(self) -> dict[str, SeriesRow]:
        """All series that pass the filter, by UID.

        Raises:
            PacsError: it does not answer.
        """
        return {row.series: row for row in self._series(self._search)}

    def series(self, uid: str) -> SeriesRow | None:
        """One series, whether or not it passes the filter; None if there is none.

        Raises:
            PacsError: it does not answer.
        """
        if not UID.fullmatch(uid):
            return None
        found = self._series({"SeriesInstanceUID": uid})
        return next((row for row in found if row.series == uid), None)

    def segs(self) -> list[SegRow]:
        """All segmentations; what was asked for once is not asked for again.

        Raises:
            PacsError: it does not answer.
        """
        known: dict[tuple[str, int | None], list[SegRow]] = {}
        for row in self._series({"Modality": "SEG"}):
            key = (row.series, row.instances)
            known[key] = self._segs[key] if key in self._segs else self._look_into(row)
        self._segs = known
        return [seg for rows in known.values() for seg in rows]

    def fetch(self, row: SeriesRow, folder: Path) -> None:
        """Write all files of a series into a folder.

        Raises:
            PacsError: it does not answer, or has no file of it.
        """
        with _asking("fetch a series"):
            fetched = 0
            for instance in self._client.iter_series(row.study, row.series):
                instance.save_as(folder / f"{fetched:05d}.dcm", write_like_original=False)
                fetched += 1
        if not fetched:
            msg = f"The PACS has no file of series {row.series}."
            raise PacsError(msg)

    def fetch_seg(self, row: SegRow, path: Path) -> None:
        """Write one segmentation to a file.

        Raises:
            PacsError: it does not answer.
        """
        with _asking("fetch a segmentation"):
            found = self._client.retrieve_instance(row.study, row.series, row.instance)
            found.save_as(path, write_like_original=False)

    def store(self, path: Path) -> None:
        """Store one file; it is in the PACS when this returns.

        Raises:
            PacsError: it was not stored.
        """
        with _asking("store a label"):
            answer = self._client.store_instances([instance_of(path)])
        failed = answer.get("FailedSOPSequence")
        if failed or not answer.get("ReferencedSOPSequence"):
            reason = str(failed[0].get("FailureReason", "")) if failed else ""
            msg = f"The PACS did not store the label (reason {reason or 'not told'})."
            raise PacsError(msg)

    def _series(self, search: Mapping[str, Any]) -> list[SeriesRow]:
        with _asking("list series"):
            rows = self._client.search_for_series(
                search_filters=dict(search), fields=list(FIELDS), get_remaining=True
            )
        found = [_series_row(row) for row in rows]
        return [row for row in found if UID.fullmatch(row.series) and UID.fullmatch(row.study)]

    def _look_into(self, row: SeriesRow) -> list[SegRow]:
        with _asking("look into a segmentation"):
            metadata = self._client.retrieve_series_metadata(row.study, row.series)
        return list(_seg_rows(row, metadata))


def open_session(url: str) -> requests.Session:
    """A session with the credentials of the platform's settings, and a time limit."""
    if "googleapis.com" in url:
        from dicomweb_client.ext.gcp.session_utils import create_session_from_gcp_credentials

        session = create_session_from_gcp_credentials()
    elif platform.MONAI_LABEL_DICOMWEB_USERNAME and platform.MONAI_LABEL_DICOMWEB_PASSWORD:
        session = create_session_from_user_pass(
            platform.MONAI_LABEL_DICOMWEB_USERNAME, platform.MONAI_LABEL_DICOMWEB_PASSWORD
        )
    else:
        session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Impatient())
    return session


class _Impatient(HTTPAdapter):
    """Without a limit, a PACS that hangs would hold its requests for ever."""

    def send(self, *args: Any, **kwargs: Any) -> requests.Response:
        """As requests does, with a time limit."""
        kwargs["timeout"] = kwargs.get("timeout") or TIMEOUT_S
        return super().send(*args, **kwargs)


def fault(error: requests.RequestException) -> str:
    """What went wrong and at which host, for the log.

    The error's own text holds the whole address, whose query may name patients.
    """
    told = [type(error).__name__]
    if error.response is not None:
        told.append(str(error.response.status_code))
    reason = getattr(error.args[0], "reason", None) if error.args else None  # urllib3's
    if isinstance(reason, Exception):
        told.append(type(reason).__name__)
    url = str(error.request.url or "") if error.request is not None else ""
    host = urlsplit(url).netloc.rpartition("@")[2]
    return ", ".join(told) + (f" at {host}" if host else "")


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """All that can go wrong with a server becomes one sentence."""
    try:
        yield
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        logger.info("cannot %s: %s", what, fault(error))
        msg = f"The PACS refused to {what} ({status}). Look at its log."
        raise PacsError(msg) from error
    except requests.RequestException as error:
        logger.info("cannot %s: %s", what, fault(error))
        msg = f"The PACS does not answer ({type(error).__name__}), so it cannot {what}."
        raise PacsError(msg) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        kind = type(error).__name__
        places = "".join(traceback.format_tb(error.__traceback__))  # no values: they may be names
        logger.info("cannot %s: %s\n%s", what, kind, places)
        msg = f"The PACS answered what is no DICOMweb ({kind}): cannot {what}."
        raise PacsError(msg) from error


def _series_row(row: Row) -> SeriesRow:
    told = {name: _text(row, tag) or "UNK" for name, tag in TOLD.items()}
    count = _text(row, COUNT)
    instances = int(count) if count.isdigit() else None
    return SeriesRow(told["SeriesInstanceUID"], told["StudyInstanceUID"], instances, told)


def _seg_rows(row: SeriesRow, metadata: Iterable[Row]) -> Iterator[SegRow]:
    for instance in metadata:
        referred = _first(instance, REFERENCED_SERIES)
        image = _text(referred, TOLD["SeriesInstanceUID"]) if isinstance(referred, Mapping) else ""
        uid = _text(instance, INSTANCE)
        if not image or not UID.fullmatch(uid):
            logger.info("segmentation %s does not say of which series it is", row.series)
            continue
        dates = ((_text(instance, day), _text(instance, hour)) for day, hour in MADE_AT)
        made_at = next((day + hour for day, hour in dates if day), "")
        yield SegRow(image, row.study, row.series, uid, made_at)


def _first(row: Row, tag: str) -> Any:
    values = (row.get(tag) or {}).get("Value") or [None]
    return values[0]


def _text(row: Row, tag: str) -> str:
    value = _first(row, tag)
    if isinstance(value, Mapping):  # a person's name
        value = value.get("Alphabetic")
    return "" if value is None else str(value).strip()
