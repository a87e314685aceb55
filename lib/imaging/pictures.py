"""2D picture files (PNG, JPEG, TIFF, BMP) as arrays with the axes (W, H), and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from lib.errors import ImageError, LabelError

# Modes that numpy takes as they are; all others (palette, CMYK, YCbCr, ...) are turned to RGB.
_GREY = frozenset({"1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
_GREY_ALPHA = frozenset({"LA", "La"})


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture.

    Attributes:
        values: (W, H) or (W, H, 3); pixels as stored, EXIF orientation not applied, because
            neither MONAI's readers nor ITK's (3D Slicer) apply it to PNG and JPEG.
        value_range: what the format calls black and white, or None where it does not say
            (16 and 32 bit and float pictures rarely use their whole range).
    """

    values: npt.NDArray[Any]
    value_range: tuple[float, float] | None


def read_picture(path: Path) -> Picture:
    """Read a picture; palettes and other color models become RGB, alpha is dropped."""
    with _opened(path) as picture:
        mode = picture.mode
        if mode in _GREY_ALPHA:
            values = np.asarray(picture.convert("L"))
        elif mode in _GREY:
            values = np.asarray(picture)
        else:
            values = np.asarray(picture.convert("RGB"))
    value_range = {"b": (0.0, 1.0), "u1": (0.0, 255.0)}.get(
        "b" if values.dtype == bool else values.dtype.str[1:]
    )
    return Picture(values.swapaxes(0, 1), value_range)


def read_label_picture(path: Path) -> npt.NDArray[Any]:
    """Read a picture whose pixels are label numbers -> (W, H); palette indices stay indices."""
    if path.suffix.lower() in {".jpg", ".jpeg"}:
        msg = f"{path.name} is a JPEG, which changes label numbers. Submit the label map as PNG."
        raise LabelError(msg)
    with _opened(path) as picture:
        values = np.asarray(picture.convert("P") if picture.mode == "PA" else picture)
        if picture.mode in _GREY_ALPHA:
            values = values[..., 0]
    if values.ndim == 3:
        values = values[..., :3]
        if (values != values[..., :1]).any():
            msg = (
                f"{path.name} is a color picture. A label map has one number a pixel: save it grey."
            )
            raise LabelError(msg)
        values = values[..., 0]
    return values.swapaxes(0, 1)


def write_label_picture(path: Path, values: npt.NDArray[Any], *, compress: bool) -> None:
    """Write (W, H) uint8 or uint16 label numbers as PNG, TIFF or BMP."""
    if path.suffix.lower() == ".bmp" and values.dtype != np.uint8:
        msg = f"A BMP holds labels up to 255, got {int(values.max())}. Ask for .png or .nrrd."
        raise LabelError(msg)
    options: dict[str, Any] = {}
    if path.suffix.lower() == ".png":
        options["compress_level"] = 6 if compress else 0
    elif path.suffix.lower() in {".tif", ".tiff"}:
        options["compression"] = "tiff_deflate" if compress else None
    Image.fromarray(np.ascontiguousarray(values.swapaxes(0, 1))).save(path, **options)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open and decode one picture, or say why not."""
    # Pillow leaves a file that it cannot identify to the garbage collector.
    with path.open("rb") as stream, Image.open(stream) as picture:
        pages = getattr(picture, "n_frames", 1)
        # A camera's MPO is a JPEG with previews behind it; its first frame is the picture.
        if pages > 1 and picture.format != "MPO":
            msg = (
                f"{path.name} holds {pages} pages; one picture a file is allowed. "
                "Save the pages as single pictures, or as a volume (.nii.gz, .nrrd)."
            )
            raise ImageError(msg)
        if picture.format == "TIFF" and picture.getexif().get(ExifTags.Base.Orientation, 1) > 4:
            # Pillow turns these by 90 degrees and ITK does not: a mask could not fit both.
            msg = (
                f"{path.name} is a TIFF with a 90 degree turn in its orientation tag, which "
                "viewers show differently. Save it upright."
            )
            raise ImageError(msg)
        picture.load()
        yield picture
