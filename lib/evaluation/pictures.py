"""Contact sheets: image, reference, mask found and truth side by side, for people who look."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lib.durable import publish, stage
from lib.types import FloatArray, IntArray

# Okabe and Ito's palette: told apart by colour-blind readers, too.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000")


@dataclass(frozen=True, eq=False)
class Panel:
    """One picture (H, W) or (H, W, 3) in 0..1 with an optional label map (H, W) over it."""

    title: str
    picture: FloatArray
    labels: IntArray | None = None


def data_address(panel: Panel, height: int) -> str:
    """A panel as a `data:` address of a small JPEG, its labels outlined: a page can hold it."""
    import base64

    return "data:image/jpeg;base64," + base64.b64encode(jpeg(panel, height)).decode()


def jpeg(panel: Panel, height: int, *, numbered: bool = False) -> bytes:
    """A panel as a JPEG, its labels outlined.

    Args:
        panel: what to draw.
        height: rows.
        numbered: write each label's number on it, for who cannot tell the colors apart.
    """
    import io

    from PIL import Image, ImageDraw
    from scipy.ndimage import binary_erosion

    picture = panel.picture if panel.picture.ndim == 3 else np.dstack([panel.picture] * 3)
    rows, columns = picture.shape[:2]
    width = max(1, round(height * columns / rows))
    small = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    pixels = np.array(small.resize((width, height), Image.Resampling.BILINEAR))
    places: dict[int, tuple[int, int]] = {}
    if panel.labels is not None:
        # looked up, not interpolated: the numbers are names
        row = (np.arange(height) + 0.5) * rows / height
        column = (np.arange(width) + 0.5) * columns / width
        labels = panel.labels[row.astype(int)][:, column.astype(int)]
        for value in np.unique(labels[labels > 0]):
            mask = labels == value
            edge = mask & ~binary_erosion(mask, iterations=2 if height > 150 else 1)
            color = COLORS[(int(value) - 1) % len(COLORS)]
            pixels[edge] = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
            places[int(value)] = _inside(mask)
    shown = Image.fromarray(pixels)
    if numbered:
        draw = ImageDraw.Draw(shown)
        for value, place in places.items():
            draw.text(
                place, str(value), fill="white", stroke_fill="black", stroke_width=2,
                anchor="mm", font_size=max(11, height // 18),
            )  # fmt: skip
    stream = io.BytesIO()
    shown.save(stream, "JPEG", quality=85)
    return stream.getvalue()


def _inside(mask: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Column and row of the point that lies deepest inside a mask (H, W)."""
    from scipy.ndimage import distance_transform_edt

    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    return int(column), int(row)


def contact_sheet(path: Path, rows: Sequence[Sequence[Panel]], *, title: str = "") -> None:
    """Write rows of panels as one PNG; labels are outlined and lightly filled."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = max(len(row) for row in rows)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(2.3 * columns, 2.5 * len(rows)), squeeze=False
    )
    for row, line in zip(rows, axes, strict=True):
        for axis in line:
            axis.axis("off")
        for panel, axis in zip(row, line, strict=False):
            axis.imshow(panel.picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(panel.title, fontsize=7)
            for value in np.unique(panel.labels) if panel.labels is not None else ():
                if value == 0:
                    continue
                color = COLORS[(int(value) - 1) % len(COLORS)]
                mask = panel.labels == value
                axis.contourf(mask, levels=[0.5, 1.5], colors=[color], alpha=0.25)
                axis.contour(mask, levels=[0.5], colors=[color], linewidths=0.9)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = stage(path, lambda file: figure.savefig(file, dpi=90, format="png"))
    plt.close(figure)
    publish(staged, path)
