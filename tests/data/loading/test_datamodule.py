import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moco.data.augment.views import EvaluationView, ViewPair
from moco.data.loading.datamodule import PretrainingData
from moco.data.loading.loaders import EpochSampler, choose_engine
from moco.data.sources.registry import build_source
from moco.errors import InputError

VIEW = {
    "random_resized_crop": {"scale": [0.2, 1.0]},
    "color_jitter": {"brightness": 0.4, "probability": 0.8},
}
HALF = [0.5] * 3


def data_for(source, *, engine="worker", batch_size=8, **options):
    augment = ViewPair(VIEW, VIEW, HALF, HALF, image_size=8, seed=0, engine=engine)
    return PretrainingData(
        source,
        augment,
        EvaluationView(8, 1.0, HALF, HALF),
        image_size=8,
        batch_size=batch_size,
        in_memory=choose_engine(engine, source.train, 8, "cpu").in_memory,
        **options,
    )


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return list(loader)


def status_of(pid):
    """Return what the system says of a process, by name."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":", 1) for line in lines)


@pytest.mark.slow
def test_loader_processes_leave_signals_to_the_training_process(numbered):
    iterator = iter(data_for(numbered, num_workers=1).train_dataloader())
    next(iterator)
    worker = multiprocessing.active_children()[0].pid
    server = int(status_of(worker)["PPid"])
    assert server != os.getpid()
    for pid in (worker, server):
        blocked = int(status_of(pid)["SigBlk"], 16)
        assert blocked & 1 << (signal.SIGINT - 1)
        assert blocked & 1 << (signal.SIGTERM - 1)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_epoch_visits_each_image_once_and_skips_the_rest_of_the_last_batch(numbered):
    loader = data_for(numbered).train_dataloader()
    orders = []
    for epoch in (0, 1):
        indices = torch.cat([batch.indices for batch in epoch_of(loader, epoch)]).tolist()
        assert len(indices) == len(set(indices)) == 24
        orders.append(indices)
    assert orders[0] != orders[1]


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
    for ours, theirs in zip(rest, whole[1:], strict=True):
        assert torch.equal(ours.indices, theirs.indices)
        assert torch.equal(ours.views[0], theirs.views[0])
    assert resumed.state_dict() == {"epoch": 1, "images": 24}
    assert len(epoch_of(resumed, 2)) == 3


def test_processes_share_each_global_batch():
    whole = list(EpochSampler(100, 12, seed=3))
    shares = [list(EpochSampler(100, 12, seed=3, rank=rank, world_size=3)) for rank in range(3)]
    assert len(whole) == 96
    assert [len(share) for share in shares] == [32] * 3
    for step in range(8):
        together = []
        for share in shares:
            together += share[step * 4 : step * 4 + 4]
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
    finished = finished_epoch(data_for(numbered, engine=engine), 0)
    for ours, theirs in zip(finished, plain, strict=True):
        assert torch.equal(ours.indices, theirs.indices)
        assert ours.views[0].dtype == torch.float32
        assert (ours.views[0] * 127.5 + 127.5 - theirs.views[0].float()).abs().mean() < 2


def finished_epoch(data, epoch, state=None):
    """Return the batches of an epoch as the method gets them."""
    loader = data.train_dataloader()
    if state:
        loader.load_state_dict(state)
    return [data.on_after_batch_transfer(batch, 0) for batch in epoch_of(loader, epoch)]


@pytest.mark.parametrize("engine", ["worker", "batch"])
def test_a_resumed_epoch_in_memory_goes_on_with_its_next_batch(engine, numbered):
    whole = finished_epoch(data_for(numbered, engine=engine), 1)
    data = data_for(numbered, engine=engine)
    rest = finished_epoch(data, 1, {"epoch": 1, "images": 8})
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


def read_epoch(data, epoch):
    """Return the batches of an epoch after unreadable images were counted."""
    batches = epoch_of(data.train_dataloader(), epoch)
    return [data.on_before_batch_transfer(batch, 0) for batch in batches]


def test_unreadable_images_are_replaced_counted_and_named_once(image_tree, caplog):
    damage(image_tree, 2)
    data = data_for(build_source("images", str(image_tree)), max_bad_fraction=0.1)
    for epoch in (0, 1):
        for batch in read_epoch(data, epoch):
            assert len(batch.indices) == 8
            # The noise of another image stands in.
            assert batch.views[0].float().std((1, 2, 3)).min() > 10
    assert len(data.unreadable) == 2
    assert caplog.text.count("skipped an unreadable image: ") == 2


def test_too_many_unreadable_images_stop_the_run_and_the_first_ten_are_named(image_tree):
    damage(image_tree, 12)
    data = data_for(build_source("images", str(image_tree)), max_bad_fraction=0.4)
    message = "of 24 images cannot be read, more than data.max_bad_fraction=0.4; the first are "
    with pytest.raises(InputError, match=message) as error:
        read_epoch(data, 0)
    named, _, example = str(error.value).partition(" (")
    assert named.count(".png") == 10
    assert example.endswith(".png: cannot identify image file)")


def test_a_set_without_a_readable_image_has_no_first_images(image_tree):
    damage(image_tree, 24)
    data = data_for(build_source("images", str(image_tree)), max_bad_fraction=0.1)
    with pytest.raises(InputError, match="3 of 24 images cannot be read"):
        data.first_images(4)


def test_a_set_without_a_readable_image_is_an_error(image_tree):
    damage(image_tree, 24)
    data = data_for(build_source("images", str(image_tree)), max_bad_fraction=1.0)
    with pytest.raises(InputError, match="24 of 24 images cannot be read"):
        read_epoch(data, 0)


LEAVE_A_LOADER_OPEN = """
import os, signal, sys
from multiprocessing import active_children
import numpy as np
from moco.data.augment.views import as_planes
from moco.data.loading.every_image import evaluation_loader
from moco.data.sources.source import ArrayImages, Labelled

if __name__ == "__main__":
    images = ArrayImages(np.zeros((30, 8, 8, 3), dtype=np.uint8), "zeros")
    labelled = Labelled(images, np.zeros(30, dtype=np.int64))
    iterator = iter(evaluation_loader(labelled, as_planes, 8, 2, num_workers=2))
    next(iterator)
    print(*(worker.pid for worker in active_children()), flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "done"])
def test_no_loader_process_outlives_the_training_process(end, tmp_path):
    script = tmp_path / "leave_a_loader_open.py"
    script.write_text(LEAVE_A_LOADER_OPEN)
    # All processes hold the output open. It ends when the last of them has ended.
    with subprocess.Popen(
        [sys.executable, script, end], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=300)
        finally:
            kill_group(process.pid)
    assert len(output.split()) == 2


def kill_group(pid):
    """Kill all processes of a group that still run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
