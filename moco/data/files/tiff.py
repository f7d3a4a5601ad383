"""Reading TIFF files: of any bands and type by tifffile, 8-bit colours by Pillow.

Pillow knows palettes, CMYK, YCbCr and transparency. It takes other bands for colours, and cuts or
wraps values of more than 8 bits.
"""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from moco.data.files import pillow_images
from moco.data.files.deep_images import jpeg2000_header
from moco.data.files.encoded_image import (
    BYTES_PER_RGB_PIXEL,
    ImageHeader,
    Request,
    Window,
    image_type,
    joined_header,
    oriented,
    oriented_size,
    path_or_file,
    values_at,
)
from moco.data.files.jpeg_images import frame_size

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage

# The numbers of the TIFF 6.0 specification, and of its supplements.
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, SEPARATED, YCBCR = 0, 1, 2, 3, 5, 6
COLOURS_WITHOUT_RGB = {8: "CIELab", 9: "ICCLab", 10: "ITULab", 32844: "LogL", 32845: "LogLuv"}
PREMULTIPLIED = 1  # of the tag ExtraSamples
ALPHA_SAMPLES = (PREMULTIPLIED, 2)
REDUCED, MASK = 1, 4  # bits of the tag NewSubfileType
ORIENTATION, INK_SET, GDAL_METADATA, GDAL_NODATA = 274, 332, 42112, 42113
CMYK_INKS = 1
LZW, OLD_JPEG, JPEG = 5, 6, 7
JPEG_COMPRESSIONS = (OLD_JPEG, JPEG)
JPEG_2000_COMPRESSIONS = (33003, 33004, 33005, 34712)
NUM_KNOWN_FILES = 256  # stacks whose pages are remembered
LARGEST_XML = 2**24  # characters of metadata that are parsed


@contextmanager
def opened_tiff(source: bytes | str) -> Iterator["TiffFile"]:
    """Open a TIFF file, and read the tags of its first image."""
    import tifffile

    # It logs what is odd in a file. What matters here becomes an error.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)
    with tifffile.TiffFile(path_or_file(source)) as tiff:
        yield tiff


def num_pages(request: Request) -> int:
    """Return the number of images in a file, without overviews, thumbnails and masks."""
    with opened_tiff(request.source) as tiff:
        return len(numbers_of_pages(tiff))


def pages_of(tiff: "TiffFile") -> Iterator["TiffPage"]:
    """Yield the images of a file, without the overviews, thumbnails and masks after the first.

    Raises:
        ValueError: there is no image, or the chain of images has no end.
    """
    offsets = set()
    for number, any_page in enumerate(tiff.pages):
        page = cast("TiffPage", any_page)  # and no TiffFrame, unless one asks for those
        if page.offset in offsets:
            raise ValueError("the chain of images in this TIFF file leads back to itself")
        offsets.add(page.offset)
        if number == 0 or not int(page.subfiletype) & (REDUCED | MASK):
            yield page
    if not offsets:
        raise ValueError("a TIFF file without an image")


def chosen_pages(tiff: "TiffFile", request: Request) -> list["TiffPage"]:
    """Return the page that is asked for, or all.

    Raises:
        EOFError: there is no such page.
    """
    if request.page is None:
        return list(pages_of(tiff))
    if request.page == 0:  # most files have one image, which needs no walk over all pages
        return [next(pages_of(tiff))]
    if isinstance(request.source, str):
        status = os.stat(request.source)
        numbers = page_numbers(request.source, status.st_size, status.st_mtime_ns)
    else:
        numbers = numbers_of_pages(tiff)
    if request.page >= len(numbers):
        raise EOFError("attempt to seek outside sequence")  # Pillow's words
    return [cast("TiffPage", tiff.pages[numbers[request.page]])]


@lru_cache(NUM_KNOWN_FILES)
def page_numbers(path: str, size: int, mtime_ns: int) -> tuple[int, ...]:
    """Return the numbers of a file's images among all its pages.

    Reading the tags of all pages takes a quarter of a second for a thousand of them, so it is done
    once for the images of a file.

    Args:
        size: of the file; like the time of its last change it tells when it is another one.
    """
    with opened_tiff(path) as tiff:
        return numbers_of_pages(tiff)


def numbers_of_pages(tiff: "TiffFile") -> tuple[int, ...]:
    """Return the numbers of a file's images among all its pages."""
    return tuple(page.index for page in pages_of(tiff))


def read_header(request: Request) -> ImageHeader:
    """Return what is known of an image before it is decoded."""
    with opened_tiff(request.source) as tiff:
        pages = chosen_pages(tiff, request)
        request = raw_if_stack(request, pages)
        headers = [page_header(page, request) for page in pages]
        header = joined_header(headers)
        names = headers[0].band_names
        if names is None or len(names) != header.bands:
            names = ome_channel_names(tiff)
    if names is None or len(names) != header.bands:
        return header._replace(band_names=None)
    return header._replace(band_names=names)


def raw_if_stack(request: Request, pages: list["TiffPage"]) -> Request:
    """Return the request, for the bands of the file if several pages are joined."""
    if len(pages) > 1:
        return request._replace(raw=True)
    return request


def page_header(page: "TiffPage", request: Request) -> ImageHeader:
    """Return the header of one image.

    Raises:
        ValueError: it is no image of a type that is read.
    """
    if page.photometric in COLOURS_WITHOUT_RGB:
        raise ValueError(f"colours in {COLOURS_WITHOUT_RGB[page.photometric]}; expected RGB")
    check_tags(page, request.max_image_pixels)
    if page.imagedepth != 1:
        raise ValueError(f"a volume, {page.imagedepth} images deep")
    orientation = tag_value(page, ORIENTATION, 1)
    if orientation not in range(1, 9):
        orientation = 1
    size = oriented_size((page.imagelength, page.imagewidth), orientation)
    bands = page.samplesperpixel
    if are_colours(page) and not request.numbers:
        bands = colour_bands(page, request.raw)
    return ImageHeader(
        size,
        bands,
        image_type(np.dtype(page.dtype)),
        orientation,
        no_data=no_data_of(page),
        band_names=gdal_band_names(page),
    )


def tag_value(page: "TiffPage", tag: int, default: Any) -> Any:
    """Return the value of a tag, or the default if there is none."""
    value = page.tags.valueof(tag)
    if value is None:
        return default
    return value


def are_colours(page: "TiffPage") -> bool:
    """Return whether a page has 8-bit colours, which Pillow reads right."""
    if page.sampleformat != 1:
        return False
    bits = page.bitspersample
    samples = page.samplesperpixel
    extra = tuple(page.extrasamples)
    if page.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO, PALETTE) and samples == 1:
        return bits in (1, 2, 4, 8)
    if bits != 8:
        return False
    has_alpha = len(extra) == 1 and extra[0] in ALPHA_SAMPLES
    if page.photometric == BLACK_IS_ZERO:
        return samples == 2 and has_alpha and page.planarconfig == 1
    if page.photometric == RGB:
        return samples == 3 or (samples == 4 and has_alpha)
    if page.photometric == SEPARATED:
        return samples == 4 and not extra and tag_value(page, INK_SET, CMYK_INKS) == CMYK_INKS
    return page.photometric == YCBCR and samples == 3


def colour_bands(page: "TiffPage", raw: bool) -> int:
    """Return the number of bands in which colours are read."""
    if not raw or page.photometric in (PALETTE, SEPARATED):
        return 3
    return page.samplesperpixel


def no_data_of(page: "TiffPage") -> float | None:
    """Return the number in GDAL's tag for missing values; None if there is none."""
    with suppress(ValueError, TypeError):
        return float(tag_value(page, GDAL_NODATA, None))
    return None


def gdal_band_names(page: "TiffPage") -> tuple[str, ...] | None:
    """Return the descriptions that GDAL wrote for all bands of a page."""
    names: dict[int, str] = {}
    for item in xml_elements(tag_value(page, GDAL_METADATA, ""), "Item"):
        if item.get("role") == "description" and item.text:
            with suppress(ValueError):
                names[int(item.get("sample", "0"))] = item.text
    bands = range(page.samplesperpixel)
    if sorted(names) != list(bands):
        return None
    return tuple(names[band] for band in bands)


def ome_channel_names(tiff: "TiffFile") -> tuple[str, ...] | None:
    """Return the names of the channels in the metadata of OME; None if one has none."""
    names = []
    for channel in xml_elements(tiff.pages.first.description, "Channel"):
        names.append(channel.get("Name"))
    if not names or None in names:
        return None
    return tuple(map(str, names))


def xml_elements(text: Any, kind: str) -> list[ElementTree.Element]:
    """Return the elements of a kind in a text; none if it is no XML."""
    if not isinstance(text, str) or not text.lstrip().startswith("<") or len(text) > LARGEST_XML:
        return []
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return []
    found = []
    for element in root.iter():
        # The names of OME stand in a namespace: {http://...}Channel.
        _, _, name = element.tag.rpartition("}")
        if name == kind:
            found.append(element)
    return found


def read_pixels(request: Request, header: ImageHeader) -> np.ndarray:
    """Return the pixels of an image, (height, width, bands)."""
    arrays = []
    with opened_tiff(request.source) as tiff:
        pages = chosen_pages(tiff, request)
        request = raw_if_stack(request, pages)
        for page in pages:
            if are_colours(page) and not request.numbers and needs_pillow(tiff, page):
                # Its number among all pages, where overviews count.
                one_page = request._replace(page=page.index)
                colours = pillow_images.read_header(one_page)
                arrays.append(pillow_images.read_pixels(one_page, colours))
            else:
                whole = Window(0, 0, page.imagelength, page.imagewidth)
                array = read_part(tiff, page, whole, request)
                arrays.append(oriented(array, header.orientation))
    return np.concatenate(arrays, axis=2)


def read_window(request: Request, window: Window) -> np.ndarray | None:
    """Return a part of an image, (height, width, bands), or None if it has to be read whole."""
    arrays = []
    with opened_tiff(request.source) as tiff:
        pages = chosen_pages(tiff, request)
        request = raw_if_stack(request, pages)
        for page in pages:
            # The window counts from the top left of the turned image.
            is_upright = tag_value(page, ORIENTATION, 1) == 1
            if not is_upright or (are_colours(page) and not is_read_by_segments(page)):
                return None
            arrays.append(read_part(tiff, page, window, request))
    return np.concatenate(arrays, axis=2)


def needs_pillow(tiff: "TiffFile", page: "TiffPage") -> bool:
    """Return whether Pillow reads a whole page of colours.

    It also reads those in JPEG, whose last bits depend on the decoder, and in LZW, which it decodes
    up to 1.5 times as fast. In a big-endian BigTIFF file it finds no image.
    """
    if not is_read_by_segments(page):
        return True
    is_known_to_pillow = not tiff.is_bigtiff or tiff.byteorder == "<"
    return page.compression in (LZW, JPEG) and is_known_to_pillow


def read_part(tiff: "TiffFile", page: "TiffPage", window: Window, request: Request) -> np.ndarray:
    """Return a part of a page, (height, width, bands); without Pillow's decoders."""
    array = read_samples(tiff, page, window, request)
    if page.samplesperpixel != 4 or not are_colours(page):
        return array
    # RGB and alpha. Pillow divides the colours of "RGBa" by alpha.
    stored = "RGBA"
    if page.extrasamples[0] == PREMULTIPLIED:
        stored = "RGBa"
    size = (window.width, window.height)
    image = Image.frombytes("RGBA", size, array.tobytes(), "raw", stored)
    if request.raw:
        return np.array(image)
    return np.array(pillow_images.to_rgb(image))


def is_read_by_segments(page: "TiffPage") -> bool:
    """Return whether tifffile decodes the colours of a page as Pillow does."""
    if page.bitspersample != 8 or page.compression == OLD_JPEG:
        return False
    if page.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO):
        return page.samplesperpixel == 1
    if page.photometric == YCBCR:
        return page.compression == JPEG
    return page.photometric == RGB


def read_samples(
    tiff: "TiffFile", page: "TiffPage", window: Window, request: Request
) -> np.ndarray:
    """Return a part of a page as it is stored, (height, width, samples).

    Only the strips and tiles are read that the part touches. Where white is stored as 0, unsigned
    values are inverted.

    Raises:
        ValueError: the file is damaged, or a strip or tile is larger than an image may be.
    """
    if page.is_contiguous and page.is_final:
        array = contiguous_samples(tiff, page, window, request.source)
    else:
        array = np.empty((window.height, window.width, page.samplesperpixel), page.dtype)
        for number in segments_of(page, window):
            segment, top, left, sample = decoded_segment(tiff, page, number, request)
            paste(array, window, segment, top, left, sample)
    is_unsigned = array.dtype.kind in "bu"
    dtype = image_type(array.dtype)
    array = array.astype(dtype, copy=False)
    if page.photometric == WHITE_IS_ZERO and is_unsigned:
        return dtype.type(2**page.bitspersample - 1) - array
    return array


def contiguous_samples(
    tiff: "TiffFile", page: "TiffPage", window: Window, source: bytes | str
) -> np.ndarray:
    """Return a part of a page whose values follow each other in the file."""
    planes, _, height, width, samples = page.shaped
    start = page.dataoffsets[0]
    check_inside(tiff, start, page.nbytes)
    dtype = np.dtype(page.dtype).newbyteorder(tiff.byteorder)
    values = values_at(source, dtype, planes * height * width * samples, start)
    part = values.reshape(planes, height, width, samples)[:, window.rows, window.columns]
    return part.transpose(1, 2, 0, 3).reshape(window.height, window.width, page.samplesperpixel)


def segments_of(page: "TiffPage", window: Window) -> Iterator[int]:
    """Yield the numbers of the strips or tiles that a part of a page touches."""
    rows, columns = page.chunks[:2]
    if rows < 1 or columns < 1:
        raise ValueError(f"strips or tiles of {columns} x {rows} px")
    num_down = math.ceil(page.imagelength / rows)
    num_across = math.ceil(page.imagewidth / columns)
    num_planes = 1
    if page.planarconfig == 2:  # each band has strips or tiles of its own
        num_planes = page.samplesperpixel
    for plane in range(num_planes):
        for row in range(window.top // rows, math.ceil((window.top + window.height) / rows)):
            first = (plane * num_down + row) * num_across
            last_column = math.ceil((window.left + window.width) / columns)
            for column in range(window.left // columns, last_column):
                yield first + column


def decoded_segment(
    tiff: "TiffFile", page: "TiffPage", number: int, request: Request
) -> tuple[np.ndarray, int, int, int]:
    """Return a strip or tile, (height, width, samples), its top, its left and its first sample.

    Where a file holds no data for it, GDAL's value for missing pixels is in it, or 0.
    """
    if number >= min(len(page.dataoffsets), len(page.databytecounts)):
        raise ValueError(f"strip or tile {number + 1} is missing in the tags")
    offset, count = page.dataoffsets[number], page.databytecounts[number]
    check_inside(tiff, offset, count)
    data = None
    if offset and count:
        tiff.filehandle.seek(offset)
        data = tiff.filehandle.read(count)
    tables = {}
    if page.compression in JPEG_COMPRESSIONS:
        tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
    if data is not None:
        check_image_in_segment(page, data, request.max_image_pixels)
    segment, (sample, _, top, left, _), shape = page.decode(data, number, **tables)
    if segment is None:
        segment = np.full(shape, page.nodata, page.dtype)
    return segment[0], top, left, sample


def check_inside(tiff: "TiffFile", offset: int, count: int) -> None:
    """Raise ValueError if a part of a file lies behind its end."""
    size = tiff.filehandle.size
    if offset + count > size:
        raise ValueError(f"truncated: the file has {size} bytes, its tags say {offset + count}")


def check_image_in_segment(page: "TiffPage", data: bytes, max_image_pixels: int) -> None:
    """Raise ValueError if the JPEG in a strip or tile is larger than an image may be.

    Such an image says its size itself, and its decoder believes it.
    """
    if page.compression in JPEG_COMPRESSIONS:
        height, width = frame_size(data)
    elif page.compression in JPEG_2000_COMPRESSIONS:
        (height, width), _, _ = jpeg2000_header(data)
    else:
        return
    if height * width > max_image_pixels:
        raise ValueError(f"a JPEG of {width} x {height} px in a strip or tile")


def check_tags(page: "TiffPage", max_image_pixels: int) -> None:
    """Raise ValueError if tags make no sense, or a strip or tile is larger than an image may be.

    A number that should be one may be many, and thousands of them times thousands fill the memory.
    """
    sizes = (page.imagelength, page.imagewidth, page.imagedepth, page.samplesperpixel)
    chunk_sizes = (page.rowsperstrip, page.tilelength, page.tilewidth, page.tiledepth)
    for size in (*sizes, *chunk_sizes):
        if not isinstance(size, int):
            raise ValueError("wrong tags: several numbers for a size")
    if page.dtype is None:
        bits = page.bitspersample
        raise ValueError(f"values of {bits} bits in sample format {int(page.sampleformat)}")
    if page.is_contiguous and page.is_final:
        return  # it is read without strips
    num_bytes = math.prod(page.chunks) * page.dtype.itemsize
    if num_bytes > BYTES_PER_RGB_PIXEL * max_image_pixels:
        raise ValueError(
            f"a strip or tile of {num_bytes / 1e9:,.1f} GB exceeds "
            f"data.max_image_pixels={max_image_pixels}"
        )


def paste(
    array: np.ndarray, window: Window, segment: np.ndarray, top: int, left: int, sample: int
) -> None:
    """Copy into `array`, (height, width, samples), what a strip or tile has of a window.

    Args:
        segment: the strip or tile, (height, width, samples).
        top: its place in the page, px.
        left: its place in the page, px.
        sample: its first sample.
    """
    height, width, samples = segment.shape
    first_row, first_column = max(top, window.top), max(left, window.left)
    end_row = min(top + height, window.top + window.height)
    end_column = min(left + width, window.left + window.width)
    part = segment[first_row - top : end_row - top, first_column - left : end_column - left]
    rows = slice(first_row - window.top, end_row - window.top)
    columns = slice(first_column - window.left, end_column - window.left)
    array[rows, columns, sample : sample + samples] = part
