"""Every image of a set once, in order, from any place on."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from moco.data.augment.views import build_evaluation_view, evaluation_crop, normalisation
from moco.data.loading.image_sets import IndexedSet, ShardedSet
from moco.data.sources.registry import build_source
from moco.data.sources.source import FileImages, Labelled
from moco.errors import InputError

SIDE = 8


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
    """Three shards of 7, 0 and 6 images, the fourth of them no image and the ninth damaged behind its header."""
    pytest.importorskip("webdataset")
    folder = tmp_path / "shards"
    folder.mkdir()
    members = [(f"k{number}.png", png(number)) for number in range(13)]
    members[3] = ("k3.png", b"no image")
    members[8] = ("k8.png", png(8)[:50])
    labelled = [
        pair for name, content in members for pair in ((name, content), (f"{name[:-4]}.cls", b"1"))
    ]
    for number, part in enumerate((labelled[:14], [], labelled[14:])):
        write_shard(folder / f"{number}.tar", part)
    return ShardedSet(build_source("webdataset", str(folder), num_images=13).train)


def loaded(images, place=None, batch_size=4, num_workers=0):
    return list(
        images.batches(
            place or images.start, evaluation_crop(SIDE, 1.0), SIDE, batch_size, num_workers
        )
    )


def names(batches):
    return [name for batch in batches for name in batch.names]


def same(batches, others):
    def plain(batch):
        return batch.images.tolist(), batch.labels.tolist(), batch.names, batch.problems, batch.end

    return [*map(plain, batches)] == [*map(plain, others)]


def test_shards_come_in_order_and_samples_are_named_by_shard_and_key(shards):
    batches = loaded(shards)
    assert names(batches) == [
        f"{0 if number < 7 else 2}.tar/k{number}" for number in range(13) if number not in (3, 8)
    ]
    values = [int(image[0, 0, 0]) for batch in batches for image in batch.images]
    assert values == [number for number in range(13) if number not in (3, 8)]
    problems = [problem for batch in batches for problem in batch.problems]
    folder = shards.sharded.shards[0].removesuffix("/0.tar")
    assert [problem.name for problem in problems] == [
        f"{folder}/0.tar/k3.png",
        f"{folder}/2.tar/k8.png",
    ]
    assert all(
        problem.reason.startswith(problem.name) and not problem.is_shard for problem in problems
    )


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_shards_go_on_after_any_batch(shards, batch_size):
    batches = loaded(shards, batch_size=batch_size)
    for number, batch in enumerate(batches, start=1):
        assert same(loaded(shards, batch.end, batch_size), batches[number:])


def test_a_shard_that_breaks_off_is_named_once_and_the_others_go_on(shards):
    with open(shards.sharded.shards[0], "r+b") as file:
        file.truncate(3000)
    for start in (shards.start, [0, 1]):
        batches = loaded(shards, start)
        damaged = [problem for batch in batches for problem in batch.problems if problem.is_shard]
        assert [problem.name for problem in damaged] == [shards.sharded.shards[0]]
        assert names(batches)[-5:] == [f"2.tar/k{number}" for number in (7, 9, 10, 11, 12)]


def test_a_shard_with_paths_that_lead_out_is_refused(shards):
    write_shard(shards.sharded.shards[1], [("../x.png", png(0))])
    with pytest.raises(InputError, match=r"1\.tar: refused, since its member \.\./x\.png"):
        loaded(shards)


def test_images_by_number_go_on_after_any_batch(image_tree):
    (image_tree / "a" / "x.png").write_bytes(b"no image")
    train = build_source("images", str(image_tree)).train
    images = IndexedSet(Labelled(train, np.arange(25)), has_labels=True)
    batches = loaded(images)
    assert [int(label) for batch in batches for label in batch.labels] == [
        number for number in range(25) if number != 8
    ]
    assert [problem.name for batch in batches for problem in batch.problems] == [
        str(image_tree / "a" / "x.png")
    ]
    for number, batch in enumerate(batches, start=1):
        assert same(loaded(images, batch.end), batches[number:])


def test_loader_processes_make_the_same_batches(shards, image_tree):
    indexed = IndexedSet(
        Labelled(build_source("images", str(image_tree)).train, np.arange(24)), has_labels=True
    )
    for images in (shards, indexed):
        assert same(loaded(images, num_workers=2), loaded(images))


def test_the_pixels_are_those_of_the_evaluation_view(image_tree):
    train = build_source("images", str(image_tree)).train
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    view, (scale, shift) = build_evaluation_view(SIDE, 0.875, mean, std), normalisation(mean, std)
    loader = IndexedSet(Labelled(train, np.zeros(24, np.int64)), False).batches(
        [0], evaluation_crop(SIDE, 0.875), SIDE, 24, 0
    )
    (batch,) = loader
    assert torch.equal(
        batch.images * scale - shift, torch.stack([view(train[number]) for number in range(24)])
    )


def test_fingerprints_tell_sets_apart(shards, image_tree):
    paths = sorted(str(path) for path in image_tree.rglob("*.png"))

    def fingerprint(paths, labels=range(24)):
        return IndexedSet(
            Labelled(FileImages(paths), np.array(labels)), has_labels=True
        ).fingerprint()

    assert fingerprint(paths) == fingerprint(list(paths))
    others = [
        fingerprint(paths[::-1]),
        fingerprint(paths, range(1, 25)),
        fingerprint([*paths[:-1], paths[0]]),
    ]
    source = build_source("digits")
    digits = IndexedSet(source.bank, has_labels=True)
    others += [digits.fingerprint(), shards.fingerprint()]
    source.train.tensor[0, 0, 0] ^= 1
    others.append(digits.fingerprint())
    with open(shards.sharded.shards[2], "ab") as file:
        file.write(bytes(512))
    others.append(shards.fingerprint())
    assert len({fingerprint(paths), *others}) == 8
