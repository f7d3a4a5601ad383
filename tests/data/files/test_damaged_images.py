"""A run goes on over damaged images, and lists exactly those that cannot be read."""

import io
import json
import os
import re
import warnings

import numpy as np
import pytest
from PIL import Image

from moco.callbacks.unreadable_images import UNREADABLE
from moco.data.sources.registry import build_source
from tests.conftest import run_program
from tests.data.files.test_hostile_images import ODD_NAMES, png_that_claims
from tests.data.loading.test_datamodule import data_for, epoch_of


def encoded(image, file_format, **options):
    with io.BytesIO() as file:
        image.save(file, file_format, **options)
        return file.getvalue()


def small_image(generator, width=24, height=20):
    """Return a smooth image, whose damaged JPEG is not always noise."""
    coarse = Image.fromarray(generator.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def some_format(generator):
    return ("JPEG", "PNG", "GIF", "BMP", "WEBP", "PPM")[generator.integers(6)]


def truncated(generator):
    content = encoded(small_image(generator), some_format(generator))
    return content[: generator.integers(1, len(content))]


def flipped(generator):
    content = bytearray(encoded(small_image(generator), some_format(generator)))
    for place in generator.integers(0, len(content), generator.integers(1, 20)):
        content[place] ^= generator.integers(1, 256)
    return bytes(content)


def animated(generator):
    frames = [small_image(generator) for _ in range(3)]
    return encoded(
        frames[0],
        ("GIF", "WEBP", "PNG")[generator.integers(3)],
        save_all=True,
        append_images=frames[1:],
    )


def sixteen_bit(generator):
    image = Image.fromarray(generator.integers(0, 65536, (20, 24), dtype=np.uint16))
    return encoded(image, ("PNG", "TIFF")[generator.integers(2)])


MAX_IMAGE_PIXELS = 1000  # an undamaged image has 480

DAMAGE = {
    "truncated": truncated,
    "flipped": flipped,
    "empty": lambda _: b"",
    "wrong_extension": lambda generator: encoded(small_image(generator), "PNG"),
    "html": lambda _: b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>",
    "large": lambda generator: encoded(small_image(generator, 40, 40), "JPEG"),
    "bomb": lambda generator: png_that_claims(int(generator.integers(20_000, 10**6)), 20_000),
    "animated": animated,
    "cmyk": lambda generator: encoded(
        small_image(generator).convert("CMYK"), ("JPEG", "TIFF")[generator.integers(2)]
    ),
    "sixteen_bit": sixteen_bit,
}


def make_tree(root, num_images, num_damaged, seed=0):
    """Write images of 24 x 20 px into ten folders, some of them damaged, some with odd names."""
    generator = np.random.default_rng(seed)
    damaged = set(generator.choice(num_images, num_damaged, replace=False).tolist())
    kinds = list(DAMAGE)
    for number in range(num_images):
        folder = root / f"{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        if number in damaged:
            kind = kinds[number % len(kinds)]
            content, name = DAMAGE[kind](generator), f"{number}_{kind}.jpg"
        else:
            content, name = encoded(small_image(generator), "JPEG"), f"{number}.jpg"
        (folder / name).write_bytes(content)
    for name in ODD_NAMES:
        (root / "0" / name).write_bytes(b"no image")
    (root / "1" / "up").symlink_to(root)
    os.mkfifo(root / "2" / "pipe.png")


def is_readable(path):
    """Return whether Pillow can read an image of an allowed size."""
    if not os.path.isfile(path):
        return False
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            image.load()
            return image.width * image.height <= MAX_IMAGE_PIXELS
    except Exception:
        return False


def damaged_tree(folder, num_images, num_damaged):
    """Make a tree of `num_images` files. Return its path, and the files that Pillow cannot read."""
    root = folder / "tree"
    num_others = len(ODD_NAMES) + 1
    make_tree(root, num_images - num_others, num_damaged)
    paths = []
    for top, _, names in os.walk(root):
        paths += [os.path.join(top, name) for name in names]
    assert len(paths) == num_images
    return root, sorted(path for path in paths if not is_readable(path))


def test_the_unreadable_images_are_those_that_pillow_cannot_read(tmp_path):
    root, expected = damaged_tree(tmp_path, 250, 45)
    assert 25 < len(expected) < 50
    source = build_source("images", str(root), max_image_pixels=MAX_IMAGE_PIXELS)
    # The batches hold every image of an epoch.
    data = data_for(source, batch_size=50, max_bad_fraction=0.5)
    for epoch in (0, 1):
        for batch in epoch_of(data.train_dataloader(), epoch):
            data.on_before_batch_transfer(batch, 0)
        assert sorted(data.unreadable) == expected


def train_on(root, batch_size, *arguments):
    """Run the training program in a terminal that knows only ASCII."""
    settings = [
        "data=images",
        f"data.root={root}",
        "backbone=resnet_tiny",
        "augmentation=cifar",
        "method.queue_size=500",
        "method.batch_norm=plain",
        "data.image_size=32",
        f"data.batch_size={batch_size}",
        "data.max_bad_fraction=0.5",
        f"data.max_image_pixels={MAX_IMAGE_PIXELS}",
        "trainer.accelerator=cpu",
        "hydra.run.dir=run",
    ]
    done = run_program(
        "moco.train",
        *settings,
        *arguments,
        cwd=root.parent,
        timeout=600,
        PYTHONIOENCODING="ascii",
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_images", "num_damaged", "batch_size", "num_workers", "epochs"),
    [(250, 45, 50, 1, 2), (5000, 1000, 100, 2, 1)],
)
def test_training_goes_on_over_damaged_images_and_lists_each_once(
    num_images, num_damaged, batch_size, num_workers, epochs, tmp_path
):
    root, expected = damaged_tree(tmp_path, num_images, num_damaged)
    assert 0.4 * num_damaged < len(expected) < 1.1 * num_damaged
    workers = f"data.num_workers={num_workers}"
    done = train_on(root, batch_size, workers, f"trainer.max_epochs={epochs}")
    listing = (tmp_path / "run" / UNREADABLE).read_text()
    assert [json.loads(line) for line in listing.splitlines()] == expected
    assert re.search(rf"unreadable images skipped +\S {len(expected)} ", done.stdout)
    assert done.stdout.count("skipped an unreadable image: ") == len(expected)
    assert "Traceback" not in done.stdout + done.stderr
    assert "Logging error" not in done.stderr
