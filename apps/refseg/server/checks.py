"""What a request may say: names that stay in their folder, JSON that can be sent back."""

import inspect
import json
import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, TypeVar

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

HEADERS = (".nrrd", ".nhdr", ".mha", ".mhd")
LONGEST_HEADER = 1 << 20

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


def _check_infer(given: Mapping[str, Any]) -> None:
    if not any(given.get(key) for key in ("image", "file", "session_id")):
        msg = "Which image? Give image=ID, upload a file, or name a session."
        raise RequestError(msg)
    params = given.get("params")
    named = json.loads(params or "{}").get("image") if isinstance(params, str) else None
    if named and named != given.get("image"):
        msg = f"params name another image than the request: {named!r}; leave it out there."
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
        try:
            members = zipfile.ZipFile(upload.file).infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            msg = "The file is no zip archive."
            raise RequestError(msg) from None
        finally:
            upload.file.seek(0)
        for member in members:
            parts = PurePath(member.filename.replace("\\", "/")).parts
            if ".." in parts or member.filename.startswith(("/", "\\")):
                msg = "The zip archive holds a name that leaves its folder."
                raise RequestError(msg)
        packed = sum(member.compress_size for member in members)
        unpacked = sum(member.file_size for member in members)
        if len(members) > 100_000 or unpacked > max(1 << 30, 200 * packed):
            msg = (
                f"The zip archive would unpack to {len(members)} files, {unpacked} bytes: too much."
            )
            raise RequestError(msg)
