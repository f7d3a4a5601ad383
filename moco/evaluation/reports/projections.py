"""Features laid out to be looked at: a plane of points, and feature maps as colours. Arrays in, arrays out.

Letters: M rows, D feature width, N images, C channels of a map, h w its cells.
"""

from importlib.util import find_spec

import numpy as np

from moco.errors import InputError

REDUCED_DIM = 50
"""t-SNE looks for neighbours in so many principal components, as its authors do (JMLR 9, 2008, section 4.2)."""
PERPLEXITY, NUM_NEIGHBORS = 30.0, 15  # of t-SNE and of UMAP, their authors' usual ones
LEAST_ROWS = 5
SAME = 1e-6
"""Unit vectors that vary by less are all the same: there is nothing to lay out."""


def check_map(name: str) -> None:
    """Raises InputError if UMAP is asked for and not installed."""
    if name == "umap" and find_spec("umap") is None:
        raise InputError(
            "evaluation.map=umap needs another package: pip install 'moco-ssl[umap]'; tsne needs none"
        )


def laid_out(features: np.ndarray, name: str) -> np.ndarray:
    """Points in the plane whose near ones have similar features: (M, 2). Only who is near whom means something.

    Args:
        features: (M, D), unit norm, at least `LEAST_ROWS`.
        name: tsne (JMLR 9, 2008) or umap (arXiv 1802.03426).
    """
    rows = principal_components(features, REDUCED_DIM).astype(np.float32)
    spread = rows[:, 0].std()
    if spread < SAME:
        return rows[:, :2]
    # A start that follows the data gives the same image each time; t-SNE needs it small.
    start = rows[:, :2] / spread * 1e-4
    if name == "umap":
        from umap import UMAP

        num_neighbors = min(NUM_NEIGHBORS, len(rows) - 1)
        return UMAP(n_neighbors=num_neighbors, init=start, random_state=0, n_jobs=1).fit_transform(
            rows
        )
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    return TSNE(perplexity=perplexity, init=start, random_state=0).fit_transform(rows)


def principal_colors(maps: np.ndarray) -> np.ndarray:
    """The first three principal components of all cells of all images together, as red, green and blue: (N, h, w, 3) uint8.

    Each component goes from its smallest value, 0, to its largest, 255; one that does not vary is 0.

    Args:
        maps: (N, C, h, w).
    """
    num, channels, height, width = maps.shape
    cells = maps.transpose(0, 2, 3, 1).reshape(-1, channels)
    colors = principal_components(cells, 3)
    colors -= colors.min(axis=0)
    colors *= 255 / np.maximum(colors.max(axis=0), 1e-12)
    return colors.round().astype(np.uint8).reshape(num, height, width, 3)


def principal_components(rows: np.ndarray, num_components: int) -> np.ndarray:
    """Rows (M, D), centred, along their directions of largest variance: (M, num_components) float64.

    Where there are fewer directions the rest is 0.
    """
    from sklearn.utils.extmath import randomized_svd

    centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    num_found = min(num_components, *rows.shape)
    # More iterations than usual, which cost little: components of nearly the same weight are told apart, too.
    left, values, _ = randomized_svd(
        centred, num_found, n_oversamples=20, n_iter=20, random_state=0
    )
    return np.pad(left * values, ((0, 0), (0, num_components - num_found)))
