import multiprocessing.forkserver
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from moco.data.augment.views import ViewPair, build_evaluation_view
from moco.data.loading.datamodule import PretrainingData, choose_engine
from moco.data.loading.samplers import EpochSampler
from moco.data.sources.registry import build_source
from moco.data.sources.source import ArrayImages, DataSource, Labelled
from moco.errors import InputError

VIEW = {
    "random_resized_crop": {"scale": [0.2, 1.0]},
    "color_jitter": {"brightness": 0.4, "probability": 0.8},
}


def data_for(source, **changes):
    options = {"image_size": 8, "batch_size": 8, "num_workers": 0, "seed": 0} | changes
    name = options.pop("engine", "worker")
    augment = ViewPair(VIEW, VIEW, [0.5] * 3, [0.5] * 3, 8, options["seed"], name)
    options["engine"] = choose_engine(name, source.train, 8, "cpu")
    return PretrainingData(
        source, augment, build_evaluation_view(8, 1.0, [0.5] * 3, [0.5] * 3), **options
    )


@pytest.fixture
def numbered(generator):
    """30 images in memory, their labels their numbers."""
    array = generator.integers(0, 256, (30, 8, 8, 3), dtype="uint8")
    images = ArrayImages(array, "numbered")
    labelled = Labelled(images, torch.arange(30).numpy())
    return DataSource(images, labelled, labelled, 8)


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_loader_processes_leave_signals_to_the_training_process(numbered):
    iterator = iter(data_for(numbered, num_workers=1).train_dataloader())
    next(iterator)
    for pid in (
        multiprocessing.forkserver._forkserver._forkserver_pid,
        multiprocessing.active_children()[0].pid,
    ):
        status = Path(f"/proc/{pid}/status").read_text()
        blocked = int(status.split("SigBlk:")[1].split()[0], 16)
        assert blocked & 1 << (signal.SIGINT - 1)
        assert blocked & 1 << (signal.SIGTERM - 1)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_epoch_visits_each_image_once_and_leaves_out_the_rest_of_the_last_batch(numbered):
    loader = data_for(numbered).train_dataloader()
    epochs = [
        torch.cat([batch.indices for batch in epoch_of(loader, epoch)]).tolist() for epoch in (0, 1)
    ]
    assert all(len(set(order)) == 24 for order in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_epoch_goes_on_with_its_next_batch(num_workers, numbered):
    whole = epoch_of(data_for(numbered).train_dataloader(), 1)
    loader = data_for(numbered, num_workers=num_workers).train_dataloader()
    loader.sampler.set_epoch(1)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    assert state == {"epoch": 1, "images": 8}
    resumed = data_for(numbered, num_workers=num_workers).train_dataloader()
    resumed.load_state_dict(state)
    assert len(resumed) == 3
    rest = epoch_of(resumed, 1)
    assert [batch.indices.tolist() for batch in rest] == [
        batch.indices.tolist() for batch in whole[1:]
    ]
    assert torch.equal(rest[0].views[0], whole[1].views[0])
    assert resumed.state_dict() == {"epoch": 1, "images": 24}
    assert len(epoch_of(resumed, 2)) == 3


def test_processes_share_each_global_batch():
    whole = list(EpochSampler(100, 12, seed=3))
    shares = [list(EpochSampler(100, 12, seed=3, rank=rank, world_size=3)) for rank in range(3)]
    assert len(whole) == 96
    assert [len(share) for share in shares] == [32] * 3
    for step in range(8):
        together = [place for share in shares for place in share[step * 4 : step * 4 + 4]]
        assert together == whole[step * 12 : step * 12 + 12]


def test_accumulated_batches_make_up_the_batch_size(numbered):
    batches = epoch_of(data_for(numbered, batch_size=12, batches_per_step=3).train_dataloader(), 0)
    assert [len(batch.indices) for batch in batches] == [4] * 6


def test_batches_that_do_not_fit_are_named(numbered):
    with pytest.raises(InputError, match=r"data\.batch_size=31: there are only 30 images"):
        data_for(numbered, batch_size=31)
    with pytest.raises(InputError, match=r"data\.batch_size=8: expected a multiple of 3"):
        data_for(numbered, batches_per_step=3)


@pytest.mark.parametrize("engine", ["worker", "batch"])
def test_both_engines_see_the_same_images_in_the_same_order(engine, numbered):
    plain = list(data_for(numbered).train_dataloader())
    for ours, theirs in zip(epochs_of(data_for(numbered, engine=engine), 1)[0], plain, strict=True):
        assert torch.equal(ours.indices, theirs.indices)
        assert ours.views[0].dtype == torch.float32
        assert (ours.views[0] * 127.5 + 127.5 - theirs.views[0].float()).abs().mean() < 2


def epochs_of(data, count):
    """Finished batches, as the method gets them."""
    loader = data.train_dataloader()
    return [
        [data.on_after_batch_transfer(batch, 0) for batch in epoch_of(loader, epoch)]
        for epoch in range(count)
    ]


@pytest.mark.parametrize("engine", ["worker", "batch"])
def test_a_resumed_epoch_in_memory_goes_on_with_its_next_batch(engine, numbered):
    whole = epochs_of(data_for(numbered, engine=engine), 2)[1]
    data = data_for(numbered, engine=engine)
    data_loader = data.train_dataloader()
    data_loader.load_state_dict({"epoch": 1, "images": 8})
    data_loader.sampler.set_epoch(1)
    rest = [data.on_after_batch_transfer(batch, 0) for batch in data_loader]
    assert len(rest) == len(whole) - 1
    for ours, theirs in zip(rest, whole[1:], strict=True):
        assert torch.equal(ours.views[0], theirs.views[0])
        assert torch.equal(ours.views[1], theirs.views[1])


@pytest.mark.parametrize(
    ("given", "device_type", "image_size", "files", "name", "in_memory"),
    [
        ("auto", "cpu", 32, False, "batch", True),
        ("auto", "cpu", 224, False, "worker", False),
        ("auto", "cuda", 224, False, "batch", True),
        ("auto", "cpu", 32, True, "worker", False),
        ("auto", "cuda", 224, True, "batch", False),
        ("worker", "cuda", 32, False, "worker", False),
        ("batch", "cpu", 224, False, "batch", True),
        ("batch", "cpu", 224, True, "batch", False),
    ],
)
def test_the_engine_is_chosen_by_rule(
    given, device_type, image_size, files, name, in_memory, numbered, image_tree
):
    images = build_source("images", str(image_tree)).train if files else numbered.train
    chosen = choose_engine(given, images, image_size, device_type)
    assert (chosen.name, chosen.in_memory) == (name, in_memory)
    assert chosen.reason


def damage(tree, count):
    for path in sorted(tree.rglob("*.png"))[:count]:
        path.write_bytes(b"not an image")


def test_unreadable_images_are_replaced_counted_and_named_once(image_tree, caplog):
    damage(image_tree, 2)
    data = data_for(build_source("images", str(image_tree)), max_bad_fraction=0.1)
    for epoch in (0, 1):
        for batch in epoch_of(data.train_dataloader(), epoch):
            data.on_before_batch_transfer(batch, 0)
            assert torch.isfinite(batch.views[0]).all()
            assert len(batch.indices) == 8
    assert len(data.unreadable) == 2
    assert caplog.text.count("skipped an unreadable image: ") == 2


def test_too_many_unreadable_images_stop_the_run_and_the_first_ten_are_named(image_tree):
    damage(image_tree, 12)
    data = data_for(build_source("images", str(image_tree)), max_bad_fraction=0.4)
    with pytest.raises(InputError) as error:  # noqa: PT012
        for batch in epoch_of(data.train_dataloader(), 0):
            data.on_before_batch_transfer(batch, 0)
    assert (
        "of 24 images cannot be read, more than data.max_bad_fraction=0.4; the first are "
        in str(error.value)
    )
    assert str(error.value).count(".png") == 10


def test_a_set_without_a_readable_image_has_no_first_ones_either(image_tree):
    damage(image_tree, 24)
    data = data_for(build_source("images", str(image_tree)), max_bad_fraction=0.1)
    with pytest.raises(InputError, match="3 of 24 images cannot be read"):
        data.first_images(4)


def test_nothing_readable_is_an_error(image_tree):
    damage(image_tree, 24)
    data = data_for(build_source("images", str(image_tree)), max_bad_fraction=1.0)
    with pytest.raises(InputError, match="24 of 24 images cannot be read"):  # noqa: PT012
        for batch in epoch_of(data.train_dataloader(), 0):
            data.on_before_batch_transfer(batch, 0)


def test_evaluation_images_come_in_order_and_unreadable_ones_are_marked(tmp_path):
    for number in range(4):
        (tmp_path / "x").mkdir(exist_ok=True)
        Image.new("RGB", (9, 12), (number * 10,) * 3).save(tmp_path / "x" / f"{number}.png")
    (tmp_path / "x" / "2.png").write_bytes(b"")
    images = build_source("images", str(tmp_path)).train
    data = data_for(DataSource(images, None, None, 8), batch_size=2)
    (batch,) = data.evaluation_dataloader(Labelled(images, torch.arange(4).numpy()))
    assert batch.images.shape == (4, 3, 8, 8)
    assert batch.labels.tolist() == [0, 1, 2, 3]
    assert batch.unreadable.tolist() == [False, False, True, False]


LEFT_OPEN = """
import os, signal, sys
import numpy as np
from moco.data.loading.loaders import evaluation_loader
from moco.data.sources.source import ArrayImages, Labelled

def tensor(image):
    import torch
    return torch.zeros(3, 8, 8)

if __name__ == "__main__":
    images = ArrayImages(np.zeros((30, 8, 8, 3), dtype=np.uint8), "zeros")
    iterator = iter(evaluation_loader(Labelled(images, np.zeros(30)), tensor, 8, 2, num_workers=2))
    next(iterator)
    from multiprocessing import forkserver
    from multiprocessing import active_children
    workers = [worker.pid for worker in active_children()]
    print(forkserver._forkserver._forkserver_pid, *workers, flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["killed", "done"])
def test_no_loader_process_outlives_the_training_process(end, tmp_path):
    import time

    script = tmp_path / "left_open.py"
    script.write_text(LEFT_OPEN)
    ended = subprocess.run(
        [sys.executable, script, end], capture_output=True, text=True, timeout=90, check=False
    )
    pids = [int(pid) for pid in ended.stdout.split()]
    assert len(pids) == 3, ended.stderr
    deadline = time.monotonic() + 20
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)
