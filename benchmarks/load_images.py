"""Images of the load: two structures that can be found, each image of a size of its own."""

import gzip
import io
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

SLICES = 5
NAMES = [{"name": "ball", "idx": 1}, {"name": "box", "idx": 2}]


@dataclass(frozen=True)
class Case:
    """An image of the studies.

    Attributes:
        name: its id.
        shape: (W, H) of a picture, (I, J, K) of a volume.
        center: of the ball, in pixels.
        radius: of the ball, in pixels.
    """

    name: str
    shape: tuple[int, ...]
    center: tuple[float, float]
    radius: float

    @property
    def ending(self) -> str:
        """Extension of its file and of its labels."""
        return ".png" if len(self.shape) == 2 else ".nii.gz"

    def truth(self, grow: float = 0.0) -> npt.NDArray[np.uint8]:
        """Label map, axes as `shape`; the ball may be drawn too large or too small."""
        i, j = np.mgrid[: self.shape[0], : self.shape[1]]
        distance = np.hypot(i - self.center[0], j - self.center[1])
        values = (distance < self.radius + grow).astype(np.uint8)
        values[3:12, 3:10] = 2
        if len(self.shape) == 3:
            values = np.repeat(values[:, :, None], self.shape[2], axis=2)
        return values

    def label(self, mark: str, grow: float) -> bytes:
        """A label file; the mark in its header makes it different from all others."""
        values, buffer = self.truth(grow), io.BytesIO()
        if self.ending == ".png":
            told = PngImagePlugin.PngInfo()
            told.add_text("mark", mark)
            Image.fromarray(values.T).save(buffer, "PNG", pnginfo=told)
            return buffer.getvalue()
        image = nib.Nifti1Image(values, _affine())
        image.header["descrip"] = mark.encode()
        return gzip.compress(image.to_bytes(), 1, mtime=0)

    def mask(self, data: bytes) -> npt.NDArray[np.uint8]:
        """A mask as the server sends it, axes as `shape`."""
        if self.ending == ".png":
            return np.asarray(Image.open(io.BytesIO(data))).T
        unpacked = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        return np.asarray(nib.Nifti1Image.from_bytes(unpacked).dataobj).astype(np.uint8)


def make_cases(studies: Path, count: int, volumes: int, *, seed: int) -> list[Case]:
    """Write the images; the last of them are volumes."""
    studies.mkdir(parents=True, exist_ok=True)
    cases = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        shape: tuple[int, ...] = tuple(int(side) for side in rng.integers(56, 120, 2))
        if number >= count - volumes:
            shape = (*shape, SLICES)
        center = (
            shape[0] / 2 + float(rng.uniform(-6, 6)),
            shape[1] / 2 + float(rng.uniform(-6, 6)),
        )
        case = Case(f"image {number}", shape, center, float(rng.uniform(9, 16)))
        truth = case.truth()
        values = 60 + 110 * (truth == 1) + 50 * (truth == 2) + rng.normal(0, 9, shape)
        path = studies / f"{case.name}{case.ending}"
        if case.ending == ".png":
            Image.fromarray(np.clip(values, 0, 255).astype(np.uint8).T).save(path)
        else:
            nib.save(nib.Nifti1Image(values.astype(np.int16), _affine()), path)
        cases.append(case)
    return cases


def _affine() -> npt.NDArray[np.float64]:
    return np.diag([-1.0, -1.0, 4.0, 1.0])
