"""Order and pixels do not depend on the number of loader processes, nor on a resume, wherever images come from."""

import tarfile

import pytest
import torch

from moco.data.sources.registry import build_source
from tests.data.loading.test_datamodule import data_for, epoch_of, numbered  # noqa: F401  (a fixture)

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create 4 worker processes"
)  # on a small machine


def shards_of(paths, root):
    """Four tar files of six images each."""
    root.mkdir()
    for shard in range(4):
        with tarfile.open(root / f"{shard}.tar", "w") as archive:
            for path in paths[shard::4]:
                archive.add(path, f"{path.stem}.png")
    return build_source("webdataset", str(root), streams=4, shuffle_buffer=4)


def table_of(paths, root):
    """The same images as Hugging Face's library saves them."""
    import datasets

    datasets.disable_progress_bars()
    rows = {"image": [{"bytes": path.read_bytes(), "path": None} for path in paths]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(root))
    return build_source("hf", str(root))


@pytest.fixture(params=["memory", "images", "webdataset", "hf"])
def source(request, image_tree, tmp_path):
    """24 images, or in memory 30."""
    paths = sorted(image_tree.rglob("*.png"))
    if request.param == "memory":
        return request.getfixturevalue("numbered")
    if request.param == "images":
        return build_source("images", str(image_tree))
    pytest.importorskip({"webdataset": "webdataset", "hf": "datasets"}[request.param])
    return (shards_of if request.param == "webdataset" else table_of)(paths, tmp_path / "set")


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(torch.stack(one.views), torch.stack(other.views))


def test_one_and_four_workers_give_what_the_training_process_alone_does(source):
    expected = [
        epoch_of(data_for(source, batch_size=4).train_dataloader(), epoch) for epoch in range(3)
    ]
    assert len(expected[0]) >= 6
    assert not torch.equal(expected[0][0].views[0], expected[1][0].views[0])
    for num_workers in (1, 4):
        loader = data_for(source, batch_size=4, num_workers=num_workers).train_dataloader()
        for epoch in (0, 1):
            assert_same(epoch_of(loader, epoch), expected[epoch])
        loader.load_state_dict({"epoch": 2, "images": 3 * 4})
        assert_same(epoch_of(loader, 2), expected[2][3:])


@pytest.mark.parametrize("num_workers", [0, 4])
def test_a_run_that_goes_on_in_the_middle_of_an_epoch_sees_what_it_would_have_seen(
    num_workers, source
):
    whole = epoch_of(data_for(source, batch_size=4).train_dataloader(), 1)
    stopped = data_for(source, batch_size=4, num_workers=num_workers).train_dataloader()
    stopped.sampler.set_epoch(1)
    iterator = iter(stopped)
    seen = [next(iterator) for _ in range(2)]
    resumed = data_for(source, batch_size=4, num_workers=num_workers).train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    assert_same([*seen, *epoch_of(resumed, 1)], whole)
