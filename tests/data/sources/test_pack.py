"""moco.pack: a copy holds the same images with the same names and labels, as an array or shards."""

import dataclasses
import io
import json
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from moco import pack
from moco.data.packing import Pool, resized_size
from moco.data.sources.registry import build_source
from moco.errors import InputError
from tests.configs import composed


def run(folder, *overrides):
    config = composed("pack", f"output={folder / 'copy'}", "num_workers=0", *overrides)
    pack.run(config, folder / "run")
    return folder / "copy"


def names(images):
    return [images.name(index) for index in range(len(images))]


def arrays(images):
    return [images.opened(index).pixels() for index in range(len(images))]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_an_array_holds_the_same_pixels_in_the_same_order(tmp_path, photographs):
    root = str(photographs)
    copy = build_source(
        "packed", str(run(tmp_path, f"data.root={root}", "format=array", "max_shard_bytes=100000"))
    ).train
    source = build_source("images", root).train
    assert names(copy) == names(source)
    for index in range(len(source)):
        assert np.array_equal(np.asarray(copy[index]), np.asarray(source[index]))
        assert copy.opened(index).size == source.opened(index).size
        assert copy.opened(index).pixels().flags.c_contiguous


def test_shards_hold_each_jpeg_as_it_was_in_another_order(tmp_path, photographs):
    root = str(photographs)
    copy = build_source("packed", str(run(tmp_path, f"data.root={root}", "format=shards"))).train
    source = build_source("images", root).train
    assert sorted(names(copy)) == names(source) != names(copy)
    for index in range(len(copy)):
        with open(copy.name(index), "rb") as file:
            assert bytes(copy.content(index)) == file.read()


def test_images_are_brought_down_to_the_shorter_side_and_never_enlarged(tmp_path, photographs):
    root = str(photographs)
    copy = build_source(
        "packed", str(run(tmp_path, f"data.root={root}", "format=array", "data.resize=64"))
    ).train
    source = build_source("images", root).train
    assert copy.folder == str(tmp_path / "copy")
    for index in range(len(source)):
        height, width = source.opened(index).size
        factor = min(1, 64 / min(height, width))
        assert copy.opened(index).size == (round(height * factor), round(width * factor))
        height, width, _ = copy[index].shape
        expected = Image.fromarray(source[index]).resize((width, height), Image.Resampling.BICUBIC)
        assert np.array_equal(copy[index], np.asarray(expected))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((500, 375), (341, 256)),
        ((10, 3000), (10, 3000)),
        ((3000, 10), (3000, 10)),
        ((256, 256), (256, 256)),
    ],
)
def test_the_aspect_is_kept(size, expected):
    assert resized_size(size, 256) == expected


def test_other_formats_become_jpegs_of_the_quality_given(tmp_path, image_tree):
    copy = build_source(
        "packed", str(run(tmp_path, f"data.root={image_tree}", "format=shards", "quality=95"))
    ).train
    for index in range(len(copy)):
        with (
            Image.open(io.BytesIO(bytes(copy.content(index)))) as jpeg,
            Image.open(copy.name(index)) as original,
        ):
            file = io.BytesIO()
            original.save(file, "JPEG", quality=95, subsampling="4:2:0")
            assert jpeg.quantization == Image.open(file).quantization
            assert jpeg.size == original.size


@pytest.mark.parametrize("form", ["array", "shards"])
def test_labels_of_bank_and_queries_come_along(tmp_path, form):
    copy = build_source("packed", str(run(tmp_path, "data=digits", f"format={form}")))
    source = build_source("digits")
    assert copy.image_size == 8
    for side in ("bank", "queries"):
        there, here = getattr(source, side), getattr(copy, side)
        expected = dict(zip(names(there.images), there.labels.tolist(), strict=True))
        assert dict(zip(names(here.images), here.labels.tolist(), strict=True)) == expected
    assert copy.bank.images is copy.train
    assert len(copy.train) == 1437
    if form == "array":
        assert np.array_equal(
            np.asarray(copy.queries.images[5]), np.asarray(source.queries.images[5])
        )


def test_several_classes_of_an_image_come_along(tmp_path, generator):
    is_class = generator.integers(0, 2, (8, 3)).astype(np.uint8)
    images = generator.integers(0, 256, (8, 4, 4, 3)).astype(np.uint8)
    sides = {"train_images": images[:5], "test_images": images[5:]}
    path = tmp_path / "several.npz"
    np.savez(path, **sides, train_labels=is_class[:5], test_labels=is_class[5:])
    copy = build_source("packed", str(run(tmp_path, "data=npz", f"data.root={path}")))
    for side, expected in ((copy.bank, is_class[:5]), (copy.queries, is_class[5:])):
        assert side.targets_of(side.labels).tolist() == expected.astype(bool).tolist()


def test_queries_that_are_trained_on_are_stored_once(tmp_path, photographs):
    source = build_source("image_folder", str(photographs), held_out=0.3)
    copy = build_source(
        "packed",
        str(run(tmp_path, "data=image_folder", f"data.root={photographs}", "data.held_out=0.3")),
    )
    assert len(copy.train) == 30
    assert copy.bank.class_names == copy.queries.class_names == source.bank.class_names is not None
    assert names(copy.queries.images) == names(source.queries.images)
    assert copy.queries.labels.tolist() == source.queries.labels.tolist()
    assert names(copy.bank.images) == names(source.bank.images)
    assert (tmp_path / "copy" / "pixels.bin").stat().st_size == sum(
        array.size for array in arrays(copy.train)
    )


@pytest.mark.filterwarnings(
    "ignore:.*unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_shards_are_what_webdataset_reads(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    folder = run(tmp_path, "data=digits", "format=shards", "max_shard_bytes=500000")
    index = json.loads((folder / "index.json").read_text())
    shards = [
        str(folder / part["file"]) for part in index["parts"] if part["file"].startswith("train-")
    ]
    assert len(shards) > 1
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    copy = build_source("packed", str(folder))
    assert [sample["__key__"] for sample in samples] == [f"{number:09}" for number in range(1437)]
    assert [int(sample["cls"]) for sample in samples] == copy.bank.labels.tolist()
    assert [sample["jpg"] for sample in samples[:20]] == [
        bytes(copy.train.content(number)) for number in range(20)
    ]
    for part in index["parts"]:
        with tarfile.open(folder / part["file"]) as archive:
            assert len(archive.getnames()) == 2 * part["images"]


@pytest.mark.slow
def test_worker_processes_write_the_same_copy(tmp_path, photographs):
    arguments = [f"data.root={photographs}", "format=shards", "data.resize=40"]
    assert files(run(tmp_path, *arguments)) == files(
        run(tmp_path / "two", *arguments, "num_workers=2")
    )


@pytest.mark.parametrize("form", ["array", "shards"])
def test_unreadable_images_are_left_out_of_every_side_and_limited(
    tmp_path, photographs, caplog, form
):
    for name in ("a/04.jpg", "b/07.jpg"):
        (photographs / name).write_bytes(b"no image")
    arguments = [
        "data=image_folder",
        f"data.root={photographs}",
        "data.held_out=0.5",
        f"format={form}",
    ]
    with pytest.raises(
        InputError, match=r"2 of 30 images cannot be read.*a/04\.jpg|1 of 30.*a/04\.jpg"
    ):
        run(tmp_path / "strict", *arguments)
    with pytest.raises(
        InputError, match=r"images cannot be read"
    ):  # nor does trying again get past it
        run(tmp_path / "strict", *arguments)
    folder = run(tmp_path, *arguments, "data.max_bad_fraction=0.1")
    copy = build_source("packed", str(folder))
    source = build_source("image_folder", str(photographs), held_out=0.5)
    readable = [name for name in names(source.train) if not name.endswith(("04.jpg", "07.jpg"))]
    assert sorted(names(copy.train)) == readable
    for side in ("bank", "queries"):
        there, here = getattr(source, side), getattr(copy, side)
        labels = dict(zip(names(there.images), there.labels.tolist(), strict=True))
        kept = {name: label for name, label in labels.items() if name in readable}
        assert dict(zip(names(here.images), here.labels.tolist(), strict=True)) == kept
    run(tmp_path, *arguments, "data.max_bad_fraction=0.1", "check=true")
    assert "04.jpg" in caplog.text


def test_auto_takes_an_array_where_it_fits_in_half_of_the_free_space(
    tmp_path, image_tree, monkeypatch, caplog
):
    caplog.set_level("INFO")
    needed = 24 * 16 * 20 * 3
    for free, name in ((2 * needed, "shards"), (2 * needed + 1, "array")):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        folder = run(tmp_path / name, f"data.root={image_tree}")
        assert json.loads((folder / "index.json").read_text())["format"] == name
        assert f"format={name}: an array takes about 0.00 GB, and 0.0 GB are free" in caplog.text
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(InputError, match=r"format=shards or a smaller data\.resize takes less"):
        run(tmp_path / "none", f"data.root={image_tree}", "format=array")


def test_loader_processes_are_handed_the_copy_as_shared_memory(tmp_path):
    from multiprocessing.reduction import ForkingPickler

    import torch.multiprocessing  # noqa: F401  (registers how tensors travel)

    train = build_source("packed", str(run(tmp_path, "data=digits"))).train
    train.opened(0).pixels()
    assert len(ForkingPickler.dumps(train)) < 5000


def test_only_so_many_files_are_open_at_once(tmp_path, photographs, monkeypatch):
    monkeypatch.setattr("moco.data.sources.packed_copy.MAX_OPEN_FILES", 2)
    folder = run(tmp_path, f"data.root={photographs}", "format=shards", "max_shard_bytes=1")
    train = build_source("packed", str(folder)).train
    assert len(train.files) == 4
    assert len(arrays(train)) == 30
    assert len(train.maps) == 2


def test_pool_holds_each_image_once():
    source = build_source("digits")
    pool = Pool(source)
    assert (len(pool), pool.num_train) == (1797, 1437)
    assert pool.name(1440) == source.queries.images.name(3)
    both = dataclasses.replace(source, queries=source.bank)
    assert len(Pool(both)) == 1437


def test_a_stream_is_no_source(tmp_path):
    pytest.importorskip("webdataset")
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    with pytest.raises(InputError, match=r"data=webdataset is a stream to train on"):
        run(tmp_path, "data=webdataset", f"data.root={tmp_path / 'a.tar'}", "data.num_images=5")


def test_the_flag_check_says_check_true(monkeypatch):
    monkeypatch.setattr("sys.argv", ["moco.pack", "data=digits", "--check", "output=copy"])
    monkeypatch.setattr(pack, "launch", lambda *arguments: None)
    pack.main()
    assert sys.argv == ["moco.pack", "data=digits", "check=true", "output=copy"]
