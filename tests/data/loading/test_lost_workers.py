"""A loader process that dies is named with what it was reading."""

import io
import itertools
import os
import re
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import pytest
from PIL import Image

from moco.data.loading.lost_workers import LONGEST_NAME, LastRead
from moco.data.sources.shards import Sample, images_in

FILES = """
import os, signal
import numpy as np
from moco.data.sources.registry import ArrayImages
from moco.data.loading.loaders import PairDataset, ResumableLoader, as_it_is
from moco.data.loading.samplers import EpochSampler
from moco.data.augment.views import ViewPair
from moco.data.loading.workers import loader_options
import torch

class Dying(ArrayImages):
    def opened(self, index):
        if index == 13:
            if "{bad}" == "defect":
                raise RuntimeError("a defect")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().opened(index)

    def name(self, index):
        return f"image {{index}}"

VIEW = {{"random_resized_crop": {{"scale": [0.2, 1.0]}}}}

if __name__ == "__main__":
    augment = ViewPair(VIEW, VIEW, [0.5] * 3, [0.5] * 3, 8, 0)
    dataset = PairDataset(Dying(np.zeros((32, 8, 8, 3), np.uint8), "x"), augment, 2)
    loader = ResumableLoader(dataset, EpochSampler(32, 4, 0), 4, **loader_options(2, torch.device("cpu")) | {{"collate_fn": as_it_is}})
    try:
        list(loader)
    except RuntimeError as error:
        print(error)
"""

SHARDS = """
import os, signal, sys
from types import SimpleNamespace
import torch
from moco.data.sources.registry import build_source
from moco.data.files.decoding import EncodedFile
from moco.data.loading.streams import StreamDataset, StreamLoader
from moco.data.loading.workers import loader_options

pixels = EncodedFile.pixels

def dying(self, *how):
    if self.name.endswith("13.png"):
        os.kill(os.getpid(), signal.SIGKILL)
    return pixels(self, *how)

EncodedFile.pixels = dying  # in the loader processes too, which run this file again

def make_batch(rows, epoch):
    for _, image, _ in rows:
        image.pixels()
    return SimpleNamespace(unreadable=torch.zeros(len(rows), dtype=torch.bool))

if __name__ == "__main__":
    streams = build_source("webdataset", sys.argv[1], streams=2, shuffle_buffer=4).train.streams(seed=0)
    settings = {{"num_images": 20, "max_bad_fraction": 0.1, "unreadable": set()}}
    loader = StreamLoader(StreamDataset(streams, 2, make_batch, 2), 10, **settings, **loader_options(2, torch.device("cpu")))
    try:
        list(loader)
    except RuntimeError as error:
        print(error)
"""

WITHOUT_VIEW_PAIRS = """
import os, signal, sys
from pathlib import Path
from torch.utils.data import dataloader, get_worker_info
from moco.data.files.decoding import EncodedFile

pixels = EncodedFile.pixels

def dying(self, *how):
    if self.name.endswith("13.png") and get_worker_info():
        os.kill(os.getpid(), signal.SIGKILL)
    return pixels(self, *how)

EncodedFile.pixels = dying  # in the loader processes too, which run this file again

def loaders(folder):
    import numpy as np
    from moco.data.sources.registry import Labelled, build_source
    from moco.data.loading.loaders import evaluation_loader
    from moco.data.loading.image_sets import IndexedSet, ShardedSet
    from moco.segmentation.mask_batches import whole_image_loader
    from moco.segmentation.mask_sources import build_segmentation_source
    from moco.segmentation.segmentation_data import SegmentationData
    from moco.segmentation.mask_augmentation import SegmentationView
    from moco.data.augment.views import Normalized, build_evaluation_view, evaluation_crop

    half = [0.5] * 3
    train = build_source("images", str(folder / "images")).train
    labelled = Labelled(train, np.zeros(len(train), np.int64))
    masked = build_segmentation_source("segmentation_folder", str(folder))
    view = SegmentationView(
        8, scale=[1.0, 1.0], horizontal_flip=0.0, color_jitter=None, mean=half, std=half, ignore_index=255, seed=0
    )
    data = SegmentationData(masked, view, image_size=8, batch_size=4, num_workers=2)
    crop, rows = evaluation_crop(8, 1.0), list(range(len(masked.validation)))
    yield "evaluation", evaluation_loader(labelled, build_evaluation_view(8, 1.0, half, half), 8, 4, num_workers=2)
    yield "crops", data.train_dataloader()
    yield "whole", data.evaluation_dataloader()
    yield "dense", whole_image_loader(
        masked.validation, Normalized(half, half), 4, num_workers=2, indices=rows, image_size=8, stride=8
    )
    yield "files", IndexedSet(labelled, True).batches([0], crop, 8, 4, 2)
    yield "shards", ShardedSet(build_source("webdataset", str(folder)).train).batches([0, 0], crop, 8, 4, 2)

if __name__ == "__main__":
    # DataLoader asks only every five seconds whether its processes are still there.
    dataloader._MultiProcessingDataLoaderIter._try_get_data.__defaults__ = (0.2,)
    for kind, loader in loaders(Path(sys.argv[1])):
        try:
            list(loader)
        except RuntimeError as error:
            print(kind, error)
"""


def shard_of(folder, numbers):
    path = folder / f"{numbers[0]}.tar"
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            content = io.BytesIO()
            Image.new("RGB", (8, 6)).save(content, "PNG")
            member = tarfile.TarInfo(f"{number}.png")
            member.size = content.tell()
            content.seek(0)
            archive.addfile(member, content)
    return str(path)


@pytest.mark.parametrize(
    ("script", "bad"),
    [(FILES, "killed"), (FILES, "defect"), (SHARDS, "killed")],
    ids=["files-killed", "files-defect", "shards-killed"],
)
def test_the_process_that_died_is_named_with_its_own_image_and_no_other_failure_is(
    script, bad, tmp_path
):
    """Two processes, of which one ends itself when it comes to an image; and one in which an image's reader is defective."""
    culprit = "image 13"
    if script == SHARDS:
        pytest.importorskip("webdataset")
        culprit = f"{shard_of(tmp_path, range(10, 20))}/13.png"
        shard_of(tmp_path, range(20, 30))
    program = tmp_path / "program.py"
    program.write_text(script.format(bad=bad))
    done = subprocess.run(
        [sys.executable, program, tmp_path], capture_output=True, text=True, timeout=90, check=False
    )
    if bad == "defect":
        assert "a defect" in done.stdout, done.stderr
        assert "exited" not in done.stdout
    else:
        said = rf"DataLoader worker \(pid \d+\) exited unexpectedly; it was reading {re.escape(culprit)}$"
        assert re.search(said, done.stdout.strip()), done.stderr


def test_every_other_loader_names_the_image_too(tmp_path):
    """Of evaluation, of segmentation, of dense evaluation and of embed, in files and shards; 13 is in both parts."""
    pytest.importorskip("webdataset")
    for folder, part, number in itertools.product(
        ("images", "masks"), ("train", "val"), range(10, 18)
    ):
        path = tmp_path / folder / part / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB" if folder == "images" else "L", (8, 8), number % 2).save(path)
    shard = shard_of(tmp_path, range(10, 18))
    program = tmp_path / "program.py"
    program.write_text(WITHOUT_VIEW_PAIRS)
    done = subprocess.run(
        [sys.executable, program, tmp_path], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    said = re.findall(
        r"^(\w+) DataLoader worker \(pid \d+\) exited unexpectedly; it was reading (.+)$",
        done.stdout,
        re.M,
    )
    train, held_out = (str(tmp_path / "images" / part / "13.png") for part in ("train", "val"))
    assert said[0] in [("evaluation", train), ("evaluation", held_out)]
    assert said[1:4] == [("crops", train), ("whole", held_out), ("dense", held_out)]
    assert said[4] in [("files", train), ("files", held_out)]
    assert said[5:] == [("shards", f"{shard}/13.png")]


def test_a_sample_is_noted_before_it_is_read(tmp_path):
    pytest.importorskip("webdataset")
    noted = []
    found = images_in(shard_of(tmp_path, range(5)), 10**6, noted.append)
    for number, sample in enumerate(found, start=1):
        assert isinstance(sample, Sample)
        assert noted[-1] == sample.name
        assert len(noted) == number


@pytest.mark.parametrize(
    "name", ["a.tar/1.png", "bad \udcff byte.tar/é.png", "x" * 1000 + "/2.png"]
)
def test_names_are_kept_by_their_end_whatever_bytes_they_have(name, monkeypatch):
    last_read = LastRead(2)
    last_read.note(name)
    assert last_read() == []  # in the training process there is nothing to note
    monkeypatch.setattr(
        "moco.data.loading.lost_workers.get_worker_info", lambda: SimpleNamespace(id=1)
    )
    last_read.note("something longer than the next one" * 9)
    last_read.note(name)
    assert last_read() == [(os.getpid(), name[-LONGEST_NAME:])]
