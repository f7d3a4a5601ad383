"""Datasets that Hugging Face's library wrote to disk."""

import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from moco.data.files.images import UnreadableImage
from moco.data.sources.registry import build_source
from moco.errors import InputError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def encoded(number, form="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (8 + number, 6), (number, 0, 7)).save(file, form)
    return file.getvalue()


def table(count, start=0, **columns):
    rows = {"image": [{"bytes": encoded(start + number), "path": None} for number in range(count)]}
    rows["label"] = [number % 2 for number in range(count)]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    for name, (values, feature) in columns.items():
        rows[name], features[name] = values, feature
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def saved(folder, dataset):
    dataset.save_to_disk(str(folder))
    return str(folder)


def sizes(images):
    return [images.opened(index).size for index in range(len(images))]


def test_a_dataset_is_trained_on_with_its_labels(tmp_path):
    source = build_source("hf", saved(tmp_path / "set", table(5)))
    assert sizes(source.train) == [(6, 8 + number) for number in range(5)]
    assert source.train[3][0, 0].tolist() == [3, 0, 7]
    assert source.train.opened(3).pixels()[0, 0].tolist() == [3, 0, 7]
    assert source.bank.labels.tolist() == [0, 1, 0, 1, 0]
    assert source.bank.class_names == tuple(table(5).features["label"].names)
    assert source.bank.images is source.train
    assert source.queries is None
    assert source.train.name(3) == f"{tmp_path / 'set'}[train][3]"


def classes_column(rows):
    return (rows, datasets.List(datasets.ClassLabel(names=["cat", "dog", "hat"])))


def test_a_column_of_lists_holds_several_classes(tmp_path):
    rows = [[2, 0], [], [1], [0, 1, 2]]
    expected = [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]
    with_lists = table(4, classes=classes_column(rows)).remove_columns("label")
    split = datasets.DatasetDict(train=with_lists, test=with_lists)
    source = build_source("hf", saved(tmp_path / "names", split))
    for side in (source.bank, source.queries):
        assert side.targets_of(side.labels).astype(int).tolist() == expected
        assert side.label_name(side.labels[0]) == "cat + hat"

    numbers = datasets.List(datasets.Value("int8"))
    root = saved(tmp_path / "rows", table(4, classes=(expected, numbers)))
    bank = build_source("hf", root, label_column="classes").bank
    assert bank.targets_of(bank.labels).astype(int).tolist() == expected


def test_lists_that_are_no_classes_are_refused(tmp_path):
    root = saved(
        tmp_path / "set",
        table(2, classes=([[0, 1], [2, 1]], datasets.List(datasets.Value("int8")))),
    )
    with pytest.raises(InputError, match="column classes has lists of numbers; expected 0 and 1"):
        build_source("hf", root, label_column="classes")


@pytest.mark.parametrize("split", ["validation", "val", "test"])
def test_a_dict_of_splits_brings_its_queries(tmp_path, split):
    both = datasets.DatasetDict({"train": table(4), split: table(3, start=10), "other": table(1)})
    source = build_source("hf", saved(tmp_path / "set", both))
    assert len(source.train) == 4
    assert sizes(source.queries.images) == [(6, 18), (6, 19), (6, 20)]
    assert source.queries.labels.tolist() == [0, 1, 0]


def labels_of(*names):
    return (
        table(4)
        .remove_columns("label")
        .add_column("label", [0, 1, 0, 1], feature=datasets.ClassLabel(names=names))
    )


def test_splits_with_other_classes_are_refused(tmp_path):
    both = datasets.DatasetDict({"train": labels_of("cat", "dog"), "test": labels_of("dog", "cat")})
    with pytest.raises(InputError, match=r"split test: other classes than split train$"):
        build_source("hf", saved(tmp_path / "set", both))


def test_rows_that_were_chosen_and_shuffled_before_saving_keep_their_order(tmp_path):
    chosen = table(20).shuffle(seed=3).select(range(7))
    source = build_source("hf", saved(tmp_path / "set", chosen))
    assert [size[1] for size in sizes(source.train)] == [image.width for image in chosen["image"]]
    assert source.bank.labels.tolist() == chosen["label"][:]


def test_images_of_files_are_embedded_when_saved(tmp_path):
    (tmp_path / "cat.png").write_bytes(encoded(2))
    paths = datasets.Dataset.from_dict({"photo": [str(tmp_path / "cat.png")]}).cast_column(
        "photo", datasets.Image()
    )
    source = build_source("hf", saved(tmp_path / "set", paths))
    (tmp_path / "cat.png").unlink()
    assert sizes(source.train) == [(6, 10)]
    assert source.bank is None


def test_columns_can_be_named(tmp_path):
    second = ([{"bytes": encoded(30), "path": None}] * 4, datasets.Image())
    coarse = ([5, 6, 5, 6], datasets.Value("int16"))
    root = saved(tmp_path / "set", table(4, depth=second, coarse=coarse))
    with pytest.raises(
        InputError,
        match=r"data\.image_column=None: expected one column of type Image .*depth: Image",
    ):
        build_source("hf", root)
    source = build_source("hf", root, image_column="depth", label_column="coarse")
    assert sizes(source.train) == [(6, 38)] * 4
    assert source.bank.labels.tolist() == [5, 6, 5, 6]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image_column": "label"},
            r"data\.image_column=label: expected one column of type Image .*label: ClassLabel",
        ),
        (
            {"image_column": "imge"},
            r"data\.image_column=imge: expected one column of type Image .*image: Image",
        ),
        (
            {"label_column": "image"},
            r"data\.label_column=image: expected one column of type ClassLabel .*image: Image",
        ),
        (
            {"label_column": "text"},
            r"data\.label_column=text: expected one column of type ClassLabel .*text: Value",
        ),
    ],
)
def test_columns_of_the_wrong_type_are_named_with_the_choices(tmp_path, columns, message):
    root = saved(tmp_path / "set", table(2, text=(["a", "b"], datasets.Value("string"))))
    with pytest.raises(InputError, match=message):
        build_source("hf", root, **columns)


def test_two_label_columns_have_to_be_chosen_from(tmp_path):
    root = saved(tmp_path / "set", table(2, coarse=([0, 0], datasets.ClassLabel(names=["animal"]))))
    with pytest.raises(
        InputError,
        match=r"data\.label_column=None: expected one column .*label: ClassLabel, coarse: ClassLabel",
    ):
        build_source("hf", root)


def test_a_table_without_images_rows_or_training_split_is_named(tmp_path):
    texts = datasets.Dataset.from_dict({"text": ["a"]})
    with pytest.raises(
        InputError, match=r"split train: no column of type Image in there \(text: Value\)"
    ):
        build_source("hf", saved(tmp_path / "texts", texts))
    with pytest.raises(InputError, match=r"empty: not a folder of datasets' save_to_disk"):
        build_source("hf", saved(tmp_path / "empty", table(0)))
    with pytest.raises(InputError, match=r"no split train in there \(found other, test\)"):
        build_source(
            "hf",
            saved(tmp_path / "splits", datasets.DatasetDict({"test": table(1), "other": table(1)})),
        )


@pytest.mark.parametrize("missing", [None, -1])
def test_labels_that_are_missing_are_not_used(tmp_path, caplog, missing):
    caplog.set_level("INFO")
    test = (
        table(2)
        .remove_columns("label")
        .add_column("label", [0, missing], feature=datasets.ClassLabel(names=["cat", "dog"]))
    )
    source = build_source(
        "hf", saved(tmp_path / "set", datasets.DatasetDict({"train": table(2), "test": test}))
    )
    assert source.bank is not None
    assert source.queries is None
    assert "split test has rows without a label" in caplog.text


def with_labels(root, *labels):
    """Save a dataset and replace its labels, which `datasets` does not check when it reads them."""
    import pyarrow as pa

    saved(root, table(len(labels)))
    (file,) = root.glob("*.arrow")
    with pa.memory_map(str(file)) as mapped:
        there = pa.ipc.open_stream(mapped).read_all()
        there = there.set_column(
            1, there.schema.field("label"), pa.array(labels, there.schema.field("label").type)
        )
        content = pa.BufferOutputStream()
        with pa.ipc.new_stream(content, there.schema) as writer:
            writer.write_table(there)
    file.write_bytes(content.getvalue())
    return str(root)


@pytest.mark.parametrize(("number", "row"), [(2, 1), (-2, 0), (2**40, 2)])
def test_a_label_that_is_no_class_is_named_with_its_row(tmp_path, number, row):
    labels = [0, 1, -1]
    labels[row] = number
    message = (
        rf"split train: column label holds {number} in row {row}; "
        r"expected 0 to 1, its 2 classes, or -1 \(no label\)$"
    )
    with pytest.raises(InputError, match=message):
        build_source("hf", with_labels(tmp_path / "set", *labels))


def test_a_plain_number_that_is_no_label_is_named_with_its_row(tmp_path):
    root = saved(tmp_path / "set", table(2, coarse=([5, -7], datasets.Value("int32"))))
    with pytest.raises(
        InputError,
        match=r"column coarse holds -7 in row 1; expected 0 or more, or -1 \(no label\)$",
    ):
        build_source("hf", root, label_column="coarse")


def test_a_row_without_an_image_or_with_a_broken_one_is_unreadable(tmp_path):
    rows = [{"bytes": b"no image", "path": None}, None, {"bytes": encoded(1), "path": None}]
    broken = datasets.Dataset.from_dict(
        {"image": rows}, features=datasets.Features({"image": datasets.Image()})
    )
    images = build_source("hf", saved(tmp_path / "set", broken)).train
    for index, reason in ((0, "cannot identify"), (1, "no image in the table")):
        with pytest.raises(UnreadableImage, match=rf"set\[train\]\[{index}\]: .*{reason}"):
            images.opened(index)
    assert images.opened(2).size == (6, 9)


def test_a_row_that_only_names_a_file_is_not_opened(tmp_path):
    (tmp_path / "secret.png").write_bytes(encoded(2))
    root = tmp_path / "set"
    saved(root, table(1))
    import pyarrow as pa

    (file,) = root.glob("*.arrow")
    with pa.memory_map(str(file)) as mapped:
        schema = pa.ipc.open_stream(mapped).schema
    rows = pa.table(
        {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}], "label": [0]},
        schema=schema,
    )
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(rows)
    with pytest.raises(UnreadableImage, match="no image in the table"):
        build_source("hf", str(root)).train.opened(0)


def test_an_image_larger_than_the_limit_is_unreadable(tmp_path):
    images = build_source("hf", saved(tmp_path / "set", table(3)), max_image_pixels=50).train
    assert images.opened(0).size == (6, 8)
    with pytest.raises(UnreadableImage, match=r"54 pixels\) exceeds data\.max_image_pixels=50"):
        images.opened(1)


def test_a_script_in_the_folder_is_not_run(tmp_path):
    root = tmp_path / "set"
    saved(root, table(1))
    (root / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert len(build_source("hf", str(root)).train) == 1
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_is_none_or_damaged_is_named(tmp_path):
    with pytest.raises(InputError, match=r"data\.root=.*nowhere: no such folder"):
        build_source("hf", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not a folder of datasets' save_to_disk"):
        build_source("hf", str(tmp_path / "empty"))
    root = saved(tmp_path / "set", table(1))
    (tmp_path / "set" / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "gone.arrow"}]})
    )
    with pytest.raises(InputError, match=r"set: not a folder of datasets' save_to_disk"):
        build_source("hf", root)
    root = saved(tmp_path / "cut", table(3))
    (file,) = (tmp_path / "cut").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"cut: not a folder of datasets' save_to_disk"):
        build_source("hf", root)


def test_the_images_travel_small_to_workers(tmp_path):
    sizes = []
    for count in (10, 200):
        noise = np.random.default_rng(0).bytes(3000)
        rows = {"image": [{"bytes": noise, "path": None}] * count}
        whole = datasets.Dataset.from_dict(
            rows, features=datasets.Features({"image": datasets.Image()})
        )
        images = build_source("hf", saved(tmp_path / str(count), whole)).train
        sizes.append(len(pickle.dumps(images)))
        assert len(pickle.loads(pickle.dumps(images))) == count
    assert max(sizes) < 10_000
    assert sizes[1] - sizes[0] < 100
