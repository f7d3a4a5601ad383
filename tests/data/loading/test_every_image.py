"""Every image of a set once, in order, for evaluation."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler

from moco.cli.build_pretraining import build_data
from moco.data.augment.views import EvaluationView
from moco.data.loading.every_image import (
    MemoryBatches,
    evaluation_batch,
    evaluation_loader,
    every_image,
)
from moco.data.sources.registry import build_source
from moco.data.sources.source import ArrayImages, DataSource, Labelled
from tests.data.loading.test_datamodule import data_for

MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]


def labelled_images(generator, *channels):
    array = generator.integers(0, 256, (11, 8, 8, *channels), dtype=np.uint8)
    return Labelled(ArrayImages(array, "array"), np.arange(11))


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 3)])
def test_batches_from_memory_equal_those_of_the_reader(channels, rank, world_size, generator):
    labelled = labelled_images(generator, *channels)
    view = EvaluationView(8, 1.0, MEAN, STD)
    from_memory = evaluation_loader(labelled, view, 8, 4, rank=rank, world_size=world_size)
    assert isinstance(from_memory, MemoryBatches)
    rows = range(rank, 11, world_size)
    collate = partial(evaluation_batch, torch.arange(11), 3, 8)
    batches = BatchSampler(rows, 4, drop_last=False)
    one_by_one = every_image(labelled.images, view, collate, batches)
    for ours, expected in zip(from_memory, one_by_one, strict=True):
        for values, expected_values in zip(ours, expected, strict=True):
            assert torch.equal(values, expected_values)
    assert len(from_memory) == len(one_by_one) == -(-len(rows) // 4)


@pytest.mark.parametrize(("image_size", "crop_ratio"), [(16, 1.0), (8, 0.875)])
def test_images_that_are_resized_or_cropped_are_read_one_by_one(image_size, crop_ratio, generator):
    view = EvaluationView(image_size, crop_ratio, MEAN, STD)
    loader = evaluation_loader(labelled_images(generator), view, image_size, 4)
    assert not isinstance(loader, MemoryBatches)
    (first, *_) = loader
    assert first.images.shape == (4, 3, image_size, image_size)


def test_a_run_with_images_in_memory_starts_no_processes_to_evaluate(runner):
    data = build_data(runner.config("data.num_workers=2", "data.image_size=8"))
    assert isinstance(data.evaluation_dataloader(data.source.bank), MemoryBatches)


def test_images_come_in_order_and_unreadable_ones_are_marked(tmp_path):
    for number in range(4):
        image = Image.new("RGB", (9, 12), (number * 10,) * 3)
        image.save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"")
    images = build_source("images", str(tmp_path)).train
    data = data_for(DataSource(images, None, None, 8), batch_size=2)
    (batch,) = data.evaluation_dataloader(Labelled(images, torch.arange(4).numpy()))
    assert batch.images.shape == (4, 3, 8, 8)
    assert batch.labels.tolist() == [0, 1, 2, 3]
    assert batch.unreadable.tolist() == [False, False, True, False]
    assert (batch.images[2] == 0).all()
