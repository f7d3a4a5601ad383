"""Hostile trees and files: nothing hangs, nothing fills the memory, and messages name the file."""

import io
import json
import os
import socket
import struct
import subprocess
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from moco.callbacks.unreadable_images import write_unreadable
from moco.config.data import DataConfig, EvaluateDataConfig
from moco.config.segment import SegmentDataConfig
from moco.data.augment.views import EvaluationView
from moco.data.files.images import (
    MAX_IMAGE_PIXELS,
    UnreadableImage,
    opened,
    pillow_warnings_ignored,
    read_mask,
)
from moco.data.files.listing import list_images
from moco.data.sources.folders import is_held_out
from moco.data.sources.registry import build_source
from moco.data.sources.source import FileImages
from moco.errors import InputError, printable
from moco.segmentation.mask_sources import build_segmentation_source
from tests.memory import memory_within

ODD_NAMES = [
    "ü ber.png",
    "new\nline.png",
    "quo'te\".png",
    "back\\slash.png",
    "\x1b[31mred.png",
    os.fsdecode(b"\xff.png"),
]


@pytest.fixture
def image(generator):
    return Image.fromarray(generator.integers(0, 256, (60, 80, 3), dtype=np.uint8))


def unreadable(path, *limit):
    """Return the message; check that it is one line and names the file."""
    with pytest.raises(UnreadableImage) as error:
        FileImages([str(path)], *limit)[0]
    assert str(error.value).startswith(printable(str(path)))
    assert str(error.value).isprintable()
    return str(error.value)


def test_the_limit_has_one_default():
    assert {
        config.max_image_pixels for config in (DataConfig, EvaluateDataConfig, SegmentDataConfig)
    } == {MAX_IMAGE_PIXELS}


@pytest.mark.parametrize("file_format", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_images_beyond_the_limit_are_refused_in_every_format(file_format, image, tmp_path):
    image.save(tmp_path / "x.jpg", format=file_format)
    assert FileImages([str(tmp_path / "x.jpg")], 4800)[0].shape == (60, 80, 3)
    message = unreadable(tmp_path / "x.jpg", 4799)
    assert message.endswith("x.jpg: Image size (4800 pixels) exceeds data.max_image_pixels=4799")


def png_that_claims(width, height):
    """Return a PNG file of a few bytes with any size in its header."""

    def chunk(name, content):
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        PNG
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


PNG = b"\x89PNG\r\n\x1a\n"


def test_a_bomb_is_refused_by_its_header_and_the_limit_can_be_raised_above_pillows_own(tmp_path):
    (tmp_path / "x.png").write_bytes(png_that_claims(20_000, 10_000))
    with memory_within(kilobytes=50_000):
        assert unreadable(tmp_path / "x.png").endswith(
            "x.png: Image size (200000000 pixels) exceeds data.max_image_pixels=178956970"
        )
        with pillow_warnings_ignored(), opened(str(tmp_path / "x.png"), 200_000_000) as image:
            assert image.size == (20_000, 10_000)


def test_a_frame_that_is_larger_than_its_canvas_is_refused(image, tmp_path):
    image.resize((10, 10)).save(tmp_path / "x.gif")
    content = bytearray((tmp_path / "x.gif").read_bytes())
    frame = content.index(b",\x00\x00\x00\x00\x0a\x00\x0a\x00")
    struct.pack_into("<HH", content, frame + 5, 60_000, 60_000)
    (tmp_path / "x.gif").write_bytes(content)
    assert "exceeds data.max_image_pixels" in unreadable(tmp_path / "x.gif")


@pytest.mark.parametrize("compression", [1, 8], ids=["plain", "deflate"])
def test_a_tile_that_is_larger_than_its_image_does_not_fill_the_memory(compression, tmp_path):
    tags = {
        256: 10, 257: 10, 258: 8, 259: compression, 262: 1, 277: 1,  # 10 x 10 px of 8 bits
        322: 60_000, 323: 60_000, 324: 8, 325: 0,  # in one tile of 3.6 gigapixels
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    (tmp_path / "x.tif").write_bytes(
        b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    )
    with memory_within(kilobytes=100_000):
        unreadable(tmp_path / "x.tif")


@pytest.mark.parametrize("suffix", ["gif", "webp", "tif", "png"])
def test_of_several_frames_the_first_is_read(suffix, tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    frames[0].save(
        tmp_path / f"x.{suffix}",
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if suffix == "webp" else {}),
    )
    assert FileImages([str(tmp_path / f"x.{suffix}")])[0][4, 4].tolist() == [255, 0, 0]


def test_compressed_text_and_colour_profiles_do_not_unpack_without_end(image, tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("comment", "0" * 50_000_000, zip=True)
    image.save(tmp_path / "text.png", pnginfo=texts)
    assert "MAX_TEXT_CHUNK" in unreadable(tmp_path / "text.png")
    image.save(tmp_path / "profile.png", icc_profile=bytes(50_000_000))
    with memory_within(kilobytes=20_000):
        assert "MAX_TEXT_CHUNK" in unreadable(tmp_path / "profile.png")


def test_postscript_is_not_handed_to_an_interpreter(image, tmp_path, monkeypatch):
    image.save(tmp_path / "x.jpg", format="EPS")
    monkeypatch.setattr(
        "subprocess.check_call", lambda *_, **__: pytest.fail("a program was started")
    )
    assert "cannot identify image file" in unreadable(tmp_path / "x.jpg")


def test_what_is_no_file_is_unreadable_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.png"))
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "nowhere.png").symlink_to("missing")
    (tmp_path / "itself.png").symlink_to("itself.png")
    (tmp_path / "folder.png").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "folder.png" / "inside.png")
    (tmp_path / "denied.png").write_bytes(b"")
    names = [os.path.relpath(path, tmp_path) for path in list_images(tmp_path)]
    assert names == sorted(
        [
            "denied.png",
            "device.png",
            "folder.png/inside.png",
            "itself.png",
            "nowhere.png",
            "pipe.png",
            "socket.png",
        ]
    )
    for name in ("pipe", "socket", "device"):
        assert unreadable(tmp_path / f"{name}.png").endswith(f"{name}.png: not a regular file")
    assert unreadable(tmp_path / "nowhere.png").endswith(": No such file or directory")
    assert unreadable(tmp_path / "itself.png").endswith(": Too many levels of symbolic links")


def test_files_and_folders_that_may_not_be_read_are_named(image_tree, caplog, monkeypatch):
    """Root may read everything, so the system's answer is replaced."""
    real_folder, real_open = os.scandir, open

    def denied(path, *arguments, real, **options):
        if str(path).endswith(("deeper", "00.png")):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr("os.scandir", lambda path: denied(path, real=real_folder))
    monkeypatch.setattr(
        "builtins.open", lambda path, *rest, **options: denied(path, *rest, real=real_open)
    )
    assert len(list_images(image_tree)) == 16
    assert (
        f"left out a folder that cannot be read: {image_tree}/b/deeper (Permission denied)"
        in caplog.text
    )
    assert unreadable(image_tree / "a" / "00.png").endswith("00.png: Permission denied")


def test_loops_of_links_end_and_every_image_is_listed_once_under_its_own_name(image_tree):
    own = list_images(image_tree)
    (image_tree / "a" / "to_b").symlink_to(image_tree / "b")
    (image_tree / "b" / "to_a").symlink_to(image_tree / "a")
    (image_tree / "a" / "up").symlink_to("..")
    (image_tree / "a" / "itself").symlink_to("itself")
    (image_tree / "A first in order").symlink_to("b")
    (image_tree / "b" / "deeper" / "x.png").symlink_to(image_tree)
    assert list_images(image_tree) == own
    assert len(build_source("image_folder", str(image_tree)).train) == 24


def test_a_linked_folder_from_elsewhere_is_listed_once(image_tree, tmp_path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "one").symlink_to(image_tree)
    (tmp_path / "tree" / "two").symlink_to(image_tree)
    listed = list_images(tmp_path / "tree")
    assert len(listed) == 24
    assert all("/tree/one/" in path for path in listed)


def test_segmentation_trees_with_loops_end(generator, tmp_path):
    from tests.segmentation.shapes import draw_shapes

    root = draw_shapes(tmp_path, num_train=4, num_val=2)
    for folder in ("images", "masks"):
        (root / folder / "train" / "loop").symlink_to(root / folder)
        (root / folder / "train" / "again").symlink_to("again")
    source = build_segmentation_source("segmentation_folder", str(root))
    assert len(source.train) == 4


def test_masks_and_their_images_hold_to_the_limit(tmp_path):
    from tests.segmentation.shapes import draw_shapes

    root = draw_shapes(tmp_path, num_train=4, num_val=2)
    with Image.open(next(root.glob("images/train/*.png"))) as image:
        width, height = image.size
    source = build_segmentation_source(
        "segmentation_folder", str(root), max_image_pixels=width * height
    )
    assert source.train[0][1].shape == (height, width)
    with pytest.raises(InputError, match=rf"exceeds data.max_image_pixels={width * height - 1}"):
        build_segmentation_source(
            "segmentation_folder", str(root), max_image_pixels=width * height - 1
        )
    (tmp_path / "bomb.png").write_bytes(png_that_claims(50_000, 50_000))
    with pytest.raises(
        UnreadableImage, match=r"Image size .2500000000 pixels. exceeds data.max_image_pixels="
    ):
        read_mask(str(tmp_path / "bomb.png"))


def test_a_tree_of_any_depth_is_listed(tmp_path):
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
        Image.new("RGB", (4, 4)).save("x.png")
        os.chdir(here)
        (path,) = list_images(tmp_path)
        assert path == f"{tmp_path}/{'d/' * 1500}x.png"
        assert FileImages([path])[0].shape == (4, 4, 3)
    finally:
        os.chdir(here)
        subprocess.run(
            ["rm", "-r", tmp_path / "d"], check=True
        )  # pytest's own cleaning up would fail at such a depth


@pytest.fixture
def oddly_named(tmp_path):
    """Return a folder with a damaged file under each odd name, in class folders with odd names."""
    for folder in ("cat\nalog", os.fsdecode(b"do\xfeg")):
        (tmp_path / folder).mkdir()
        for name in ODD_NAMES:
            (tmp_path / folder / name).write_bytes(b"no image")
    return tmp_path


def test_odd_names_are_listed_read_and_shown_on_one_line(oddly_named):
    source = build_source("image_folder", str(oddly_named))
    names = [source.train.name(index) for index in range(len(source.train))]
    assert sorted(os.path.basename(name) for name in names) == sorted(2 * ODD_NAMES)
    for name in names:
        assert unreadable(name).isprintable()


def test_names_of_bytes_have_a_place_in_the_split():
    names = [os.fsdecode(b"\xff%d.png" % number) for number in range(100)]
    assert 0 < is_held_out(map(os.fsencode, names), 0.1).sum() < 30


def test_the_list_of_unreadable_images_gives_every_name_back(oddly_named):
    names = list_images(oddly_named)
    write_unreadable(oddly_named / "run", reversed(names))
    lines = (oddly_named / "run" / "unreadable_images.jsonl").read_bytes().splitlines()
    assert [json.loads(line) for line in lines] == names
    assert all(os.path.isfile(json.loads(line)) for line in lines)
    assert b"".join(lines).isascii()
    write_unreadable(oddly_named / "run", names[:1])
    assert (oddly_named / "run" / "unreadable_images.jsonl").read_text().count("\n") == 1


def test_no_list_is_written_where_everything_was_readable(tmp_path):
    write_unreadable(tmp_path, [])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b/ü.png", "a b/ü.png"),
        ("new\nline\r\t", r"new\nline\r\t"),
        (os.fsdecode(b"\xff"), r"\udcff"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("right\u202eleft\u2028", r"right\u202eleft\u2028"),
        ("back\\slash", "back\\slash"),
    ],
)
def test_printable_text_is_one_line_that_a_terminal_shows(text, shown):
    assert printable(text) == printable(shown) == shown


def test_a_stripe_is_evaluated_without_being_enlarged_whole(generator):
    view = EvaluationView(224, 1.0, [0.5] * 3, [0.5] * 3)
    line = Image.fromarray(generator.integers(0, 256, (1, 60_000, 3), dtype=np.uint8))
    with memory_within(kilobytes=100_000):
        for stripe in (line, line.transpose(Image.Transpose.ROTATE_90)):
            assert view(stripe).shape == (3, 224, 224)


def test_the_middle_of_a_stripe_looks_as_if_it_had_been_resized_whole(generator):
    from torchvision.transforms import v2

    stripe = Image.fromarray(generator.integers(0, 256, (10, 700, 3), dtype=np.uint8))
    whole = v2.Compose([v2.Resize(20), v2.CenterCrop(16), v2.PILToTensor()])(stripe)
    ours = EvaluationView(16, 0.8, [0.0] * 3, [1.0] * 3)(stripe) * 255
    assert torch.allclose(ours, whole.float(), atol=0.01)


def small_files(generator):
    """Return the content of a small file in each format."""
    base = Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    two_frames = {"save_all": True, "append_images": [base]}
    formats = [
        ("BMP", {}),
        ("GIF", two_frames),
        ("JPEG", {}),
        ("PNG", {}),
        ("PPM", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "raw"}),
        ("WEBP", {}),
        ("MPO", two_frames),
    ]
    contents = []
    for file_format, options in formats:
        with io.BytesIO() as file:
            base.save(file, file_format, **options)
            contents.append(file.getvalue())
    return contents


def random_images(generator, count):
    """Yield small files with random bytes changed; of a fifth of them the end is cut off."""
    contents = small_files(generator)
    for _ in range(count):
        content = bytearray(contents[generator.integers(len(contents))])
        num_changes = 2 ** generator.integers(5)
        for _ in range(num_changes):
            stop = len(content)
            if generator.random() < 0.5:  # headers are near the start
                stop = min(64, stop)
            content[generator.integers(stop)] = generator.integers(256)
        if generator.random() < 0.2:
            content = content[: generator.integers(len(content))]
        yield bytes(content)


def test_damaged_files_are_images_or_unreadable_and_nothing_else(generator, tmp_path):
    outcomes = set()
    for content in random_images(generator, 400):
        (tmp_path / "x.jpg").write_bytes(content)
        try:
            outcomes.add(FileImages([str(tmp_path / "x.jpg")], 10**6)[0].shape[2])
        except UnreadableImage as error:
            assert str(error).isprintable()  # noqa: PT017
            outcomes.add("unreadable")
    assert outcomes == {3, "unreadable"}
