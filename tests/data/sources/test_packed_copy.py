"""Packed copies that are damaged or not finished: moco.pack --check tells, and reading refuses."""

import json

import numpy as np
import pytest
from PIL import Image

from moco.data.packing import CopyWriter
from moco.data.sources.registry import build_source
from moco.errors import InputError, Interrupted, RunError
from tests.data.sources.test_pack import run


@pytest.fixture(scope="module")
def labelled_copy(tmp_path_factory):
    """24 images in two classes, about half of them the bank."""
    folder = tmp_path_factory.mktemp("labelled")
    for number in range(24):
        path = folder / "source" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 5), (number, 0, 0)).save(path)
    return run(
        folder,
        "data=image_folder",
        f"data.root={folder / 'source'}",
        "data.held_out=0.5",
        "format=array",
    )


@pytest.mark.parametrize("form", ["array", "shards"])
def test_check_names_the_images_whose_bytes_have_changed(tmp_path, photographs, form):
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
    assert f"not as it was written in 2 places: {copy.name(3)}, {copy.name(17)}" in str(error.value)


def test_check_sees_a_flipped_bit_between_two_images_of_a_shard(tmp_path, photographs):
    arguments = [f"data.root={photographs}", "format=shards"]
    path = run(tmp_path, *arguments) / "train-00000.tar"
    content = bytearray(path.read_bytes())
    content[0] ^= 1  # of the first member's name
    path.write_bytes(content)
    with pytest.raises(
        RunError, match=r"in 1 places: bytes between the images of train-00000\.tar"
    ):
        run(tmp_path, *arguments, "check=true")


def test_a_copy_that_is_not_finished_is_neither_checked_nor_read(
    tmp_path, photographs, monkeypatch
):
    monkeypatch.setattr(
        CopyWriter, "finish", lambda self: (_ for _ in ()).throw(Interrupted(2, "stopped"))
    )
    with pytest.raises(Interrupted):
        run(tmp_path, f"data.root={photographs}")
    with pytest.raises(InputError, match="not finished; start the same"):
        run(tmp_path, f"data.root={photographs}", "check=true")
    with pytest.raises(InputError, match=r"not finished; start the same moco\.pack again"):
        build_source("packed", str(tmp_path / "copy"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "pixels.bin").write_bytes(b"abc"),
            r"pixels\.bin: missing, or not of 23,040 bytes",
        ),
        (lambda folder: (folder / "pixels.bin").unlink(), r"pixels\.bin: missing, or not of"),
        (lambda folder: (folder / "index.npz").write_bytes(b"PK\x03\x04"), r"index\.npz: damaged"),
        (
            lambda folder: (folder / "index.json").write_text("{"),
            r"index\.json: not the index of a packed copy",
        ),
        (
            lambda folder: (folder / "index.json").write_text('{"version": 3}'),
            "version 3 of a packed copy",
        ),
        (lambda folder: (folder / "index.json").unlink(), "no packed copy there"),
    ],
)
def test_a_damaged_copy_is_named(tmp_path, image_tree, damage, message):
    folder = run(tmp_path, f"data.root={image_tree}", "format=array")
    damage(folder)
    with pytest.raises(InputError, match=message):
        build_source("packed", str(folder))


def test_an_index_that_points_beyond_the_file_is_refused(tmp_path, image_tree):
    folder = run(tmp_path, f"data.root={image_tree}", "format=array")
    with np.load(folder / "index.npz") as file:
        table = dict(file)
    np.savez(folder / "index.npz", **table | {"offsets": table["offsets"] + 1})
    with pytest.raises(InputError, match=r"index\.npz: does not go with index\.json"):
        build_source("packed", str(folder))


def test_an_index_of_more_images_than_there_are_is_refused(tmp_path, image_tree):
    folder = run(tmp_path, f"data.root={image_tree}", "format=array")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(changed(index, ["num_images"], 25))
    with pytest.raises(InputError, match=r"index\.npz: does not go with index\.json"):
        build_source("packed", str(folder))


def test_a_copy_that_an_earlier_version_wrote_is_read(labelled_copy, tmp_path):
    for path in labelled_copy.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = (tmp_path / "index.json").read_text()
    text = text.replace('"images"', '"pictures"').replace('"num_images"', '"num_pictures"')
    (tmp_path / "index.json").write_text(text)
    assert len(build_source("packed", str(tmp_path)).train) == 24


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
        (["format"], 3, r"format=3: not as moco.pack writes it"),
        (["complete"], 1, r"complete=1: not as moco.pack writes it"),
        (["image_size"], "a", r'image_size="a": not as moco.pack writes it'),
        (["source"], [], r"source=\[\]: not as moco.pack writes it"),
        (["parts"], {}, r"parts=\{\}: not as moco.pack writes it"),
        (["parts", 0], [1], r"parts\[0\]\.file is missing"),
        (["parts", 0, "bytes"], None, r"parts\[0\]\.bytes is missing"),
        (["parts", 0, "images"], 1.5, r"parts\[0\]\.images=1\.5: not as moco.pack writes it"),
        *[
            (["parts", 0, "file"], name, r"parts\[0\]\.file=.*: not as moco.pack writes it")
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
        (
            "bank_rows",
            lambda array: array.astype(float),
            r"bank_rows is float64 \(\d+,\), expected int64",
        ),
        ("bank_labels", lambda array: array[1:], r"bank_labels is int64"),
        ("heights", lambda array: array[1:], r"heights is int32 \(23,\), expected int32 \(24,\)"),
        ("rows", lambda array: array[0], r"rows is int64 \(\), expected int64"),
        ("name_ends", lambda array: array[1:], r"name_ends is int64 \(23,\)"),
        ("offsets", lambda array: array - 1, "does not go with index.json"),
        ("offsets", lambda array: array + (2**63 - 1 - array[-1]), "does not go with index.json"),
        (
            "rows",
            lambda array: np.array([{}] * len(array), object),
            "Object arrays cannot be loaded",
        ),
    ],
)
def test_a_table_is_held_to_its_form(labelled_copy, tmp_path, name, change, message):
    for path in labelled_copy.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with np.load(tmp_path / "index.npz") as file:
        table = dict(file)
    table[name] = change(table[name])
    np.savez(
        tmp_path / "index.npz",
        **{name: array for name, array in table.items() if array is not None},
    )
    with pytest.raises(InputError, match=message) as error:
        build_source("packed", str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path}/index.npz: ")
