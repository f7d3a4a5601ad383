"""Tar shards: what is in them, the order of training, and what happens to damaged ones."""

import io
import json
import tarfile
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from moco.data.loading.streams import (
    StreamDataset,
    StreamLoader,
    build_streams,
    check_num_workers,
)
from moco.data.loading.workers import loader_options
from moco.data.sources.registry import build_source
from moco.data.sources.shards import Problem, Sample, count_images, images_in, list_shards
from moco.errors import InputError

pytest.importorskip("webdataset")

LIMIT = 10**8


def image(number, form="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (number % 256, number // 256, 7)).save(file, form)
    return file.getvalue()


def number_of(encoded):
    red, green, _ = encoded.pixels()[0, 0].tolist()
    return red + 256 * green


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return str(path)


@pytest.fixture
def shards(tmp_path):
    """Twelve shards of 10 images each, numbered from 0 to 119."""
    for shard in range(12):
        members = []
        for number in range(10 * shard, 10 * shard + 10):
            members += [(f"{number:04}.png", image(number)), (f"{number:04}.cls", b"3")]
        write_tar(tmp_path / f"part-{shard:03}.tar", members)
    return f"{tmp_path}/part-{{000..011}}.tar"


def numbers_in(shard):
    return [
        number_of(found.image) for found in images_in(shard, LIMIT) if isinstance(found, Sample)
    ]


def problems_of(shard):
    return [found for found in images_in(shard, LIMIT) if isinstance(found, Problem)]


def make_batch(rows, epoch):
    numbers = torch.tensor([number_of(image) for _, image, _ in rows])
    positions = torch.tensor([position for position, _, _ in rows])
    return SimpleNamespace(
        numbers=numbers,
        positions=positions,
        epoch=epoch,
        unreadable=torch.zeros(len(rows), dtype=torch.bool),
    )


def loader(shards, batch_size=4, num_workers=0, num_batches=20, streams=6, buffer=7, **place):
    source = build_source(
        "webdataset", shards, streams=streams, shuffle_buffer=buffer, num_images=120
    )
    dataset = StreamDataset(build_streams(source.train, seed=5, **place), batch_size, make_batch)
    settings = {"max_bad_fraction": 0.01, "unreadable": set()}
    return StreamLoader(
        dataset, num_batches, **settings, **loader_options(num_workers, torch.device("cpu"))
    )


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return [batch.numbers.tolist() for batch in loader]


def test_patterns_lists_wildcards_and_folders_name_the_same_shards(shards, tmp_path):
    expected = [f"{tmp_path}/part-{number:03}.tar" for number in range(12)]
    assert list_shards(shards) == expected
    assert list_shards(f"{tmp_path}/part-*.tar") == expected
    assert list_shards(str(tmp_path)) == expected
    assert list_shards([expected[3], f"{tmp_path}/part-00{{1,0}}.tar"]) == [
        expected[3],
        expected[1],
        expected[0],
    ]
    assert list_shards("pipe:cat {a,b}.tar") == ["pipe:cat a.tar", "pipe:cat b.tar"]


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("nowhere-{0..1}.tar", r"data\.root=nowhere-0\.tar: no such file"),
        ("nowhere-*.tar", r"data\.root=nowhere-\*\.tar: no file matches"),
        ([], "expected tar shards"),
        ([3], "expected tar shards"),
        (".", r"data\.root=\.: no \.tar files to train on"),
        ("pipe:cat x.tar", r"data\.num_images: missing; pipe:cat x\.tar is not a local file"),
    ],
)
def test_a_root_without_shards_is_named(root, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        build_source("webdataset", root)


def test_a_sample_is_its_first_image_and_the_rest_of_it_is_not_read(tmp_path):
    members = [
        ("a/0001.txt", b"no image"),
        ("a/0001.left.PNG", image(1)),
        ("a/0001.right.png", image(2)),
        ("a/0002.jpg", image(3)),
        ("b/0002.jpg", image(4)),
        ("a.b/0003.png", image(5)),
        ("0004.json", b"{}"),
    ]
    shard = write_tar(tmp_path / "shard.tar", members)
    assert numbers_in(shard) == [1, 3, 4, 5]
    assert count_images(shard).samples == 4
    compressed = write_tar(tmp_path / "shard.tar.gz", members, "w:gz")
    assert numbers_in(compressed) == [1, 3, 4, 5]
    assert count_images(compressed).samples == 4


def test_images_that_are_left_out_of_their_sample_are_one_warning(tmp_path, caplog):
    for number in range(2):
        members = [(f"{n}.{depth}.png", image(n)) for n in range(3) for depth in (0, 5)]
        write_tar(tmp_path / f"{number}.tar", [*members, ("2.npy", b"")])
    build_source("webdataset", str(tmp_path))
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage() == (
        "6 of 12 images are left out: names that are equal up to the first dot are one sample, and "
        f"only its first image is used; the first one left out is {tmp_path}/0.tar/0.5.png"
    )


def test_images_are_counted_in_local_shards_unless_the_number_is_given(shards):
    assert len(build_source("webdataset", shards).train) == 120
    assert len(build_source("webdataset", shards, num_images=77).train) == 77
    assert len(build_source("webdataset", f"pipe:cat {shards}", num_images=77).train.shards) == 12


def test_a_copy_of_moco_pack_brings_its_number_and_its_training_shards(shards, tmp_path):
    files = ("part-001.tar", "train-00000.tar", "train-00001.tar")
    for file in files:
        (tmp_path / file).touch()
    parts = [{"file": file, "stop": 0, "images": 617, "bytes": 1, "skipped": []} for file in files]
    index = {
        "version": 1,
        "format": "shards",
        "complete": True,
        "num_images": 1234,
        "image_size": 224,
        "parts": parts,
    }
    index |= {"settings": {"quality": 90}, "source": {"images": 1851}}
    (tmp_path / "index.json").write_text(json.dumps(index))
    source = build_source("webdataset", str(tmp_path))
    assert len(source.train) == 1234
    assert source.train.shards == [f"{tmp_path}/train-00000.tar", f"{tmp_path}/train-00001.tar"]
    (tmp_path / "index.json").write_text(
        json.dumps(index | {"complete": False, "num_images": None})
    )
    with pytest.raises(InputError, match=r"not finished; start the same moco\.pack again"):
        build_source("webdataset", str(tmp_path))


def test_one_pass_of_all_streams_hands_out_every_image_once(shards):
    streams = build_streams(
        build_source("webdataset", shards, streams=6, shuffle_buffer=7).train, seed=1
    )
    found = []
    for stream in range(6):
        samples = streams.samples(0, stream)
        numbers = [number_of(next(samples).image) for _ in range(20)]
        assert len({number // 10 for number in numbers}) == 2  # whole shards
        assert numbers != sorted(numbers)
        found += numbers
    assert sorted(found) == list(range(120))


def test_a_stream_begins_again_in_another_order(shards):
    samples = build_streams(
        build_source("webdataset", shards, streams=6, shuffle_buffer=7).train, seed=1
    ).samples(0, 2)
    first, second = ([number_of(next(samples).image) for _ in range(20)] for _ in range(2))
    assert sorted(first) == sorted(second)
    assert first != second


def test_the_buffer_bounds_how_early_an_image_can_come(shards):
    """No sample is handed out before it was read: at most `shuffle_buffer` are waiting."""
    streams = build_streams(
        build_source("webdataset", shards, streams=1, shuffle_buffer=5).train, seed=3
    )
    read = [number for shard in streams.shards_of(4, 0) for number in numbers_in(shard)]
    samples = streams.samples(4, 0)
    handed = [number_of(next(samples).image) for _ in range(120)]
    assert sorted(handed) == sorted(read)
    assert all(read.index(number) <= place + 5 for place, number in enumerate(handed))


def test_epochs_and_seeds_have_their_own_order(shards):
    batches = loader(shards)
    assert epoch_of(batches, 0) == epoch_of(loader(shards), 0)
    assert epoch_of(batches, 0) != epoch_of(batches, 1)


def test_processes_share_the_images_and_the_positions(shards):
    seen, positions = [], []
    for rank in (0, 1):
        batches = loader(shards, batch_size=5, num_batches=12, rank=rank, world_size=2)
        for batch in batches:
            seen += batch.numbers.tolist()
            positions += batch.positions.tolist()
    assert sorted(seen) == list(range(120))
    assert sorted(positions) == list(range(120))


def test_a_resumed_epoch_goes_on_with_its_next_batch_without_decoding_what_went_before(
    shards, monkeypatch
):
    straight = loader(shards)
    straight.sampler.set_epoch(3)
    whole = []
    for batch in straight:
        whole.append((batch.numbers.tolist(), batch.positions.tolist()))
        if len(whole) == 9:
            state = straight.state_dict()
    assert state == {"epoch": 3, "images": 36}

    from moco.data.files.images import EncodedFile

    decoded, pixels = [], EncodedFile.pixels
    monkeypatch.setattr(
        EncodedFile, "pixels", lambda self, *how: decoded.append(self) or pixels(self, *how)
    )
    resumed = loader(shards)
    resumed.load_state_dict(state)
    resumed.sampler.set_epoch(3)
    assert [(batch.numbers.tolist(), batch.positions.tolist()) for batch in resumed] == whole[9:]
    assert len(decoded) == (20 - 9) * 4
    assert len(resumed) == 20
    assert len(epoch_of(resumed, 4)) == 20


def test_streams_of_an_earlier_epoch_are_closed_though_the_worker_now_serves_others(shards):
    dataset = StreamDataset(
        build_streams(build_source("webdataset", shards, streams=6).train, seed=1), 4, make_batch
    )
    for stream in (0, 2, 4):
        dataset[0, stream]
    earlier = [weakref.ref(opened.samples) for opened in dataset.opened.values()]
    dataset[1, 1]
    assert [samples() for samples in earlier] == [None] * 3
    assert list(dataset.opened) == [1]


def test_fewer_shards_than_streams_make_fewer_streams_that_workers_still_divide(shards, caplog):
    caplog.set_level("INFO")
    source = build_source("webdataset", list_shards(shards)[:5], num_images=50)
    assert build_streams(source.train, seed=0).num_streams == 4
    assert "4 streams instead of data.streams=12, for 5 shards a process" in caplog.text
    assert build_streams(source.train, seed=0, rank=1, world_size=2).num_streams == 2
    with pytest.raises(
        InputError, match="5 shards for 6 processes; expected at least one for each"
    ):
        build_streams(source.train, seed=0, rank=5, world_size=6)


def test_workers_that_do_not_divide_the_streams_are_refused_with_the_choices():
    with pytest.raises(
        InputError, match=r"data\.num_workers=5: expected a divisor of the 6 streams: 0, 1, 2, 3, 6"
    ):
        check_num_workers(5, 6)


def test_pipes_are_read_and_a_command_that_fails_is_named(shards, caplog):
    local = list_shards(shards)
    assert numbers_in(f"pipe:cat {local[2]}") == list(range(20, 30))
    # These are more zeros than a pipe holds, so the command cannot end before the archive is read.
    assert problems_of(f"pipe:cat {local[2]}; head -c 200000 /dev/zero; exit 3")[0].reason.endswith(
        "cannot be read beyond its first 10 images (its command failed)"
    )
    (problem,) = problems_of(f"pipe:cat {local[2]}.missing 2>/dev/null")
    assert problem.is_shard
    assert problem.reason.endswith("cannot be read beyond its first 0 images (its command failed)")


def test_a_file_whose_name_looks_like_an_address_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run1:x").mkdir()
    write_tar("run1:x/s.tar", [("0.png", image(5))])
    assert len(build_source("webdataset", "run1:x/s.tar").train) == 1
    assert numbers_in("run1:x/s.tar") == [5]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_label_that_was_cut_off_does_not_cost_its_image(tmp_path, mode):
    path = tmp_path / "shard.tar"
    write_tar(
        path,
        [
            ("0.png", image(0)),
            ("1.png", image(1)),
            ("1.cls", np.random.default_rng(0).bytes(90_000)),
        ],
        mode,
    )
    path.write_bytes(path.read_bytes()[:40_000])
    assert numbers_in(str(path)) == [0, 1]
    assert count_images(str(path)).samples == 2


def test_a_stream_can_be_given_up_in_the_middle_of_a_command(shards):
    found = images_in(f"pipe:cat {list_shards(shards)[0]}; sleep 0.1; cat /dev/zero", LIMIT)
    assert number_of(next(found).image) == 0
    found.close()


@pytest.mark.parametrize(
    ("cut", "whole"),
    [
        (lambda content: content[: 512 * 9], 4),  # four of a header and a block each, and a header
        (
            lambda content: content[: len(content) // 2 + 100],
            None,
        ),  # in the middle of a header or of an image
        (lambda content: content[: 512 * 8], 4),  # as if it were complete, but for the end's zeros
        (lambda content: b"", 0),
        (lambda content: b"this is no tar archive" * 100, 0),
    ],
)
def test_of_a_shard_that_was_cut_short_what_is_whole_is_used(tmp_path, cut, whole):
    path = tmp_path / "shard.tar"
    write_tar(path, [(f"{number}.bmp", image(number, "BMP")) for number in range(40)])
    path.write_bytes(cut(path.read_bytes()))
    numbers, (problem,) = numbers_in(str(path)), problems_of(str(path))
    assert numbers == list(range(len(numbers)))
    assert problem.is_shard
    assert f"shard.tar: cannot be read beyond its first {len(numbers)} images" in problem.reason
    assert count_images(str(path)).samples in (
        len(numbers),
        len(numbers) + 1,
    )  # the last one is cut off
    if whole is not None:
        assert len(numbers) == whole


def test_training_goes_on_beside_damaged_and_empty_shards_and_names_them_once(shards, caplog):
    paths = list_shards(shards)
    with open(paths[1], "r+b") as file:
        file.truncate(512 * 9)
    open(paths[2], "wb").close()
    write_tar(paths[3], [])
    batches = loader(shards)
    seen = {number for epoch in range(3) for batch in epoch_of(batches, epoch) for number in batch}
    assert seen <= set(range(12)) | set(range(40, 120))
    assert {10, 11} <= seen
    for path in paths[1:3]:
        assert caplog.text.count(f"damaged: {path}") == 1
    assert batches.unreadable == set()


def test_shards_without_any_image_are_an_error(tmp_path):
    paths = [write_tar(tmp_path / f"{number}.tar", [("0.txt", b"text")]) for number in range(2)]
    with pytest.raises(InputError, match="no images in the 2 shards"):
        build_source("webdataset", paths)
    with pytest.raises(InputError, match=r"no images in .*[01]\.tar"):
        epoch_of(loader(paths, streams=1), 0)


def test_samples_that_are_no_images_are_skipped_named_and_limited(shards, caplog):
    path = list_shards(shards)[0]
    good = [(f"{number:04}.png", image(number)) for number in range(9)]
    write_tar(path, [("bad.png", b"no image"), *good])
    batches = loader(shards)
    seen = [number for epoch in range(2) for batch in epoch_of(batches, epoch) for number in batch]
    assert batches.unreadable == {f"{path}/bad.png"}
    assert caplog.text.count("skipped: ") == 1
    assert f"{path}/bad.png" in caplog.text
    assert 9 not in seen
    write_tar(path, [("bad.png", b"no image"), ("worse.jpg", b""), *good])
    with pytest.raises(InputError, match=r"2 of 120 images cannot be read.*bad\.png.*worse\.jpg"):
        epoch_of(loader(shards), 0)


def test_rows_that_turn_out_to_be_damaged_when_decoded_count_as_unreadable(shards):
    def third_is_damaged(rows, epoch):
        batch = make_batch(rows, epoch)
        batch.unreadable[2] = True
        return batch

    batches = loader(shards, num_batches=1)
    batches.dataset.make_batch = third_is_damaged
    (batch,) = batches
    assert len(batches.unreadable) == 1
    assert next(iter(batches.unreadable)).endswith(f"/{batch.numbers[2]:04}.png")


def test_members_that_no_image_needs_are_not_taken_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("moco.data.sources.shards.MAX_ENCODED_BYTES", 1000)
    path = write_tar(
        tmp_path / "shard.tar",
        [("0.png", bytes(1001)), ("1.png", image(1)), ("2.txt", bytes(5000))],
    )
    assert numbers_in(path) == [1]
    (problem,) = problems_of(path)
    assert "0.png: 1,001 bytes, more than 1,000" in problem.reason


def test_there_are_no_images_by_number(shards):
    train = build_source("webdataset", shards).train
    for ask in (train.opened, train.__getitem__):
        with pytest.raises(InputError, match=r"data=webdataset is a stream to train on"):
            ask(0)


def test_the_dataset_travels_small_to_workers(shards):
    import pickle

    streams = build_streams(build_source("webdataset", shards).train, seed=0)
    assert len(pickle.dumps(StreamDataset(streams, 4, make_batch))) < 3000


@pytest.mark.slow
def test_the_shuffle_is_as_good_as_its_buffer(tmp_path):
    """With a buffer as large as the stream each image is as likely to come early as late."""
    path = write_tar(
        tmp_path / "shard.tar", [(f"{number}.png", image(number)) for number in range(20)]
    )
    streams = build_streams(
        build_source("webdataset", path, streams=1, shuffle_buffer=20).train, seed=0
    )
    places = np.zeros((20, 200))
    for epoch in range(200):
        samples = streams.samples(epoch, 0)
        for place in range(20):
            places[number_of(next(samples).image), epoch] = place
    assert np.abs(places.mean(axis=1) - 9.5).max() < 4 * 5.77 / np.sqrt(
        200
    )  # 5.77: standard deviation of 0..19
