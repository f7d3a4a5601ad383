"""A loader process that dies is named with what it was reading."""

import io
import os
import re
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import pytest
from PIL import Image

from moco.data.lost_workers import LONGEST_NAME, LastRead
from moco.data.shards import Sample, pictures_in

FILES = """
import os, signal
import numpy as np
from moco.data.datasets import ArrayPictures
from moco.data.loading import PairDataset, ResumableLoader, as_it_is
from moco.data.samplers import EpochSampler
from moco.data.views import ViewPair
from moco.data.workers import loader_options

class Dying(ArrayPictures):
    def opened(self, index):
        if index == 13:
            if "{bad}" == "defect":
                raise RuntimeError("a defect")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().opened(index)

    def name(self, index):
        return f"picture {{index}}"

VIEW = {{"random_resized_crop": {{"scale": [0.2, 1.0]}}}}

if __name__ == "__main__":
    augment = ViewPair(VIEW, VIEW, [0.5] * 3, [0.5] * 3, 8, 0)
    dataset = PairDataset(Dying(np.zeros((32, 8, 8, 3), np.uint8), "x"), augment, 2)
    loader = ResumableLoader(dataset, EpochSampler(32, 4, 0), 4, **loader_options(2) | {{"collate_fn": as_it_is}})
    try:
        list(loader)
    except RuntimeError as error:
        print(error)
"""

SHARDS = """
import os, signal, sys
from types import SimpleNamespace
import torch
from moco.data.datasets import build_source
from moco.data.decoding import EncodedFile
from moco.data.streams import StreamDataset, StreamLoader
from moco.data.workers import loader_options

pixels = EncodedFile.pixels

def dying(self, *how):
    if self.name.endswith("13.png"):
        os.kill(os.getpid(), signal.SIGKILL)
    return pixels(self, *how)

EncodedFile.pixels = dying  # in the loader processes too, which run this file again

def make_batch(rows, epoch):
    for _, picture, _ in rows:
        picture.pixels()
    return SimpleNamespace(unreadable=torch.zeros(len(rows), dtype=torch.bool))

if __name__ == "__main__":
    streams = build_source("webdataset", sys.argv[1], streams=2, shuffle_buffer=4).train.streams(seed=0)
    settings = {{"num_images": 20, "max_bad_fraction": 0.1, "unreadable": set()}}
    loader = StreamLoader(StreamDataset(streams, 2, make_batch, 2), 10, **settings, **loader_options(2))
    try:
        list(loader)
    except RuntimeError as error:
        print(error)
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
def test_the_process_that_died_is_named_with_its_own_picture_and_no_other_failure_is(script, bad, tmp_path):
    """Two processes, of which one ends itself when it comes to a picture; and one in which a picture's reader is defective."""
    culprit = "picture 13"
    if script == SHARDS:
        pytest.importorskip("webdataset")
        culprit = f"{shard_of(tmp_path, range(10, 20))}/13.png"
        shard_of(tmp_path, range(20, 30))
    program = tmp_path / "program.py"
    program.write_text(script.format(bad=bad))
    done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True, timeout=90, check=False)
    if bad == "defect":
        assert "a defect" in done.stdout, done.stderr
        assert "exited" not in done.stdout
    else:
        said = rf"DataLoader worker \(pid \d+\) exited unexpectedly; it was reading {re.escape(culprit)}$"
        assert re.search(said, done.stdout.strip()), done.stderr


def test_a_sample_is_noted_before_it_is_read(tmp_path):
    pytest.importorskip("webdataset")
    noted = []
    found = pictures_in(shard_of(tmp_path, range(5)), 10**6, noted.append)
    for number, sample in enumerate(found, start=1):
        assert isinstance(sample, Sample)
        assert noted[-1] == sample.name
        assert len(noted) == number


@pytest.mark.parametrize("name", ["a.tar/1.png", "bad \udcff byte.tar/é.png", "x" * 1000 + "/2.png"])
def test_names_are_kept_by_their_end_whatever_bytes_they_have(name, monkeypatch):
    last_read = LastRead(2)
    last_read.note(name)
    assert last_read() == []  # in the training process there is nothing to note
    monkeypatch.setattr("moco.data.lost_workers.get_worker_info", lambda: SimpleNamespace(id=1))
    last_read.note("something longer than the next one" * 9)
    last_read.note(name)
    assert last_read() == [(os.getpid(), name[-LONGEST_NAME:])]
