"""The image formats: how each is recognised, what reads it, and what has to be installed for it.

An ending says what a file probably is. Its first bytes say what it is.
"""

from typing import NamedTuple

FIRST_BYTES = 132  # as many as `recognised` needs


class Format(NamedTuple):
    """An image format."""

    name: str
    """As Pillow calls it, if Pillow knows it."""
    endings: tuple[str, ...]
    """In lower case."""
    reader: str
    """What decodes it: pillow, tiff, numpy or dicom."""
    package: str | None = None
    """The package that has to be installed besides; None: nothing."""
    extra: str | None = None
    """The extra of this project that installs the package."""


FORMATS = (
    Format("BMP", (".bmp", ".dib"), "pillow"),
    Format("GIF", (".gif",), "pillow"),
    Format("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif"), "pillow"),
    Format("JPEG2000", (".jp2", ".j2k", ".jpx"), "pillow"),
    Format("PNG", (".png",), "pillow"),
    Format("PPM", (".pgm", ".ppm", ".pbm", ".pnm"), "pillow"),
    Format("WEBP", (".webp",), "pillow"),
    Format("AVIF", (".avif",), "pillow"),
    Format("HEIF", (".heic", ".heif"), "pillow", "pillow_heif", "heif"),
    Format("TIFF", (".tif", ".tiff"), "tiff"),
    Format("NPY", (".npy",), "numpy"),
    Format("NPZ", (".npz",), "numpy"),
    Format("DICOM", (".dcm", ".dicom"), "dicom", "pydicom", "dicom"),
)
FORMAT_OF_ENDING: dict[str, Format] = {}
for _known in FORMATS:
    FORMAT_OF_ENDING |= dict.fromkeys(_known.endings, _known)
FORMAT_OF_NAME = {known.name: known for known in FORMATS}

SIGNATURES = (
    (0, b"BM", "BMP"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x00\x00\x00\x0cjP  ", "JPEG2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG2000"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"II*\x00", "TIFF"),
    (0, b"MM\x00*", "TIFF"),
    (0, b"II+\x00", "TIFF"),  # BigTIFF
    (0, b"MM\x00+", "TIFF"),
    (8, b"WEBP", "WEBP"),
    (0, b"\x93NUMPY", "NPY"),
    (128, b"DICM", "DICOM"),
)
"""Offset and bytes that tell a format."""
ZIP_START = b"PK\x03\x04"
# The brands of ISO base media files, in the bytes 8 to 12, after "ftyp".
AVIF_BRANDS = (b"avif", b"avis")
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def endings_not_read_by(reader: str) -> tuple[str, ...]:
    """Return the endings of the formats that another reader decodes."""
    endings: list[str] = []
    for known in FORMATS:
        if known.reader != reader:
            endings += known.endings
    return tuple(endings)


def recognised(first_bytes: bytes) -> Format | None:
    """Return the format that a file's first bytes tell, or None.

    Args:
        first_bytes: `FIRST_BYTES` of them; the whole file if it is shorter.
    """
    for offset, signature, name in SIGNATURES:
        if first_bytes[offset : offset + len(signature)] == signature:
            return FORMAT_OF_NAME[name]
    if first_bytes.startswith(ZIP_START) and is_npz(first_bytes):
        return FORMAT_OF_NAME["NPZ"]
    if first_bytes[4:8] == b"ftyp":
        if first_bytes[8:12] in AVIF_BRANDS:
            return FORMAT_OF_NAME["AVIF"]
        if first_bytes[8:12] in HEIF_BRANDS:
            return FORMAT_OF_NAME["HEIF"]
    is_netpbm = first_bytes[:1] == b"P" and first_bytes[1:2] in b"123456" and len(first_bytes) > 2
    if is_netpbm and first_bytes[2:3].isspace():
        return FORMAT_OF_NAME["PPM"]
    return None


def is_npz(first_bytes: bytes) -> bool:
    """Return whether the first file in a zip archive is an array, by its name.

    A name that does not end in these bytes may be that of an array.
    """
    name_length = int.from_bytes(first_bytes[26:28], "little")
    name = first_bytes[30 : 30 + name_length]
    return name.endswith(b".npy") or len(name) < name_length
