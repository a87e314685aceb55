"""What the owner of a server may choose, beside the options of the app itself."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeOptions:
    """Options of `serve`.

    Attributes:
        studies: folder or URL.
        conf: the app's own options, as of `--conf`.
        host: address to listen on.
        port: to listen on.
        tokens: any of them lets in; none: no log-in.
        tls_cert: certificate chain, PEM.
        tls_key: its key, PEM.
        allowed_hosts: names by which clients may call the server; with the loopback address its
            own names are always allowed. Empty elsewhere: any name.
        cors_origins: other origins whose pages may call the server.
        max_upload: bytes of one request's body.
        body_timeout: seconds that a client may pause while it sends.
        infer_at_once: segmentations that run together.
        infer_queue: segmentations that may wait.
        grace: seconds that a stop waits for requests that are being answered.
        log_format: `json` leaves out names of images.
    """

    studies: str
    conf: dict[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    tokens: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_upload: int = 4 << 30
    body_timeout: float = 60.0
    infer_at_once: int = 2
    infer_queue: int = 32
    grace: float = 30.0
    log_format: Literal["text", "json"] = "text"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK or self.host.startswith("127.")
