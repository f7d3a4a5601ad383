"""The image sets of moco.embed: every image once, in order, from any place on."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from moco.data.augment.views import EvaluationView, evaluation_crop, normalisation
from moco.data.loading.every_image import IndexedSet, ShardedSet
from moco.data.sources.registry import build_source
from moco.data.sources.source import FileImages, Labelled

SIDE = 8
BROKEN = (3, 8)  # images of the shards that cannot be read


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Three shards of 7, 0 and 6 images. One image is none, and one is damaged after its header."""
    pytest.importorskip("webdataset")
    folder = tmp_path / "shards"
    folder.mkdir()
    members = []
    for number in range(13):
        content = png(number)
        if number == 3:
            content = b"no image"
        if number == 8:
            content = content[:50]
        members.append((f"k{number}.png", content))
        members.append((f"k{number}.cls", b"1"))
    write_shard(folder / "0.tar", members[:14])
    write_shard(folder / "1.tar", [])
    write_shard(folder / "2.tar", members[14:])
    return ShardedSet(build_source("webdataset", str(folder), num_images=13).train)


def load(images, place=None, batch_size=4, num_workers=0):
    place = place or images.start
    return list(images.batches(place, evaluation_crop(SIDE, 1.0), batch_size, num_workers))


def names_of(batches):
    names = []
    for batch in batches:
        names += batch.names
    return names


def problems_of(batches):
    problems = []
    for batch in batches:
        problems += batch.problems
    return problems


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.labels, other.labels)
        assert batch[1:2] + batch[3:] == other[1:2] + other[3:]


def test_shards_come_in_order_and_samples_are_named_by_shard_and_key(shards):
    batches = load(shards)
    readable = [number for number in range(13) if number not in BROKEN]
    expected_names = [f"{0 if number < 7 else 2}.tar/k{number}" for number in readable]
    assert names_of(batches) == expected_names
    values = torch.cat([batch.images[:, 0, 0, 0] for batch in batches])
    assert values.tolist() == readable
    folder = shards.sharded.shards[0].removesuffix("/0.tar")
    problems = problems_of(batches)
    assert [problem.name for problem in problems] == [
        f"{folder}/0.tar/k3.png",
        f"{folder}/2.tar/k8.png",
    ]
    for problem in problems:
        assert problem.reason.startswith(problem.name)
        assert not problem.is_shard


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_shards_go_on_after_any_batch(shards, batch_size):
    batches = load(shards, batch_size=batch_size)
    for number, batch in enumerate(batches, start=1):
        assert_same(load(shards, batch.end, batch_size), batches[number:])


def test_a_shard_that_breaks_off_is_named_once_and_the_others_go_on(shards):
    with open(shards.sharded.shards[0], "r+b") as file:
        file.truncate(3000)
    for start in (shards.start, [0, 1]):
        batches = load(shards, start)
        damaged = [problem.name for problem in problems_of(batches) if problem.is_shard]
        assert damaged == [shards.sharded.shards[0]]
        assert names_of(batches)[-5:] == [f"2.tar/k{number}" for number in (7, 9, 10, 11, 12)]


def test_images_by_number_go_on_after_any_batch(image_tree):
    broken = image_tree / "a" / "x.png"
    broken.write_bytes(b"no image")
    train = build_source("images", str(image_tree)).train
    images = IndexedSet(Labelled(train, np.arange(25)), has_labels=True)
    batches = load(images)
    labels = torch.cat([batch.labels for batch in batches]).tolist()
    assert labels == [number for number in range(25) if number != 8]
    assert [problem.name for problem in problems_of(batches)] == [str(broken)]
    for number, batch in enumerate(batches, start=1):
        assert_same(load(images, batch.end), batches[number:])


def test_loader_processes_make_the_same_batches(shards, image_tree):
    train = build_source("images", str(image_tree)).train
    indexed = IndexedSet(Labelled(train, np.arange(24)), has_labels=True)
    for images in (shards, indexed):
        assert_same(load(images, num_workers=2), load(images))


def test_the_pixels_are_those_of_the_evaluation_view(image_tree):
    train = build_source("images", str(image_tree)).train
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    view = EvaluationView(SIDE, 0.875, mean, std)
    scale, shift = normalisation(mean, std)
    images = IndexedSet(Labelled(train, np.zeros(24, np.int64)), has_labels=False)
    (batch,) = images.batches([0], evaluation_crop(SIDE, 0.875), 24, 0)
    expected = torch.stack([view(train[number]) for number in range(24)])
    assert torch.equal(batch.images * scale - shift, expected)


def test_fingerprints_tell_sets_apart(shards, image_tree):
    paths = sorted(str(path) for path in image_tree.rglob("*.png"))

    def fingerprint(paths, labels=range(24)):
        labelled = Labelled(FileImages(paths), np.array(labels))
        return IndexedSet(labelled, has_labels=True).fingerprint()

    assert fingerprint(paths) == fingerprint(list(paths))
    found = [
        fingerprint(paths),
        fingerprint(paths[::-1]),
        fingerprint(paths, range(1, 25)),
        fingerprint([*paths[:-1], paths[0]]),
    ]
    source = build_source("digits")
    digits = IndexedSet(source.bank, has_labels=True)
    found.append(digits.fingerprint())
    source.train.tensor[0, 0, 0, 0] ^= 1
    found.append(digits.fingerprint())
    found.append(shards.fingerprint())
    with open(shards.sharded.shards[2], "ab") as file:
        file.write(bytes(512))
    found.append(shards.fingerprint())
    assert len(set(found)) == len(found) == 8
