"""Damaged and hostile files of arrays end in one line, at once and without gigabytes."""

import io
import struct
import sys
import time
import zipfile
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile

from moco.data.files.formats import FIRST_BYTES, recognised
from moco.data.files.images import (
    MAX_IMAGE_PIXELS,
    UnreadableImage,
    encoded,
    header,
    read_mask,
    read_window,
)
from moco.extras import install_command
from tests.data.files.test_any_images import png_chunk, saved, tiff, values
from tests.memory import memory_within

GREY_16 = {
    256: (4, 100),  # width
    257: (4, 100),  # height
    258: (3, 16),  # bits
    259: (3, 1),  # compression: none
    262: (3, 1),  # black is zero
    273: (4, 8),  # where the strip is
    277: (3, 1),  # bands
    278: (4, 100),  # rows in it
    279: (4, 20_000),  # bytes in it
    284: (3, 1),  # interleaved
}


def claims(tags, content=b"", without=()):
    """Return a TIFF that says of itself what `tags` say in place of `GREY_16`."""
    tags = {tag: value for tag, value in {**GREY_16, **tags}.items() if tag not in without}
    directory = struct.pack("<H", len(tags))
    for tag in sorted(tags):
        kind, value, *count = tags[tag]
        directory += struct.pack("<HHII", tag, kind, *(count or [1]), value)
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + content


def with_cycle():
    """Return a TIFF of two images whose second is followed by the first."""
    image = np.ones((8, 8), np.uint16)
    content = bytearray(tiff(np.stack([image, image]), photometric="minisblack"))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        first, second = (page.offset for page in file.pages)
    num_tags = struct.unpack_from("<H", content, second)[0]
    struct.pack_into("<I", content, second + 2 + 12 * num_tags, first)
    return bytes(content)


def cut(generator, **options):
    return tiff(values(generator, "uint16", 1, 60, 60)[..., 0], **options)[:-1000]


HOSTILE_TIFFS = {
    "a bomb": (claims({256: (4, 100_000), 257: (4, 100_000)}), r"100000 x 100000 px x 1 uint16 \("),
    "a bomb of 8 bits": (
        claims({256: (4, 100_000), 257: (4, 100_000), 258: (3, 8)}),
        "Image size .10000000000 pixels. exceeds",
    ),
    "strip beyond the file": (claims({273: (4, 10**9)}), "truncated: the file has 134 bytes"),
    "many bands": (claims({277: (3, 65_535)}), r"100 x 100 px x 65535 uint16 \(1.3 GB\) exceeds"),
    "many planes": (
        claims({256: (4, 1), 257: (4, 1), 277: (3, 65_535), 284: (3, 2)}),
        "truncated: ",
    ),
    "many strips": (
        claims({273: (4, 8, 2**32 - 1), 279: (4, 8, 2**32 - 1)}),
        "missing in the tags",
    ),
    "a tile of gigabytes": (
        claims({322: (4, 60_000), 323: (4, 60_000), 324: (4, 8), 325: (4, 0)}),
        "a strip or tile of 7.2 GB exceeds",
    ),
    "an empty tile": (
        claims({322: (4, 0), 323: (4, 0), 324: (4, 8), 325: (4, 0)}),
        "strips or tiles of 100 x 0 px",
    ),
    "several widths": (claims({256: (4, 8, 3)}), "wrong tags: several numbers for a size"),
    "no width": (claims({256: (4, 0)}), "0 x 100 px, 1 bands"),
    "an unknown compression": (claims({259: (3, 777)}, bytes(20_000)), "777"),
    "odd bits": (claims({258: (3, 77)}), "values of 77 bits in sample format 1"),
    "no place": (claims({}, without=[273]), "missing in the tags"),
    "a deflate bomb": (
        claims({259: (3, 8), 273: (4, 134), 279: (4, 97_000)}, zlib.compress(bytes(10**8))),
        "INSUFFICIENT_SPACE",
    ),
    "no image": (b"II*\0" + bytes(4), "a TIFF file without an image"),
    "an image beyond the file": (b"II*\0\xff\xff\xff\x7f", "a TIFF file without an image"),
    "a cycle": (with_cycle(), "the chain of images in this TIFF file leads back to itself"),
}


@pytest.mark.parametrize("name", sorted(HOSTILE_TIFFS))
def test_a_hostile_tiff_is_one_line_at_once(name, tmp_path):
    content, message = HOSTILE_TIFFS[name]
    (tmp_path / "x.tif").write_bytes(content)
    with memory_within(kilobytes=100_000):
        start = time.process_time()
        with pytest.raises(UnreadableImage, match=message) as error:
            encoded(content, "x.tif", MAX_IMAGE_PIXELS, page=None).pixels()
        assert str(error.value).startswith("x.tif: ")
        assert str(error.value).isprintable()
        for read in (
            lambda path: header(path),
            lambda path: read_window(path, "x", 0, 0, 0, 8, 8, MAX_IMAGE_PIXELS),
            lambda path: read_mask(path),
        ):
            try:
                read(str(tmp_path / "x.tif"))
            except UnreadableImage as reason:
                assert str(reason).isprintable()  # noqa: PT017
        assert time.process_time() - start < 1


def test_the_first_image_of_a_file_with_a_cycle_can_be_read():
    assert encoded(with_cycle(), "x", MAX_IMAGE_PIXELS).pixels().shape == (8, 8, 1)


@pytest.mark.parametrize(
    "options",
    [{}, {"compression": "lzw"}, {"compression": "deflate", "rowsperstrip": 7}, {"tile": (16, 16)}],
)
def test_a_truncated_tiff_is_not_filled_up(options, generator):
    with pytest.raises(UnreadableImage, match=r"^x: truncated: the file has"):
        encoded(cut(generator, **options), "x", MAX_IMAGE_PIXELS).pixels()


def test_missing_tiles_of_a_sparse_tiff_hold_the_value_for_missing_pixels(generator):
    array = values(generator, "int16", 1, 32, 32)
    tag = [(42113, "s", 0, "-9999", True)]
    content = bytearray(tiff(array[..., 0], tile=(16, 16), extratags=tag))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        counts = file.pages[0].tags[325].valueoffset
    assert struct.unpack_from("<H", content, counts) == (512,)
    struct.pack_into("<H", content, counts, 0)
    array[:16, :16] = -9999
    assert np.array_equal(encoded(bytes(content), "x", 10**6).pixels(), array)


def npy_that_claims(shape, dtype="<u2", content=b""):
    with io.BytesIO() as file:
        fields = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, fields)
        return file.getvalue() + content


def archive(content, name="a.npy", compression=zipfile.ZIP_DEFLATED):
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", compression) as members:
            members.writestr(name, content)
        return file.getvalue()


HOSTILE_ARRAYS = {
    "a bomb": (npy_that_claims((100_000, 100_000)), "truncated: 128 bytes, its header says"),
    "a negative size": (npy_that_claims((-5, 7)), "an array of uint16 of shape"),
    "an empty array": (npy_that_claims((0, 7)), "an array of uint16 of shape"),
    "five axes": (npy_that_claims((1,) * 5, content=bytes(2)), "an array of shape"),
    "objects": (saved(np.save, np.array([{}]), allow_pickle=True), "an array of object"),
    "records": (npy_that_claims((2, 2), "<u2,<u2", bytes(16)), "an array of"),
    "text": (npy_that_claims((2, 2), "<U1", bytes(16)), "values of type str"),
    "half a header": (npy_that_claims((4, 4))[:40], "EOF: reading array header"),
    "an archive of objects": (
        archive(saved(np.save, np.array([{}]), allow_pickle=True)),
        "an array of object",
    ),
    "an archive that claims": (archive(npy_that_claims((9000, 9000))), "truncated: 128 bytes"),
    "an archive of a bomb": (
        archive(npy_that_claims((20_000, 20_000), content=bytes(10**6))),
        "truncated",
    ),
    "bzip2": (archive(npy_that_claims((2, 2)), compression=zipfile.ZIP_BZIP2), "in another way"),
    "half an archive": (archive(npy_that_claims((2, 2), content=bytes(8)))[:-30], "not a zip file"),
}


@pytest.mark.parametrize("name", sorted(HOSTILE_ARRAYS))
def test_a_hostile_array_is_one_line_at_once(name, tmp_path):
    content, message = HOSTILE_ARRAYS[name]
    path = tmp_path / "x"
    path.write_bytes(content)
    with memory_within(kilobytes=100_000):
        for source in (content, str(path)):
            with pytest.raises(UnreadableImage, match=message) as error:
                encoded(source, "x", MAX_IMAGE_PIXELS).pixels()
            assert str(error.value).startswith("x: ")
            assert str(error.value).isprintable()
        with pytest.raises(UnreadableImage):
            read_window(str(path), "x", 0, 0, 0, 1, 1, MAX_IMAGE_PIXELS)


def test_an_array_in_an_archive_that_unpacks_to_too_much_is_refused():
    content = archive(npy_that_claims((3000, 3000), content=bytes(18_000_000)))
    with pytest.raises(UnreadableImage, match=r"^x: 3000 x 3000 px x 1 uint16 \(0.0 GB\) exceeds"):
        encoded(content, "x", 10**6)


def test_a_bomb_of_sixteen_bits_is_refused_by_its_header():
    size = struct.pack(">IIBBBBB", 60_000, 60_000, 16, 6, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", size) + png_chunk(b"IDAT", b"")
    codestream = imagecodecs.jpeg2k_encode(np.ones((8, 8), np.uint16), level=0, codecformat="j2k")
    place = codestream.index(b"\xff\x51") + 6
    jpeg_2000 = codestream[:place] + struct.pack(">II", 60_000, 60_000) + codestream[place + 8 :]
    for content in (png, jpeg_2000, b"P5 60000 60000 65535\n"):
        with pytest.raises(UnreadableImage, match=r"exceeds data.max_image_pixels"):
            encoded(content, "x", MAX_IMAGE_PIXELS)


def test_damaged_files_of_every_reader_are_images_or_unreadable_and_nothing_else(generator):
    array = values(generator, "uint16", 3, 12, 12)
    contents = [
        tiff(array, photometric="minisblack", extrasamples=(0, 0), compression="deflate"),
        tiff(
            array,
            photometric="minisblack",
            planarconfig="contig",
            predictor=True,
            compression="lzw",
        ),
        tiff(array[..., 0].astype(np.float32), tile=(16, 16), bigtiff=True),
        tiff((array >> 8).astype(np.uint8), photometric="rgb", tile=(16, 16), compression="jpeg"),
        imagecodecs.png_encode(array),
        imagecodecs.jpeg2k_encode(array, level=0),
        b"P6 12 12 65535\n" + array.tobytes(),
        saved(np.save, array),
        saved(np.savez_compressed, array),
    ]
    outcomes = set()
    for _ in range(400):
        content = bytearray(contents[generator.integers(len(contents))])
        for _ in range(2 ** generator.integers(4)):
            stop = len(content) if generator.random() < 0.5 else min(300, len(content))
            content[generator.integers(stop)] = generator.integers(256)
        if generator.random() < 0.2:
            content = content[: generator.integers(len(content))]
        page = None if generator.random() < 0.2 else 0
        try:
            outcomes.add(encoded(bytes(content), "x", 10**5, page).pixels().ndim)
        except UnreadableImage as error:
            assert str(error).isprintable()  # noqa: PT017
            outcomes.add("unreadable")
    assert outcomes == {3, "unreadable"}


def test_the_first_bytes_tell_an_archive_of_arrays_from_other_archives():
    for name, expected in (
        ("a.npy", "NPZ"),
        ("word/document.xml", None),
        ("b" * 120 + ".npy", "NPZ"),
    ):
        known = recognised(archive(b"", name)[:FIRST_BYTES])
        assert (known and known.name) == expected


def test_a_missing_package_for_heic_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UnreadableImage) as error:
        encoded(b"\0\0\0\x18ftypheic" + bytes(120), "x", 10**6)
    assert str(error.value) == f"x: HEIC needs pillow-heif: {install_command('heif')}"
