"""What a request may say: names that stay in their folder, JSON that can be sent back."""

import inspect
import json
import math
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any, TypeVar

from monailabel import endpoints as static
from monailabel.config import settings as platform
from starlette.datastructures import UploadFile

from lib.errors import RequestError
from lib.names import check_file_name, check_name

ID_ARGUMENTS = frozenset(
    {"image", "id", "label", "tag", "session_id", "model", "strategy", "method"}
)
NAMES_IN_PARAMS = ("image", "label", "label_tag", "tag", "model", "session_id")
JSON_ARGUMENTS = frozenset({"params", "info", "wsi"})
MAY_BE_EMPTY = frozenset({"session_id"})
DEEPEST = 24
LARGEST_JSON = 1 << 20  # characters; Slicer sends some hundred

OHIF = Path(static.__file__).parent / "static" / "ohif"
CHECKSUM = re.compile(r"((SHA256|SHA512|MD5):)?[0-9a-fA-F]{1,128}")
HEADERS = (".nrrd", ".nhdr", ".mha", ".mhd")
LONGEST_HEADER = 1 << 20
MOST_MEMBERS = 100_000
LONGEST_LIST = 16 << 20  # bytes of a zip archive's list of files, some 160 for each of so many

Endings = Callable[[], list[str]]
T = TypeVar("T")


def check_arguments(path: str, given: Mapping[str, Any], endings: Endings) -> None:
    """Check what FastAPI has read of a request, before the platform sees it.

    Args:
        path: the route's, such as /datastore/label.
        given: arguments of the route's function.
        endings: extensions that the datastore takes, lower case.

    Raises:
        RequestError: a value is not allowed; the message says what is.
    """
    optional = MAY_BE_EMPTY | ({"image"} if path.startswith("/infer") else set())
    for name, value in given.items():
        if name in ID_ARGUMENTS and isinstance(value, str):
            if value or name not in optional:
                check_name(name, value)
        elif name in JSON_ARGUMENTS and isinstance(value, str | dict):
            check_params(name, value)
        elif isinstance(value, UploadFile):
            _check_upload(value)
        elif isinstance(value, list) and name == "files":
            for file in value:
                _check_upload(file)
    if path.startswith("/infer"):
        _check_infer(given)
    if path.startswith("/datastore/image"):
        _check_given_to(given)
    params = given.get("params")
    if path.startswith("/activelearning") and isinstance(params, dict):
        strategy = params.get("strategy", "")
        if not isinstance(strategy, str):
            msg = "params: strategy is not text."
            raise RequestError(msg)
    checksum = given.get("check_sum")
    if checksum and not CHECKSUM.fullmatch(checksum):
        msg = f"check_sum {checksum[:40]!r} is not SHA256:, SHA512: or MD5: and hexadecimal digits."
        raise RequestError(msg)
    upload = given.get("file") or given.get("label")
    if path.startswith("/datastore") and isinstance(upload, UploadFile):
        _check_ending(upload, endings())
    if path == "/session/" and given.get("uncompress"):
        _check_archives(given.get("files") or [])


def check_params(name: str, value: "str | Mapping[str, Any]") -> None:
    """A JSON object of plain values, whose names of images and tags stay in their folder.

    Raises:
        RequestError: it is not.
    """
    found = _parse(name, value) if isinstance(value, str) else value
    if not isinstance(found, Mapping):
        msg = f"{name} is not a JSON object, such as {{}}."
        raise RequestError(msg)
    _check_value(name, found, DEEPEST)
    client = found.get("client_id")
    if client is not None and not isinstance(client, str):
        msg = f"{name}: client_id is not text."
        raise RequestError(msg)
    for key in NAMES_IN_PARAMS:
        named = found.get(key)
        if named is None or named == "":
            continue
        if not isinstance(named, str):
            msg = f"{name}: {key} is not text."
            raise RequestError(msg)
        check_name(f"{name}: {key}", named)


def client_of(given: Mapping[str, Any], address: str) -> str:
    """Who asks, for turns: the client's id where it tells one, else its address."""
    params = given.get("params")
    try:
        found = json.loads(params) if isinstance(params, str) else params
    except ValueError:
        return address
    client = found.get("client_id") if isinstance(found, Mapping) else None
    return f"{address} {client[:80]}" if isinstance(client, str) else address


def with_argument(function: Callable[..., T], name: str, kind: type) -> inspect.Signature:
    """A function's signature with one more keyword argument."""
    signature = inspect.signature(function)
    extra = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind)
    return signature.replace(parameters=[*signature.parameters.values(), extra])


def _parse(name: str, text: str) -> Any:
    if len(text) > LARGEST_JSON:
        msg = f"{name} has {len(text)} characters; at most {LARGEST_JSON} are allowed."
        raise RequestError(msg)
    try:
        return json.loads(text) if text else {}
    except (ValueError, RecursionError):
        msg = f"{name} is not JSON: {text[:60]!r}; it is an object, such as {{}}."
        raise RequestError(msg) from None


def _check_value(name: str, value: Any, depth: int) -> None:
    if depth == 0:
        msg = f"{name} is nested more than {DEEPEST} deep."
        raise RequestError(msg)
    if isinstance(value, float) and not math.isfinite(value):
        msg = f"{name} holds {value}; NaN and infinity are not JSON."
        raise RequestError(msg)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            msg = f"{name} holds half of a surrogate pair, which is no text."
            raise RequestError(msg) from None
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check_value(name, key, depth)
            _check_value(name, entry, depth - 1)
    elif isinstance(value, list):
        for entry in value:
            _check_value(name, entry, depth - 1)


def not_served(path: str, given: Mapping[str, Any], studies: str) -> str:
    """Why a route of the platform has nothing to answer here; else empty."""
    if path.startswith("/infer/wsi"):
        return "RefSeg does not segment whole-slide images."
    if path.startswith("/model/"):
        return "RefSeg's weights are not exchanged over the network: see `main.py weights`."
    if path.startswith("/proxy/") and "://" not in studies:
        return "The studies are a folder: there is no DICOMweb server to ask."
    if path == "/ohif/{path:path}" and (OHIF / str(given.get("path"))).is_dir() and given["path"]:
        return "This is a folder."
    return ""


def _check_infer(given: Mapping[str, Any]) -> None:
    if not any(given.get(key) for key in ("image", "file", "session_id")):
        msg = "Which image? Give image=ID, upload a file, or name a session."
        raise RequestError(msg)
    output = str(getattr(given.get("output"), "value", ""))
    if output == "dicom_seg" and "://" not in platform.MONAI_LABEL_STUDIES:
        msg = "output=dicom_seg needs a DICOMweb server as the studies; ask for image or all."
        raise RequestError(msg)
    params = given.get("params")
    told = json.loads(params or "{}") if isinstance(params, str) else {}
    unwritten = str(told.get("result_write_to_file", "")).lower() in ("false", "0", "no", "off")
    if output == "image" and unwritten:
        msg = "output=image wants a file, which result_write_to_file=false leaves out."
        raise RequestError(msg)
    named = told.get("image")
    if named and named != given.get("image"):
        msg = f"params name another image than the request: {named!r}; leave it out there."
        raise RequestError(msg)


def _check_given_to(given: Mapping[str, Any]) -> None:
    """`strategy` of an image's info says who was given it; the platform writes into it."""
    for argument in ("info", "params"):
        told = given.get(argument)
        notes = json.loads(told or "{}").get("strategy", {}) if isinstance(told, str) else {}
        if not isinstance(notes, dict) or not all(isinstance(n, dict) for n in notes.values()):
            msg = f"{argument}: strategy is not an object of objects; leave it out."
            raise RequestError(msg)


def _check_upload(file: UploadFile) -> None:
    """One file by a plain name, whose header does not send its reader to another file."""
    name = check_file_name(file.filename or "").lower()
    if not name.endswith(HEADERS):
        return
    head: bytes = file.file.read(LONGEST_HEADER)
    file.file.seek(0)
    for line in head.replace(b"\r", b"\n").split(b"\n"):
        key, _, value = line.replace(b"=", b":", 1).partition(b":")
        word = key.strip().lower().replace(b" ", b"")
        if word == b"datafile" or (word == b"elementdatafile" and value.strip() != b"LOCAL"):
            msg = (
                "The file's header names another file for the data; send both in one (.nrrd, .mha)."
            )
            raise RequestError(msg)


def _check_ending(file: UploadFile, endings: list[str]) -> None:
    name = (file.filename or "").lower()
    if name and not any(name.endswith(ending) and name != ending for ending in endings):
        ending = "".join(PurePath(name).suffixes)[-20:]
        msg = f"The file's extension {ending!r} is not served; allowed are {', '.join(endings)}."
        raise RequestError(msg)


def _check_archives(files: list[UploadFile]) -> None:
    """Tar archives could write anywhere, so zip alone; its members are counted before."""
    for upload in files:
        if not (upload.filename or "").lower().endswith(".zip"):
            msg = "uncompress takes .zip files only; or upload the files one by one."
            raise RequestError(msg)
        _check_list(upload)
        try:
            members = zipfile.ZipFile(upload.file).infolist()
        except (zipfile.BadZipFile, OSError, ValueError):
            msg = "The file is no zip archive."
            raise RequestError(msg) from None
        except NotImplementedError as error:  # what zipfile says of versions above its own
            msg = f"The zip archive is of a kind that is not read here ({error}); pack it plainly."
            raise RequestError(msg) from None
        finally:
            upload.file.seek(0)
        if any(member.flag_bits & 1 for member in members):
            msg = "The zip archive has a password."
            raise RequestError(msg)
        for member in members:
            parts = PurePath(member.filename.replace("\\", "/")).parts
            if ".." in parts or member.filename.startswith(("/", "\\")):
                msg = "The zip archive holds a name that leaves its folder."
                raise RequestError(msg)
        packed = sum(member.compress_size for member in members)
        unpacked = sum(member.file_size for member in members)
        if len(members) > MOST_MEMBERS or unpacked > max(1 << 30, 200 * packed):
            msg = (
                f"The zip archive would unpack to {len(members)} files, {unpacked} bytes: too much."
            )
            raise RequestError(msg)


def _check_list(upload: UploadFile) -> None:
    """`zipfile` reads all of the list into memory, where each file takes ten times as much."""
    end = zipfile._EndRecData(upload.file)  # type: ignore[attr-defined]  # what it looks at first
    size = end[zipfile._ECD_SIZE] if end else 0  # type: ignore[attr-defined]
    if size > LONGEST_LIST:
        msg = (
            f"The zip archive's list of files has {size} bytes; {LONGEST_LIST} are allowed. "
            "Send fewer files at once."
        )
        raise RequestError(msg)
