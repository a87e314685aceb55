"""`serve`: the MONAI Label server of this app, with a log-in, limits, queues and health checks."""

from pathlib import Path
from typing import Annotated

import typer

from apps.refseg.cli import app, reported
from lib.errors import RequestError

MEGABYTE = 1 << 20


@app.command("serve")
@reported
def serve(
    studies: Annotated[str, typer.Option(help="Folder of images, or DICOMweb URL.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    conf: Annotated[
        list[str] | None, typer.Option("--conf", help="An option as NAME=VALUE; may be repeated.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token that lets in; several: one a line.")
    ] = None,
    without_token: Annotated[
        bool, typer.Option("--without-token", help="Let all in, on any --host.")
    ] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Key of the certificate, PEM.")] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Name by which clients call the server; repeatable.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin whose pages may call the server; repeatable.")
    ] = None,
    max_upload_mb: Annotated[int, typer.Option(min=1, help="Largest request, in MB.")] = 4096,
    body_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that a client may pause, or send below 1 kB/s.")
    ] = 60.0,
    infer_at_once: Annotated[
        int, typer.Option(min=1, max=64, help="Segmentations that run together.")
    ] = 2,
    infer_queue: Annotated[
        int, typer.Option(min=1, help="Segmentations that may wait; more are told to come again.")
    ] = 32,
    grace: Annotated[
        float, typer.Option(min=1, help="Seconds that a stop waits for answers under way.")
    ] = 30.0,
    log_format: Annotated[
        str, typer.Option(help="text, or json: no names of images or patients.")
    ] = "text",
) -> None:
    """Serve the studies until Ctrl-C or a SIGTERM ends it."""
    from apps.refseg.server.options import ServeOptions
    from apps.refseg.server.run import read_tokens
    from apps.refseg.server.run import serve as run

    if log_format not in ("text", "json"):
        msg = f"--log-format {log_format!r} is not allowed; it is text or json."
        raise RequestError(msg)
    if (tls_cert is None) != (tls_key is None):
        msg = "--tls-cert and --tls-key go together: give both, or none."
        raise RequestError(msg)
    for path in filter(None, (tls_cert, tls_key, token_file)):
        if not path.is_file():
            msg = f"{path} does not exist."
            raise RequestError(msg)
    options = ServeOptions(
        studies=_studies(studies),
        conf=_pairs(conf or []),
        host=host,
        port=port,
        tokens=read_tokens(token_file) if token_file else (),
        tls_cert=tls_cert,
        tls_key=tls_key,
        allowed_hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        max_upload=max_upload_mb * MEGABYTE,
        body_timeout=body_timeout,
        infer_at_once=infer_at_once,
        infer_queue=infer_queue,
        grace=grace,
        log_format="json" if log_format == "json" else "text",
    )
    if not (options.is_local or options.tokens or without_token):
        msg = f"--host {host} lets other machines in: give --token-file FILE, or --without-token."
        raise RequestError(msg)
    run(options, Path(__file__).resolve().parents[1])


def _studies(studies: str) -> str:
    if studies.startswith(("http://", "https://")):
        return studies
    folder = Path(studies).expanduser().resolve()
    if not folder.is_dir():
        msg = f"Studies folder {folder} does not exist; make it, or name another."
        raise RequestError(msg)
    return str(folder)


def _pairs(conf: list[str]) -> dict[str, str]:
    found = {}
    for text in conf:
        name, sign, value = text.partition("=")
        if not sign:
            msg = f"--conf {text!r} is not NAME=VALUE, such as --conf k=4."
            raise RequestError(msg)
        found[name] = value
    return found
