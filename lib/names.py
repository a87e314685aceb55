"""Names that come from outside and become file names: ids of images, tags, names of uploads."""

from lib.errors import RequestError

LONGEST = 255  # bytes, of most file systems


def check_name(what: str, value: str) -> str:
    """An id or tag that is one part of a path and no more -> the same.

    Raises:
        RequestError: it could leave its folder, be hidden in it, or cannot be a file's name.
    """
    shown = repr(value if len(value) <= 60 else f"{value[:57]}...")
    if not value:
        msg = f"{what} is empty; name one of GET /datastore/?output=all."
        raise RequestError(msg)
    if "/" in value or "\\" in value:
        msg = f"{what} {shown} holds a slash: it is a name, not a path."
        raise RequestError(msg)
    if value.startswith("."):
        msg = f"{what} {shown} begins with a dot, which is not allowed."
        raise RequestError(msg)
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        msg = f"{what} {shown} holds a control character."
        raise RequestError(msg)
    try:
        length = len(value.encode())
    except UnicodeEncodeError:
        msg = f"{what} {shown} is no text."
        raise RequestError(msg) from None
    if length > LONGEST:
        msg = f"{what} {shown} has {length} bytes; at most {LONGEST} are allowed."
        raise RequestError(msg)
    return value


def check_file_name(value: str) -> str:
    """The name of an upload -> the same; empty where the client gave none.

    Raises:
        RequestError: as for `check_name`.
    """
    return check_name("the file name", value) if value else value
