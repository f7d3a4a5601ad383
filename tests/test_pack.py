"""moco.pack: copies that hold the same pictures, survive any end of their writing, and know when they are damaged."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPOSITORY
from hydra import compose, initialize_config_dir
from PIL import Image

from moco import pack
from moco.config.pack import PackConfig
from moco.config.parsing import CONFIG_DIR, parse, register_schemas
from moco.data.datasets import build_source
from moco.data.decoding import DecodedPicture, encoded
from moco.data.packed_writer import Writer
from moco.data.packing import Pool, chunks, resized, resized_size
from moco.errors import InputError, Interrupted, RunError


def run(folder, *overrides):
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = parse(compose("pack", [f"output={folder / 'copy'}", "num_workers=0", *overrides]), PackConfig)
    pack.run(config, folder / "run")
    return folder / "copy"


@pytest.fixture
def photographs(tmp_path, generator):
    """30 JPEGs of various sizes, smooth as photographs are, in two folders."""
    root = tmp_path / "photographs"
    for number in range(30):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        path = root / "ab"[number % 2] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((60 + number, 90 - number), Image.Resampling.BICUBIC).save(path, quality=90)
    return root


@pytest.fixture(scope="module")
def labelled_copy(tmp_path_factory):
    """24 pictures in two classes, about half of them the bank."""
    folder = tmp_path_factory.mktemp("labelled")
    for number in range(24):
        path = folder / "source" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 5), (number, 0, 0)).save(path)
    return run(folder, "data=image_folder", f"data.root={folder / 'source'}", "data.held_out=0.5", "format=array")


def names(pictures):
    return [pictures.name(index) for index in range(len(pictures))]


def arrays(pictures):
    return [pictures.opened(index).pixels() for index in range(len(pictures))]


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
        assert copy.opened(index).pixels(8).flags.c_contiguous


def test_shards_hold_each_jpeg_as_it_was_in_another_order(tmp_path, photographs):
    root = str(photographs)
    copy = build_source("packed", str(run(tmp_path, f"data.root={root}", "format=shards"))).train
    source = build_source("images", root).train
    assert sorted(names(copy)) == names(source) != names(copy)
    for index in range(len(copy)):
        with open(copy.name(index), "rb") as file:
            assert bytes(copy.content(index)) == file.read()


def test_pictures_are_brought_down_to_the_shorter_side_and_never_enlarged(tmp_path, photographs):
    root = str(photographs)
    copy = build_source("packed", str(run(tmp_path, f"data.root={root}", "format=array", "data.resize=64"))).train
    source = build_source("images", root).train
    assert copy.folder == str(tmp_path / "copy")
    for index in range(len(source)):
        height, width = source.opened(index).size
        factor = min(1, 64 / min(height, width))
        assert copy.opened(index).size == (round(height * factor), round(width * factor))
        expected = source[index].resize(copy[index].size, Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(copy[index]), np.asarray(expected))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((500, 375), (341, 256)), ((10, 3000), (10, 3000)), ((3000, 10), (3000, 10)), ((256, 256), (256, 256))],
)
def test_the_aspect_is_kept(size, expected):
    assert resized_size(size, 256) == expected


def test_a_reduced_decode_of_a_large_jpeg_stays_near_the_full_one(generator):
    coarse = Image.fromarray(generator.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    photograph = coarse.resize((1800, 1200), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    photograph.save(file, "JPEG", quality=92)
    picture = encoded(file.getvalue(), "photograph", 10**8)
    small, full = resized(picture, 128), resized(DecodedPicture(picture.pixels()), 128)
    assert small.shape == full.shape == (128, 192, 3)
    assert np.abs(small.astype(int) - full).mean() < 0.5


def test_other_formats_become_jpegs_of_the_quality_given(tmp_path, picture_tree):
    copy = build_source("packed", str(run(tmp_path, f"data.root={picture_tree}", "format=shards", "quality=95"))).train
    for index in range(len(copy)):
        with Image.open(io.BytesIO(bytes(copy.content(index)))) as jpeg, Image.open(copy.name(index)) as original:
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
        expected = dict(zip(names(there.pictures), there.labels.tolist(), strict=True))
        assert dict(zip(names(here.pictures), here.labels.tolist(), strict=True)) == expected
    assert copy.bank.pictures is copy.train
    assert len(copy.train) == 1437
    if form == "array":
        assert np.array_equal(np.asarray(copy.queries.pictures[5]), np.asarray(source.queries.pictures[5]))


def test_queries_that_are_trained_on_are_stored_once(tmp_path, photographs):
    source = build_source("image_folder", str(photographs), held_out=0.3)
    copy = build_source(
        "packed", str(run(tmp_path, "data=image_folder", f"data.root={photographs}", "data.held_out=0.3"))
    )
    assert len(copy.train) == 30
    assert names(copy.queries.pictures) == names(source.queries.pictures)
    assert copy.queries.labels.tolist() == source.queries.labels.tolist()
    assert names(copy.bank.pictures) == names(source.bank.pictures)
    assert (tmp_path / "copy" / "pixels.bin").stat().st_size == sum(array.size for array in arrays(copy.train))


@pytest.mark.filterwarnings("ignore:.*unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_are_what_webdataset_reads(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    folder = run(tmp_path, "data=digits", "format=shards", "max_shard_bytes=500000")
    index = json.loads((folder / "index.json").read_text())
    shards = [str(folder / part["file"]) for part in index["parts"] if part["file"].startswith("train-")]
    assert len(shards) > 1
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    copy = build_source("packed", str(folder))
    assert [sample["__key__"] for sample in samples] == [f"{number:09}" for number in range(1437)]
    assert [int(sample["cls"]) for sample in samples] == copy.bank.labels.tolist()
    assert [sample["jpg"] for sample in samples[:20]] == [bytes(copy.train.content(number)) for number in range(20)]
    for part in index["parts"]:
        with tarfile.open(folder / part["file"]) as archive:
            assert len(archive.getnames()) == 2 * part["pictures"]


@pytest.mark.parametrize("form", ["array", "shards"])
def test_a_copy_that_was_interrupted_anywhere_ends_in_the_same_bytes(tmp_path, photographs, monkeypatch, form):
    size = {"array": 100_000, "shards": 30_000}[form]  # two chunks of eight
    arguments = [f"data.root={photographs}", f"format={form}", "data.resize=48", f"max_shard_bytes={size}"]
    straight = files(run(tmp_path / "straight", *arguments))
    add, finish = Writer.add, Writer.finish

    def adding_so_often(number):
        calls = []

        def stop_after(self, chunk):
            add(self, chunk)
            calls.append(chunk.stop)
            if len(calls) == number:
                raise Interrupted(signal.SIGTERM, "stopped")

        return stop_after

    def stop(self):
        raise Interrupted(signal.SIGTERM, "stopped")

    def finish_and_stop(self):
        finish(self)
        stop(self)

    for number in (1, 3, 1):  # in the first part; in the second; there again
        monkeypatch.setattr(Writer, "add", adding_so_often(number))
        with pytest.raises(Interrupted):
            run(tmp_path, *arguments)
    monkeypatch.setattr(Writer, "add", add)
    for ending in (stop, finish_and_stop):
        monkeypatch.setattr(Writer, "finish", ending)
        with pytest.raises(Interrupted):
            run(tmp_path, *arguments)
    monkeypatch.setattr(Writer, "finish", finish)
    assert files(run(tmp_path, *arguments)) == straight


def test_a_finished_part_is_not_done_again(tmp_path, photographs, monkeypatch):
    seen = []

    def watched(pool, start, *rest):
        seen.append(start)
        return chunks(pool, start, *rest)

    monkeypatch.setattr("moco.data.packing.chunks", watched)
    add = Writer.add

    def broken(self, chunk):
        if chunk.stop > 16:
            raise Interrupted(signal.SIGINT, "stopped")
        add(self, chunk)

    arguments = [f"data.root={photographs}", "format=array", "max_shard_bytes=1"]
    monkeypatch.setattr(Writer, "add", broken)
    with pytest.raises(Interrupted):
        run(tmp_path, *arguments)
    monkeypatch.setattr(Writer, "add", add)
    run(tmp_path, *arguments)
    assert seen == [0, 16]


def test_the_same_command_after_the_end_changes_nothing(tmp_path, photographs):
    before = files(run(tmp_path, f"data.root={photographs}"))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").iterdir()}
    assert files(run(tmp_path, f"data.root={photographs}")) == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").iterdir()} == times


def test_worker_processes_write_the_same_copy(tmp_path, photographs):
    arguments = [f"data.root={photographs}", "format=shards", "data.resize=40"]
    assert files(run(tmp_path, *arguments)) == files(run(tmp_path / "two", *arguments, "num_workers=2"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["data.resize=32"], "data.resize: 48 there, 32 here"),
        (["format=shards"], "format: array there, shards here"),
        (["data=digits"], "data.name: images there, digits here"),
    ],
)
def test_another_source_or_setting_in_the_same_folder_is_refused(tmp_path, photographs, change, message):
    run(tmp_path, f"data.root={photographs}", "format=array", "data.resize=48")
    with pytest.raises(InputError) as error:
        run(tmp_path, f"data.root={photographs}", "format=array", "data.resize=48", *change)
    assert message in str(error.value)
    assert "choose another folder" in str(error.value)


def test_a_source_that_has_grown_is_refused_and_fails_the_check(tmp_path, photographs):
    run(tmp_path, f"data.root={photographs}")
    Image.new("RGB", (9, 9)).save(photographs / "new.png")
    with pytest.raises(InputError, match="the source: 30 pictures there, 31 here"):
        run(tmp_path, f"data.root={photographs}")
    with pytest.raises(RunError, match="made of 30 pictures, and the source has 31"):
        run(tmp_path, f"data.root={photographs}", "check=true")


def test_a_folder_with_other_files_is_refused(tmp_path, photographs):
    with pytest.raises(InputError, match="holds other files; choose an empty folder"):
        run(photographs.parent, f"data.root={photographs}", f"output={photographs}")
    with pytest.raises(InputError, match=r"output=.*: Not a directory|output=.*: File exists"):
        run(tmp_path, f"data.root={photographs}", f"output={photographs / 'a' / '00.jpg'}")


def test_two_processes_do_not_pack_into_one_folder(tmp_path, photographs):
    with pack.taken(tmp_path / "copy"), pytest.raises(InputError, match="another process is packing there"):
        run(tmp_path, f"data.root={photographs}")


@pytest.mark.parametrize("form", ["array", "shards"])
def test_unreadable_pictures_are_left_out_of_every_side_and_limited(tmp_path, photographs, caplog, form):
    for name in ("a/04.jpg", "b/07.jpg"):
        (photographs / name).write_bytes(b"no picture")
    arguments = ["data=image_folder", f"data.root={photographs}", "data.held_out=0.5", f"format={form}"]
    with pytest.raises(InputError, match=r"2 of 30 pictures cannot be read.*a/04\.jpg|1 of 30.*a/04\.jpg"):
        run(tmp_path / "strict", *arguments)
    with pytest.raises(InputError, match=r"pictures cannot be read"):  # nor does trying again get past it
        run(tmp_path / "strict", *arguments)
    folder = run(tmp_path, *arguments, "data.max_bad_fraction=0.1")
    copy = build_source("packed", str(folder))
    source = build_source("image_folder", str(photographs), held_out=0.5)
    readable = [name for name in names(source.train) if not name.endswith(("04.jpg", "07.jpg"))]
    assert sorted(names(copy.train)) == readable
    for side in ("bank", "queries"):
        there, here = getattr(source, side), getattr(copy, side)
        labels = dict(zip(names(there.pictures), there.labels.tolist(), strict=True))
        kept = {name: label for name, label in labels.items() if name in readable}
        assert dict(zip(names(here.pictures), here.labels.tolist(), strict=True)) == kept
    run(tmp_path, *arguments, "data.max_bad_fraction=0.1", "check=true")
    assert "04.jpg" in caplog.text


@pytest.mark.parametrize("form", ["array", "shards"])
def test_check_names_the_pictures_whose_bytes_have_changed(tmp_path, photographs, form):
    arguments = [f"data.root={photographs}", f"format={form}"]
    folder = run(tmp_path, *arguments)
    run(tmp_path, *arguments, "check=true")
    copy = build_source("packed", str(folder)).train
    path = folder / copy.files[0]
    content = bytearray(path.read_bytes())
    offsets = copy.table["offsets"].tolist()
    damaged = [3, 17]
    for place in damaged:
        content[offsets[place] + 20] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError) as error:
        run(tmp_path, *arguments, "check=true")
    assert f"2 of 30 pictures are not as they were written: {copy.name(3)}, {copy.name(17)}" in str(error.value)


def test_check_sees_a_flipped_bit_between_two_pictures_of_a_shard(tmp_path, photographs):
    arguments = [f"data.root={photographs}", "format=shards"]
    path = run(tmp_path, *arguments) / "train-00000.tar"
    content = bytearray(path.read_bytes())
    content[0] ^= 1  # of the first member's name
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"between its pictures other than it was written: train-00000\.tar"):
        run(tmp_path, *arguments, "check=true")


def test_a_copy_that_is_not_finished_is_neither_checked_nor_read(tmp_path, photographs, monkeypatch):
    monkeypatch.setattr(Writer, "finish", lambda self: (_ for _ in ()).throw(Interrupted(2, "stopped")))
    with pytest.raises(Interrupted):
        run(tmp_path, f"data.root={photographs}")
    with pytest.raises(InputError, match="not finished; start the same command without check"):
        run(tmp_path, f"data.root={photographs}", "check=true")
    with pytest.raises(InputError, match=r"not finished; start the same moco\.pack again"):
        build_source("packed", str(tmp_path / "copy"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "pixels.bin").write_bytes(b"abc"), r"pixels\.bin: 3 bytes, and the index says"),
        (lambda folder: (folder / "pixels.bin").unlink(), r"pixels\.bin: No such file"),
        (lambda folder: (folder / "index.npz").write_bytes(b"PK\x03\x04"), r"index\.npz: damaged"),
        (lambda folder: (folder / "index.json").write_text("{"), r"index\.json: not the index of a packed copy"),
        (lambda folder: (folder / "index.json").write_text('{"version": 2}'), "version 2 of a packed copy"),
        (lambda folder: (folder / "index.json").unlink(), "no packed copy there"),
    ],
)
def test_a_damaged_copy_is_named(tmp_path, picture_tree, damage, message):
    folder = run(tmp_path, f"data.root={picture_tree}", "format=array")
    damage(folder)
    with pytest.raises(InputError, match=message):
        build_source("packed", str(folder))


def test_an_index_that_points_beyond_the_file_is_refused(tmp_path, picture_tree):
    folder = run(tmp_path, f"data.root={picture_tree}", "format=array")
    with np.load(folder / "index.npz") as file:
        table = dict(file)
    np.savez(folder / "index.npz", **table | {"offsets": table["offsets"] + 1})
    with pytest.raises(InputError, match=r"index\.npz: does not go with index\.json"):
        build_source("packed", str(folder))


def changed(index, place, value):
    """A copy of JSON data with one value replaced, or left out if it is None."""
    index = json.loads(json.dumps(index))
    *way, last = place
    inner = index
    for step in way:
        inner = inner[step]
    inner[last] = value
    if value is None:
        del inner[last]
    return json.dumps(index)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["format"], None, r"format is missing"),
        (["format"], "tar", r'format="tar": expected array or shards'),
        (["complete"], 1, r"complete=1: expected true or false"),
        (["num_images"], 25, r"num_images=25, and its parts hold 24"),
        (["num_images"], -1, r"num_images=-1: expected a number"),
        (["image_size"], "a", r'image_size="a": expected a number'),
        (["settings"], {}, r"settings=\{\}: expected settings, quality among them"),
        (["source"], [], r"source=\[\]: expected its number of pictures"),
        (["parts"], {}, r"parts=\{\}: expected a list"),
        (["parts", 0, "bytes"], None, r"parts\[0\]\.bytes is missing"),
        (["parts", 0, "pictures"], 1.5, r"parts\[0\]\.pictures=1\.5: expected a number"),
        (["parts", 0, "skipped"], [[1]], r"parts\[0\]\.skipped=\[\[1\]\]: expected a list of rows and reasons"),
        *[
            (["parts", 0, "file"], name, r"parts\[0\]\.file=.*: expected the name of a file in this folder")
            for name in ("../x", "/etc/passwd", "..", "", 3)
        ],
    ],
)
def test_an_index_is_held_to_its_form(labelled_copy, tmp_path, place, value, message):
    index = json.loads((labelled_copy / "index.json").read_text())
    (tmp_path / "index.json").write_text(changed(index, place, value))
    with pytest.raises(InputError, match=message) as error:
        build_source("packed", str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path}/index.json: ")


def test_an_index_of_a_version_alone_is_no_copy(tmp_path):
    (tmp_path / "index.json").write_text('{"version": 1}')
    with pytest.raises(InputError, match=r"index\.json: format is missing; pack it anew"):
        build_source("packed", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("names", lambda array: None, "names is missing"),
        ("bank_labels", lambda array: None, "bank_labels is missing"),
        ("bank_rows", lambda array: array + 24, "bank_rows has numbers below 0 or above 23"),
        ("bank_rows", lambda array: array - 1, "bank_rows has numbers below 0 or above 23"),
        ("bank_rows", lambda array: array.astype(float), r"bank_rows is float64 \(\d+,\), expected int64"),
        ("bank_labels", lambda array: array - 9, "bank_labels has numbers below 0"),
        ("bank_labels", lambda array: array[1:], r"bank_labels is int64"),
        ("heights", lambda array: array[1:], r"heights is int32 \(23,\), expected int32 \(24,\)"),
        ("rows", lambda array: array[0], r"rows is int64 \(\), expected int64"),
        ("name_ends", lambda array: array[::-1], "name_ends does not go with names"),
        ("name_ends", lambda array: array + 1, "name_ends does not go with names"),
        ("offsets", lambda array: array - 1, "offsets has numbers below 0"),
        ("offsets", lambda array: array + (2**63 - 1 - array[-1]), "does not go with index.json"),
        ("lengths", lambda array: array * 0, "lengths has numbers below 1"),
        ("rows", lambda array: np.array([{}] * len(array), object), "rows holds Python objects"),
    ],
)
def test_a_table_is_held_to_its_form(labelled_copy, tmp_path, name, change, message):
    for path in labelled_copy.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with np.load(tmp_path / "index.npz") as file:
        table = dict(file)
    table[name] = change(table[name])
    np.savez(tmp_path / "index.npz", **{name: array for name, array in table.items() if array is not None})
    with pytest.raises(InputError, match=message) as error:
        build_source("packed", str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path}/index.npz: ")


def test_auto_takes_an_array_where_it_fits_in_half_of_the_free_space(tmp_path, picture_tree, monkeypatch, caplog):
    caplog.set_level("INFO")
    needed = 24 * 16 * 20 * 3
    for free, name in ((2 * needed, "shards"), (2 * needed + 1, "array")):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        folder = run(tmp_path / name, f"data.root={picture_tree}")
        assert json.loads((folder / "index.json").read_text())["format"] == name
        assert f"format={name}: an array takes about 0.00 GB, and 0.0 GB are free" in caplog.text
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(InputError, match=r"format=shards or a smaller data\.resize takes less"):
        run(tmp_path / "none", f"data.root={picture_tree}", "format=array")


def test_a_full_disk_is_one_line_and_the_copy_goes_on_later(tmp_path, photographs, monkeypatch):
    import errno

    add, arguments = Writer.add, [f"data.root={photographs}", "format=array", "max_shard_bytes=1"]

    def full(self, chunk):
        if chunk.stop > 16:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, chunk)

    monkeypatch.setattr(Writer, "add", full)
    with pytest.raises(RunError, match="No space left on device; with room there the same command goes on"):
        run(tmp_path, *arguments)
    monkeypatch.setattr(Writer, "add", add)
    assert len(build_source("packed", str(run(tmp_path, *arguments))).train) == 30


def test_a_full_disk_at_the_first_write_is_one_line_and_what_it_leaves_is_not_in_the_way(
    tmp_path, photographs, monkeypatch
):
    import errno

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(RunError, match="No space left on device; with room there the same command goes on"):
            run(tmp_path, f"data.root={photographs}")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == [".index.json.tmp"]
    folder = run(tmp_path, f"data.root={photographs}")
    assert len(build_source("packed", str(folder)).train) == 30
    assert not (folder / ".index.json.tmp").exists()


def test_loader_processes_are_handed_the_copy_as_shared_memory(tmp_path):
    from multiprocessing.reduction import ForkingPickler

    import torch.multiprocessing  # noqa: F401  (registers how tensors travel)

    train = build_source("packed", str(run(tmp_path, "data=digits"))).train
    train.opened(0).pixels()
    assert len(ForkingPickler.dumps(train)) < 5000


def test_only_so_many_files_are_open_at_once(tmp_path, photographs, monkeypatch):
    monkeypatch.setattr("moco.data.packed.MOST_OPEN", 2)
    folder = run(tmp_path, f"data.root={photographs}", "format=shards", "max_shard_bytes=1")
    train = build_source("packed", str(folder)).train
    assert len(train.files) == 4
    assert len(arrays(train)) == 30
    assert len(train.maps) == 2


def test_pool_holds_each_picture_once():
    source = build_source("digits")
    pool = Pool(source)
    assert (len(pool), pool.num_train) == (1797, 1437)
    assert pool.name(1440) == source.queries.pictures.name(3)
    both = dataclasses.replace(source, queries=source.bank)
    assert len(Pool(both)) == 1437


def test_a_stream_is_no_source(tmp_path):
    pytest.importorskip("webdataset")
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    with pytest.raises(InputError, match=r"data=webdataset is a stream to train on"):
        run(tmp_path, "data=webdataset", f"data.root={tmp_path / 'a.tar'}", "data.num_images=5")


def started(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "moco.pack", *arguments, f"output={folder / 'copy'}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def num_parts(folder):
    """-1 before there is an index."""
    index = folder / "copy" / "index.json"
    return len(json.loads(index.read_text())["parts"]) if index.exists() else -1


def ended_by(number, process):
    """What the program said, when it had the signal."""
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said.strip()


INTERRUPTED = "interrupted: the parts that are whole are kept; the same command goes on there"


def test_the_program_ends_on_sigterm_with_a_line_and_goes_on(tmp_path, photographs, capsys):
    for number in range(120):  # so many that the signal comes before the last
        shutil.copy(next(photographs.rglob("*.*g")), photographs / f"more{number}.jpg")
    arguments = [f"data.root={photographs}", "max_shard_bytes=1", "format=array"]
    process = started(tmp_path, *arguments, "num_workers=0")
    while process.poll() is None and num_parts(tmp_path) < 0:
        time.sleep(0.01)
    assert ended_by(signal.SIGTERM, process) == (128 + signal.SIGTERM, INTERRUPTED)
    folder = run(tmp_path, *arguments)
    assert len(build_source("packed", str(folder)).train) == 150
    printed = capsys.readouterr().out
    assert "x as fast" in printed
    assert f"data=packed data.root={folder}" in printed


@pytest.mark.slow
@pytest.mark.parametrize("form", ["array", "shards"])
def test_a_program_that_is_killed_again_and_again_ends_in_the_same_bytes(tmp_path, picture_tree, generator, form):
    for number in range(100, 1500):
        Image.fromarray(generator.integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(picture_tree / f"{number}.png")
    arguments = [f"data.root={picture_tree}", "max_shard_bytes=2000000", f"format={form}", "data.resize=64"]
    straight = files(run(tmp_path / "straight", *arguments))
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
        before = num_parts(tmp_path)
        process = started(tmp_path, *arguments, "num_workers=2")
        while process.poll() is None and num_parts(tmp_path) <= before:
            time.sleep(0.01)
        code, said = ended_by(number, process)
        is_kill = number == signal.SIGKILL  # after which Python's own resource tracker has something to say
        assert (code, is_kill or said) == (-number if is_kill else 128 + number, is_kill or INTERRUPTED)
    assert num_parts(tmp_path) < num_parts(tmp_path / "straight")
    assert files(run(tmp_path, *arguments)) == straight


def test_the_flag_check_says_check_true(monkeypatch):
    monkeypatch.setattr("sys.argv", ["moco.pack", "data=digits", "--check", "output=copy"])
    monkeypatch.setattr(pack, "launch", lambda *arguments: None)
    pack.main()
    assert sys.argv == ["moco.pack", "data=digits", "check=true", "output=copy"]
