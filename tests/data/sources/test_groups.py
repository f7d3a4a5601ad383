"""Which images belong together, and which of them the key views come from."""

import logging
from collections import Counter

import numpy as np
import pytest
import torch

from moco.data.sources.groups import KeyImages, group_numbers, with_groups
from moco.data.sources.registry import build_source
from moco.data.sources.source import ArrayImages, DataSource
from moco.errors import InputError

NAMES = ["a/1.png", "a/2.png", "b/deep/1.png", "b/deep/2.png", "b/flat.png", "alone.png"]


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (r"(?P<group>[^/]+)/.*", [0, 0, 1, 1, 1, -1]),
        (r"(?P<group>\d)\.png$", [0, 1, 0, 1, -1, -1]),
        (1, [0, 0, 1, 1, 1, -1]),
        (2, [-1, -1, 0, 0, -1, -1]),
    ],
)
def test_names_tell_the_groups(group, expected):
    assert group_numbers(NAMES, group).tolist() == expected


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_tells_the_groups(separator, tmp_path, caplog):
    rows = [("Group", "name"), ("x", NAMES[0]), ("y", NAMES[2]), ("x", NAMES[4]), ("", NAMES[5])]
    rows += [("z", "gone.png")]
    table = tmp_path / "groups.csv"
    lines = [separator.join([*row, "more"]) for row in rows]
    table.write_text("\n".join(lines), encoding="utf-8-sig")
    assert group_numbers(NAMES, {"csv": str(table)}).tolist() == [0, -1, 1, -1, 0, -1]
    assert "1 of 5 names belong to no image: gone.png" in caplog.text


def test_tiles_and_pages_have_the_group_of_their_file(tmp_path):
    table = tmp_path / "groups.csv"
    table.write_text("name,group\nx/slide.tif,one\nscan,two\n")
    names = ["x/slide.tif#0,512", "x/slide.tif#0,1024", "x/scan.tif#2", "x/slide.tif", "x/a#b.tif"]
    assert group_numbers(names, {"csv": str(table)}).tolist() == [0, 0, 1, 0, -1]


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("(?P<group>", r"no regular expression \(.*position"),
        ("[^/]+/.*", r"has no \(\?P<group>"),
        ("(?P<group>x)y", r"the group of none of the 6 images; the first are a/1\.png, a/2\.png"),
        (0, "expected 1 for the first folder"),
        (3, "says the group of none"),
        (True, "expected a regular expression"),
        ({"table": "x"}, "expected a regular expression"),
        ({"csv": "missing.csv"}, r"data\.group\.csv=missing\.csv: no such file"),
    ],
)
def test_what_tells_no_groups_is_named(group, expected):
    with pytest.raises(InputError, match=expected):
        group_numbers(NAMES, group)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty"),
        ("name,class\na,b\n", "found name, class"),
        ("name,group\na\n", "line 2 has 1 cells"),
        ("name,group\na,x\na,y\n", "a is in two groups, x and y"),
        ("name,group\nb,x\n", "b stands for several images"),
    ],
)
def test_a_table_that_is_none_is_named(text, expected, tmp_path):
    table = tmp_path / "groups.csv"
    table.write_text(text)
    with pytest.raises(InputError, match=expected):
        group_numbers(["a", "x/b.png", "y/b.png"], {"csv": str(table)})


def test_names_are_relative_to_the_root_and_to_a_training_folder(image_tree, tmp_path):
    source = build_source("images", str(image_tree) + "/")
    assert with_groups(source, str(image_tree) + "/", 1).groups.tolist() == [0] * 8 + [1] * 16
    # A packed copy has the names of its source.
    assert with_groups(source, "/packed", 1).groups.tolist() == [0] * 8 + [1] * 16
    root = tmp_path / "sets"
    root.mkdir()
    image_tree.rename(root / "train")
    source = build_source("image_folder", str(root))
    assert with_groups(source, str(root), 1).groups.tolist() == [0] * 8 + [1] * 16


def test_shards_have_no_groups(image_tree, tmp_path):
    import tarfile

    pytest.importorskip("webdataset")
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        archive.add(image_tree / "a" / "00.png", "00.png")
    source = build_source("webdataset", str(tmp_path))
    with pytest.raises(InputError, match=r"data\.group: tar shards"):
        with_groups(source, str(tmp_path), 1)


GROUPS = np.array([0, 1, 0, -1, 1, 1, 1, 5, -1])


def test_another_image_of_the_group_is_drawn_with_equal_probability():
    images = KeyImages(GROUPS, "group", seed=3)
    indices = torch.arange(len(GROUPS))
    drawn = Counter()
    for epoch in range(600):
        keys = images.of(epoch, indices).tolist()
        assert keys == images.of(epoch, indices).tolist()
        drawn.update(enumerate(keys))
    for index, group in enumerate(GROUPS):
        others = [other for other in range(9) if GROUPS[other] == group and other != index]
        if group < 0 or not others:
            others = [index]
        counts = [drawn.pop((index, other)) for other in others]
        # Three standard deviations of a binomial count are at most 35.
        assert counts == pytest.approx([600 / len(others)] * len(others), abs=40)
    assert not drawn


def test_mixed_draws_such_an_image_half_of_the_time_whatever_the_batch():
    images = KeyImages(GROUPS, "mixed", seed=3)
    indices = torch.tensor([1, 0, 6])
    keys = torch.stack([images.of(epoch, indices) for epoch in range(600)])
    shares = (keys != indices).double().mean(dim=0)
    assert shares.tolist() == pytest.approx([0.5] * 3, abs=0.07)
    for row, index in enumerate(indices):
        assert images.of(599, index[None]) == keys[599, row]


def test_groups_of_one_image_each_are_refused():
    with pytest.raises(InputError, match=r"data\.pair=group: each of the 3 groups"):
        KeyImages(np.array([2, 0, -1]), "group", 0)


def test_the_log_counts_images_that_are_alone(caplog):
    caplog.set_level(logging.INFO, logger="moco")
    images = ArrayImages(np.zeros((4, 2, 2), np.uint8), "set")
    with_groups(DataSource(images, None, None, 2), None, r"(?P<group>[012])\]")
    expected = "3 groups of 1 to 1 images; 3 images are alone in their group and 1 have none: they"
    assert expected in caplog.text
