"""Datasets with masks: listing, pairing and checking of files, and the numbers in masks."""

import itertools
import shutil
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from moco.data.files.images import UnreadableImage, read_mask
from moco.errors import InputError
from moco.segmentation.mask_sources import VOC_CLASSES, build_segmentation_source
from tests.segmentation.shapes import SIDE, draw_shapes, save


@pytest.fixture
def shapes(tmp_path):
    return draw_shapes(tmp_path / "shapes")


def source_of(root, **settings):
    return build_segmentation_source("segmentation_folder", str(root), **settings)


def test_the_folders_decide_the_split_and_the_masks_the_number_of_classes(shapes):
    source = source_of(shapes)
    assert (len(source.train), len(source.validation)) == (8, 4)
    assert source.class_names == ("0", "1", "2")
    image, mask = source.validation[1]
    assert source.validation.name(1) == str(shapes / "images/val/01.png")
    assert np.array_equal(mask, np.array(Image.open(shapes / "masks/val/01.png")))
    assert np.array_equal(np.array(image), np.array(Image.open(shapes / "images/val/01.png")))
    assert source.train.sizes.tolist() == [[SIDE, SIDE]] * 8


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_class_names_have_no_byte_order_mark(encoding, shapes):
    (shapes / "classes.txt").write_bytes("sky\r\ndisc\r\nsquare\r\n".encode(encoding))
    assert source_of(shapes).class_names == ("sky", "disc", "square")


def test_held_out_masks_without_a_class_are_said(shapes, caplog):
    for path in (shapes / "masks" / "val").iterdir():
        save(path, np.full((SIDE, SIDE), 255, np.uint8))
    source_of(shapes)
    assert "no pixel of the held-out masks has a class" in caplog.text


def held_out_names(source):
    return {source.validation.name(row) for row in range(len(source.validation))}


def number_in(path):
    """The number of an image named like 29.png."""
    return int(path.split("/")[-1].removesuffix(".png"))


def test_without_folders_a_tenth_is_held_out_and_more_images_do_not_change_it(tmp_path):
    for number in range(60):
        save(tmp_path / "images" / f"{number}.png", np.zeros((4, 4, 3), np.uint8))
        save(tmp_path / "masks" / f"{number}.png", np.full((4, 4), number % 2, np.uint8))
        if number == 29:
            held_out_of_30 = held_out_names(source_of(tmp_path))
    source = source_of(tmp_path)
    assert len(source.train) + len(source.validation) == 60
    held_out = held_out_names(source)
    assert held_out_of_30 == {path for path in held_out if number_in(path) < 30}
    assert 1 < len(held_out) < 15


def test_of_two_images_one_is_held_out_and_the_log_says_how(tmp_path, caplog):
    caplog.set_level("INFO")
    for number in range(2):
        save(tmp_path / "images" / f"{number}.jpg", np.zeros((4, 4, 3), np.uint8))
        save(tmp_path / "masks" / f"{number}.png", np.eye(4, dtype=np.uint8))
    source = source_of(tmp_path)
    assert (len(source.train), len(source.validation)) == (1, 1)
    assert "1 of 2 images are held out, chosen by a hash of their names" in caplog.text


@pytest.mark.parametrize(
    ("held_out", "of_masks"), [("val", "val"), ("Validation", "validation"), ("TEST", "TEST")]
)
def test_folders_may_have_other_common_names(held_out, of_masks, shapes, caplog):
    caplog.set_level("INFO")
    for folder, name in (("images", held_out), ("masks", of_masks)):
        (shapes / folder / "train").rename(shapes / folder / "training")  # as in ADE20K
        (shapes / folder / "val").rename(shapes / folder / name)
    (shapes / "images" / "more").mkdir()
    source = source_of(shapes)
    assert (len(source.train), len(source.validation)) == (8, 4)
    assert source.validation.name(0) == str(shapes / "images" / held_out / "00.png")
    assert "hash" not in caplog.text
    taken = (
        f"training is trained on, {held_out} is held out, and the other folders are not used: more"
    )
    assert taken in caplog.text


@pytest.mark.parametrize("is_trained_on", [True, False])
def test_another_folder_can_be_measured(is_trained_on, shapes):
    for folder in ("images", "masks"):
        shutil.copytree(shapes / folder / "val", shapes / folder / "test")
        (shapes / folder / "test" / "00.png").unlink()
    source = source_of(shapes, is_trained_on=is_trained_on, part="test")
    assert source.validation.name(0) == str(shapes / "images" / "test" / "01.png")
    assert len(source.validation) == 3
    message = "evaluation.part: unknown folder below images 'tests'"
    with pytest.raises(InputError, match=message):
        source_of(shapes, is_trained_on=is_trained_on, part="tests")


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_a_validation_folder_needs_a_training_folder(held_out, shapes):
    for folder in ("images", "masks"):
        (shapes / folder / "train").rename(shapes / folder / "Training set")
        (shapes / folder / "val").rename(shapes / folder / held_out)
    with pytest.raises(InputError) as error:
        source_of(shapes)
    assert str(error.value) == (
        f"data.root={shapes}: there is a folder images/{held_out}, but none to train on; "
        "expected images/train or images/training"
    )


def test_checking_files_in_threads_keeps_the_warning_filters(tmp_path, monkeypatch):
    for number in range(16):
        save(tmp_path / "images" / f"{number}.png", np.zeros((SIDE, SIDE, 3), np.uint8))
        save(tmp_path / "masks" / f"{number}.png", np.eye(SIDE, dtype=np.uint8))
    open_image = Image.open
    counter = itertools.count()

    def open_slowly(path, **options):
        image = open_image(path, **options)
        # The threads have to end in another order than they begin.
        time.sleep(0.001 * (next(counter) % 7))
        return image

    monkeypatch.setattr(Image, "open", open_slowly)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    filters = list(warnings.filters)
    # Pillow warns of every image with more than half of the limit.
    source_of(tmp_path, max_image_pixels=SIDE * SIDE)
    assert warnings.filters == filters


def test_class_names_come_from_the_settings_or_a_file(shapes):
    named = source_of(shapes, class_names=["sky", "disc", "square"])
    assert named.class_names == ("sky", "disc", "square")
    (shapes / "classes.txt").write_text("sky\ndisc\nsquare\nmoon\n\n")
    assert source_of(shapes).class_names == ("sky", "disc", "square", "moon")
    assert source_of(shapes, class_names=["a", "b", "c"]).class_names == ("a", "b", "c")
    assert source_of(shapes, num_classes=4).class_names == ("sky", "disc", "square", "moon")


def test_a_class_can_be_the_number_without_a_class(shapes, caplog):
    source = source_of(shapes, ignore_index=0, num_classes=256)
    assert len(source.class_names) == 256
    assert "the class 0 is left out, because its number is data.ignore_index=0" in caplog.text


@pytest.mark.parametrize("settings", [{"num_classes": 2}, {"class_names": ["road", "rest"]}, {}])
def test_masks_of_0_and_255_have_only_one_class(settings, shapes):
    diagonal = np.where(np.eye(SIDE) > 0, 255, 0).astype(np.uint8)
    for path in shapes.glob("masks/*/*.png"):
        save(path, diagonal)
    with pytest.raises(InputError) as error:
        source_of(shapes, **settings)
    assert str(error.value) == (
        f"data.root={shapes}: the training masks hold the numbers [0] besides "
        "data.ignore_index=255; at least two classes are needed "
        "(masks of 0 and 255 have to be stored as 0 and 1)"
    )


def test_masks_with_one_class_are_refused_with_another_ignore_index(shapes):
    for path in shapes.glob("masks/train/*.png"):
        save(path, np.eye(SIDE, dtype=np.uint8))
    message = r"the numbers \[1\] besides data.ignore_index=0; at least two classes are needed"
    with pytest.raises(InputError, match=message):
        source_of(shapes, ignore_index=0)


def test_classes_without_a_training_mask_are_named(shapes, caplog):
    source_of(shapes, class_names=["sky", "disc", "square"])
    assert "no training mask" not in caplog.text
    save(shapes / "masks/val/00.png", np.full((SIDE, SIDE), 3, np.uint8))
    source_of(shapes, class_names=["sky", "disc", "square", "moon", "sun"])
    assert "no training mask contains the classes moon, sun\n" in caplog.text
    caplog.clear()
    source_of(shapes, num_classes=16)
    assert "classes 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 (and 3 more like it)\n" in caplog.text
    caplog.clear()
    # Neither 0, the number without a class, nor 255, which the masks hold, is missing.
    source_of(shapes, num_classes=256, ignore_index=0)
    assert "classes 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 (and 242 more like it)\n" in caplog.text


def test_voc_2012_is_read_as_torchvision_unpacks_it(tmp_path):
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    lists = voc / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    mask = np.full((6, 8), 20, np.uint8) - np.eye(6, 8, dtype=np.uint8)
    for part, names in (("train", ["a", "b"]), ("val", ["c"])):
        (lists / f"{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            save(voc / "JPEGImages" / f"{name}.jpg", np.zeros((6, 8, 3), np.uint8))
            save(voc / "SegmentationClass" / f"{name}.png", mask, "P")
    source = build_segmentation_source("voc2012", str(tmp_path))
    assert (len(source.train), len(source.validation)) == (2, 1)
    assert source.class_names == VOC_CLASSES
    assert len(VOC_CLASSES) == 21
    _, first_mask = source.train[1]
    assert first_mask.max() == 20


def spoil(mistake, shapes):
    """Make a mistake in the folder. Return the settings to read it with."""
    names = shapes / "classes.txt"
    if mistake == "no masks":
        (shapes / "masks").rename(shapes / "labels")
    elif mistake == "image without mask":
        (shapes / "masks/train/03.png").unlink()
    elif mistake == "images without mask":
        (shapes / "masks/train/03.png").unlink()
        (shapes / "masks/train/07.png").rename(shapes / "masks/train/07.jpg")
    elif mistake == "mask without image":
        (shapes / "images/val/02.png").unlink()
    elif mistake == "two images":
        save(shapes / "images/train/01.jpg", np.zeros((4, 4, 3), np.uint8))
    elif mistake == "size":
        save(shapes / "masks/train/05.png", np.zeros((20, 16), np.uint8))
    elif mistake == "colours":
        save(shapes / "masks/train/05.png", np.zeros((SIDE, SIDE, 3), np.uint8))
    elif mistake == "damaged image":
        (shapes / "images/train/04.png").write_bytes(b"text")
    elif mistake == "damaged mask":
        path = shapes / "masks/val/00.png"
        path.write_bytes(path.read_bytes()[:60])
    elif mistake == "number beyond the classes":
        save(shapes / "masks/train/06.png", np.full((SIDE, SIDE), 7, np.uint8))
        return {"num_classes": 3}
    elif mistake == "number beyond the names":
        save(shapes / "masks/train/06.png", np.full((SIDE, SIDE), 7, np.uint8))
        names.write_text("a\nb\nc")
    elif mistake == "names and number":
        names.write_text("a\nb\nc")
        return {"num_classes": 5}
    elif mistake == "empty name":
        names.write_text("a\n\nb\n")
    elif mistake == "no text":
        names.write_bytes(b"stra\xdfe")
    elif mistake == "names twice":
        return {"class_names": ["a", "b", "a"]}
    elif mistake == "no class":
        for path in shapes.glob("masks/*/*.png"):
            save(path, np.full((SIDE, SIDE), 255, np.uint8))
    return {}


# The whole message, or its beginning if it ends with "...".
MISTAKES = {
    "no masks": (
        "data.root={root}: there is no folder masks in it; expected the folders images and masks"
    ),
    "image without mask": (
        "{root}/images/train/03.png: there is no mask {root}/masks/train/03.png"
    ),
    "images without mask": (
        "{root}/images/train/03.png: there is no mask {root}/masks/train/03.png "
        "(and 1 more like it)"
    ),
    "mask without image": (
        "{root}/masks/val/02.png: there is no image of that name in {root}/images/val"
    ),
    "two images": (
        "{root}/images/train/01.png: {root}/images/train/01.jpg has the same mask, "
        "{root}/masks/train/01.png"
    ),
    "size": (
        "{root}/masks/train/05.png: the mask has 16 x 20 px, "
        "but its image {root}/images/train/05.png has 32 x 32 px"
    ),
    "colours": "{root}/masks/train/05.png: mode RGB: expected one number per pixel ...",
    "damaged image": "{root}/images/train/04.png: cannot identify image file",
    "damaged mask": "{root}/masks/val/00.png: ...",
    "number beyond the classes": (
        "{root}/masks/train/06.png: the mask holds the number 7, "
        "but data.num_classes says 3 classes, 0 to 2"
    ),
    "number beyond the names": (
        "{root}/masks/train/06.png: the mask holds the number 7, "
        "but {root}/classes.txt says 3 classes, 0 to 2"
    ),
    "names and number": "data.num_classes=5: {root}/classes.txt has 3 names",
    "empty name": "{root}/classes.txt: line 2 is empty; expected a class name in every line",
    "no text": "{root}/classes.txt: cannot be read as text in UTF-8 or UTF-16 ('utf-8' codec ...",
    "names twice": "data.class_names: the class name a occurs twice",
    "no class": (
        "data.root={root}: the training masks hold the numbers [] besides data.ignore_index=255; "
        "at least two classes are needed (masks of 0 and 255 have to be stored as 0 and 1)"
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_folder_is_named(mistake, shapes):
    settings = spoil(mistake, shapes)
    with pytest.raises(InputError) as error:
        source_of(shapes, **settings)
    expected = MISTAKES[mistake].format(root=shapes)
    if expected.endswith("..."):
        assert str(error.value).startswith(expected.removesuffix("..."))
    else:
        assert str(error.value) == expected


@pytest.mark.parametrize(
    ("name", "root", "expected"),
    [
        (
            "cifar10",
            ".",
            "data.name: unknown dataset with masks 'cifar10' "
            "(choices: segmentation_folder, voc2012)",
        ),
        (
            "voc2021",
            ".",
            "data.name: unknown dataset with masks 'voc2021'; did you mean 'voc2012'? "
            "(choices: segmentation_folder,",
        ),
        ("voc2012", None, "data.root=None: expected the dataset's folder; give data.root=PATH"),
        ("voc2012", "nowhere", "data.root=nowhere: VOCSegmentation is not there or damaged"),
        ("segmentation_folder", "nowhere", "data.root=nowhere: no such folder"),
    ],
)
def test_datasets_without_masks_or_folder_are_refused(name, root, expected):
    with pytest.raises(InputError) as error:
        build_segmentation_source(name, root)
    assert str(error.value).startswith(expected)


def test_pretraining_says_what_datasets_with_masks_are_for():
    from moco.data.sources.registry import build_source

    message = r"data=voc2012: its masks are for moco.segment and evaluation=dense"
    with pytest.raises(InputError, match=message):
        build_source("voc2012", "x")


@pytest.mark.parametrize(
    ("mode", "stored", "expected"),
    [
        ("1", [[0, 255, 0], [255, 0, 255]], [[0, 1, 0], [1, 0, 1]]),
        ("L", [[0, 1, 2], [3, 4, 200]], [[0, 1, 2], [3, 4, 200]]),
        ("P", [[0, 1, 2], [3, 4, 200]], [[0, 1, 2], [3, 4, 200]]),
        ("I;16", [[0, 1, 2], [3, 4, 60000]], [[0, 1, 2], [3, 4, 60000]]),
    ],
)
def test_masks_of_every_mode_give_their_numbers(mode, stored, expected, tmp_path):
    has_16_bits = mode == "I;16"
    array = np.array(stored, np.uint16 if has_16_bits else np.uint8)
    path = save(tmp_path / "mask.png", array, mode)
    with Image.open(path) as image:
        assert image.mode == mode
    mask = read_mask(str(path))
    assert mask.dtype == (np.int32 if has_16_bits else np.uint8)
    assert mask.tolist() == expected


def png_chunk(kind, content):
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(numbers, bit_depth, colour_type):
    """Write a PNG file by its specification, because Pillow writes no grey of 2 or 4 bits."""
    height, width = numbers.shape
    bits = np.unpackbits(numbers.astype(np.uint8)[:, :, None], axis=2)
    bits = bits[:, :, -bit_depth:].reshape(height, -1)
    lines = b""
    for line in np.packbits(bits, axis=1):
        lines += b"\0" + line.tobytes()
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    if colour_type == 3:
        content += png_chunk(b"PLTE", bytes(range(3 * 2**bit_depth)))
    return content + png_chunk(b"IDAT", zlib.compress(lines)) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("colour_type", [0, 3], ids=["grey", "palette"])
@pytest.mark.parametrize("bit_depth", [1, 2, 4])
def test_masks_of_few_bits_give_their_numbers(bit_depth, colour_type, tmp_path):
    numbers = np.arange(35).reshape(5, 7) % 2**bit_depth  # its rows end inside a byte
    path = tmp_path / "mask.png"
    path.write_bytes(png(numbers, bit_depth, colour_type))
    assert np.array_equal(read_mask(str(path)), numbers)


def test_a_mask_of_colours_is_refused(tmp_path):
    path = save(tmp_path / "mask.png", np.zeros((4, 4, 3), np.uint8))
    message = r"mask.png: mode RGB: expected one number per pixel \(modes 1, I, I;16"
    with pytest.raises(UnreadableImage, match=message):
        read_mask(str(path))


@pytest.mark.parametrize("name", ["00_mask.png", "00.jpg"])
def test_a_mask_of_another_name_is_named(name, shapes):
    masks = shapes / "masks" / "train"
    (masks / "00.png").rename(masks / name)
    message = rf"00.png; {name} is there: expected the name of the image and the ending .png"
    with pytest.raises(InputError, match=message):
        source_of(shapes)


def test_folders_on_another_level_are_named(shapes, tmp_path):
    with pytest.raises(InputError, match=f"masks; they are in data.root={shapes}$"):
        source_of(shapes / "images" / "train")
    other = tmp_path / "other"
    (other / "train").mkdir(parents=True)
    (shapes / "images").rename(other / "train" / "images")
    message = "; train/images is there: expected images/train and masks/train$"
    with pytest.raises(InputError, match=message):
        source_of(other)
