"""The names of masks: those of the images."""

import pytest

from moco.errors import InputError
from moco.segmentation.mask_names import check_names, mask_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/data/a/b.jpg", "a/b"),
        ("/data/a/b.tar.JPEG", "a/b.tar"),
        ("/data/no_ending", "no_ending"),
        ("/data/1.5", "1.5"),  # no ending of an image
        ("/data/stack.tif#12", "stack#12"),
        ("/data/a#2.png", "a#2"),
        ("/data/[3]", "[3]"),
        ("/data.npz[42]", "000042"),
        ("custom dataset[7]", "000007"),
        ("shard-01.tar/img7", "shard-01.tar/img7"),
        ("/elsewhere/c.png", "elsewhere/c"),
        ("/data/caf\udce9.png", "caf\udce9"),
        ("/data/new\nline.png", "new\nline"),
    ],
)
def test_a_mask_has_the_name_of_its_image(name, expected):
    assert mask_name(name, ["/data"]) == expected
    assert mask_name(name, ["/data/"]) == expected


def test_of_several_folders_the_name_begins_with_the_folder():
    roots = ["/data/north", "/data/south"]
    assert mask_name("/data/north/1.jpg", roots) == "north/1"
    check_names(["/data/north/1.jpg", "/data/south/1.jpg"], roots)


@pytest.mark.parametrize("name", ["../a.png", "a/../../b", "", "/"])
def test_no_mask_leaves_its_folder(name):
    with pytest.raises(InputError, match="no mask can have that name"):
        mask_name(name, ["/data"])


@pytest.mark.parametrize(
    ("first", "second", "path"),
    [
        ("/data/b.jpg", "/data/b.png", "b.png"),
        ("/data/a.jpg", "/data/a.png/x.jpg", "a.png"),
        ("/data/a.png/x.jpg", "/data/a.jpg", "a.png"),
    ],
)
def test_two_images_with_one_mask_are_named(first, second, path):
    with pytest.raises(InputError) as error:
        check_names([first, "/data/other.jpg", second], ["/data"])
    assert first in str(error.value)
    assert second in str(error.value)
    assert f"would have the same mask, {path}; rename one" in str(error.value)
