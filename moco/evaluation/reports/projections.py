"""Features in fewer dimensions, to be looked at: a plane of points, colours of feature maps.

Arrays in, arrays out.
"""

from importlib.util import find_spec

import numpy as np

from moco.errors import InputError
from moco.extras import install_command

REDUCED_DIM = 50
"""t-SNE searches for neighbours in this many principal components, as its authors do (JMLR 9, 2008,
section 4.2)."""
PERPLEXITY = 30.0
"""Of t-SNE, as its authors and scikit-learn use it."""
NUM_NEIGHBORS = 15
"""Of UMAP, as its authors use it."""
LEAST_ROWS = 5
"""A map needs at least this many rows."""
SAME = 1e-6
"""If unit vectors vary by less than this, they are all the same."""


def check_map(name: str) -> None:
    """Check that the package of a map is installed.

    Raises:
        InputError: UMAP is asked for and not installed.
    """
    if name == "umap" and find_spec("umap") is None:
        raise InputError(
            f"evaluation.map=umap needs another package: {install_command('umap')}; tsne needs none"
        )


def laid_out(features: np.ndarray, name: str) -> np.ndarray:
    """Lay features out as points (rows, 2) that are near one another if their features are similar.

    Nothing else of the points has a meaning: neither the axes nor the distances between groups.

    Args:
        features: (rows, feature_dim), unit norm, at least `LEAST_ROWS`.
        name: tsne (JMLR 9, 2008) or umap (arXiv 1802.03426).
    """
    rows = principal_components(features, REDUCED_DIM).astype(np.float32)
    spread = rows[:, 0].std()
    if spread < SAME:
        return rows[:, :2]
    # A start from the data gives the same points every time. t-SNE needs a small one.
    start = rows[:, :2] / spread * 1e-4
    if name == "umap":
        from umap import UMAP

        num_neighbors = min(NUM_NEIGHBORS, len(rows) - 1)
        umap = UMAP(n_neighbors=num_neighbors, init=start, random_state=0, n_jobs=1)
        return umap.fit_transform(rows)
    from sklearn.manifold import TSNE

    # t-SNE looks at three times as many neighbours as its perplexity.
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    return TSNE(perplexity=perplexity, init=start, random_state=0).fit_transform(rows)


def principal_colors(maps: np.ndarray) -> np.ndarray:
    """Return the first three principal components of feature maps as red, green and blue.

    They are components of all cells of all images together. Each goes from 0 at its smallest value
    to 255 at its largest; a component that does not vary is 0.

    Args:
        maps: (images, channels, height, width).

    Returns:
        (images, height, width, 3) uint8.
    """
    num_images, channels, height, width = maps.shape
    cells = maps.transpose(0, 2, 3, 1).reshape(-1, channels)
    colors = principal_components(cells, 3)
    colors -= colors.min(axis=0)
    colors *= 255 / np.maximum(colors.max(axis=0), 1e-12)
    return colors.round().astype(np.uint8).reshape(num_images, height, width, 3)


def principal_components(
    rows: np.ndarray, num_components: int, *, centred: bool = True
) -> np.ndarray:
    """Return rows along their directions of largest variance.

    Args:
        rows: (rows, dim).
        centred: subtract the mean row first. Without that, cosines between rows stay nearly the
            same.

    Returns:
        (rows, num_components) float64. If there are fewer directions, the other columns are 0.
    """
    from sklearn.utils.extmath import randomized_svd

    rows = rows.astype(np.float64)
    if centred:
        rows -= rows.mean(axis=0)
    num_found = min(num_components, *rows.shape)
    # More iterations than usual tell components of nearly the same weight apart, for a small cost.
    left, values, _ = randomized_svd(rows, num_found, n_oversamples=20, n_iter=20, random_state=0)
    return np.pad(left * values, ((0, 0), (0, num_components - num_found)))
