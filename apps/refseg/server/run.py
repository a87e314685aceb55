"""Starts the server: MONAI Label's settings, the layers around its application, uvicorn."""

import faulthandler
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import typer
import uvicorn
from fastapi import APIRouter
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from apps.refseg.server.memory import give_back_freed_memory
from apps.refseg.server.options import ServeOptions
from apps.refseg.server.temporary import TemporaryFolder
from lib.errors import RequestError

logger = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn's, that sends those away who wait for a segmentation when it is asked to stop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.lanes: Any = None
        self.temporary: TemporaryFolder | None = None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; requests that are being answered have the grace period."""
        self.lanes.infer.turn_away()
        await super().shutdown(sockets)
        if self.temporary is not None:  # here: uvicorn ends the process by the signal it was sent
            self.temporary.close()


def serve(options: ServeOptions, app_folder: Path) -> None:
    """Serve until a signal ends it."""
    if hasattr(faulthandler, "register"):  # not on Windows
        faulthandler.register(signal.SIGUSR1)  # `kill -USR1`: where each thread is, to stderr
    _set_up_platform(options, app_folder)
    from apps.refseg.server.limits import MOST_REQUESTS, prompt_protocol
    from apps.refseg.server.logs import Pseudonyms, log_config
    from apps.refseg.server.platform import Lanes

    lanes = Lanes.of(options)
    studies = options.studies if "://" in options.studies else str(Path(options.studies).resolve())
    folders = [studies, os.path.realpath(studies)] if "://" not in studies else []
    pseudonyms = Pseudonyms(lambda: _image_names(folders), folders)
    server: _Server
    config = uvicorn.Config(
        application(options, lanes, studies=studies, stopping=lambda: server.should_exit),
        host=options.host,
        port=options.port,
        http=prompt_protocol(options.body_timeout),
        limit_concurrency=MOST_REQUESTS,
        ws="none",
        log_config=log_config(options.log_format, pseudonyms, app_folder / "logs"),
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, round(options.grace)),
        ssl_certfile=str(options.tls_cert) if options.tls_cert else None,
        ssl_keyfile=str(options.tls_key) if options.tls_key else None,
        ssl_version=ssl.PROTOCOL_TLS_SERVER,
    )
    warn_of_clear_text(options)
    server = _Server(config)
    server.lanes = lanes
    server.temporary = TemporaryFolder()
    give_back_freed_memory()
    try:
        server.run()
    finally:  # where it could not start
        server.temporary.close()


def application(
    options: ServeOptions,
    lanes: Any,
    *,
    studies: str,
    stopping: Any,
    more: Sequence[APIRouter] = (),
) -> ASGIApp:
    """MONAI Label's application inside our layers, the outermost last.

    Args:
        options: see there.
        lanes: the `Lanes` of the server.
        studies: folder or URL.
        stopping: called to know whether the server has been asked to stop.
        more: routes beside the platform's, such as pages.
    """
    from apps.refseg.server.access import Guard, Tokens, log_in_routes
    from apps.refseg.server.health import health_routes
    from apps.refseg.server.limits import Limits
    from apps.refseg.server.observe import Metrics, Observe
    from apps.refseg.server.pacs_proxy import proxy_routes
    from apps.refseg.server.page import page_routes
    from apps.refseg.server.page_login import Sessions
    from apps.refseg.server.platform import build

    metrics, tokens, sessions = Metrics(lanes), Tokens(options.tokens), Sessions()
    pages = page_routes(lanes, tokens=tokens, sessions=sessions, secure=bool(options.tls_cert))
    health = health_routes(metrics, studies=studies, stopping=stopping)
    routers = [health, pages, proxy_routes(studies), *more]
    if tokens:
        routers.append(log_in_routes(tokens))
    layered: ASGIApp = Limits(build(lanes, routers), options)
    if options.cors_origins:
        layered = CORSMiddleware(
            layered,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
            allow_headers=["authorization", "content-type"],
        )
    return Observe(Guard(layered, options, sessions), metrics)


def read_tokens(path: Path) -> tuple[str, ...]:
    """The tokens of a file, one a line; more than one while the old one is being replaced.

    Raises:
        RequestError: there is none, or one is too short to be a secret.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    tokens = tuple(line for line in lines if line and not line.startswith("#"))
    if not tokens or any(len(token) < 16 for token in tokens):
        msg = (
            f"{path} holds no token of at least 16 characters; make one by "
            '`python -c "import secrets; print(secrets.token_urlsafe(32))"`.'
        )
        raise RequestError(msg)
    if os.name == "posix" and path.stat().st_mode & 0o077:
        # the log is not set up yet
        typer.echo(f"{path} can be read by others on this machine: chmod 600 it", err=True)
    return tokens


def warn_of_clear_text(options: ServeOptions) -> None:
    """Once the log is set up: whoever is on the way can read what no TLS hides."""
    if options.is_local or options.tls_cert:
        return
    secret = "the token and all images go" if options.tokens else "all images go"
    logger.warning(
        "--host %s without TLS: %s over the network in the clear. Give --tls-cert and --tls-key, "
        "or listen on 127.0.0.1 behind a reverse proxy that adds TLS (docs/security.md)",
        options.host,
        secret,
    )


def _set_up_platform(options: ServeOptions, app_folder: Path) -> None:
    """What `monailabel start_server` does before it starts uvicorn, by its own functions."""
    # its loader would drop our modules of `lib` and import them a second time
    os.environ["MONAI_LABEL_RELOAD_APP_LIB"] = "false"
    from monailabel.main import Main

    arguments = ["start_server", "--app", str(app_folder), "--studies", options.studies]
    arguments += ["--host", options.host, "--port", str(options.port)]
    for name, value in options.conf.items():
        arguments += ["--conf", name, value]
    main = Main(loglevel=logging.WARNING)
    parsed = main.args_parser().parse_args(arguments)
    main.start_server_validate_args(parsed)
    main.start_server_init_settings(parsed)
    sys.path.append(str(app_folder))


def _image_names(folders: Iterable[str]) -> Iterable[str]:
    """Ids of the images as they are known now, without a lock: a log line must not wait."""
    from monailabel.interfaces.utils.app import apps

    if not apps:  # it is being started: the files' names must do
        for name in {path.name for folder in folders for path in Path(folder).iterdir()}:
            yield from (name, name.partition(".")[0])
    for app in list(apps.values()):
        names_now = getattr(app.datastore(), "names_now", None)
        if names_now is not None:
            yield from names_now()
