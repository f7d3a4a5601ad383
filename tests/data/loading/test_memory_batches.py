import numpy as np
import pytest
import torch

from moco.cli.build_pretraining import build_data
from moco.data.augment.views import build_evaluation_view
from moco.data.loading.loaders import evaluation_loader
from moco.data.loading.memory_batches import MemoryBatches, memory_batches
from moco.data.sources.registry import ArrayImages, Labelled

MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]


def labelled_images(generator, *channels, side=8):
    array = generator.integers(0, 256, (11, side, side, *channels), dtype=np.uint8)
    return Labelled(ArrayImages(array, "array"), np.arange(11))


@pytest.mark.parametrize("channels", [(), (1,), (3,), (4,)])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 3)])
def test_batches_equal_those_of_the_loader_that_takes_one_image_after_the_other(
    channels, rank, world_size, generator
):
    labelled, view = labelled_images(generator, *channels), build_evaluation_view(8, 1.0, MEAN, STD)
    batches = memory_batches(labelled, view, 4, rank, world_size, torch.device("cpu"))
    for ours, slow in zip(
        batches, evaluation_loader(labelled, view, 8, 4, 0, rank, world_size), strict=True
    ):
        for values, expected in zip(ours, slow, strict=True):
            assert torch.equal(values, expected)
    assert len(batches) == -(-len(range(rank, 11, world_size)) // 4)


def test_images_that_would_be_resized_or_cropped_are_left_to_the_loader(generator):
    labelled = labelled_images(generator)
    for image_size, crop_ratio in ((16, 1.0), (8, 0.875)):
        view = build_evaluation_view(image_size, crop_ratio, MEAN, STD)
        assert memory_batches(labelled, view, 4, 0, 1, torch.device("cpu")) is None


def test_a_run_with_images_in_memory_starts_no_loader_processes_to_evaluate(runner):
    data = build_data(runner.config("data.num_workers=2", "data.image_size=8"))
    assert isinstance(data.evaluation_dataloader(data.source.bank), MemoryBatches)
