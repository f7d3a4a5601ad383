"""Batches of images with masks, and the data module of a segmentation run."""

import pickle

import numpy as np
import pytest
import torch

from moco.errors import InputError
from moco.segmentation.mask_batches import MAX_ASPECT, batches_of_one_size, scaled_size
from moco.segmentation.mask_sources import build_segmentation_source
from moco.segmentation.segmentation_data import SegmentationData
from tests.segmentation.shapes import draw_shapes, save
from tests.segmentation.test_mask_augmentation import view


@pytest.fixture
def shapes(tmp_path):
    return draw_shapes(tmp_path / "shapes")


def data_of(root, batch_size=4, **settings):
    source = build_segmentation_source("segmentation_folder", str(root))
    return SegmentationData(source, view(16), batch_size=batch_size, **settings)


def test_training_batches_are_crops_in_the_order_of_the_epoch(shapes):
    loader = data_of(shapes).train_dataloader()
    orders = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        assert [tuple(batch.images.shape) for batch in batches] == [(4, 3, 16, 16)] * 2
        assert not any(batch.unreadable for batch in batches)
        orders.append(torch.cat([batch.indices for batch in batches]).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(8))
    assert orders[0] != orders[1]


def test_datasets_can_be_sent_to_loader_processes(shapes):
    data = data_of(shapes)
    for loader, place in ((data.train_dataloader(), (0, 5)), (data.evaluation_dataloader(), 2)):
        copy = pickle.loads(pickle.dumps(loader.dataset))
        for one, other in zip(copy[place].value, loader.dataset[place].value, strict=True):
            assert one == other if isinstance(one, int) else torch.equal(one, other)


def test_evaluation_batches_hold_whole_images_of_one_size(shapes):
    save(shapes / "images/val/01.png", np.zeros((20, 10, 3), np.uint8))
    save(shapes / "masks/val/01.png", np.zeros((20, 10), np.uint8))
    batches = list(data_of(shapes, evaluation_batch_size=2).evaluation_dataloader())
    assert [batch.indices.tolist() for batch in batches] == [[0, 2], [3], [1]]
    sizes = [tuple(batch.classes.shape) for batch in batches]
    assert sizes == [(2, 32, 32), (1, 32, 32), (1, 20, 10)]


def test_batches_of_one_size_hold_every_image_once():
    sizes = np.random.default_rng(0).integers(1, 4, (50, 2))
    batches = batches_of_one_size(sizes, range(50), 4)
    rows = []
    for batch in batches:
        rows += batch
        assert len(batch) <= 4
        assert len(np.unique(sizes[batch], axis=0)) == 1
    assert sorted(rows) == list(range(50))


@pytest.mark.parametrize("size", [(375, 500), (333, 500), (1, 100_000), (40, 30)])
def test_images_are_scaled_to_whole_cells(size):
    height, width = scaled_size(*size, image_size=224, stride=32)
    assert height % 32 == width % 32 == 0
    assert 32 <= min(height, width) <= 224
    assert max(height, width) <= MAX_ASPECT * 224
    if max(size) < 2 * min(size):
        assert height / width == pytest.approx(size[0] / size[1], rel=0.1)


def batch_with_unreadable_image(data):
    """The one training batch that has an image that cannot be read."""
    batches = [batch for batch in data.train_dataloader() if batch.unreadable]
    assert len(batches) == 1
    assert len(batches[0].unreadable) == 1
    return batches[0]


def test_a_file_that_is_damaged_after_the_check_is_named(shapes):
    data = data_of(shapes)
    path = shapes / "images/train/02.png"
    path.write_bytes(path.read_bytes()[:80])
    batch = batch_with_unreadable_image(data)
    with pytest.raises(InputError, match=r"images/train/02.png: "):
        data.on_before_batch_transfer(batch, 0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"batch_size": 9}, "data.batch_size=9: there are only 8 images to train on"),
        ({"batches_per_step": 3}, "data.batch_size=4: expected a multiple of 3"),
        ({"batches_per_step": 4}, "data.batch_size=4: a batch would hold one image; "),
    ],
)
def test_batch_sizes_that_do_not_fit_are_named(settings, expected, shapes):
    with pytest.raises(InputError) as error:
        data_of(shapes, **settings)
    assert str(error.value).startswith(expected)
