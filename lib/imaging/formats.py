"""Which file formats there are, by name and by first bytes."""

from pathlib import Path

from lib.errors import ImageError

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"})
NIFTI = frozenset({".nii", ".nii.gz"})
ITK = frozenset({".nrrd", ".nhdr", ".mha", ".mhd"})
DICOM = frozenset({".dcm", ".dicom", ".ima"})
WRITABLE = (".nii.gz", ".nii", ".nrrd", ".mha", ".png", ".tif", ".tiff", ".bmp")

# First bytes -> what the file is and the extensions under which readers find it.
_SIGNATURES: tuple[tuple[int, bytes, str, frozenset[str]], ...] = (
    # First, because the 128 bytes before the mark may be a TIFF header.
    (128, b"DICM", "a DICOM file", DICOM | {""}),
    (0, b"\x89PNG", "a PNG picture", PICTURES),
    (0, b"\xff\xd8\xff", "a JPEG picture", PICTURES),
    (0, b"II*\0", "a TIFF picture", PICTURES),
    (0, b"MM\0*", "a TIFF picture", PICTURES),
    (0, b"\x1f\x8b", "packed with gzip", frozenset({".nii.gz"})),
    (0, b"NRRD000", "a NRRD volume", frozenset({".nrrd", ".nhdr"})),
    (0, b"ObjectType", "a MetaImage volume", frozenset({".mha", ".mhd"})),
    (344, b"n+1\0", "a NIfTI volume that is not packed", frozenset({".nii"})),
    (4, b"n+2\0", "a NIfTI volume that is not packed", frozenset({".nii"})),
)


def extension_of(path: Path) -> str:
    """Lower-case extension with its dot, ".nii.gz" as one."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()


def check_signature(path: Path, extension: str) -> bool:
    """Refuse an empty or misnamed file; tell whether it says that it is DICOM."""
    with path.open("rb") as stream:
        head = stream.read(352)
    if not head:
        msg = f"{path.name} is empty (0 bytes). Copy it anew."
        raise ImageError(msg)
    kind = {e: kind for kind in (PICTURES, NIFTI, ITK, DICOM) for e in kind}.get(extension)
    for offset, signature, what, extensions in _SIGNATURES:
        if head[offset : offset + len(signature)] == signature:
            # DICOM often comes without any extension, or with a part of its UID as one.
            if extensions >= DICOM and kind is None:
                return True
            if extension not in extensions:
                named = extension or "without extension"
                msg = (
                    f"{path.name} is named {named} but is {what}. "
                    f"Rename it to {' or '.join(sorted(filter(None, extensions)))}."
                )
                raise ImageError(msg)
            break
    return extension in DICOM
