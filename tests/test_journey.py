"""The journey of scripts/segmentation_journey.py from 64 to 144 px, in miniature."""

import dataclasses
import importlib.util

import numpy as np
import pytest

from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def journey():
    spec = importlib.util.spec_from_file_location(
        "journey", REPOSITORY / "scripts" / "segmentation_journey.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiles(tmp_path):
    """Ten classes of 32 px tiles that differ in their colour."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 60), ("test", 20)):
        labels = np.arange(count) % 10
        hues = generator.integers(0, 40, (count, 32, 32, 3)) + (labels * 21)[:, None, None, None]
        arrays |= {f"{part}_images": hues.astype(np.uint8), f"{part}_labels": labels}
    np.savez(tmp_path / "tiles.npz", **arrays)
    return tmp_path / "tiles.npz"


def test_masks_hold_the_class_of_each_pixels_tile(journey):
    tiles = (
        np.arange(10, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
        * 20
    )
    images, masks = journey.mosaics(tiles, np.arange(10), count=3, grid=3, side=4, seed=0)
    assert images.shape == (3, 12, 12, 3)
    assert (images[..., 0] == masks * 20).all()
    assert len(np.unique(masks)) > 3


@pytest.mark.slow
def test_every_variant_goes_from_64_to_144_px_and_nothing_is_run_twice(
    journey, tiles, tmp_path, monkeypatch
):
    pytest.importorskip("segmentation_models_pytorch")
    scale = journey.Scale(
        pretraining_mosaics=16,
        pretraining_epochs=1,
        pretraining_batch=16,
        training_mosaics=4,
        test_mosaics=2,
        epochs=1,
        batch=4,
    )
    results = journey.journey(tiles, tmp_path / "journey", 1, scale)
    assert list(results) == list(journey.VARIANTS)
    assert all(len(scores) == 1 and 0 <= scores[0] <= 1 for scores in results.values())
    monkeypatch.setattr(journey.train, "run", None)
    monkeypatch.setattr(journey.segment, "run", None)
    assert journey.journey(tiles, tmp_path / "journey", 1, scale) == results
    with pytest.raises(SystemExit, match="holds a journey of another scale"):
        journey.journey(tiles, tmp_path / "journey", 1, dataclasses.replace(scale, epochs=2))
