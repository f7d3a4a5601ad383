"""Order and pixels depend neither on the number of loader processes nor on a resume."""

import tarfile

import pytest
import torch

from moco.data.sources.registry import build_source
from tests.data.loading.test_datamodule import data_for, epoch_of

# A machine with few cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")


def write_shards(paths, root):
    """Write four tar files of six images each."""
    root.mkdir()
    for shard in range(4):
        with tarfile.open(root / f"{shard}.tar", "w") as archive:
            for path in paths[shard::4]:
                archive.add(path, f"{path.stem}.png")


def write_table(paths, root):
    """Save the images as the datasets library of Hugging Face does."""
    import datasets

    datasets.disable_progress_bars()
    rows = {"image": [{"bytes": path.read_bytes(), "path": None} for path in paths]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(root))


# Every loader process imports the datasets library, which takes seconds.
HUGGING_FACE = pytest.param("hf", marks=pytest.mark.slow)


@pytest.fixture(params=["memory", "images", "webdataset", HUGGING_FACE])
def source(request, image_tree, tmp_path):
    """A dataset of 24 images, or of 30 in memory."""
    paths = sorted(image_tree.rglob("*.png"))
    root = tmp_path / "set"
    if request.param == "memory":
        return request.getfixturevalue("numbered")
    if request.param == "images":
        return build_source("images", str(image_tree))
    if request.param == "webdataset":
        pytest.importorskip("webdataset")
        write_shards(paths, root)
        return build_source("webdataset", str(root), streams=4, shuffle_buffer=4)
    pytest.importorskip("datasets")
    write_table(paths, root)
    return build_source("hf", str(root))


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(torch.stack(one.views), torch.stack(other.views))


def loader_of(source, num_workers):
    return data_for(source, batch_size=4, num_workers=num_workers).train_dataloader()


@pytest.mark.slow
def test_one_and_four_processes_give_what_the_training_process_gives(source):
    expected = [epoch_of(loader_of(source, 0), epoch) for epoch in range(3)]
    assert len(expected[0]) >= 6
    assert not torch.equal(expected[0][0].views[0], expected[1][0].views[0])
    for num_workers in (1, 4):
        loader = loader_of(source, num_workers)
        for epoch in (0, 1):
            assert_same(epoch_of(loader, epoch), expected[epoch])
        loader.load_state_dict({"epoch": 2, "images": 3 * 4})
        assert_same(epoch_of(loader, 2), expected[2][3:])


@pytest.mark.parametrize("num_workers", [0, 4])
def test_a_resumed_epoch_sees_what_it_would_have_seen(num_workers, source):
    whole = epoch_of(loader_of(source, 0), 1)
    stopped = loader_of(source, num_workers)
    stopped.sampler.set_epoch(1)
    iterator = iter(stopped)
    seen = [next(iterator) for _ in range(2)]
    resumed = loader_of(source, num_workers)
    resumed.load_state_dict(stopped.state_dict())
    assert_same([*seen, *epoch_of(resumed, 1)], whole)
