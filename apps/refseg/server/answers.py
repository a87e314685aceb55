"""What goes back when something is wrong: JSON with a sentence and an id that the log has, too."""

import errno
import json
import logging
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from contextvars import ContextVar

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from monailabel.interfaces.exception import (
    ImageNotFoundException,
    LabelNotFoundException,
    MONAILabelError,
    MONAILabelException,
)
from pydantic import ValidationError
from requests import ConnectionError as NoConnection
from requests import RequestException, Timeout
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Send

from apps.refseg.server.lanes import ClientGoneError, LaneClosedError, LaneFullError
from lib.cancellation import StoppedError
from lib.errors import ImageError, LabelError, RefSegError, RequestError
from lib.studies.dicomweb import fault

logger = logging.getLogger(__name__)

CLIENT_GONE = 499  # nginx's number; nobody reads it but the log and the metrics
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
NOT_WRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})

request_id: ContextVar[str] = ContextVar("refseg_request_id", default="")


def new_id() -> str:
    """An id for one request; never the client's own, which could be anything."""
    return uuid.uuid4().hex[:12]


def body_of(status: int, detail: object) -> bytes:
    """The JSON of an answer that is no success."""
    if not detail:
        detail = f"Status {status}."
    return json.dumps({"detail": detail, "id": request_id.get()}).encode()


async def send_problem(
    send: Send, status: int, detail: object, headers: Mapping[str, str] | None = None
) -> None:
    """Answer from outside FastAPI: from the layers around it."""
    body = body_of(status, detail)
    named = {"content-type": "application/json", "content-length": str(len(body))}
    named |= {key.lower(): value for key, value in (headers or {}).items()}
    raw = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def http_problem(_: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler of HTTP errors, with the id."""
    assert isinstance(error, StarletteHTTPException)
    content = {"detail": error.detail, "id": request_id.get()}
    return JSONResponse(content, error.status_code, dict(error.headers or {}))


async def invalid_request(_: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler of requests that do not fit a route; the values are not sent back."""
    assert isinstance(error, RequestValidationError)
    told = [{key: entry[key] for key in ("type", "loc", "msg")} for entry in error.errors()]
    return JSONResponse({"detail": told, "id": request_id.get()}, 422)


def translated(error: Exception) -> HTTPException:
    """Any exception of the app as an answer; what nobody expected is logged with its id."""
    if isinstance(error, HTTPException):
        return error
    if isinstance(error, StarletteHTTPException):
        return HTTPException(error.status_code, error.detail, dict(error.headers or {}))
    if isinstance(error, LaneFullError):
        return HTTPException(503, str(error), {"Retry-After": str(error.retry_s)})
    if isinstance(error, LaneClosedError):
        text = "The server is being stopped; try again in a minute."
        return HTTPException(503, text, {"Retry-After": "60", "Connection": "close"})
    if isinstance(error, ClientGoneError | StoppedError):
        return HTTPException(CLIENT_GONE, "The client closed the connection.")
    if isinstance(error, RequestError | ImageError | LabelError):
        return HTTPException(422, str(error))
    if isinstance(error, RefSegError):
        return HTTPException(503, str(error))
    if isinstance(error, MONAILabelException):
        return _of_platform(error)
    if isinstance(error, OverflowError | ValidationError):
        return HTTPException(422, f"A value is out of range ({type(error).__name__}).")
    if isinstance(error, zipfile.BadZipFile | shutil.ReadError | zlib.error):
        return HTTPException(422, "The archive cannot be unpacked: it is damaged.")
    if isinstance(error, RequestException):
        logger.warning("request %s: %s", request_id.get(), fault(error))
        return _of_pacs(error)
    if isinstance(error, FileNotFoundError):  # deleted by another client, or a tool not installed
        logger.warning("request %s: not there: %s", request_id.get(), error)
        return HTTPException(404, "What the request needs is not there, or not any more.")
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        logger.error("request %s: no space is left on the disk: %s", request_id.get(), error)
        return HTTPException(507, "The server's disk is full: nothing was stored. Make room first.")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return HTTPException(422, "A name in the request is too long for a file.")
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        logger.error("request %s: not writable: %s", request_id.get(), error)
        return HTTPException(503, "The server may not write there: nothing was stored.")
    logger.error("request %s failed", request_id.get(), exc_info=error)
    kind, mark = type(error).__name__, request_id.get()
    return HTTPException(500, f"RefSeg failed ({kind}); the server's log tells more at {mark}.")


def _of_pacs(error: RequestException) -> HTTPException:
    if isinstance(error, NoConnection | Timeout):
        return HTTPException(502, "The DICOMweb server behind this one does not answer.")
    text = (
        "The request could not be handed on to the DICOMweb server behind this one, or its answer "
        f"broke off ({type(error).__name__}). Try again, then look at that server's log."
    )
    return HTTPException(502, text)


def _of_platform(error: MONAILabelException) -> HTTPException:
    if isinstance(error, ImageNotFoundException | LabelNotFoundException):
        return HTTPException(404, f"{error.msg}. Look at GET /datastore/?output=all.")
    if "is not Initialized" in error.msg:  # a model, strategy or method of that name
        return HTTPException(404, error.msg)
    if error.error == MONAILabelError.INVALID_INPUT:
        return HTTPException(422, error.msg)
    logger.error("request %s failed", request_id.get(), exc_info=error)
    return HTTPException(500, f"{error.msg} (the server's log tells more at {request_id.get()})")
