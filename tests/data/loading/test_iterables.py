"""Loaders of the user's own datasets: order, resume, several processes, and errors on the way."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from moco.data.files.images import UnreadableImage
from moco.data.loading.every_image import IterableSet
from moco.data.sources.own_dataset import dataset_source
from moco.errors import InputError
from tests.data.loading.test_any_number_of_workers import assert_same
from tests.data.loading.test_datamodule import data_for, epoch_of


class Numbered:
    """30 images, whose first value is their number. Some cannot be read."""

    def __init__(self, damaged=(), broken=()):
        self.damaged = damaged
        self.broken = broken

    def __len__(self):
        return 30

    def __getitem__(self, index):
        if index in self.damaged:
            raise OSError("gone")
        if index in self.broken:
            raise KeyError("x")
        return np.full((8, 8, 3), index, np.uint8), index


class Shuffled:
    """The same images in another order in each epoch; how many were read is counted."""

    def __init__(self, items=None):
        self.items = items or Numbered()
        self.num_read = 0

    def __len__(self):
        return 30

    def set_epoch(self, epoch):
        self.order = np.random.default_rng(epoch).permutation(30).tolist()

    def __iter__(self):
        for number in self.order:
            self.num_read += 1
            yield self.items[number]


class DamagedPixels(Numbered):
    """Some of the images are found to be damaged when they are converted."""

    def __getitem__(self, index):
        if index not in self.damaged:
            return super().__getitem__(index)
        image = Image.new("RGB", (8, 8))
        image.load = lambda: (_ for _ in ()).throw(SyntaxError("broken PNG"))
        return image


def loader_of(dataset, **options):
    return data_for(dataset_source(dataset), batch_size=4, **options).train_dataloader()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", [Numbered, Shuffled])
@pytest.mark.slow
def test_a_resumed_epoch_sees_the_same_bits_for_any_number_of_workers(kind, num_workers):
    whole = epoch_of(loader_of(kind()), 1)
    stopped = loader_of(kind(), num_workers=num_workers)
    stopped.sampler.set_epoch(1)
    iterator = iter(stopped)
    seen = [next(iterator) for _ in range(2)]
    resumed = loader_of(kind(), num_workers=num_workers)
    resumed.load_state_dict(stopped.state_dict())
    assert_same([*seen, *epoch_of(resumed, 1)], whole)
    assert len(whole) == len(resumed) == 7


def test_an_iterable_is_read_once_an_epoch_in_its_own_order():
    dataset = Shuffled()
    data = data_for(dataset_source(dataset), batch_size=4, num_workers=1)
    loader = data.train_dataloader()
    read_at_start = dataset.num_read
    batches = epoch_of(loader, 3)
    assert dataset.num_read - read_at_start == 28
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(28))
    first_values = [row.image.pixels()[0, 0, 0] for row in loader.sampler]
    assert first_values == np.random.default_rng(3).permutation(30)[:28].tolist()


def test_processes_share_each_batch_of_an_iterable():
    from moco.data.loading.iterables import IterableSampler

    images = dataset_source(Shuffled()).train
    whole = [row.place for row in IterableSampler(images, 12, 0, 1, 0.1, set())]
    shares = []
    for rank in range(3):
        sampler = IterableSampler(images, 12, rank, 3, 0.1, set())
        shares.append([row.place for row in sampler])
        assert len(sampler) == len(shares[-1]) == 8
        sampler.resume_at = (0, 4)
        assert [row.place for row in sampler] == shares[-1][4:]
    assert whole == list(range(24))
    for step in range(2):
        together = []
        for share in shares:
            together += share[step * 4 : step * 4 + 4]
        assert together == whole[step * 12 : step * 12 + 12]


def counted_epoch(data):
    """The batches of an epoch, whose unreadable images are counted as by a Trainer."""
    return [data.on_before_batch_transfer(batch, 0) for batch in data.train_dataloader()]


def test_another_image_stands_in_for_a_damaged_one_until_they_are_too_many(caplog):
    for dataset in (Numbered(damaged=[3]), Shuffled(DamagedPixels(damaged=[3]))):
        caplog.clear()
        data = data_for(dataset_source(dataset), batch_size=30, max_bad_fraction=0.05)
        (batch,) = counted_epoch(data)
        assert int(batch.unreadable.sum()) == len(data.unreadable) == 1
        assert caplog.text.count("skipped an unreadable image: dataset[") == 1
    for dataset in (Numbered(damaged=[3, 4]), Shuffled(DamagedPixels(damaged=[3, 4]))):
        with pytest.raises(InputError, match="2 of 30 images cannot be read"):
            counted_epoch(data_for(dataset_source(dataset), batch_size=30, max_bad_fraction=0.05))


def error_of(dataset, num_workers):
    """The error of an epoch. Its traceback is not kept, because it keeps the loader."""
    try:
        list(loader_of(dataset, num_workers=num_workers))
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_the_dataset_is_one_line_also_from_a_loader_process(num_workers):
    message = error_of(Numbered(broken=[7]), num_workers)
    assert message == "dataset: item 7 raised KeyError: 'x'"


def test_what_loader_processes_cannot_have_is_one_line(monkeypatch):
    dataset = Numbered()
    dataset.transform = lambda image: image
    assert error_of(dataset, 1).startswith(
        "data.num_workers=1: the dataset or the augmentation cannot be sent to loader processes (Can"
    )
    in_notebook = type("InNotebook", (Numbered,), {"__module__": "__main__"})
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    assert error_of(in_notebook(), 1).startswith(
        "data.num_workers=1: InNotebook is defined in a notebook, where loader processes cannot find it"
    )


def test_a_pass_over_an_iterable_goes_on_at_any_place():
    images = IterableSet(dataset_source(Shuffled(DamagedPixels(damaged=[5]))).train)
    whole = list(images.keys_from([0]))
    assert [key.name for key in whole] == [f"dataset[{number}]" for number in range(30)]
    rest = list(images.keys_from(whole[11].end))
    assert [(key.name, key.end) for key in rest] == [(key.name, key.end) for key in whole[12:]]
    first = np.random.default_rng(0).permutation(30).tolist()
    damaged = whole[first.index(5)]
    assert "broken PNG" in damaged.source.reason
    with pytest.raises(UnreadableImage):
        dataset_source(DamagedPixels(damaged=[5])).train.opened(5)
