"""Images and masks: pairing, checking, augmenting them together."""

import itertools
import pickle
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from moco.data.files.images import UnreadableImage, read_mask
from moco.errors import InputError
from moco.segmentation.mask_augmentation import SegmentationView
from moco.segmentation.mask_batches import batches_of_one_size
from moco.segmentation.mask_sources import VOC_CLASSES, build_segmentation_source
from moco.segmentation.segmentation_data import SegmentationData

SIDE = 32


def save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette([value for grey in range(256) for value in (grey, 255 - grey, 128)])
    (image.convert(mode) if mode == "1" else image).save(path)
    return path


def draw_shape(generator, kind, side=SIDE):
    """An image (side, side, 3) of a red disc or a blue square on grey, and its mask: 1 or 2, 0 beside, 255 at the top."""
    rows, columns = np.mgrid[:side, :side]
    middle_row, middle_column = generator.integers(side // 4, 3 * side // 4, 2)
    radius = generator.integers(side // 6, side // 4)
    down, right = abs(rows - middle_row), abs(columns - middle_column)
    inside = down**2 + right**2 < radius**2 if kind == 1 else (down < radius) & (right < radius)
    image = np.full((side, side, 3), 90, dtype=np.uint8)
    image[inside] = (220, 40, 40) if kind == 1 else (40, 40, 220)
    mask = np.where(inside, kind, 0).astype(np.uint8)
    mask[0] = 255
    return image, mask


def draw_shapes(root, num_train=8, num_val=4):
    """A folder of images and masks, discs and squares by turns."""
    generator = np.random.default_rng(0)
    for part, count in (("train", num_train), ("val", num_val)):
        for number in range(count):
            image, mask = draw_shape(generator, 1 + number % 2)
            save(root / "images" / part / f"{number:02}.png", image)
            save(root / "masks" / part / f"{number:02}.png", mask)
    return root


@pytest.fixture
def shapes(tmp_path):
    return draw_shapes(tmp_path / "shapes")


def source_of(root, **settings):
    return build_segmentation_source("segmentation_folder", str(root), **settings)


def view(image_size, **settings):
    defaults = {
        "scale": [1.0, 1.0], "horizontal_flip": 0.0, "color_jitter": None, "mean": [0.5, 0.5, 0.5], "std": [1.0, 1.0, 1.0],
        "ignore_index": 255, "seed": 0,
    }  # fmt: skip
    return SegmentationView(image_size, **(defaults | settings))


def test_the_split_by_folders_is_kept_and_classes_are_counted(shapes):
    source = source_of(shapes)
    assert (len(source.train), len(source.validation)) == (8, 4)
    assert source.class_names == ("0", "1", "2")
    image, mask = source.validation[1]
    assert source.validation.images.name(1) == str(shapes / "images/val/01.png")
    assert np.array_equal(mask, np.array(Image.open(shapes / "masks/val/01.png")))
    assert np.array_equal(np.array(image), np.array(Image.open(shapes / "images/val/01.png")))
    assert source.train.sizes.tolist() == [[SIDE, SIDE]] * 8


def test_without_folders_a_tenth_by_name_is_held_out_and_stays_so(tmp_path):
    def held_out():
        return {source.validation.images.name(row) for row in range(len(source.validation))}

    for number in range(60):
        save(tmp_path / "images" / f"{number}.png", np.zeros((4, 4, 3), np.uint8))
        save(tmp_path / "masks" / f"{number}.png", np.full((4, 4), number % 2, np.uint8))
        if number == 29:
            source = source_of(tmp_path)
            before = held_out()
    source = source_of(tmp_path)
    assert len(source.train) + len(source.validation) == 60
    assert before == {name for name in held_out() if int(name.split("/")[-1][:-4]) < 30}
    assert 1 < len(held_out()) < 15


def test_few_images_still_hold_one_out_and_the_log_says_how(tmp_path, caplog):
    caplog.set_level("INFO")
    for number in range(2):
        save(tmp_path / "images" / f"{number}.jpg", np.zeros((4, 4, 3), np.uint8))
        save(tmp_path / "masks" / f"{number}.png", np.eye(4, dtype=np.uint8))
    source = source_of(tmp_path)
    assert (len(source.train), len(source.validation)) == (1, 1)
    assert "held out: 1 of 2 images, by a hash of their names" in caplog.text


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_folders_may_have_other_usual_names(held_out, shapes, caplog):
    caplog.set_level("INFO")
    for folder in ("images", "masks"):
        (shapes / folder / "train").rename(shapes / folder / "training")  # ADE20K's
        (shapes / folder / "val").rename(shapes / folder / held_out)
    source = source_of(shapes)
    assert (len(source.train), len(source.validation)) == (8, 4)
    assert source.validation.images.name(0) == str(shapes / "images" / held_out / "00.png")
    assert "hash" not in caplog.text


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_a_folder_to_hold_out_needs_one_to_train_on(held_out, shapes):
    for folder in ("images", "masks"):
        (shapes / folder / "train").rename(shapes / folder / "Training set")
        (shapes / folder / "val").rename(shapes / folder / held_out)
    with pytest.raises(InputError) as error:
        source_of(shapes)
    assert str(error.value) == (
        f"data.root={shapes}: images has a folder {held_out}, and none to train on; expected images/train or "
        "images/training beside it"
    )


def test_checking_files_in_threads_leaves_the_warning_filters(tmp_path, monkeypatch):
    for number in range(16):
        save(tmp_path / "images" / f"{number}.png", np.zeros((SIDE, SIDE, 3), np.uint8))
        save(tmp_path / "masks" / f"{number}.png", np.eye(SIDE, dtype=np.uint8))
    open_image, counts = Image.open, itertools.count()

    def delayed(path, **options):
        image = open_image(path, **options)
        time.sleep(
            0.001 * (next(counts) % 7)
        )  # so that threads end in another order than they begin
        return image

    monkeypatch.setattr(Image, "open", delayed)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    before = list(warnings.filters)
    source_of(
        tmp_path, max_image_pixels=SIDE * SIDE
    )  # Pillow warns of every file: from half of this on
    assert warnings.filters == before


@pytest.mark.parametrize(
    ("mode", "dtype"), [("1", np.uint8), ("L", np.uint8), ("P", np.uint8), ("I;16", np.int32)]
)
def test_masks_of_every_kind_give_their_numbers(mode, dtype, tmp_path):
    numbers = (
        np.arange(12).reshape(3, 4) % (2 if mode == "1" else 12) * (1000 if mode == "I;16" else 1)
    )
    stored = numbers.astype(np.uint16 if mode == "I;16" else np.uint8)
    path = save(tmp_path / "mask.png", stored * 255 if mode == "1" else stored, mode)
    with Image.open(path) as image:
        assert image.mode == mode
    mask = read_mask(str(path))
    assert mask.dtype == dtype
    assert np.array_equal(mask, numbers)


def png(numbers, bit_depth, colour_type):
    """A PNG file by its specification: Pillow writes no grey of 2 or 4 bits."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    height, width = numbers.shape
    bits = np.unpackbits(numbers.astype(np.uint8)[:, :, None], axis=2)[:, :, -bit_depth:].reshape(
        height, -1
    )
    lines = b"".join(b"\0" + line.tobytes() for line in np.packbits(bits, axis=1))
    palette = chunk(b"PLTE", bytes(range(3 * 2**bit_depth))) if colour_type == 3 else b""
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + palette
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("colour_type", [0, 3], ids=["grey", "palette"])
@pytest.mark.parametrize("bit_depth", [1, 2, 4])
def test_masks_of_few_bits_give_their_numbers(bit_depth, colour_type, tmp_path):
    numbers = np.arange(35).reshape(5, 7) % 2**bit_depth  # rows that end inside a byte
    path = tmp_path / "mask.png"
    path.write_bytes(png(numbers, bit_depth, colour_type))
    assert np.array_equal(read_mask(str(path)), numbers)


def test_a_mask_of_colours_is_refused(tmp_path):
    path = save(tmp_path / "mask.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(
        UnreadableImage,
        match=r"mask.png: mode RGB: expected one number per pixel \(modes 1, I, I;16",
    ):
        read_mask(str(path))


def test_class_names_come_from_the_config_or_a_file(shapes):
    assert source_of(shapes, class_names=["sky", "disc", "square"]).class_names == (
        "sky",
        "disc",
        "square",
    )
    (shapes / "classes.txt").write_text("sky\ndisc\nsquare\nmoon\n\n")
    assert source_of(shapes).class_names == ("sky", "disc", "square", "moon")
    assert source_of(shapes, class_names=["a", "b", "c"]).class_names == ("a", "b", "c")
    assert source_of(shapes, num_classes=4).class_names == ("sky", "disc", "square", "moon")


def test_another_number_can_stand_for_no_class(shapes, caplog):
    source = source_of(shapes, ignore_index=0, num_classes=256)
    assert len(source.class_names) == 256
    assert "class 0 is left out: its number is data.ignore_index=0" in caplog.text


@pytest.mark.parametrize("settings", [{"num_classes": 2}, {"class_names": ["road", "rest"]}, {}])
def test_masks_of_0_and_255_leave_nothing_to_tell_apart(settings, shapes):
    for path in shapes.glob("masks/*/*.png"):
        save(path, np.where(np.eye(SIDE) > 0, 255, 0).astype(np.uint8))
    with pytest.raises(InputError) as error:
        source_of(shapes, **settings)
    assert str(error.value) == (
        f"data.root={shapes}: the masks to train on hold only the number 0 beside data.ignore_index=255, and at least two "
        "classes are needed; masks of 0 and 255 have to be stored as 0 and 1"
    )


def test_one_class_beside_another_number_without_class_is_named(shapes):
    for path in shapes.glob("masks/train/*.png"):
        save(path, np.eye(SIDE, dtype=np.uint8))
    with pytest.raises(
        InputError,
        match=r"only the number 1 beside data.ignore_index=0, and at least two classes are ne",
    ):
        source_of(shapes, ignore_index=0)


def test_classes_that_no_mask_to_train_on_has_are_named(shapes, caplog):
    source_of(shapes, class_names=["sky", "disc", "square"])
    assert "no mask" not in caplog.text
    save(shapes / "masks/val/00.png", np.full((SIDE, SIDE), 3, np.uint8))
    source_of(shapes, class_names=["sky", "disc", "square", "moon", "sun"])
    assert "classes in no mask to train on: moon, sun\n" in caplog.text
    caplog.clear()
    source_of(shapes, num_classes=16)
    assert "on: 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 (and 3 more like it)\n" in caplog.text
    caplog.clear()
    source_of(shapes, num_classes=256, ignore_index=0)  # which is not missing
    assert "on: 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 (and 242 more like it)\n" in caplog.text


def test_voc_2012_is_read_as_torchvision_unpacks_it(tmp_path):
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    for part, names in (("train", ["a", "b"]), ("val", ["c"])):
        (voc / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (voc / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            save(voc / "JPEGImages" / f"{name}.jpg", np.zeros((6, 8, 3), np.uint8))
            save(
                voc / "SegmentationClass" / f"{name}.png",
                np.full((6, 8), 20, np.uint8) - np.eye(6, 8, dtype=np.uint8),
                "P",
            )
    source = build_segmentation_source("voc2012", str(tmp_path))
    assert (len(source.train), len(source.validation)) == (2, 1)
    assert source.class_names == VOC_CLASSES
    assert len(VOC_CLASSES) == 21
    assert source.train[1][1].max() == 20


# What is wrong with the folder, and what is said: word for word after the folder's name.
MISTAKES = {
    "no folder": "data.root={root}/nowhere: no such folder",
    "no masks": "data.root={root}: no folder masks in there (expected images and masks)",
    "image without mask": "{root}/images/train/03.png: no mask {root}/masks/train/03.png",
    "images without mask": "{root}/images/train/03.png: no mask {root}/masks/train/03.png (and 1 more like it)",
    "mask without image": "{root}/masks/val/02.png: no image of that name in {root}/images/val",
    "two images": "{root}/images/train/01.png: {root}/images/train/01.jpg has the same mask, {root}/masks/train/01.png",
    "size": "{root}/masks/train/05.png: 16 x 20 px, and its image {root}/images/train/05.png has 32 x 32 px",
    "colours": "{root}/masks/train/05.png: mode RGB: expected one number per pixel (modes 1, I, I;16, L, P)",
    "damaged image": "{root}/images/train/04.png: cannot identify image file",
    "damaged mask": "{root}/masks/val/00.png: ",
    "past the classes": "{root}/masks/train/06.png: holds the number 7, and data.num_classes says 3 classes, 0 to 2",
    "past the names": "{root}/masks/train/06.png: holds the number 7, and {root}/classes.txt says 3 classes, 0 to 2",
    "names and number": "data.num_classes=5: {root}/classes.txt has 3 names",
    "empty name": "{root}/classes.txt: line 2 is empty; expected a class name in every line",
    "no text": "{root}/classes.txt: cannot be read as UTF-8 text ('utf-8' codec can't decode byte 0xff in position 0: invalid"
    " start byte)",
    "names twice": "data.class_names: the class a is there twice",
    "no class": "data.root={root}: the masks to train on hold nothing beside data.ignore_index=255, and at least two classes"
    " are needed; masks of 0 and 255 have to be stored as 0 and 1",
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_in_the_folder_names_the_file(mistake, shapes):
    settings, root = {}, shapes
    names = shapes / "classes.txt"
    if mistake == "no folder":
        root = shapes / "nowhere"
    elif mistake == "no masks":
        (shapes / "masks").rename(shapes / "labels")
    elif mistake in ("image without mask", "images without mask"):
        (shapes / "masks/train/03.png").unlink()
        if mistake == "images without mask":
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
    elif mistake in ("past the classes", "past the names"):
        save(shapes / "masks/train/06.png", np.full((SIDE, SIDE), 7, np.uint8))
        settings = {"num_classes": 3} if mistake == "past the classes" else {}
        names.write_text("a\nb\nc") if mistake == "past the names" else None
    elif mistake == "names and number":
        names.write_text("a\nb\nc")
        settings = {"num_classes": 5}
    elif mistake == "empty name":
        names.write_text("a\n\nb\n")
    elif mistake == "no text":
        names.write_bytes(b"\xff\xfe")
    elif mistake == "names twice":
        settings = {"class_names": ["a", "b", "a"]}
    else:
        for path in shapes.glob("masks/*/*.png"):
            save(path, np.full((SIDE, SIDE), 255, np.uint8))
    with pytest.raises(InputError) as error:
        source_of(root, **settings)
    expected = MISTAKES[mistake].format(root=shapes)
    assert (
        str(error.value) == expected
        if mistake != "damaged mask"
        else str(error.value).startswith(expected)
    )


@pytest.mark.parametrize(
    ("name", "root", "expected"),
    [
        (
            "cifar10",
            ".",
            "data=cifar10: this set has no masks (choices: segmentation_folder, voc2012)",
        ),
        (
            "voc2021",
            ".",
            "data.name: unknown data set 'voc2021'; did you mean 'voc2012'? (choices: segmentation_folder,",
        ),
        ("voc2012", None, "data.root=None: expected the data set's folder; give data.root=PATH"),
        ("voc2012", "nowhere", "data.root=nowhere: VOCSegmentation is not there or damaged"),
    ],
)
def test_other_data_sets_are_refused(name, root, expected):
    with pytest.raises(InputError) as error:
        build_segmentation_source(name, root)
    assert str(error.value).startswith(expected)


def test_pretraining_says_where_masks_belong():
    from moco.data.sources.registry import build_source

    with pytest.raises(
        InputError,
        match=r"data=voc2012: its masks are for moco.segment and evaluation=dense; data=images data.root=PATH",
    ):
        build_source("voc2012", "x")


def coordinates(height, width):
    """An image whose red is 4 times the column and green 4 times the row, and a mask of row * 64 + column."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([4 * columns, 4 * rows, np.zeros_like(rows)], axis=2).astype(np.uint8)
    return Image.fromarray(image), (rows * 64 + columns).astype(np.int32)


@pytest.mark.parametrize("scale", [[1.0, 1.0], [0.5, 2.0]])
def test_image_and_mask_move_together(scale):
    raw, mask = coordinates(60, 50)
    augment = view(24, scale=scale, horizontal_flip=0.5, mean=[0, 0, 0], ignore_index=60000)
    seen = set()
    for index in range(40):
        image, classes = augment(raw, mask, epoch=0, index=index)
        assert image.shape == (3, 24, 24)
        assert (classes.dtype, classes.shape) == (torch.int64, (24, 24))
        columns, rows = image[0] * 255 / 4, image[1] * 255 / 4
        inner = (
            slice(2, -2),
            slice(2, -2),
        )  # at the borders the bilinear image is made of less than its surroundings
        tolerance = (
            0.01 if scale == [1.0, 1.0] else 0.8
        )  # in px of the source; nearest and bilinear differ by up to 0.5
        assert (classes % 64 - columns).abs()[inner].max() < tolerance
        assert (classes // 64 - rows).abs()[inner].max() < tolerance
        is_flipped = bool(classes[12, 4] > classes[12, 20])
        seen.add((is_flipped, int(classes[12, 12])))
    assert {flipped for flipped, _ in seen} == {False, True}
    assert len(seen) > 20


@pytest.mark.parametrize("factor", [0.7, 1.6])
def test_resized_masks_stay_where_their_images_are(factor):
    raw, mask = coordinates(60, 50)
    shifts = []
    for index in range(20):
        image, classes = view(24, scale=[factor, factor], mean=[0, 0, 0])(raw, mask, 0, index)
        shifts.append((classes % 64 - image[0] * 255 / 4)[4:-4, 4:-4].mean())
    assert (
        abs(torch.stack(shifts).mean()) < 0.08
    )  # torchvision's resizing of masks is off by 0.2 here


def test_what_the_image_lacks_is_its_mean_and_has_no_class():
    raw, mask = coordinates(20, 50)
    image, classes = view(40, scale=[0.5, 0.5], mean=[0.2, 0.4, 0.6])(raw, mask, 0, 0)
    assert (classes[:10, :25] != 255).all()
    assert (classes[10:] == 255).all()
    assert (classes[:, 25:] == 255).all()
    assert image[:, 10:].abs().max() < 1 / 255
    assert image[:, :, 25:].abs().max() < 1 / 255


def test_what_the_image_lacks_has_no_class_where_that_takes_more_bits_than_the_mask_has():
    raw, mask = coordinates(20, 50)
    _, classes = view(40, scale=[0.5, 0.5], ignore_index=300)(
        raw, (mask % 200).astype(np.uint8), 0, 0
    )
    assert (classes[:10, :25] < 200).all()
    assert (classes[10:] == 300).all()
    assert (classes[:, 25:] == 300).all()


def test_draws_depend_on_seed_epoch_and_index_alone():
    raw, mask = coordinates(60, 60)
    settings = {
        "scale": [0.5, 2.0],
        "horizontal_flip": 0.5,
        "color_jitter": {"brightness": 0.5, "probability": 0.5},
    }
    augment = view(24, **settings)
    first = augment(raw, mask, 1, 5)
    torch.rand(7)
    augment(raw, mask, 0, 0)
    again = view(24, **settings)(raw, mask, 1, 5)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    for seed, epoch, index in ((1, 1, 5), (0, 2, 5), (0, 1, 6)):
        other = view(24, **(settings | {"seed": seed}))(raw, mask, epoch, index)
        assert not torch.equal(first[0], other[0])


def test_colour_jitter_leaves_the_mask_alone():
    raw, mask = coordinates(24, 24)
    plain = view(24)(raw, mask, 0, 0)
    jittered = view(24, color_jitter={"brightness": 0.5, "saturation": 0.5, "hue": 0.1})(
        raw, mask, 0, 0
    )
    assert not torch.allclose(plain[0], jittered[0])
    assert torch.equal(plain[1], jittered[1])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"scale": [2.0, 0.5]},
            "augmentation.scale=[2.0, 0.5]: expected two factors, 0 < low <= high",
        ),
        ({"scale": [1.0]}, "augmentation.scale=[1.0]: expected two factors, 0 < low <= high"),
        (
            {"color_jitter": {"hues": 1}},
            "augmentation.color_jitter: unknown setting 'hues'; did you mean 'hue'?",
        ),
        (
            {"color_jitter": {"hue": 2}},
            "augmentation.color_jitter: hue=2: expected a fraction of a turn, 0 to 0.5",
        ),
        (
            {"std": [0, 1, 1]},
            "augmentation.mean=[0.5, 0.5, 0.5], augmentation.std=[0, 1, 1]: expected three numbers each",
        ),
    ],
)
def test_wrong_augmentation_settings_name_their_key(settings, expected):
    with pytest.raises(InputError) as error:
        view(24, **settings)
    assert str(error.value).startswith(expected)


def data_of(source, **settings):
    return SegmentationData(source, view(16), image_size=16, **({"batch_size": 4} | settings))


def test_training_batches_are_crops_in_the_epochs_order(shapes):
    loader = data_of(source_of(shapes)).train_dataloader()
    orders = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        assert [tuple(batch.images.shape) for batch in batches] == [(4, 3, 16, 16)] * 2
        assert all(not batch.unreadable.any() for batch in batches)
        orders.append(torch.cat([batch.indices for batch in batches]).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(8))
    assert orders[0] != orders[1]


def test_loader_processes_can_be_handed_the_data(shapes):
    data = data_of(source_of(shapes))
    for loader, place in ((data.train_dataloader(), (0, 5)), (data.evaluation_dataloader(), 2)):
        copied = pickle.loads(pickle.dumps(loader.dataset))
        assert all(
            torch.equal(*pair) for pair in zip(copied[place], loader.dataset[place], strict=True)
        )


def test_evaluation_batches_hold_whole_images_of_one_size(shapes):
    save(shapes / "images/val/01.png", np.zeros((20, 10, 3), np.uint8))
    save(shapes / "masks/val/01.png", np.zeros((20, 10), np.uint8))
    batches = list(data_of(source_of(shapes), evaluation_batch_size=2).evaluation_dataloader())
    assert [batch.indices.tolist() for batch in batches] == [[0, 2], [3], [1]]
    assert [tuple(batch.classes.shape) for batch in batches] == [
        (2, 32, 32),
        (1, 32, 32),
        (1, 20, 10),
    ]


def test_batches_of_one_size_hold_every_image_once():
    sizes = np.random.default_rng(0).integers(1, 4, (50, 2))
    batches = batches_of_one_size(sizes, 4)
    assert sorted(row for batch in batches for row in batch) == list(range(50))
    assert all(
        len({tuple(sizes[row]) for row in batch}) == 1 and len(batch) <= 4 for batch in batches
    )


def test_a_file_that_goes_bad_after_the_check_is_named(shapes):
    data = data_of(source_of(shapes))
    path = shapes / "images/train/02.png"
    path.write_bytes(path.read_bytes()[:80])
    batches = list(data.train_dataloader())
    assert sum(int(batch.unreadable.sum()) for batch in batches) == 1
    with pytest.raises(InputError, match=r"images/train/02.png: "):
        [data.on_before_batch_transfer(batch, 0) for batch in batches]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"batch_size": 9}, "data.batch_size=9: there are only 8 images to train on"),
        ({"batch_size": 4, "batches_per_step": 3}, "data.batch_size=4: expected a multiple of 3"),
        (
            {"batch_size": 4, "batches_per_step": 4},
            "data.batch_size=4: one image at a time; the decoders' BatchNorm needs",
        ),
    ],
)
def test_batches_that_cannot_be_made_are_named(settings, expected, shapes):
    with pytest.raises(InputError) as error:
        data_of(source_of(shapes), **settings)
    assert str(error.value).startswith(expected)
