"""Images of any format, bands and type come out as they are in the file, to the last bit."""

import io
import itertools
import struct
import zlib
from itertools import product

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps, features

from moco.data.files.images import (
    MAX_IMAGE_PIXELS,
    UnreadableImage,
    encoded,
    encoded_file,
    header,
    read_mask,
    read_window,
    to_rgb,
)
from moco.data.files.listing import listed
from tests.conftest import thinned

TYPES = ("uint8", "uint16", "int16", "int32", "uint32", "float16", "float32", "float64")


def values(generator, dtype, bands, height=20, width=31):
    """Return an image with values over the range of its type."""
    if np.dtype(dtype).kind == "f":
        return generator.normal(0, 1000, (height, width, bands)).astype(dtype)
    bounds = np.iinfo(dtype)
    size = (height, width, bands)
    return generator.integers(bounds.min, bounds.max, size, dtype=dtype, endpoint=True)


def tiff(array, **options):
    with io.BytesIO() as file:
        tifffile.imwrite(file, array, **options)
        return file.getvalue()


def saved(save, *arguments, **options):
    with io.BytesIO() as file:
        save(file, *arguments, **options)
        return file.getvalue()


def assert_is(content, expected, page=0, **options):
    """Check size, bands and type before decoding, and every pixel after it."""
    image = encoded(content, "x", MAX_IMAGE_PIXELS, page, **options)
    assert (image.size, image.bands) == (expected.shape[:2], expected.shape[2])
    assert image.dtype == expected.dtype
    pixels = image.pixels()
    assert pixels.dtype == expected.dtype
    assert pixels.dtype.isnative
    assert pixels.flags.c_contiguous
    assert np.array_equal(pixels, expected, equal_nan=expected.dtype.kind == "f")


def given_out(array):
    """Return an image as it is given out: 8-bit grey becomes RGB."""
    if array.dtype == np.uint8 and array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    return array


@pytest.mark.parametrize(
    ("dtype", "bands"), thinned(itertools.product(TYPES, [1, 2, 3, 4, 13]), every=3)
)
def test_a_tiff_of_any_type_bands_layout_and_compression_keeps_its_values(dtype, bands, generator):
    array = values(generator, dtype, bands)
    layouts = ("contig", "separate") if bands > 1 else (None,)
    for layout, compression, tile in product(
        layouts, (None, "lzw", "deflate", "zstd"), (None, (16, 16))
    ):
        stored = array.transpose(2, 0, 1) if layout == "separate" else array
        content = tiff(
            stored if bands > 1 else array[..., 0],
            photometric="minisblack",
            planarconfig=layout,
            compression=compression,
            predictor=compression is not None and dtype != "float16",
            tile=tile,
            extrasamples=(0,) * (bands - 1),
            bigtiff=tile is not None,
            byteorder=">" if compression == "lzw" else "<",
        )
        assert_is(content, given_out(array))
        assert_is(content, array, raw=True)


@pytest.mark.parametrize("bits", [1, 2, 4, 12])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_packed_bits_are_unpacked_and_white_is_the_largest_value(bits, photometric, generator):
    dtype = np.uint16 if bits > 8 else np.uint8
    numbers = generator.integers(0, 2**bits, (9, 16, 1)).astype(dtype)
    packed = imagecodecs.packints_encode(numbers[..., 0], bits)
    content = packed_tiff(packed, (9, 16), bits, 1 if photometric == "minisblack" else 0)
    shown = numbers if photometric == "minisblack" else 2**bits - 1 - numbers
    if bits == 12:
        assert_is(content, shown)
    else:
        with Image.open(io.BytesIO(content)) as image:
            assert_is(content, np.asarray(to_rgb(image)))
        stretched = (shown * (255 // (2**bits - 1))).astype(np.uint8)
        assert_is(content, stretched, raw=True)


def packed_tiff(packed, size, bits, photometric):
    """Write a TIFF of packed grey values by its specification."""
    height, width = size
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: photometric,
        273: 8 + 2 + 10 * 12 + 4,
        277: 1,
        278: height,
        279: len(packed),
        284: 1,
    }
    directory = len(tags).to_bytes(2, "little")
    for tag, value in tags.items():
        entry = (tag, 2), (4, 2), (1, 4), (value, 4)
        directory += b"".join(number.to_bytes(length, "little") for number, length in entry)
    return b"II*\0" + (8).to_bytes(4, "little") + directory + bytes(4) + packed


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int16", "float32"])
def test_where_white_is_zero_unsigned_values_are_inverted(dtype, generator):
    array = values(generator, dtype, 1)
    content = tiff(array[..., 0], photometric="miniswhite", compression="deflate")
    if np.dtype(dtype).kind == "u":
        array = np.iinfo(dtype).max - array
    assert_is(content, array)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg"])
def test_eight_bit_colours_of_a_tiff_are_those_of_pillow(mode, compression, generator):
    if compression == "jpeg" and mode in ("1", "LA", "P", "RGBA"):
        return
    image = Image.fromarray(values(generator, "uint8", 4, 24, 40)).convert(mode)
    content = saved(image.save, "TIFF", compression=compression)
    with Image.open(io.BytesIO(content)) as stored:
        assert stored.mode == mode
        assert_is(content, np.asarray(to_rgb(stored)))
    bands = {"1": "L", "P": "RGB", "CMYK": "RGB"}.get(mode, mode)
    with Image.open(io.BytesIO(content)) as stored:
        expected = np.asarray(stored.convert(bands))
    assert_is(content, expected.reshape(24, 40, -1), raw=True)


@pytest.mark.parametrize("compression", ["jpeg2000", "webp", "jpegxl", "lerc", "png", "lzma"])
@pytest.mark.parametrize("bands", [1, 3, 4])
def test_colours_in_compressions_that_pillow_does_not_know_are_read(compression, bands, generator):
    array = values(generator, "uint8", bands)
    options = {"photometric": "rgb" if bands > 1 else "minisblack"}
    if bands == 4:
        options["extrasamples"] = [2]
    if compression == "webp" and bands == 1:
        return
    settings = {"jpeg2000": {"level": 0}, "webp": {"lossless": True}, "jpegxl": {"lossless": True}}
    options["compressionargs"] = settings.get(compression)
    content = tiff(array if bands > 1 else array[..., 0], compression=compression, **options)
    stored = array
    if compression == "webp" and bands == 4:
        stored = encoded(content, "x", 10**6, raw=True).pixels()  # colours under alpha 0 are lost
        assert np.array_equal(stored[stored[..., 3] > 0], array[array[..., 3] > 0])
    assert_is(content, stored, raw=True)
    image = Image.fromarray(stored if bands > 1 else array[..., 0])
    assert_is(content, np.asarray(to_rgb(image)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_a_fourth_band_is_alpha_only_if_the_file_says_so(dtype, extra, generator):
    array = values(generator, dtype, 4)
    content = tiff(array, photometric="rgb", extrasamples=[extra])
    if dtype == "uint8" and extra > 0:
        with Image.open(io.BytesIO(content)) as image:
            assert_is(content, np.asarray(to_rgb(image)))
            expected = np.asarray(image)
            assert image.mode == "RGBA"
        assert_is(content, expected, raw=True)
    else:
        assert_is(content, array)
        assert_is(content, array, raw=True)


def test_four_bands_without_a_word_about_them_are_bands(generator):
    array = values(generator, "uint8", 4)
    content = tiff(array, photometric="rgb", extrasamples=[2])
    tag = struct.pack("<HHI", 338, 3, 1)  # ExtraSamples
    assert content.count(tag) == 1
    assert_is(content.replace(tag, struct.pack("<HHI", 65000, 3, 1)), array)


def test_signed_bytes_become_sixteen_bits_and_other_types_are_named(generator):
    array = values(generator, "int8", 2)
    content = tiff(array, photometric="minisblack", extrasamples=[0])
    assert_is(content, array.astype(np.int16))
    for dtype in ("uint64", "int64", "complex64"):
        with pytest.raises(UnreadableImage, match=rf"^x: values of type {dtype}; expected one of"):
            encoded(saved(np.save, np.ones((4, 4), dtype)), "x", MAX_IMAGE_PIXELS)
    lab = tiff(values(generator, "uint8", 3), photometric="cielab")
    with pytest.raises(UnreadableImage, match=r"^x: colours in CIELab; expected RGB$"):
        encoded(lab, "x", MAX_IMAGE_PIXELS)


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_sixteen_bit_png_keeps_its_values(bands, generator):
    array = values(generator, "uint16", bands)
    content = imagecodecs.png_encode(array if bands > 1 else array[..., 0])
    assert_is(content, array)
    assert_is(content, array, raw=True)
    if bands in (1, 3):  # a colour that is transparent is no band
        number = ">H" if bands == 1 else ">HHH"
        colour = png_chunk(b"tRNS", struct.pack(number, *array[0, 0].tolist()))
        place = content.index(b"IDAT") - 4
        assert_is(content[:place] + colour + content[place:], array)


@pytest.mark.parametrize("largest", [300, 4095, 65535])
@pytest.mark.parametrize("kind", [b"P2", b"P3", b"P5", b"P6"])
def test_sixteen_bit_ppm_keeps_its_values(kind, largest, generator):
    bands = 3 if kind in (b"P3", b"P6") else 1
    array = generator.integers(0, largest, (5, 7, bands), np.uint16, endpoint=True)
    header = b"%b # a comment\n7 5\n# and one more\n%d\n" % (kind, largest)
    if kind in (b"P5", b"P6"):
        body = array.astype(">u2").tobytes()
    else:
        body = b" ".join(b"%d" % value for value in array.ravel()) + b" # the end"
    assert_is(header + body, array)
    with pytest.raises(UnreadableImage, match=r"^x: truncated: "):
        encoded(header + body[: len(body) // 2], "x", MAX_IMAGE_PIXELS).pixels()


@pytest.mark.parametrize("container", ["jp2", "j2k"])
@pytest.mark.parametrize(
    ("dtype", "bands"), [("uint16", 1), ("uint16", 3), ("int16", 1), ("uint8", 5)]
)
def test_jpeg_2000_keeps_bits_and_bands(container, dtype, bands, generator):
    array = values(generator, dtype, bands)
    stored = array if bands > 1 else array[..., 0]
    content = imagecodecs.jpeg2k_encode(stored, level=0, codecformat=container)
    assert_is(content, array)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "AVIF", "HEIF", "JPEG2000", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_eight_bit_images_are_those_of_pillow_and_raw_ones_keep_their_bands(
    file_format, mode, generator
):
    if file_format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    if file_format == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    image = Image.fromarray(values(generator, "uint8", 4, 16, 24)).convert(mode)
    if mode == "P" and file_format in ("WEBP", "AVIF", "HEIF", "JPEG2000"):
        return
    options = {"lossless": True} if file_format == "WEBP" else {}
    content = saved(image.save, file_format, **options)
    with Image.open(io.BytesIO(content)) as stored:
        expected = np.asarray(to_rgb(stored))
        bands = stored.mode
        if bands == "P":
            bands = "RGBA" if "transparency" in stored.info else "RGB"
        raw = np.asarray(stored.convert(bands)).reshape(16, 24, -1)
    assert_is(content, expected)
    assert_is(content, raw, raw=True)


def upright(array, orientation):
    """Return what Pillow makes of an image that is stored in one of EXIF's eight ways."""
    planes = []
    for band in range(array.shape[2]):
        image = Image.fromarray(array[..., band].astype(np.int32))
        image.getexif()[274] = orientation
        planes.append(np.asarray(ImageOps.exif_transpose(image)))
    return np.stack(planes, axis=2).astype(array.dtype)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_exif_is_applied_in_every_format(orientation, generator, tmp_path):
    exif = Image.Exif()
    exif[274] = orientation
    exif = exif.tobytes()  # a TIFF would take the orientation out of the object
    note = png_chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))
    array = values(generator, "uint8", 3, 16, 24)
    grey = array[..., :1]
    for file_format, options in (
        ("JPEG", {}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("AVIF", {}),
        ("TIFF", {}),
    ):
        if file_format == "AVIF" and not features.check("avif"):
            continue
        content = saved(Image.fromarray(array).save, file_format, exif=exif, **options)
        with Image.open(io.BytesIO(content)) as image:
            assert_is(content, np.asarray(ImageOps.exif_transpose(image).convert("RGB")))
    content = saved(Image.fromarray(grey[..., 0]).save, "JPEG", exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        assert_is(content, np.asarray(ImageOps.exif_transpose(image))[..., None], raw=True)

    for dtype, bands in (("uint16", 13), ("float32", 1), ("uint8", 5)):
        stored = values(generator, dtype, bands)
        content = tiff(
            stored if bands > 1 else stored[..., 0],
            photometric="minisblack",
            extrasamples=(0,) * (bands - 1),
            extratags=[(274, "H", 1, orientation, True)],
        )
        turned = {1: stored, 6: np.rot90(stored, -1), 8: np.rot90(stored), 3: np.rot90(stored, 2)}
        expected = turned.get(orientation)
        if expected is None:
            mirrored = {2: (1,), 4: (0,), 5: (), 7: (0, 1)}[orientation]
            expected = stored.swapaxes(0, 1) if orientation in (5, 7) else stored
            expected = np.flip(expected, mirrored)
        assert_is(content, expected)

    deep = values(generator, "uint16", 1)
    content = imagecodecs.png_encode(deep[..., 0])
    for place in (content.index(b"IDAT") - 4, content.index(b"IEND") - 4):  # also after the pixels
        assert_is(content[:place] + note + content[place:], upright(deep, orientation))
    eight = saved(Image.fromarray(array).save, "PNG")
    place = eight.index(b"IEND") - 4
    assert_is(eight[:place] + note + eight[place:], upright(array, orientation))

    mask = (grey % 7)[..., 0]
    (tmp_path / "mask.png").write_bytes(saved(Image.fromarray(mask).save, "PNG", exif=exif))
    assert np.array_equal(
        read_mask(str(tmp_path / "mask.png")), upright(mask[..., None], orientation)[..., 0]
    )


def test_damaged_exif_notes_nothing(generator):
    image = Image.fromarray(values(generator, "uint8", 3, 16, 24))
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense", b"Exif\0\0"):
        for file_format in ("JPEG", "PNG", "WEBP"):
            assert encoded(saved(image.save, file_format, exif=exif), "x", 10**6).size == (16, 24)
    wrong = Image.Exif()
    wrong[274] = 77
    assert encoded(saved(image.save, "JPEG", exif=wrong), "x", 10**6).size == (16, 24)


def png_chunk(kind, content):
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


@pytest.mark.parametrize("dtype", [*TYPES, "bool"])
def test_numpy_files_hold_bands_first_or_last(dtype, generator, tmp_path):
    for bands in (1, 3, 7):
        array = values(generator, "uint8" if dtype == "bool" else dtype, bands)
        if dtype == "bool":
            array = array > 127
        shown = array * np.uint8(255) if dtype == "bool" else array
        forms = [array, array.transpose(2, 0, 1), np.asfortranarray(array)]
        forms.append(array.astype(array.dtype.newbyteorder(">")))
        if bands == 1:
            forms.append(array[..., 0])
        for form in forms:
            content = saved(np.save, form)
            assert_is(content, given_out(shown))
            (tmp_path / "x.npy").write_bytes(content)
            mapped = encoded_file(str(tmp_path / "x.npy"), "x", MAX_IMAGE_PIXELS, raw=True)
            assert isinstance(mapped.source, str)
            assert np.array_equal(mapped.pixels(), shown)
    assert_is(saved(np.save, array[:5, :9, :5]), shown[:5, :9, :5])  # equal: the last


def test_stacks_and_archives_of_numpy_are_pages_or_bands(generator):
    stack = generator.integers(0, 60000, (4, 6, 8, 3), np.uint16)
    for page in range(4):
        assert_is(saved(np.save, stack), stack[page], page=page)
    assert_is(saved(np.save, stack), np.concatenate(stack, axis=2), page=None)
    bands = {"red": stack[0, ..., 0], "nir": stack[1, ..., 0], "swir": stack[2, ..., 0]}
    for save in (np.savez, np.savez_compressed):
        content = saved(save, **bands)
        assert_is(content, bands["nir"][..., None], page=1)
        assert_is(content, np.stack(list(bands.values()), axis=2), page=None)
        assert encoded(content, "x", 10**6, None).band_names == ("red", "nir", "swir")
        with pytest.raises(UnreadableImage, match=r"^x: there is no image 4 among 3$"):
            encoded(content, "x", 10**6, 3)
    mixed = saved(np.savez, a=stack[0], b=stack[0, :5])
    with pytest.raises(
        UnreadableImage, match=r"^x: page 2 has 8 x 5 px of uint16, page 1 has 8 x 6"
    ):
        encoded(mixed, "x", 10**6, None)


def test_the_pages_of_all_stacks_below_a_folder_are_counted(generator, tmp_path):
    stack = generator.integers(0, 60000, (4, 6, 8), np.uint16)
    np.save(tmp_path / "a.npy", stack[..., None])
    np.savez(tmp_path / "b.npz", *stack[:3])
    tifffile.imwrite(tmp_path / "c.tif", stack[:2], photometric="minisblack")
    Image.fromarray(stack[0]).save(tmp_path / "d.png")
    assert listed([str(tmp_path)], "each").num_pages.tolist() == [4, 3, 2, 1]
    assert listed([str(tmp_path)], "first").num_pages.tolist() == [1, 1, 1, 1]


def test_pages_of_a_tiff_are_images_or_bands_and_overviews_are_neither(generator, tmp_path):
    stack = values(generator, "uint16", 5).transpose(2, 0, 1)
    path = str(tmp_path / "x.tif")
    with tifffile.TiffWriter(path, ome=True) as writer:
        names = {"Channel": {"Name": ["DAPI", "GFP", "RFP", "Cy5", "BF"]}}
        writer.write(stack, photometric="minisblack", metadata={"axes": "CYX", **names})
    joined = encoded_file(path, "x", MAX_IMAGE_PIXELS, None)
    assert np.array_equal(joined.pixels(), stack.transpose(1, 2, 0))
    assert joined.band_names == ("DAPI", "GFP", "RFP", "Cy5", "BF")
    assert header(path) == ((20, 31), 1, np.dtype(np.uint16), 5)
    assert header(path, page=None).bands == 5
    for page in range(5):
        image = encoded_file(path, "x", MAX_IMAGE_PIXELS, page)
        assert np.array_equal(image.pixels()[..., 0], stack[page])
        assert image.band_names is None

    rgb = values(generator, "uint8", 3)
    with tifffile.TiffWriter(path) as writer:
        writer.write(rgb, photometric="rgb")
        writer.write(rgb[::2, ::2], photometric="rgb", subfiletype=1)  # an overview
        writer.write(rgb[::-1], photometric="rgb")
    assert header(path).pages == 2
    assert np.array_equal(encoded_file(path, "x", MAX_IMAGE_PIXELS, 1).pixels(), rgb[::-1])
    assert encoded_file(path, "x", MAX_IMAGE_PIXELS, None).bands == 6
    with pytest.raises(UnreadableImage, match="attempt to seek outside sequence"):
        encoded_file(path, "x", MAX_IMAGE_PIXELS, 2)


def test_values_for_missing_pixels_and_names_of_bands_come_from_the_file(generator):
    array = values(generator, "int16", 2)
    descriptions = "".join(
        f'<Item name="DESCRIPTION" sample="{band}" role="description">{name}</Item>'
        for band, name in enumerate(("B04", "B08"))
    )
    content = tiff(
        array,
        photometric="minisblack",
        extrasamples=[0],
        extratags=[
            (42113, "s", 0, "-9999", True),
            (42112, "s", 0, f"<GDALMetadata>{descriptions}</GDALMetadata>", True),
        ],
    )
    image = encoded(content, "x", MAX_IMAGE_PIXELS)
    assert (image.no_data, image.band_names) == (-9999.0, ("B04", "B08"))
    plain = encoded(tiff(array, photometric="minisblack"), "x", MAX_IMAGE_PIXELS)
    assert (plain.no_data, plain.band_names) == (None, None)
    nan = tiff(array, photometric="minisblack", extratags=[(42113, "s", 0, "nan", True)])
    assert np.isnan(encoded(nan, "x", MAX_IMAGE_PIXELS).no_data)


WINDOWED = [
    {"compression": None},
    {"compression": "deflate", "tile": (16, 16)},
    {"compression": "lzw", "rowsperstrip": 3, "predictor": True},
    {"compression": None, "rowsperstrip": 5, "byteorder": ">"},
]


@pytest.mark.parametrize("options", WINDOWED)
@pytest.mark.parametrize(
    ("dtype", "bands", "kind"),
    [
        ("uint16", 13, {"photometric": "minisblack", "planarconfig": "separate"}),
        ("uint16", 13, {"photometric": "minisblack", "planarconfig": "contig"}),
        ("float32", 1, {"photometric": "minisblack"}),
        ("uint8", 3, {"photometric": "rgb"}),
        ("uint8", 3, {"photometric": "rgb", "planarconfig": "separate"}),
        ("uint8", 4, {"photometric": "rgb", "extrasamples": [1]}),
        ("uint8", 4, {"photometric": "rgb", "extrasamples": [2]}),
        ("uint8", 1, {"photometric": "miniswhite"}),
    ],
)
def test_a_window_equals_that_part_of_the_image(options, dtype, bands, kind, generator, tmp_path):
    array = values(generator, dtype, bands, 45, 50)
    stored = array.transpose(2, 0, 1) if kind.get("planarconfig") == "separate" else array
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, stored if bands > 1 else array[..., 0], **options, **kind)
    for raw in (False, True):
        whole = encoded_file(str(path), "x", MAX_IMAGE_PIXELS, raw=raw).pixels()
        for window in ((0, 0, 45, 50), (7, 13, 22, 31), (44, 49, 1, 1), (16, 32, 16, 16)):
            top, left, height, width = window
            part = read_window(str(path), "x", 0, *window, MAX_IMAGE_PIXELS, raw=raw)
            assert part.dtype == whole.dtype
            assert np.array_equal(part, whole[top : top + height, left : left + width])


def test_windows_of_other_files_equal_that_part_too(generator, tmp_path):
    smooth = Image.fromarray(values(generator, "uint8", 3, 6, 8)).resize((80, 64))
    palette = smooth.convert("P")
    files = {
        "jpeg.tif": saved(smooth.save, "TIFF", compression="jpeg"),
        "tiled.tif": tiff(
            np.asarray(smooth), tile=(32, 32), compression="jpeg", photometric="ycbcr"
        ),
        "palette.tif": saved(palette.save, "TIFF"),
        "x.png": saved(smooth.save, "PNG"),
        "x.npy": saved(np.save, np.asarray(smooth).transpose(2, 0, 1).astype(np.float32)),
        "turned.tif": tiff(
            np.asarray(smooth), photometric="rgb", extratags=[(274, "H", 1, 6, True)]
        ),
    }
    for name, content in files.items():
        path = str(tmp_path / name)
        (tmp_path / name).write_bytes(content)
        whole = encoded_file(path, name, MAX_IMAGE_PIXELS).pixels()
        part = read_window(path, name, 0, 9, 21, 40, 37, MAX_IMAGE_PIXELS)
        assert np.array_equal(part, whole[9:49, 21:58]), name
        with pytest.raises(UnreadableImage, match=r"Window\(.*\) is not in the image of"):
            read_window(path, name, 0, 40, 0, 50, 10, MAX_IMAGE_PIXELS)


def test_a_window_of_a_large_raster_reads_only_the_tiles_that_it_touches(generator, tmp_path):
    array = values(generator, "uint16", 4, 256, 256)
    path = tmp_path / "x.tif"
    options = {"photometric": "minisblack", "extrasamples": (0,) * 3}
    tifffile.imwrite(path, array, tile=(32, 32), compression="deflate", **options)
    with tifffile.TiffFile(path) as file:
        offsets = file.pages[0].dataoffsets
    content = bytearray(path.read_bytes())
    for number, offset in enumerate(offsets):
        if number not in (9, 10, 17, 18):
            content[offset : offset + 8] = bytes(8)
    path.write_bytes(content)
    limit = 64 * 64 * 4 * 2 // 3 + 1  # the image itself exceeds it
    part = read_window(str(path), "x", 0, 32, 32, 64, 64, limit)
    assert np.array_equal(part, array[32:96, 32:96])
    with pytest.raises(UnreadableImage):
        read_window(str(path), "x", 0, 0, 0, 64, 64, limit)
    with pytest.raises(
        UnreadableImage,
        match=r"^x: 256 x 256 px x 4 uint16 \(0.0 GB\) exceeds data.max_image_pixels=10923, "
        r"which is for 8-bit RGB \(0.0 GB\); data.tile=512 reads windows$",
    ):
        encoded_file(str(path), "x", limit)


@pytest.mark.parametrize("suffix", ["tif", "npy", "png"])
def test_masks_in_other_files_give_their_numbers(suffix, generator, tmp_path):
    path = tmp_path / f"mask.{suffix}"
    for dtype in ("uint8", "uint16", "int32") if suffix != "png" else ("uint8", "uint16"):
        numbers = generator.integers(0, 200, (9, 16)).astype(dtype)
        if suffix == "tif":
            tifffile.imwrite(path, numbers, compression="lzw")
        elif suffix == "npy":
            np.save(path, numbers.astype(np.int64) if dtype == "int32" else numbers)
        else:
            Image.fromarray(numbers).save(path)
        mask = read_mask(str(path))
        assert mask.dtype == (np.uint8 if dtype == "uint8" else np.int32)
        assert np.array_equal(mask, numbers)
    if suffix == "png":
        return
    wrong = np.zeros((4, 4), np.float32)
    tifffile.imwrite(path, wrong) if suffix == "tif" else np.save(path, wrong)
    message = "bands: 1 of float32; expected one whole number per pixel$"
    with pytest.raises(UnreadableImage, match=message):
        read_mask(str(path))


def test_a_mask_of_few_bits_or_a_palette_in_a_tiff_gives_its_numbers(generator, tmp_path):
    numbers = generator.integers(0, 16, (9, 16)).astype(np.uint8)
    path = tmp_path / "mask.tif"
    path.write_bytes(packed_tiff(imagecodecs.packints_encode(numbers, 4), (9, 16), 4, 1))
    assert np.array_equal(read_mask(str(path)), numbers)
    palette = Image.fromarray(numbers)
    palette.putpalette(generator.integers(0, 256, 768).tolist())
    palette.save(path)
    assert np.array_equal(read_mask(str(path)), numbers)
