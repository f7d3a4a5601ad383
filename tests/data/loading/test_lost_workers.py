"""The error of a lost loader process names the image that the process was reading."""

import io
import os
import re
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import dataloader

from moco.data.augment.views import EvaluationView, ViewPair, as_planes
from moco.data.loading import workers
from moco.data.loading.every_image import ShardedSet, evaluation_loader
from moco.data.loading.loaders import EpochSampler, PairDataset, ResumableLoader
from moco.data.loading.streams import StreamDataset, StreamLoader, build_streams
from moco.data.loading.workers import (
    CPU,
    LONGEST_NAME,
    ReadNotes,
    loader_options,
    note_read,
    unchanged,
)
from moco.data.sources.registry import build_source
from moco.data.sources.shards import Sample, images_in
from moco.data.sources.source import Labelled
from tests.data.loading.deadly import DeadlyImages, DeadlyPairMaker, deadly_crop

VIEW = {"random_resized_crop": {"scale": [0.2, 1.0]}}
AUGMENT = ViewPair(VIEW, VIEW, [0.5] * 3, [0.5] * 3, image_size=8, seed=0)


@pytest.fixture(autouse=True)
def asked_often(monkeypatch):
    """DataLoader asks only every five seconds whether its processes still run."""
    defaults = (0.2,)
    fetch = dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(fetch, "__defaults__", defaults)


def write_shard(folder, numbers):
    """Write a tar file of images whose colours are their numbers."""
    path = folder / f"{numbers[0]}.tar"
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            content = io.BytesIO()
            Image.new("RGB", (8, 8), (number, 0, 0)).save(content, "PNG")
            member = tarfile.TarInfo(f"{number}.png")
            member.size = content.tell()
            content.seek(0)
            archive.addfile(member, content)
    return str(path)


def pair_loader(folder, is_defect=False):
    dataset = PairDataset(DeadlyImages(is_defect), AUGMENT)
    sampler = EpochSampler(16, batch_size=4, seed=0)
    options = loader_options(2, CPU)
    return ResumableLoader(dataset, sampler, 4, collate_fn=unchanged, **options)


def labelled_loader(folder):
    labelled = Labelled(DeadlyImages(), np.zeros(16, np.int64))
    return evaluation_loader(labelled, as_planes, 8, batch_size=4, num_workers=2)


def stream_loader(folder):
    images = build_source("webdataset", str(folder), streams=2, shuffle_buffer=4).train
    dataset = StreamDataset(build_streams(images, seed=0), 2, DeadlyPairMaker(AUGMENT))
    settings = {"max_bad_fraction": 0.1, "unreadable": set()}
    return StreamLoader(dataset, 10, **settings, **loader_options(2, CPU))


def sharded_set_loader(folder):
    images = ShardedSet(build_source("webdataset", str(folder)).train)
    return images.batches([0, 0], deadly_crop, batch_size=4, num_workers=2)


@pytest.mark.parametrize(
    ("build_loader", "culprit"),
    [
        (pair_loader, "image 13"),
        (labelled_loader, "image 13"),
        (stream_loader, "10.tar/13.png"),
        (sharded_set_loader, "10.tar/13.png"),
    ],
)
def test_the_image_of_the_lost_process_is_named(build_loader, culprit, tmp_path):
    if culprit.endswith("png"):
        pytest.importorskip("webdataset")
        write_shard(tmp_path, range(10, 20))
        write_shard(tmp_path, range(20, 30))
    message = rf"DataLoader worker \(pid \d+\) exited unexpectedly; it was reading .*{culprit}$"
    with pytest.raises(RuntimeError, match=message):
        list(build_loader(tmp_path))


def test_no_image_is_named_if_a_process_reports_an_error(tmp_path):
    with pytest.raises(RuntimeError) as error:
        list(pair_loader(tmp_path, is_defect=True))
    assert "a defect" in str(error.value)
    assert not re.search("exited", str(error.value))


def test_a_sample_of_a_shard_is_noted_before_it_is_read(tmp_path):
    pytest.importorskip("webdataset")
    noted = []
    samples = images_in(write_shard(tmp_path, range(5)), 10**6, noted.append)
    for number, sample in enumerate(samples, start=1):
        assert isinstance(sample, Sample)
        assert noted[-1] == sample.name
        assert len(noted) == number


@pytest.mark.parametrize(
    "name", ["a.tar/1.png", "bad \udcff byte.tar/é.png", "x" * 1000 + "/2.png"]
)
def test_the_end_of_a_name_is_kept_with_all_its_bytes(name, monkeypatch):
    notes = ReadNotes(num_workers=2)
    monkeypatch.setattr(workers, "notes_of_this_process", notes)
    note_read(name)
    assert notes.read() == []  # the training process takes no notes
    monkeypatch.setattr(workers, "get_worker_info", lambda: SimpleNamespace(id=1))
    note_read("a name that is longer than the next one" * 9)
    note_read(name)
    assert notes.read() == [(os.getpid(), name[-LONGEST_NAME:])]


def test_the_processes_of_an_earlier_pass_are_not_taken_for_lost(numbered):
    view = EvaluationView(16, 1.0, [0.5] * 3, [0.5] * 3)
    loader = evaluation_loader(numbered.bank, view, 16, batch_size=4, num_workers=1)
    list(loader)
    ((earlier, _),) = loader.notes.read()
    iter(loader)
    assert earlier not in [pid for pid, _ in loader.notes.read()]


def test_a_watched_loader_draws_no_global_random_number(numbered):
    labelled = numbered.bank
    state = torch.get_rng_state()
    list(evaluation_loader(labelled, as_planes, 8, batch_size=4))
    assert torch.equal(torch.get_rng_state(), state)
