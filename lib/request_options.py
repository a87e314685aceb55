"""Options of a request, read from whatever a client makes of them.

That is a number, text from a form, or nothing at all. Each refusal names the option, the value and
what is allowed.
"""

from collections.abc import Mapping
from typing import Any

from lib.errors import RequestError

Request = Mapping[str, Any]


def number(request: Request, name: str, default: float, low: float, high: float) -> float:
    """A number from low to high.

    Raises:
        RequestError: it is none, or out of range.
    """
    return _number(request, name, default, low, high, kind="a number")


def whole(request: Request, name: str, default: int, low: int, high: int) -> int:
    """A whole number from low to high; 3.0 and "3" are, true is not.

    Raises:
        RequestError: it is none, or out of range.
    """
    return int(_number(request, name, default, low, high, kind="a whole number"))


def truth(request: Request, name: str, default: bool) -> bool:
    """Yes or no.

    Raises:
        RequestError: it is neither.
    """
    value = request.get(name)
    if value is None or value == "":
        return default
    text = str(value).lower()
    if text in ("true", "1", "yes", "on"):
        return True
    if text in ("false", "0", "no", "off"):
        return False
    msg = f"{name} {value!r} is not allowed; it is true or false."
    raise RequestError(msg)


def _number(
    request: Request, name: str, default: float, low: float, high: float, *, kind: str
) -> float:
    value = request.get(name)
    if value is None or value == "":
        return default
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = float("nan")
    fits = low <= found <= high and (kind == "a number" or found == round(found))
    if isinstance(value, bool) or not fits:
        msg = f"{name} {value!r} is not allowed; it is {kind} from {low:.10g} to {high:.10g}."
        raise RequestError(msg)
    return found
