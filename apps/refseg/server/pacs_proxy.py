"""The PACS behind the server, for OHIF: `/proxy/dicom/`, at which its built files look.

The platform's own leaves out the query, so that every search finds everything; it sends our token
on to the PACS, and it answers for any address of that machine, since `..` is not looked at.
"""

import asyncio
from collections.abc import Mapping
from typing import Literal
from urllib.parse import quote

import requests
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response
from monailabel.config import settings as platform

from apps.refseg.server.answers import translated
from lib.studies.dicomweb import open_session

ASKED = ("accept", "accept-language", "content-type", "range", "if-none-match")
ANSWERED = ("content-type", "content-range", "etag", "last-modified", "warning")


def proxy_routes(studies: str) -> APIRouter:
    """Routes that hand DICOMweb requests on; none where the studies are a folder."""
    router = APIRouter(prefix="/proxy/dicom", tags=["Others"])
    if not studies.startswith(("http://", "https://")):
        return router
    session = open_session(studies)

    @router.get("/{service}/{path:path}", include_in_schema=False)
    async def ask(request: Request, service: Literal["wado", "qido"], path: str) -> Response:
        url = _address(studies, service, path, request.url.query)
        return await asyncio.to_thread(_hand_on, session, "GET", url, request.headers, None)

    @router.post("/stow/{path:path}", include_in_schema=False)
    @router.post("/wado/{path:path}", include_in_schema=False)  # where OHIF stores
    async def store(request: Request, path: str) -> Response:
        if path.strip("/").split("/")[0] != "studies":
            raise HTTPException(404, "Only /studies can be stored to.")
        url = _address(studies, "stow", path, request.url.query)
        body = await request.body()
        return await asyncio.to_thread(_hand_on, session, "POST", url, request.headers, body)

    return router


def _address(studies: str, service: str, path: str, query: str) -> str:
    if any(part in ("..", ".") for part in path.replace("\\", "/").split("/")):
        raise HTTPException(400, "The path leaves the DICOMweb server.")
    if service == "qido" and path.endswith("metadata"):  # some versions of OHIF ask so
        service = "wado"
    prefix = {
        "qido": platform.MONAI_LABEL_QIDO_PREFIX,
        "wado": platform.MONAI_LABEL_WADO_PREFIX,
        "stow": platform.MONAI_LABEL_STOW_PREFIX,
    }[service]
    parts = [studies.rstrip("/"), *([prefix] if prefix else []), quote(path)]
    return "/".join(parts) + (f"?{query}" if query else "")


def _hand_on(
    session: requests.Session, method: str, url: str, headers: Mapping[str, str], body: bytes | None
) -> Response:
    told = {name: headers[name] for name in ASKED if name in headers}
    try:
        answer = session.request(method, url, headers=told, data=body)
    except requests.RequestException as error:
        raise translated(error) from error
    kept = {name: answer.headers[name] for name in ANSWERED if name in answer.headers}
    return Response(answer.content, answer.status_code, kept)
