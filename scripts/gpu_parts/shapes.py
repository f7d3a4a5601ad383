"""Make labelled images: ten shapes at any place, in any size and colour."""

from pathlib import Path

import numpy as np

NUM_CLASSES = 10
AT_ONCE = 1000


def masks(columns: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Return the mask of each class's shape.

    Args:
        columns: coordinates, which are -1 to 1 within the square of the shape.
        rows: the same for rows.
    """
    distance = np.hypot(columns, rows)
    width, height = np.abs(columns), np.abs(rows)
    longer = np.maximum(width, height)
    inside = longer < 1
    return [
        distance < 1,  # disc
        (distance < 1) & (distance > 0.6),  # ring
        inside,  # square
        inside & (longer > 0.6),  # frame
        width + height < 1,  # diamond
        inside & (np.minimum(width, height) < 0.3),  # plus
        inside & (np.abs(width - height) < 0.3),  # cross
        inside & (np.sin(9 * rows) > 0),  # bars
        inside & (np.sin(9 * rows) * np.sin(9 * columns) > 0),  # chequers
        inside & (2 * width < 1 - rows),  # triangle
    ]


def draw(num_images: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images (num_images, size, size, 3) uint8 and their labels (num_images,)."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, NUM_CLASSES, num_images)
    images = np.empty((num_images, size, size, 3), np.uint8)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    for first in range(0, num_images, AT_ONCE):
        part = slice(first, first + AT_ONCE)
        count = len(labels[part])
        radius = generator.uniform(0.4, 0.8, (count, 1, 1)).astype(np.float32)
        centre = generator.uniform(-0.4, 0.4, (2, count, 1, 1)).astype(np.float32)
        columns = (axis[None, None, :] - centre[0]) / radius
        rows = (axis[None, :, None] - centre[1]) / radius
        columns, rows = np.broadcast_arrays(columns, rows)
        is_shape = np.choose(labels[part][:, None, None], masks(columns, rows))  # (N, size, size)
        colors = generator.integers(0, 256, (2, count, 1, 1, 3))
        noise = generator.normal(0, 20, (count, size, size, 3)).astype(np.float32)
        images[part] = (np.where(is_shape[..., None], *colors) + noise).clip(0, 255)
    return images, labels


def write(
    path: Path,
    num_images: int,
    num_queries: int,
    size: int,
    *,
    has_labels: bool = True,
) -> Path:
    """Write an archive in the MedMNIST layout; return its path."""
    images, labels = draw(num_images, size, seed=0)
    arrays = {"train_images": images}
    if has_labels:
        queries, query_labels = draw(num_queries, size, seed=1)
        arrays |= {"train_labels": labels, "test_images": queries, "test_labels": query_labels}
    np.savez(path, **arrays)
    return path
