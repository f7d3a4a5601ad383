"""Reading PNG, PPM and JPEG 2000 images that Pillow would cut to 8 bits.

Every channel is a band with its true values, alpha too.
"""

import mmap
import re
import struct
from typing import NamedTuple

import numpy as np

from moco.data.files.encoded_image import (
    ImageHeader,
    Request,
    content_of,
    first_bytes,
    image_type,
    oriented,
    oriented_size,
)
from moco.data.files.pillow_images import (
    PNG_BIT_DEPTH_OFFSET,
    PNG_START,
    opened,
    orientation_of,
)

UINT16 = np.dtype(np.uint16)
PNG_BANDS = {0: 1, 2: 3, 4: 2, 6: 4}  # of the colour types grey, RGB, grey and alpha, RGBA
# "P5", width, height and largest value, with white space and comments between them.
NETPBM_START = re.compile(rb"P([2356])" + 3 * rb"(?:\s|#[^\n]*\n)+(\d{1,9})" + rb"\s")
NETPBM_BYTES = 4096  # the header is in these, comments included
COMMENT = re.compile(rb"#[^\n]*")
CODESTREAM = b"\xff\x4f\xff\x51"  # of JPEG 2000: its two first markers, start and size
ALPHA_KINDS = (1, 2)  # of a channel of JPEG 2000: opacity, and premultiplied opacity


class Netpbm(NamedTuple):
    """The header of a PPM or PGM file."""

    is_text: bool
    bands: int
    width: int
    height: int
    largest: int
    """The largest value that a pixel may have."""
    length: int
    """Of the header, bytes."""


def is_deep(name: str, source: bytes | str) -> bool:
    """Return whether an image of this format has more than 8 bits, or bands that are no colours.

    Args:
        name: of the format, see `moco.data.files.formats`.
    """
    if name == "PNG":
        start = first_bytes(source, PNG_BIT_DEPTH_OFFSET + 1)
        return len(start) > PNG_BIT_DEPTH_OFFSET and start[-1] == 16
    if name == "PPM":
        header = netpbm_header(first_bytes(source, NETPBM_BYTES))
        return header is not None and header.largest > 255
    if name == "JPEG2000":
        with content_of(source) as content:
            _, bands, dtype = jpeg2000_header(content)
            has_alpha = has_jpeg2000_alpha(content)
        are_colours = bands in (1, 3) or (bands in (2, 4) and has_alpha)
        return dtype != np.uint8 or not are_colours
    return False


def num_pages(request: Request) -> int:
    """Return 1: these files hold one image."""
    return 1


def read_header(request: Request) -> ImageHeader:
    """Return what is known of an image before it is decoded."""
    if request.page:
        raise EOFError(f"no image {request.page + 1} in this file")
    start = first_bytes(request.source, NETPBM_BYTES)
    if start.startswith(PNG_START):
        with opened(request.source, request.max_image_pixels, request.name) as image:
            orientation = orientation_of(image, request.source)
            size = oriented_size((image.height, image.width), orientation)
        bands = PNG_BANDS[start[PNG_BIT_DEPTH_OFFSET + 1]]
        return ImageHeader(size, bands, UINT16, orientation)
    netpbm = netpbm_header(start)
    if netpbm is not None:
        return ImageHeader((netpbm.height, netpbm.width), netpbm.bands, UINT16)
    with content_of(request.source) as content:
        size, bands, dtype = jpeg2000_header(content)
    return ImageHeader(size, bands, image_type(dtype))


def read_pixels(request: Request, header: ImageHeader) -> np.ndarray:
    """Return the pixels of an image, (height, width, bands)."""
    import imagecodecs

    with content_of(request.source) as content:
        start = content[:NETPBM_BYTES]
        netpbm = netpbm_header(start)
        if netpbm is not None:
            return netpbm_pixels(content, netpbm)
        if start.startswith(PNG_START):
            pixels = imagecodecs.png_decode(content)
        else:
            pixels = imagecodecs.jpeg2k_decode(content)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    # A colour that a PNG calls transparent comes as one more channel, which is none of its bands.
    return oriented(pixels[..., : header.bands], header.orientation)


def netpbm_header(start: bytes) -> Netpbm | None:
    """Return the header of a PPM or PGM file, or None for any other file."""
    found = NETPBM_START.match(start)
    if found is None:
        return None
    kind, width, height, largest = map(int, found.groups())
    is_text = kind in (2, 3)
    bands = 1
    if kind in (3, 6):
        bands = 3
    return Netpbm(is_text, bands, width, height, largest, found.end())


def netpbm_pixels(content: bytes | mmap.mmap, header: Netpbm) -> np.ndarray:
    """Return the pixels of a PPM or PGM file with more than 8 bits.

    Raises:
        ValueError: there are too few of them, or larger ones than the header says.
    """
    shape = (header.height, header.width, header.bands)
    count = header.height * header.width * header.bands
    if header.is_text:
        words = COMMENT.sub(b"", content[header.length :]).split()
        values = np.array(words[:count], dtype=np.int64)
    else:
        body = content[header.length : header.length + 2 * count]
        values = np.frombuffer(body, dtype=">u2", count=len(body) // 2)
    if len(values) < count:
        raise ValueError(f"truncated: {len(values)} of {count} values")
    least, largest = values.min(), values.max()
    if least < 0 or largest > header.largest:
        raise ValueError(f"values from {least} to {largest}, expected 0 to {header.largest}")
    return values.astype(np.uint16).reshape(shape)


def jpeg2000_header(content: bytes | mmap.mmap) -> tuple[tuple[int, int], int, np.dtype]:
    """Return size, bands and type of a JPEG 2000 image, by ISO/IEC 15444-1, A.5.1.

    Raises:
        ValueError: there is no such header, or the channels differ in type or size.
    """
    place = content.find(CODESTREAM)
    fields = content[place + 4 : place + 42]
    if place < 0 or len(fields) < 38:
        raise ValueError("a JPEG 2000 file without a codestream")
    # Behind the segment's length and the capabilities: four numbers of 32 bits, in this order.
    right, bottom, left, top = struct.unpack(">4I", fields[4:20])
    bands = int.from_bytes(fields[36:38], "big")
    channels = content[place + 42 : place + 42 + 3 * bands]
    if not channels or channels != channels[:3] * bands or channels[1:3] != b"\1\1":
        raise ValueError("a JPEG 2000 file whose channels differ in type or size")
    is_signed, bits = channels[0] >= 128, channels[0] % 128 + 1
    if bits > 16:
        raise ValueError(f"a JPEG 2000 file of {bits} bits, expected at most 16")
    name = "uint8"
    if bits > 8:
        name = "uint16"
    if is_signed:
        name = name.removeprefix("u")
    return (bottom - top, right - left), bands, np.dtype(name)


def has_jpeg2000_alpha(content: bytes | mmap.mmap) -> bool:
    """Return whether the header of a JPEG 2000 file says that a channel is alpha.

    Its box "cdef" lists number, kind and colour of each channel (ISO/IEC 15444-1, I.5.3.6).
    """
    place = content.find(b"cdef", 0, max(content.find(CODESTREAM), 0))
    if place < 0:
        return False
    count = int.from_bytes(content[place + 4 : place + 6], "big")
    for number in range(count):
        kind = place + 6 + 6 * number + 2
        if int.from_bytes(content[kind : kind + 2], "big") in ALPHA_KINDS:
            return True
    return False
