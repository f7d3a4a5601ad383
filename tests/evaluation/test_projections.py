"""Features laid out: colours of feature maps, and points in a plane."""

import importlib.util

import numpy as np
import pytest

from moco.errors import InputError
from moco.evaluation.neighbors import normalized
from moco.evaluation.reports.projections import (
    LEAST_ROWS,
    check_map,
    laid_out,
    principal_colors,
    principal_components,
)
from moco.extras import install_command


def test_principal_components_are_those_of_numpys_svd(generator):
    rows = generator.normal(size=(300, 40)) * np.linspace(9, 0.1, 40) + 5
    found = principal_components(rows.astype(np.float32), 3)
    left, values, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    expected = left[:, :3] * values[:3]
    expected *= np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_the_colours_of_maps_are_components_of_all_images_together(generator):
    directions = np.linalg.qr(generator.normal(size=(32, 3)))[0].T  # (3, C)
    amounts = np.linalg.qr(generator.normal(size=(8 * 5 * 6, 4)))[0][:, 1:]
    amounts = (amounts - amounts.mean(axis=0)).reshape(8, 5, 6, 3) * [30, 20, 10]
    maps = np.moveaxis(amounts @ directions + 7, 3, 1)  # (8, C, 5, 6)
    _, _, expected = np.linalg.svd((amounts @ directions).reshape(-1, 32), full_matrices=False)
    colors = principal_colors(maps.astype(np.float32))
    assert (colors.shape, colors.dtype) == ((8, 5, 6, 3), np.uint8)
    for channel in range(3):
        known = amounts @ directions @ expected[channel]
        known = 255 * (known - known.min()) / np.ptp(known)
        shown = colors[..., channel].astype(float)
        assert min(np.abs(shown - known).max(), np.abs(shown - (255 - known)).max()) < 1
        assert (shown.min(), shown.max()) == (0, 255)


@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (8, 16, 1, 1), (2, 2, 3, 3)])
def test_maps_of_few_cells_and_maps_that_do_not_vary_have_colours_too(shape):
    assert not principal_colors(np.full(shape, 3.0, np.float32)).any()


def test_tsne_keeps_clusters_together(generator):
    centres = generator.normal(size=(3, 64)) * 3
    labels = np.repeat([0, 1, 2], 30)
    points = laid_out(normalized(centres[labels] + generator.normal(size=(90, 64))), "tsne")
    assert points.shape == (90, 2)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + np.eye(90) * 1e9
    assert (labels[distances.argmin(axis=1)] == labels).all()


@pytest.mark.parametrize("name", ["tsne", "umap"])
def test_the_features_of_a_collapsed_encoder_are_one_point(name):
    points = laid_out(normalized(np.ones((40, 60))), name)
    assert points.shape == (40, 2)
    np.testing.assert_allclose(points, 0, atol=1e-6)


def test_a_few_features_are_laid_out_too(generator):
    points = laid_out(normalized(generator.normal(size=(LEAST_ROWS, 60))), "tsne")
    assert points.shape == (LEAST_ROWS, 2)
    assert np.isfinite(points).all()


def test_rows_keep_their_inner_products_in_fewer_dimensions(generator):
    # Of rank 5.
    rows = generator.normal(size=(60, 5)) @ generator.normal(size=(5, 40))
    rows = rows.astype(np.float32)
    fewer = principal_components(rows, 8, centred=False)
    assert fewer.shape == (60, 8)
    np.testing.assert_allclose(fewer @ fewer.T, rows @ rows.T, atol=1e-3)
    assert (fewer.var(axis=0)[:5] > 1e-3).all()


@pytest.mark.slow  # its library compiles itself, which takes most of a minute
def test_umap_keeps_clusters_together(generator):
    pytest.importorskip("umap")
    centres = generator.normal(size=(3, 64)) * 3
    labels = np.repeat([0, 1, 2], 30)
    points = laid_out(normalized(centres[labels] + generator.normal(size=(90, 64))), "umap")
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + np.eye(90) * 1e9
    assert (labels[distances.argmin(axis=1)] == labels).all()


def test_umap_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(
        "moco.evaluation.reports.projections.find_spec",
        lambda name: importlib.util.find_spec("numpy"),
    )
    check_map("umap")
    monkeypatch.setattr("moco.evaluation.reports.projections.find_spec", lambda name: None)
    for name in ("tsne", "none"):
        check_map(name)
    with pytest.raises(InputError) as error:
        check_map("umap")
    assert install_command("umap") in str(error.value)
