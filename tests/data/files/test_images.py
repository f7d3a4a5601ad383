import os

import numpy as np
import pytest
from PIL import Image

from moco.data.files.images import UnreadableImage, to_rgb
from moco.data.files.listing import list_images
from moco.data.sources.source import FileImages
from moco.errors import InputError


def pixel(image, x=0, y=0):
    image = np.asarray(image)
    assert image.shape[2] == 3
    return tuple(image[y, x].tolist())


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (50, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_every_pixel_type_becomes_rgb(mode, color, expected):
    assert pixel(to_rgb(Image.new(mode, (4, 4), color))) == expected


def test_palette_keeps_its_colours_and_transparency(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=1)
    assert pixel(FileImages([str(tmp_path / "plain.png")])[0]) == (200, 100, 50)
    assert pixel(FileImages([str(tmp_path / "clear.png")])[0]) == (255, 255, 255)


def test_jpeg_in_cmyk_is_read(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    red, green, blue = pixel(FileImages([str(tmp_path / "print.jpg")])[0])
    assert red > 220
    assert max(green, blue) < 40


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None, "cut"])
def test_unreadable_images_are_named(content, tmp_path, generator):
    path = tmp_path / "image.tif"
    if content == "cut":
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
            path, format="JPEG"
        )
        path.write_bytes(path.read_bytes()[:600])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableImage, match=r"image\.tif"):
        FileImages([str(path)])[0]


def test_listing_is_recursive_sorted_and_by_extension(image_tree):
    (image_tree / "notes.txt").write_text("no image")
    (image_tree / "b" / "LOUD.JPG").write_bytes(b"")
    listed = list_images(image_tree)
    assert listed == sorted(listed)
    assert len(listed) == 25
    assert any(path.endswith("LOUD.JPG") for path in listed)


def test_a_link_back_into_the_tree_ends(image_tree):
    os.symlink(image_tree, image_tree / "b" / "loop")
    assert len(list_images(image_tree)) == 24


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(InputError, match=r"data\.root=.*nowhere: no such folder"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no images in there \(looked for \.avif, \.bmp"):
        list_images(tmp_path)
