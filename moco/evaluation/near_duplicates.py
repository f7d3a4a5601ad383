"""A threshold for near-duplicates that fits an encoder: arrays in, numbers out.

How similar two images of different things are depends on the encoder: 0.3 for one, 0.97 for
another. So the cosines of all images with their nearest other image say what is usual, and a pair
that is far more similar than that is a near-duplicate.
"""

import numpy as np

from moco.evaluation.knn import without_own
from moco.evaluation.neighbors import nearest, nearest_by_block

CUTOFF = 3.5
"""Modified z-scores beyond this are outliers: Iglewicz and Hoaglin, "How to detect and handle
outliers" (ASQC, 1993)."""
NORMAL = 0.6745
"""Median absolute deviation of a normal distribution with a standard deviation of 1."""
NEARER = 2
"""A near-duplicate is so many times nearer than the usual nearest image. In many dimensions all
nearest images have about the same distance, and a slightly smaller one means nothing."""
COPY = 1e-5
"""Distance 1 - cosine that rounding alone can make between two copies of an image."""
LEAST_IMAGES = 10
"""Fewer images say nothing about what is usual."""
MOST_SEARCHED = 1_000
"""Images whose nearest one is searched, for a threshold."""
MOST_PRODUCTS = 2e11
"""Multiplications for that: some seconds of a core. Of a large dataset fewer images are taken."""
MOST_PRODUCTS_OF_ALL = 2e12
"""Multiplications to search the nearest image of all images: a minute of two cores, for 60,000
images with 512 features. Pairs of a larger dataset are not listed."""


def near_duplicate_cosine(cosines: np.ndarray) -> float:
    """Return the cosine above which a pair of images is unusually similar, at most 1 - `COPY`.

    The distances 1 - cosine of images to their nearest other image are nearly log-normal. A pair is
    a near-duplicate if the logarithm of its distance is an outlier below their median, by the
    modified z-score, and the distance is at most half of the usual one. Copies do not count for the
    median.

    Args:
        cosines: (images,) of each image with its nearest other image.
    """
    distances = 1 - np.asarray(cosines, np.float64)
    logs = np.log(distances[distances > COPY])
    if len(logs) < LEAST_IMAGES:
        return 1 - COPY
    median = np.median(logs)
    deviation = np.median(np.abs(logs - median))
    distance = np.exp(median - CUTOFF / NORMAL * deviation)
    distance = min(distance, np.exp(median) / NEARER)
    return float(1 - max(distance, COPY))


def nearest_cosines(features: np.ndarray) -> np.ndarray:
    """Return the cosine of some images with their nearest other image.

    Args:
        features: (images, width) of any norm, at least two rows; may be mapped from a file.

    Returns:
        (some images,) at most `MOST_SEARCHED`, evenly spaced.
    """
    num_images, width = features.shape
    affordable = max(1, int(MOST_PRODUCTS / (num_images * width)))
    number = min(num_images, MOST_SEARCHED, affordable)
    rows = np.linspace(0, num_images - 1, number).astype(np.int64)
    similarities, found = nearest(features, features[rows], 2)
    return without_own(similarities, found, rows)[0][:, 0]


def pairs_above(features: np.ndarray, cosine: float) -> list[tuple[int, int, float]] | None:
    """Return images with their nearest other image where the two are similar enough.

    Args:
        features: (images, width) of any norm, at least two rows; may be mapped from a file.
        cosine: the threshold.

    Returns:
        Two rows and their cosine for each pair, the most similar one first, each pair once. None if
        the search would take too long, see `MOST_PRODUCTS_OF_ALL`.
    """
    num_images, width = features.shape
    if num_images * num_images * width > MOST_PRODUCTS_OF_ALL:
        return None
    cosines: dict[tuple[int, int], float] = {}
    start = 0
    for similarities, found in nearest_by_block(features, features, 2):
        rows = np.arange(start, start + len(found))
        start += len(found)
        nearest_similarities, nearest_rows = without_own(similarities, found, rows)
        is_near = nearest_similarities[:, 0] > cosine
        for row, other, similarity in zip(
            rows[is_near].tolist(),
            nearest_rows[is_near, 0].tolist(),
            nearest_similarities[is_near, 0].tolist(),
            strict=True,
        ):
            cosines[min(row, other), max(row, other)] = similarity
    pairs = [(row, other, similarity) for (row, other), similarity in cosines.items()]
    return sorted(pairs, key=lambda pair: (-pair[2], pair[0], pair[1]))
