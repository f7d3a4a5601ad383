import numpy as np
import pytest
from PIL import Image

from moco.data.sources.label_files import natural_order, read_labels
from moco.data.sources.registry import build_source
from moco.errors import InputError

NAMES = ["a/1.png", "a/2.png", "b/3.png", "b/4.png"]


def labels_of(tmp_path, content, names=NAMES):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "labels.csv").write_bytes(data)
    labels = read_labels("labels.csv", str(tmp_path), names)
    return labels.numbers.tolist(), labels.class_names


DOG_CAT = ([1, 0, 1, -1], ("cat", "dog"))
TABLES = {
    "paths": ("a/1.png,dog\na/2.png,cat\nb/3.png,dog\n", DOG_CAT),
    "last parts, a header and a mark": (
        "\ufeffname;class\n1.png;dog\n2.png;cat\n\n3.png; dog\n",
        DOG_CAT,
    ),
    "no endings, tabs, Windows": ("image_id\tbreed\r\na/1\tdog\r\n2\tcat\r\nb/3\tdog\r\n", DOG_CAT),
    "other columns": (
        ',label,file,split\n0,dog,1.png,train\n1,cat,2.png,val\n2,dog,./b/3.png,val\n',
        DOG_CAT,
    ),
    "class first": ("dog,a/1.png\ncat,a/2.png\ndog,b/3.png\n", DOG_CAT),
    "quoted": ('file,class\n"a/1.png","dog, small"\n2.png,cat\n', ([1, 0, -1, -1], ("cat", "dog, small"))),
    "whole numbers": ("1.png,7\n2.png,0\n3.png,-1\n4.png,\n", ([7, 0, -1, -1], None)),
    "natural order": ("1.png,c10\n2.png,c9\n3.png,c1\n", ([2, 1, 0, -1], ("c1", "c9", "c10"))),
    "one column a class": (
        "image,cat,dog\n1,0,1\n2,1.0,0.0\n3,0,1\n4,0,0\n",
        DOG_CAT,
    ),
    "a class without an image": ("gone.png,ant\n1.png,dog\n2.png,cat\n3.png,dog\n", DOG_CAT),
    "the same line twice": ("1.png,dog\n1.png,dog\n2.png,cat\n3.png,dog\n", DOG_CAT),
}  # fmt: skip


@pytest.mark.parametrize("table", TABLES)
def test_tables_as_people_have_them_are_read(table, tmp_path):
    content, expected = TABLES[table]
    assert labels_of(tmp_path, content) == expected


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_tables_of_spreadsheets_are_read(encoding, tmp_path):
    content = "1.png;dog\r\n2.png;cat\r\n3.png;dog\r\n".encode(encoding)
    assert labels_of(tmp_path, content) == DOG_CAT


MISTAKES = {
    "not UTF-8": (b"1.png,d\xe4\n", "cannot be read as text in UTF-8 or UTF-16"),
    "empty": ("\n,\n", "empty; expected a column of image names and one of classes"),
    "a header alone": ("name,class\n", "one line; expected"),
    "one column": ("1.png\n2.png\n", "one column; expected"),
    "other lengths": ("1.png,a\n2.png,a,b\n", "line 2 has 3 cells, and the first line has 2"),
    "which column": (
        "name,breed,age\n1.png,pug,3\n",
        "the columns name, breed, age; expected a column named class, or columns of 0 and 1",
    ),
    "other images": (
        "x.png,a\ny.png,b\nz.png,a\nw.png,a\n",
        r"none of its 4 names is an image below .*: x\.png, y\.png, z\.png, \.\.\.",
    ),
    "two classes": (
        "1.png,a\n1.png,b\n2.png,a\n",
        r"1 images have a second line with another class: 1\.png",
    ),
    "other sets of classes": (
        "name,a,b\n1.png,1,1\n2.png,1,0\n1.png,0,1\n",
        r"1 images have a second line with another class: 1\.png",
    ),
    "decimals": ("1.png,0.25\n2.png,1.5\n", "a class is 0.25; expected names of classes"),
    "no classes": ("1.png,\n2.png,\n", "no image below .* has a class in there"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_table_is_one_line(mistake, tmp_path):
    content, message = MISTAKES[mistake]
    with pytest.raises(InputError, match=message) as error:
        labels_of(tmp_path, content)
    assert "\n" not in str(error.value)
    assert "labels.csv: " in str(error.value)


def test_a_name_of_several_images_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"1 names stand for several images each: 1\.png; give"):
        labels_of(tmp_path, "1.png,a\n", names=["a/1.png", "b/1.png"])


def test_what_does_not_fit_is_counted_and_the_first_are_named(tmp_path, caplog):
    labels_of(tmp_path, "1.png,a\n" + "".join(f"gone{number},b\n" for number in range(4)))
    assert "4 of 5 names are no images below" in caplog.text
    assert "gone0, gone1, gone2, ..." in caplog.text
    assert (
        "3 of 4 images have no class, and are only trained on: a/2.png, b/3.png, b/4.png"
        in caplog.text
    )


def test_natural_order_is_that_of_numbers_in_names():
    names = ["10", "2", "1", "img12b", "img3", "img", "a", "B", "02"]
    expected = ["1", "02", "2", "10", "B", "a", "img", "img3", "img12b"]
    assert sorted(names, key=natural_order) == expected


def tree(root):
    for number in range(40):
        path = root / ("train", "val")[number % 4 == 0] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    lines = [f"{number},{('even', 'odd')[number % 2]}" for number in range(1, 40)]
    (root / "labels.csv").write_text("\n".join(lines))


def test_images_of_any_folder_get_classes(tmp_path):
    tree(tmp_path)
    divided = build_source("images", str(tmp_path), labels="labels.csv", held_out=0.3)
    assert len(divided.train) == 40
    assert divided.bank.class_names == divided.queries.class_names == ("even", "odd")
    named = {}
    for side in (divided.bank, divided.queries):
        for index, label in enumerate(side.labels):
            number = int(side.images.name(index).rpartition("/")[2].removesuffix(".png"))
            named[number] = label
    assert named == {number: number % 2 for number in range(1, 40)}

    split = build_source("image_folder", str(tmp_path), labels="labels.csv")
    assert len(split.train) == len(split.bank.labels) == 30
    assert split.queries.labels.tolist() == [0] * 9
    with pytest.raises(InputError, match=r"data\.labels=x\.csv: no such file, also not in"):
        build_source("images", str(tmp_path), labels="x.csv")
    with pytest.raises(InputError, match=r"data\.labels=x\.csv: data=npz has no such setting"):
        build_source("npz", str(tmp_path), labels="x.csv")


def test_pages_have_the_class_of_their_file(tmp_path):
    pages = [Image.new("RGB", (4, 4), color) for color in ("red", "lime")]
    for name in ("a", "b", "c"):
        pages[0].save(tmp_path / f"{name}.tif", save_all=True, append_images=pages[1:])
    (tmp_path / "labels.csv").write_text("a,3\nc,5\n")
    source = build_source("images", str(tmp_path), labels="labels.csv", pages="each", held_out=0.0)
    assert len(source.train) == 6
    assert source.bank.labels.tolist() == [3, 3, 5, 5]
    assert source.bank.images.name(2) == f"{tmp_path}/c.tif#1"
    assert np.array_equal(source.bank.images[3], source.train[5])
