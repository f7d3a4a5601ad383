"""Bring DSB2018 or DRIVE, as their publishers give them, into the layout of a segmentation folder.

    python scripts/prepare_masks.py dsb2018 stage1_train nuclei
    python scripts/prepare_masks.py drive DRIVE retina

DSB2018, the nuclei of the Data Science Bowl 2018, is BBBC038 of the Broad Bioimage Benchmark
Collection (CC0): a folder for each image, with the image and one mask for each nucleus. Its images
are divided 70/15/15 into train, val and test by a hash of their names. DRIVE, photographs of the
retina, needs a registration at drive.grand-challenge.org. Its own two parts become train and val.
Pixels outside the field of view have no class (255).

The result holds images/PART/NAME.png, masks/PART/NAME.png and classes.txt.
"""

import argparse
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

NO_CLASS = 255
PARTS = {"training": "train", "test": "val", "testing": "val"}
"""The parts of DRIVE. The test part has two names in its copies."""

Sample = tuple[str, str, Image.Image, np.ndarray]
"""The part, the name, the image, and the mask (height, width), uint8."""


def opened(path: Path, mode: str) -> Image.Image:
    """Return an image in a mode of Pillow, such as ``RGB``."""
    with Image.open(path) as image:
        return image.convert(mode)


def is_set(path: Path) -> np.ndarray:
    """Return where a mask of black and white is white, (height, width)."""
    return np.asarray(opened(path, "L")) > 127


def part_of(name: str) -> str:
    """Return the part of an image of DSB2018, from its name alone."""
    percent = zlib.crc32(name.encode()) % 100
    if percent < 70:
        return "train"
    return "val" if percent < 85 else "test"


def dsb2018(source: Path) -> Iterator[Sample]:
    """Yield the images of DSB2018. A pixel is of class 1 if it is in the mask of any nucleus."""
    for folder in sorted(path for path in source.iterdir() if (path / "masks").is_dir()):
        image = opened(folder / "images" / f"{folder.name}.png", "RGB")
        mask = np.zeros((image.height, image.width), np.uint8)
        for path in (folder / "masks").glob("*.png"):
            mask[is_set(path)] = 1
        yield part_of(folder.name), folder.name, image, mask


def drive(source: Path) -> Iterator[Sample]:
    """Yield the images of DRIVE. Class 1 are the vessels of the first observer."""
    for folder in sorted(path for path in source.iterdir() if path.name in PARTS):
        for path in sorted((folder / "images").glob("*.tif")):
            number = path.name[:2]
            vessels = only(folder / "1st_manual", number)
            field_of_view = only(folder / "mask", number)
            mask = np.where(is_set(field_of_view), is_set(vessels), NO_CLASS)
            yield PARTS[folder.name], number, opened(path, "RGB"), mask.astype(np.uint8)


def only(folder: Path, number: str) -> Path:
    """Return the one file of a folder whose name begins with a number."""
    found = list(folder.glob(f"{number}*"))
    if len(found) != 1:
        sys.exit(f"{folder}: expected one file {number}*, found {len(found)}")
    return found[0]


DATA_SETS = {
    "dsb2018": (dsb2018, ("background", "nucleus")),
    "drive": (drive, ("background", "vessel")),
}


def main() -> None:
    """Convert the dataset of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=DATA_SETS)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    samples, class_names = DATA_SETS[arguments.name]
    if not arguments.source.is_dir():
        sys.exit(f"{arguments.source}: no such folder")
    counts: dict[str, int] = {}
    for part, name, image, mask in samples(arguments.source):
        for kind, content in (("images", image), ("masks", Image.fromarray(mask))):
            path = arguments.output / kind / part / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            content.save(path)
        counts[part] = counts.get(part, 0) + 1
    if not counts:
        sys.exit(f"{arguments.source}: there is no image of {arguments.name} in it")
    (arguments.output / "classes.txt").write_text("\n".join(class_names) + "\n")
    shown = [f"{counts[part]} {part}" for part in ("train", "val", "test") if part in counts]
    print(f"{', '.join(shown)} in {arguments.output}")


if __name__ == "__main__":
    main()
