"""A request to segment, checked: the dictionary of the platform becomes `SegmentRequest`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import RequestError
from lib.request_options import truth, whole
from lib.segmentation import Options
from lib.settings import AXIS_NAMES, RefSegSettings, parse_axis, parse_window

DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")


@dataclass(frozen=True)
class SegmentRequest:
    """A request, checked.

    Attributes:
        path: the image's file or DICOM folder.
        prompt: labels asked for, as names or as numbers of `/info`; empty: all.
        options: how to segment.
        extension: of the result's file; empty: as the image's.
        compress: pack the result's file.
        write: whether a file is wanted at all.
        largest: the largest value that the wanted dtype holds.
        info_numbers: number labels as `/info` does, with gaps where a label is not answered. OHIF
            reads them so, while 3D Slicer takes value i for the i-th name.
    """

    path: Path
    prompt: tuple[str | int, ...]
    options: Options
    extension: str
    compress: bool
    write: bool
    largest: int
    info_numbers: bool

    @classmethod
    def parse(cls, request: Mapping[str, Any], settings: RefSegSettings) -> "SegmentRequest":
        """Check every value that is used; keys of the platform and of other tasks are let pass.

        Raises:
            RequestError: a value is not allowed; the message says what is.
        """
        _refuse_other_slices(request, settings)
        return cls(
            path=Path(str(request["image"])),
            prompt=_prompt(request.get("label_prompt")),
            options=Options(
                k=whole(request, "k", settings.k, 1, 64),
                cap_per_case=whole(request, "cap_per_case", settings.cap_per_case, 0, 64),
                own_labels=truth(request, "own_labels", settings.own_labels),
                every_slice=truth(request, "every_slice", settings.every_slice),
            ),
            extension=_extension(request.get("result_extension")),
            compress=truth(request, "result_compress", True),
            write=truth(request, "result_write_to_file", True),
            largest=_largest(request.get("result_dtype")),
            info_numbers="restore_label_idx" in request,
        )


def chosen_labels(prompt: Sequence[str | int], numbers: Mapping[str, int]) -> tuple[str, ...]:
    """Names asked for, in the order of their numbers; all, if none is asked for."""
    by_number = {number: name for name, number in numbers.items()}
    asked = set()
    for entry in prompt:
        name = by_number.get(entry) if isinstance(entry, int) else entry
        if name not in numbers:
            known = ", ".join(f"{number} {name}" for name, number in numbers.items()) or "none yet"
            msg = f"label_prompt {entry!r} is no label here; known are: {known}."
            raise RequestError(msg)
        asked.add(name)
    return tuple(name for name in numbers if name in asked or not asked)


def _refuse_other_slices(request: Mapping[str, Any], settings: RefSegSettings) -> None:
    """The references were cut and windowed as the server was started: the query must be, too."""
    window, axis = request.get("window"), str(request.get("axis") or "")
    if window and parse_window(_joined(window)) != settings.window:
        now = "robust percentiles" if settings.window is None else _joined(settings.window)
        msg = (
            f"window {window!r} is not the references', which is {now}; leave it out, or start "
            "the server with --conf window LOW,HIGH."
        )
        raise RequestError(msg)
    if axis and parse_axis(axis) != settings.axis_index:
        msg = (
            f"axis {axis!r} is not the references', which is {settings.axis}; leave it out, or "
            f"start the server with --conf axis {'|'.join(('auto', *AXIS_NAMES))}."
        )
        raise RequestError(msg)


def _prompt(value: Any) -> tuple[str | int, ...]:
    entries = value.split(",") if isinstance(value, str) else value or []
    if not isinstance(entries, list | tuple):
        entries = [entries]
    prompt: list[str | int] = []
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, int | str):
            msg = f"label_prompt {entry!r} is neither a label's name nor its number."
            raise RequestError(msg)
        text = str(entry).strip()
        prompt += [int(text)] if text.isdecimal() else [text] if text else []
    return tuple(prompt)


def _joined(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _extension(value: Any) -> str:
    text = str(value or "").strip().lower()
    return text if not text or text.startswith(".") else f".{text}"


def _largest(value: Any) -> int:
    if value in (None, ""):
        return int(np.iinfo(np.uint16).max)
    if value not in DTYPES:  # numpy itself would parse "i4,," and raise whatever it likes
        msg = f"result_dtype {value!r} is not allowed; allowed are {', '.join(DTYPES)}."
        raise RequestError(msg)
    return min(int(np.iinfo(value).max), int(np.iinfo(np.uint16).max))
