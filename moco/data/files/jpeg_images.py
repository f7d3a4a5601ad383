"""Reading JPEGs by libjpeg-turbo (simplejpeg), bit for bit as Pillow does and faster."""

import numpy as np
import simplejpeg

from moco.data.files.encoded_image import ImageHeader, Request, oriented, oriented_size
from moco.data.files.pillow_images import UINT8, orientation_in

# simplejpeg's names of the colours that it decodes as Pillow does. It also reads CMYK, but the
# resulting colours differ.
COLORS = ("Gray", "RGB", "YCbCr")
START = b"\xff\xd8\xff"
SCAN, APP1 = 0xDA, 0xE1  # markers: the pixels follow; a segment that may hold EXIF
EXIF_START = b"Exif\0\0"


def read_header(request: Request) -> ImageHeader | None:
    """Return the header of a JPEG that simplejpeg decodes as Pillow does, else None.

    This takes a tenth of the time that Pillow takes.
    """
    content = request.source
    if not isinstance(content, bytes) or not content.startswith(START) or request.page:
        return None
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    if color not in COLORS or height * width > request.max_image_pixels:
        return None
    bands = 3
    if request.raw and color == "Gray":
        bands = 1
    exif = exif_of(content)
    if exif is None:
        return ImageHeader((height, width), bands, UINT8)
    orientation = orientation_in(exif)
    return ImageHeader(oriented_size((height, width), orientation), bands, UINT8, orientation)


def read_pixels(request: Request, header: ImageHeader) -> np.ndarray:
    """Return the pixels of an image, (height, width, bands) uint8.

    Raises:
        ValueError: it is damaged. Pillow can read some of these files, and its messages say more.
    """
    pixels = simplejpeg.decode_jpeg(request.source, "GRAY" if header.bands == 1 else "RGB")
    return oriented(pixels, header.orientation)


def exif_of(jpeg: bytes) -> bytes | None:
    """Return the EXIF of a JPEG, found by a walk over its segments; None if there is none."""
    place = 2
    while place + 4 <= len(jpeg) and jpeg[place] == 0xFF:
        marker = jpeg[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        if marker == SCAN:
            return None
        end = place + 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
        if marker == APP1 and jpeg.startswith(EXIF_START, place + 4):
            return jpeg[place + 4 : end]
        place = end
    return None
