"""A request for the next image, checked."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lib.errors import RequestError
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
            images=_whole(request, "images", 1, (1, MOST_IMAGES)),
            labels=_names(request.get("labels")) or settings.labels,
            flagged=_flag(request.get("flagged", False)),
            lease=_whole(request, "lease", settings.lease, (0, MOST_LEASE_S)),
            skip=_names(request.get("skip")),
        )


def _whole(request: Mapping[str, Any], name: str, default: int, among: tuple[int, int]) -> int:
    value = request.get(name, default)
    try:
        number = int(value)
        if isinstance(value, bool) or number != float(value):
            raise ValueError
    except (TypeError, ValueError):
        msg = f"{name} {value!r} is not a whole number; allowed are {among[0]} to {among[1]}."
        raise RequestError(msg) from None
    if not among[0] <= number <= among[1]:
        msg = f"{name} {number} is out of range; allowed are {among[0]} to {among[1]}."
        raise RequestError(msg)
    return number


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    msg = f"flagged {value!r} is not true or false."
    raise RequestError(msg)


def _names(value: object) -> tuple[str, ...]:
    """A list, or text with commas."""
    if value is None:
        return ()
    listed = value.split(",") if isinstance(value, str) else value
    if not isinstance(listed, Iterable):
        msg = f"{value!r} is not a list of names; write them as a list or with commas."
        raise RequestError(msg)
    return tuple(dict.fromkeys(name for item in listed if (name := str(item).strip())))
