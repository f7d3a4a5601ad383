import multiprocessing

import pytest
import torch

from moco.data.sources.source import ArrayImages, DataSource, Labelled


@pytest.fixture(autouse=True)
def reaped_workers():
    """End the loader processes of a test, also if the test fails."""
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


@pytest.fixture
def numbered(generator):
    """30 images in memory, whose labels are their numbers."""
    array = generator.integers(0, 256, (30, 8, 8, 3), dtype="uint8")
    images = ArrayImages(array, "numbered")
    labelled = Labelled(images, torch.arange(30).numpy())
    return DataSource(images, labelled, labelled, 8)
