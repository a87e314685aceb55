"""Image and label files, most of them wrong in one way."""

import gzip
import io
import struct
import zlib
from collections.abc import Callable

import nibabel as nib
import numpy as np
import numpy.typing as npt
from PIL import Image

Generator = np.random.Generator
SHAPE = (24, 20, 4)
MANY_LABELS = (175, 100, 4)  # one for each voxel: 70,000


def picture(seed: int, mode: str = "L", form: str = "PNG") -> bytes:
    """A small noisy picture."""
    values = np.random.default_rng(seed).integers(0, 255, (20, 24), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).convert(mode).save(buffer, form)
    return buffer.getvalue()


def volume(seed: int) -> bytes:
    """A small noisy NIfTI volume."""
    return _nifti(np.random.default_rng(seed).integers(0, 900, SHAPE).astype(np.int16))


def make_file(rng: Generator) -> tuple[str, bytes]:
    """A name and bytes."""
    kind = list(FILES)[int(rng.integers(len(FILES)))]
    name, data = FILES[kind](rng)
    harm = rng.random()
    if harm < 0.15 and len(data) > 2:
        data = data[: int(rng.integers(1, len(data)))]
    elif harm < 0.35 and data:
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 9))):
            changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
        data = bytes(changed)
    elif harm < 0.37:
        data = rng.bytes(int(rng.integers(0, 3000)))
    return name, data


def _nifti(values: npt.NDArray[np.generic], affine: npt.NDArray[np.float64] | None = None) -> bytes:
    image = nib.Nifti1Image(values, np.diag([1.0, 1.0, 3.0, 1.0]) if affine is None else affine)
    return gzip.compress(image.to_bytes(), 1)


def _header(
    change: Callable[[bytearray, Generator], None],
) -> Callable[[Generator], tuple[str, bytes]]:
    def make(rng: Generator) -> tuple[str, bytes]:
        data = bytearray(gzip.decompress(volume(int(rng.integers(9)))))
        change(data, rng)
        packed = rng.random() < 0.5
        return ("x.nii.gz", gzip.compress(bytes(data), 1)) if packed else ("x.nii", bytes(data))

    return make


def _dims(data: bytearray, rng: Generator) -> None:
    dims = rng.choice([-1, 0, 1, 2, 5, 24, 4000, 32767], 8)
    struct.pack_into("<8h", data, 40, *map(int, dims))


def _huge(data: bytearray, _: Generator) -> None:
    struct.pack_into("<8h", data, 40, 3, 32767, 32767, 32767, 1, 1, 1, 1)


def _spacing(data: bytearray, rng: Generator) -> None:
    values = rng.choice([0.0, -1.0, np.nan, np.inf, 1e30, 1e-30], 8)
    struct.pack_into("<8f", data, 76, *map(float, values))


def _position(data: bytearray, rng: Generator) -> None:
    values = rng.choice([0.0, 1.0, np.nan, np.inf, -1e30], 12)
    struct.pack_into("<12f", data, 280, *map(float, values))


def _scale(data: bytearray, rng: Generator) -> None:
    struct.pack_into("<2f", data, 112, *map(float, rng.choice([0, np.nan, np.inf, -1e38], 2)))


def _kind(data: bytearray, rng: Generator) -> None:
    struct.pack_into("<2h", data, 70, int(rng.integers(0, 3000)), int(rng.integers(0, 130)))


def _start(data: bytearray, rng: Generator) -> None:
    struct.pack_into("<f", data, 108, float(rng.choice([-1, 0, 1e9, np.nan, 4000])))


def _labels(rng: Generator) -> tuple[str, bytes]:
    kind = int(rng.integers(7))
    shape = SHAPE if kind else tuple(int(n) for n in rng.integers(1, 40, 3))
    if kind == 3:
        shape = MANY_LABELS
    values: npt.NDArray[np.generic] = rng.integers(0, 3, shape).astype(np.uint8)
    if kind == 1:
        values = values.astype(np.float32) + 0.5
    elif kind == 2:
        values = -values.astype(np.int16)
    elif kind == 3:
        values = np.arange(np.prod(shape)).reshape(shape).astype(np.int32)
    elif kind == 4:
        values = np.full(shape, np.nan, np.float32)
    elif kind == 5:
        values = np.stack([values] * 2, -1)
    elif kind == 6:
        values = values.astype(np.float64) * 1e300
    return "label.nii.gz", _nifti(values)


def _bomb(_: Generator) -> tuple[str, bytes]:
    """16 MB of nothing in 16 kB."""
    return "x.nii.gz", _nifti(np.zeros((2048, 2048, 4), np.uint8))


def _big_png(rng: Generator) -> tuple[str, bytes]:
    """A PNG that claims to be large."""
    size = int(rng.choice([0, 1, 20_000, 65_535, 2**31 - 1]))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return "x.png", b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


def _picture(mode: str, form: str, name: str) -> Callable[[Generator], tuple[str, bytes]]:
    return lambda rng: (name, picture(int(rng.integers(9)), mode, form))


def _pages(rng: Generator) -> tuple[str, bytes]:
    frames = [Image.fromarray(rng.integers(0, 255, (9, 9), np.uint8)) for _ in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "TIFF", save_all=True, append_images=frames[1:])
    return "x.tif", buffer.getvalue()


def _nrrd(rng: Generator) -> tuple[str, bytes]:
    sizes = " ".join(str(int(n)) for n in rng.choice([0, 1, 4, 10**6, -3, 2**40], 3))
    extra = str(
        rng.choice(["", "data file: /etc/passwd", "data file: ../seed0.png", "byte skip: -1"])
    )
    coding = str(rng.choice(["raw", "gzip", "ascii", "hex", "bzip2", "nonsense"]))
    lines = ["NRRD0004", "type: short", "dimension: 3", f"sizes: {sizes}", f"encoding: {coding}"]
    lines += ["endian: little", extra, "", ""]
    return "x.nrrd", "\n".join(line for line in lines[:-2] if line).encode() + b"\n\n" + bytes(128)


def _mhd(rng: Generator) -> tuple[str, bytes]:
    file = str(
        rng.choice(["/etc/passwd", "LOCAL", "../datastore_v2.json", "LIST", "x%d.raw 1 9 1"])
    )
    size = " ".join(str(int(n)) for n in rng.choice([1, 4, 0, -1, 10**5], 3))
    text = f"ObjectType = Image\nNDims = 3\nDimSize = {size}\nElementType = MET_SHORT\n"
    return str(rng.choice(["x.mhd", "x.mha"])), (
        text + f"ElementDataFile = {file}\n"
    ).encode() + bytes(99)


FILES: dict[str, Callable[[Generator], tuple[str, bytes]]] = {
    "png": _picture("L", "PNG", "x.png"),
    "palette": _picture("P", "PNG", "x.png"),
    "1 bit": _picture("1", "PNG", "x.png"),
    "16 bit": _picture("I;16", "PNG", "x.png"),
    "color": _picture("RGB", "PNG", "x.png"),
    "transparent": _picture("RGBA", "PNG", "x.png"),
    "gray and alpha": _picture("LA", "PNG", "x.png"),
    "jpeg": _picture("L", "JPEG", "x.jpg"),
    "cmyk": _picture("CMYK", "JPEG", "x.jpeg"),
    "float tiff": _picture("F", "TIFF", "x.tiff"),
    "bmp": _picture("RGB", "BMP", "x.bmp"),
    "png called nifti": _picture("L", "PNG", "x.nii.gz"),
    "png called xml": _picture("L", "PNG", "x.xml"),
    "pages": _pages,
    "large png": _big_png,
    "nifti": lambda rng: ("x.nii.gz", volume(int(rng.integers(9)))),
    "nifti called png": lambda rng: ("x.png", volume(int(rng.integers(9)))),
    "labels": _labels,
    "bomb": _bomb,
    "huge": _header(_huge),
    "dims": _header(_dims),
    "spacing": _header(_spacing),
    "position": _header(_position),
    "scale": _header(_scale),
    "type": _header(_kind),
    "start": _header(_start),
    "nrrd": _nrrd,
    "mhd": _mhd,
    "empty": lambda rng: (str(rng.choice(["x.png", "x.nii.gz", "x.nrrd", "x.mha"])), b""),
}
