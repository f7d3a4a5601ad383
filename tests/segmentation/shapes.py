"""Images of discs and squares with their masks, which tests of segmentation draw."""

import numpy as np
from PIL import Image

SIDE = 32


def save(path, array, mode=None):
    """Write an array as an image file. Return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode == "P":
        palette = []
        for grey in range(256):
            palette += [grey, 255 - grey, 128]
        image.putpalette(palette)
    if mode == "1":
        image = image.convert("1")
    image.save(path)
    return path


def draw_shape(generator, kind, side=SIDE):
    """Draw a red disc (kind 1) or a blue square (kind 2) on grey.

    Returns:
        The image (side, side, 3) and its mask: the kind inside, 0 outside, 255 in the first row.
    """
    rows, columns = np.mgrid[:side, :side]
    middle_row, middle_column = generator.integers(side // 4, 3 * side // 4, 2)
    radius = generator.integers(side // 6, side // 4)
    down, right = abs(rows - middle_row), abs(columns - middle_column)
    image = np.full((side, side, 3), 90, dtype=np.uint8)
    if kind == 1:
        inside = down**2 + right**2 < radius**2
        image[inside] = (220, 40, 40)
    else:
        inside = (down < radius) & (right < radius)
        image[inside] = (40, 40, 220)
    mask = np.where(inside, kind, 0).astype(np.uint8)
    mask[0] = 255
    return image, mask


def draw_shapes(root, num_train=8, num_val=4):
    """Draw a segmentation folder of discs and squares in turns. Return its path."""
    generator = np.random.default_rng(0)
    for part, count in (("train", num_train), ("val", num_val)):
        for number in range(count):
            image, mask = draw_shape(generator, 1 + number % 2)
            save(root / "images" / part / f"{number:02}.png", image)
            save(root / "masks" / part / f"{number:02}.png", mask)
    return root
