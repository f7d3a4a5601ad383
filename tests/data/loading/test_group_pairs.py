"""Batches whose key views come from another image of the query's group."""

import numpy as np
import pytest
import torch
from PIL import Image

from moco.data.augment.views import ViewPair
from moco.data.loading.loaders import PairDataset
from moco.data.sources.groups import KeyImages, with_groups
from moco.data.sources.registry import build_source
from moco.data.sources.source import ArrayImages, DataSource
from moco.errors import InputError
from tests.data.loading.test_datamodule import HALF, VIEW, data_for, epoch_of


def grouped(groups):
    """Images in memory of one grey value each, so that a view tells its image."""
    values = 10 * np.arange(len(groups), dtype=np.uint8)
    array = np.broadcast_to(values[:, None, None], (len(groups), 8, 8)).copy()
    return DataSource(ArrayImages(array, "grey"), None, None, 8, np.asarray(groups))


PLAIN = {"random_resized_crop": {"scale": [0.5, 1.0]}}


def images_of(views):
    """The number of the image that each normalised view is made of."""
    return ((views.mean(dim=(1, 2, 3)) * 0.5 + 0.5) * 25.5).round().int().tolist()


@pytest.mark.parametrize("engine", ["worker", "batch"])
def test_both_engines_take_the_key_view_from_the_drawn_image(engine):
    groups = [0, 1, 2] * 6 + [3, -1]
    source = grouped(groups)
    data = data_for(source, engine=engine, pair="group")
    data.augment = ViewPair(PLAIN, PLAIN, HALF, HALF, image_size=8, seed=0, engine=engine)
    expected = KeyImages(source.groups, "group", data.seed)
    for batch in epoch_of(data.train_dataloader(), 1):
        batch = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
        assert images_of(batch.views[0]) == batch.indices.tolist()
        keys = expected.of(1, batch.indices)
        assert images_of(batch.views[1]) == keys.tolist()
        assert batch.groups.tolist() == source.groups[batch.indices.numpy()].tolist()
        assert source.groups[keys.numpy()].tolist() == batch.groups.tolist()
    first = data.first_images(4)
    keys = expected.of(0, torch.tensor([index for index, _, _ in first]))
    assert images_of(data.pairs(first)[1]) == keys.tolist()


@pytest.mark.parametrize("engine", ["worker", "batch"])
def test_with_groups_of_the_same_image_the_views_are_those_of_the_image_alone(engine, numbered):
    source = DataSource(numbered.train, None, None, 8, np.array([0, 0, *range(1, 29)]))
    with_pairs = data_for(source, engine=engine, pair="group").train_dataloader()
    alone = data_for(numbered, engine=engine).train_dataloader()
    for ours, theirs in zip(epoch_of(with_pairs, 0), epoch_of(alone, 0), strict=True):
        is_alone = ours.indices > 1
        for view, expected in zip(ours.views, theirs.views, strict=True):
            assert torch.equal(view[is_alone], expected[is_alone])


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_epoch_gives_the_same_pairs(num_workers, image_tree):
    source = with_groups(build_source("images", str(image_tree)), str(image_tree), 1)
    whole = epoch_of(data_for(source, pair="mixed").train_dataloader(), 1)
    loader = data_for(source, pair="mixed", num_workers=num_workers).train_dataloader()
    loader.load_state_dict({"epoch": 1, "images": 8})
    for ours, theirs in zip(epoch_of(loader, 1), whole[1:], strict=True):
        assert torch.equal(torch.stack(ours.views), torch.stack(theirs.views))


def test_the_next_image_of_the_group_stands_in_for_an_unreadable_key(image_tree):
    source = with_groups(build_source("images", str(image_tree)), str(image_tree), 1)
    paths = [source.train.name(index) for index in range(24)]
    views = ViewPair(VIEW, VIEW, HALF, HALF, image_size=8, seed=0)
    drawn = KeyImages(source.groups, "group", 0)
    (key,) = drawn.of(0, torch.tensor([5])).tolist()
    after = drawn.others_of_group(5, key)
    assert sorted([*after, key]) == list(range(8))
    assert after[-1] == 5
    with open(paths[key], "wb") as file:
        file.write(b"damaged")
    pairs = PairDataset(source.train, views, drawn)
    pair = pairs._read(5, key)
    np.testing.assert_array_equal(pair.key, np.asarray(Image.open(paths[after[0]])))
    assert pair.is_readable
    # For an unreadable query an image of any group may stand in, and it is paired with itself.
    pair = pairs._read(key, 5)
    assert pair.key is pair.query
    assert not pair.is_readable


def test_a_pair_needs_groups(numbered):
    with pytest.raises(InputError, match=r"data\.pair=group: needs data\.group"):
        data_for(numbered, pair="group")
