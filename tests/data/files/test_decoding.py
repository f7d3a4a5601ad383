import io
import os

import numpy as np
import pytest
from PIL import Image

from moco.data.files.images import MAX_IMAGE_PIXELS, UnreadableImage, encoded, encoded_file, to_rgb
from moco.data.sources.registry import build_source
from moco.data.sources.source import ArrayImages, FileImages
from tests.memory import memory_within


def smooth(generator, height=125, width=166):
    """Return an image that is smooth, as a photograph is."""
    small = Image.fromarray(generator.integers(0, 256, (8, 10, 3), dtype=np.uint8))
    return Image.fromarray(
        np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) // 2 + 60
    )


def file_of(image, file_format, **options):
    with io.BytesIO() as file:
        image.save(file, file_format, **options)
        return file.getvalue()


def by_pillow(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(to_rgb(image))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"keep_rgb": True},
        {"quality": 20},
    ],
)
def test_jpegs_have_the_pixels_that_pillow_decodes(mode, options, generator):
    content = file_of(smooth(generator).convert(mode), "JPEG", **options)
    image = encoded(content, "x", MAX_IMAGE_PIXELS)
    assert image.size == (125, 166)
    assert image.pixels().flags.c_contiguous
    assert (image.pixels() == by_pillow(content)).all()


@pytest.mark.parametrize(
    ("mode", "file_format", "options"),
    [
        ("CMYK", "JPEG", {}),
        ("CMYK", "TIFF", {}),
        ("RGBA", "PNG", {}),
        ("P", "GIF", {}),
        ("RGB", "WEBP", {"lossless": True}),
        ("RGB", "BMP", {}),
        ("RGB", "PPM", {}),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("1", "PNG", {}),
        ("LA", "PNG", {}),
    ],
)
def test_what_libjpeg_does_not_decode_is_read_by_pillow(mode, file_format, options, generator):
    source = smooth(generator, 12, 18).convert(mode)
    content = file_of(source, file_format, **options)
    image = encoded(content, "x", MAX_IMAGE_PIXELS)
    assert image.size == (12, 18)
    pixels = image.pixels()
    assert pixels.flags.c_contiguous
    assert pixels.dtype == np.uint8
    assert (pixels == by_pillow(content)).all()


def damaged_jpegs(generator, count):
    """Yield JPEGs with some random bytes, a fifth of them cut short."""
    files = []
    for mode in ("RGB", "L", "CMYK"):
        for options in ({}, {"progressive": True}, {"subsampling": 0}):
            files.append(file_of(smooth(generator, 24, 28).convert(mode), "JPEG", **options))
    for _ in range(count):
        content = bytearray(files[generator.integers(len(files))])
        for _ in range(2 ** generator.integers(4)):
            # The headers are in the first 700 bytes.
            end = min(700, len(content)) if generator.random() < 0.6 else len(content)
            content[generator.integers(end)] = generator.integers(256)
        if generator.random() < 0.2:
            content = content[: generator.integers(len(content))]
        yield bytes(content)


def test_damaged_jpegs_are_read_or_refused_as_by_pillow(generator, tmp_path):
    outcomes = set()
    path = str(tmp_path / "x.jpg")
    for content in damaged_jpegs(generator, 600):
        (tmp_path / "x.jpg").write_bytes(content)
        try:
            expected = encoded(path, "x", 10**6).pixels()  # Pillow reads what is on disk
        except UnreadableImage as error:
            with pytest.raises(UnreadableImage) as ours:
                encoded(content, "x", 10**6).pixels()
            assert str(ours.value) == str(error)  # noqa: PT017
            outcomes.add("unreadable")
        else:
            image = encoded(content, "x", 10**6)
            assert (image.pixels() == expected).all()
            assert image.size == expected.shape[:2]
            outcomes.add("readable")
    assert outcomes == {"readable", "unreadable"}


def jpeg_that_claims(content, height, width):
    """Return the file with another size in its header."""
    place = content.index(b"\xff\xc0") + 5
    size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return content[:place] + size + content[place + 4 :]


def test_the_limit_holds_before_a_jpeg_is_decoded(generator):
    content = file_of(smooth(generator), "JPEG")
    assert encoded(content, "x", 125 * 166).pixels().shape == (125, 166, 3)
    with pytest.raises(
        UnreadableImage,
        match=r"^x: Image size \(20750 pixels\) exceeds data.max_image_pixels=20749$",
    ):
        encoded(content, "x", 125 * 166 - 1)
    with (
        memory_within(kilobytes=50_000),
        pytest.raises(UnreadableImage, match="4294836225 pixels"),
    ):
        encoded(jpeg_that_claims(content, 65535, 65535), "x", MAX_IMAGE_PIXELS)


def test_a_file_in_memory_is_unreadable_with_the_words_of_one_on_disk(tmp_path, generator):
    for content in (
        b"",
        b"<html>",
        file_of(smooth(generator), "JPEG")[:900],
        file_of(smooth(generator), "PNG")[:900],
    ):
        (tmp_path / "x.jpg").write_bytes(content)
        path = str(tmp_path / "x.jpg")
        with pytest.raises(UnreadableImage) as on_disk:
            encoded(path, path, MAX_IMAGE_PIXELS).pixels()
        with pytest.raises(UnreadableImage) as in_memory:
            encoded_file(path, path, MAX_IMAGE_PIXELS).pixels()
        assert str(in_memory.value) == str(on_disk.value)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, message in (
        ("pipe.jpg", "not a regular file"),
        ("nowhere.jpg", "No such file or directory"),
    ):
        with pytest.raises(UnreadableImage, match=rf"{name}: {message}$"):
            FileImages([str(tmp_path / name)]).opened(0)


def test_a_file_that_is_too_large_to_be_read_whole_is_read_by_pillow(
    tmp_path, monkeypatch, generator
):
    monkeypatch.setattr("moco.data.files.images.LARGEST_READ_WHOLE", 1000)
    content = file_of(smooth(generator), "JPEG")
    assert len(content) > 1000
    (tmp_path / "x.jpg").write_bytes(content)
    image = FileImages([str(tmp_path / "x.jpg")]).opened(0)
    assert isinstance(image.source, str)
    assert (image.pixels() == by_pillow(content)).all()


@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 5, 7, 1), (3, 5, 7, 3), (3, 5, 7, 4)])
def test_images_in_memory_are_handed_out_decoded(shape, generator):
    images = ArrayImages(generator.integers(0, 256, shape, dtype=np.uint8), "x")
    image = images.opened(1)
    assert image.size == (5, 7)
    assert (image.pixels() == np.asarray(images[1])).all()
    assert image.pixels().flags.c_contiguous
    if shape[3:] == (3,):
        assert np.shares_memory(image.pixels(), images.tensor.numpy())  # not a copy


def stack(path, colors, sizes=None):
    pages = [
        Image.new("RGB", size, color)
        for color, size in zip(colors, sizes or [(8, 6)] * len(colors), strict=True)
    ]
    pages[0].save(path, save_all=True, append_images=pages[1:])


def test_every_page_of_a_tiff_file_can_be_an_image_of_its_own(tmp_path):
    stack(tmp_path / "b.tif", ["red", "lime", "blue"], [(8, 6), (4, 4), (9, 2)])
    Image.new("RGB", (5, 5), "white").save(tmp_path / "a.tif")
    Image.new("RGB", (5, 5), "black").save(tmp_path / "c.png")
    first = build_source("images", str(tmp_path)).train
    names = [os.path.basename(first.name(index)) for index in range(len(first))]
    assert names == ["a.tif", "b.tif", "c.png"]
    each = build_source("images", str(tmp_path), pages="each").train
    names = [os.path.basename(each.name(index)) for index in range(len(each))]
    assert names == ["a.tif", "b.tif#1", "b.tif#2", "b.tif#3", "c.png"]
    sizes = [each.opened(index).size for index in range(5)]
    assert sizes == [(5, 5), (6, 8), (4, 4), (2, 9), (5, 5)]
    corners = [tuple(each[index][0, 0].tolist()) for index in range(5)]
    assert corners == [(255,) * 3, (255, 0, 0), (0, 255, 0), (0, 0, 255), (0,) * 3]
    for index, corner in enumerate(corners):
        assert each.opened(index).pixels()[0, 0].tolist() == list(corner)


def test_a_page_that_is_too_large_or_gone_is_named(tmp_path):
    stack(tmp_path / "x.tif", ["red", "lime"], [(8, 6), (8, 7)])
    images = build_source("images", str(tmp_path), pages="each", max_image_pixels=48).train
    assert images[0].shape == (6, 8, 3)
    with pytest.raises(
        UnreadableImage, match=r"x.tif#2: Image size .56 pixels. exceeds data.max_image_pixels=48$"
    ):
        images.opened(1)
    stack(tmp_path / "x.tif", ["red"])
    with pytest.raises(UnreadableImage, match=r"x.tif#2: .*attempt to seek outside sequence"):
        images.opened(1)


def test_a_stack_that_cannot_be_read_is_one_unreadable_image(tmp_path):
    (tmp_path / "x.tif").write_bytes(b"II*\0 no stack")
    images = build_source("images", str(tmp_path), pages="each").train
    assert len(images) == 1
    with pytest.raises(UnreadableImage, match=r"x\.tif: "):
        images.opened(0)


def test_pages_stay_in_their_class_and_on_one_side_of_the_split(tmp_path):
    for number in range(40):
        folder = tmp_path / ("cat", "dog")[number % 2]
        folder.mkdir(exist_ok=True)
        stack(folder / f"{number}.tif", ["red"] * (1 + number % 3))
    source = build_source("image_folder", str(tmp_path), pages="each", held_out=0.3)
    num_pages = sum(1 + number % 3 for number in range(40))
    assert len(source.train) == num_pages
    assert len(source.bank.labels) + len(source.queries.labels) == num_pages
    sides = []
    for labelled in (source.bank, source.queries):
        files = set()
        for index, label in enumerate(labelled.labels):
            name = labelled.images.name(index)
            assert ("cat", "dog")[label] in name
            files.add(name.partition("#")[0])
        sides.append(files)
    assert not sides[0] & sides[1]
