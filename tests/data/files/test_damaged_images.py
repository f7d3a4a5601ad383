"""A run on a tree with many damaged images goes on, and its list of unreadable images is exact."""

import io
import json
import os
import re
import warnings

import numpy as np
import pytest
from PIL import Image

from moco import train
from moco.callbacks.unreadable_images import UNREADABLE
from tests.conftest import run_program
from tests.data.files.test_hostile_images import ODD_NAMES, png_that_claims


def encoded(image, file_format, **options):
    with io.BytesIO() as file:
        image.save(file, file_format, **options)
        return file.getvalue()


def small_image(generator, width=24, height=20):
    """Return a smooth image: most damaged JPEGs of it can still be decoded."""
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


MAX_IMAGE_PIXELS = 1000  # the sound images have 480

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
}


def make_tree(root, num_images, num_damaged, seed=0):
    """Make images of 24 x 20 px in ten folders, some of them damaged, some with odd names."""
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
    """Return whether Pillow alone can read an image."""
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
    """Make a tree; return the paths that Pillow cannot read, in sorted order."""
    make_tree(folder / "tree", num_images - len(ODD_NAMES) - 1, num_damaged)
    paths = []
    for top, _, names in os.walk(folder / "tree"):
        for name in names:
            paths.append(os.path.join(top, name))
    assert len(paths) == num_images
    return sorted(path for path in paths if not is_readable(path))


def settings(folder, batch_size):
    return [
        "data=images",
        f"data.root={folder / 'tree'}",
        "backbone=resnet_tiny",
        "augmentation=cifar",
        "method.queue_size=500",
        "method.batch_norm=plain",
        "data.image_size=32",
        f"data.batch_size={batch_size}",
        "data.max_bad_fraction=0.5",
        f"data.max_image_pixels={MAX_IMAGE_PIXELS}",
        "trainer.accelerator=cpu",
    ]


def listed_in_the_run_folder(folder):
    lines = (folder / "run" / UNREADABLE).read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_training_goes_on_over_damaged_images_and_lists_each_once(tmp_path, runner, caplog):
    """Every image is in a batch of both epochs."""
    unreadable = damaged_tree(tmp_path, num_images=100, num_damaged=20)
    assert 10 < len(unreadable) < 30
    config = runner.config(
        *settings(tmp_path, batch_size=50),
        "trainer.max_epochs=2",
        "trainer.max_steps=-1",
        "data.num_workers=0",
    )
    train.run(config, tmp_path / "run")
    assert listed_in_the_run_folder(tmp_path) == unreadable
    assert caplog.text.count("skipped an unreadable image: ") == len(unreadable)


@pytest.mark.slow
def test_a_thousand_damaged_images_in_five_thousand(tmp_path):
    """Images are read in two processes, and the terminal knows only ASCII."""
    unreadable = damaged_tree(tmp_path, num_images=5000, num_damaged=1000)
    assert 450 < len(unreadable) < 700
    done = run_program(
        "moco.train",
        *settings(tmp_path, batch_size=100),
        "trainer.max_epochs=2",
        "data.num_workers=2",
        "hydra.run.dir=run",
        cwd=tmp_path,
        timeout=600,
        PYTHONIOENCODING="ascii",
    )
    assert done.returncode == 0, done.stderr
    assert listed_in_the_run_folder(tmp_path) == unreadable
    assert re.search(rf"unreadable images skipped +\S {len(unreadable)} ", done.stdout)
    assert done.stdout.count("skipped an unreadable image: ") == len(unreadable)
    assert "Traceback" not in done.stdout + done.stderr
    assert "Logging error" not in done.stderr
