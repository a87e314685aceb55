"""A request for the next image, checked."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lib.errors import RequestError
from lib.request_options import truth, whole
from lib.settings import RefSegSettings

MOST_IMAGES = 1000  # of one answer
MOST_LEASE_S = 7 * 24 * 3600


@dataclass(frozen=True)
class NextRequest:
    """One request, checked.

    Attributes:
        client_id: who asks; "admin" where the client does not say, as the platform has it.
        images: how many.
        labels: that each image should have; an image that lacks some is offered once more.
        flagged: whether images that were set aside may be given, too.
        lease: seconds for which others are not given the same.
        skip: ids that the client does not want now.
    """

    client_id: str
    images: int
    labels: tuple[str, ...]
    flagged: bool
    lease: int
    skip: tuple[str, ...]

    @classmethod
    def parse(cls, request: Mapping[str, Any], settings: RefSegSettings) -> "NextRequest":
        """Read a request.

        Raises:
            RequestError: an option is out of range.
        """
        return cls(
            client_id=str(request.get("client_id") or "admin"),
            images=whole(request, "images", 1, 1, MOST_IMAGES),
            labels=_names(request.get("labels")) or settings.labels,
            flagged=truth(request, "flagged", False),
            lease=whole(request, "lease", settings.lease, 0, MOST_LEASE_S),
            skip=_names(request.get("skip")),
        )


def _names(value: object) -> tuple[str, ...]:
    """A list, or text with commas."""
    if value is None:
        return ()
    listed = value.split(",") if isinstance(value, str) else value
    if not isinstance(listed, Iterable):
        msg = f"{value!r} is not a list of names; write them as a list or with commas."
        raise RequestError(msg)
    return tuple(dict.fromkeys(name for item in listed if (name := str(item).strip())))
